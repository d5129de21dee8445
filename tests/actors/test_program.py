"""The programs of the README's kind, whole, through a kill and a restart."""

import asyncio
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from actors import Cluster
from placement.errors import Deadlock, OutcomeUnknown
from tests.actors.actors_under_test import Account, Echo, InsufficientFunds

KINDS: dict[str, Any] = {"account": Account, "echo": Echo}


def deposit(cluster: Cluster, amount: int, request_id: str) -> Decimal:
    """Deposit once, whatever happens on the way: asked again under the same id."""
    account = cluster.proxy(Account, "42")
    until = time.monotonic() + 20
    while True:
        try:
            return cluster.ask(
                account.deposit(Decimal(amount)), timeout=8.0, request_id=request_id
            )
        except OutcomeUnknown:
            assert time.monotonic() < until


def test_the_account_program_through_a_kill_and_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/accounts.db"
    with Cluster.embedded(nodes=3, kinds=KINDS, store=url, ttl=1.0) as cluster:
        account = cluster.proxy(Account, "42")
        assert deposit(cluster, 10, "pay-16") == 10
        cluster.tell(account.deposit(Decimal(1)), request_id="pay-17")
        assert deposit(cluster, 1, "pay-17") == 11

        before = cluster.resolve("account/42")
        cluster.kill_node(before.pid.node)

        assert deposit(cluster, 5, "pay-18") == 16
        assert deposit(cluster, 5, "pay-18") == 16
        after = cluster.resolve("account/42")
        assert after.fencing_token > before.fencing_token
        assert after.pid.node != before.pid.node
        for name in cluster.nodes:
            node = cluster.node(name)
            with pytest.raises(InsufficientFunds) as caught:
                node.ask(node.proxy(Account, "42").transfer("43", Decimal(99)))
            assert caught.value.have == Decimal(16)
        cluster.ask(account.transfer("43", Decimal(6)))
        with pytest.raises(Deadlock):
            cluster.ask(account.circle(["43", "42"]))

        async def main() -> None:
            assert await account.deposit(Decimal(1)) == 11
            assert await cluster.ref("echo/1").ask_async({"n": 1}) == {"n": 1}

        asyncio.run(main())

    with Cluster.embedded(nodes=3, kinds=KINDS, store=url, ttl=1.0) as cluster:
        assert cluster.ask(cluster.proxy(Account, "42").balance()) == 11
        assert cluster.ask(cluster.proxy(Account, "43").balance()) == 6
        assert cluster.resolve("account/42").fencing_token > after.fencing_token
