"""The whole sample on real node processes, one of which is killed in the middle."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.requests import SAMPLE
from tests.actors.nats_servers import nats_server
from tests.actors.node_processes import ROOT, Process, ended, placement
from tests.actors.postgres_server import PostgresServer
from tests.waiting import eventually

pytestmark = pytest.mark.servers

TRACE = ROOT / "actors" / "data" / SAMPLE
REQUESTS = 64_469
#: Long, since nothing here is about being fast.
PATIENCE_S = 280.0


@contextmanager
def engine_and_nodes(
    folder: Path, stores: list[str | None]
) -> Iterator[tuple[str, list[Process]]]:
    """A server, and a node on each of `stores`; all write one witness."""
    with nats_server() as server:
        nodes = []
        for number, store in enumerate(stores, start=1):
            name = f"node-{number}"
            args = ["node", name, "--engine", server.url, "--kind", "file"]
            args += ["--ttl", "2", "--witness", str(folder / "witness")]
            args += [] if store is None else ["--store", store]
            nodes.append(Process(folder, name, *args))
        with ended(*nodes):
            for node in nodes:
                node.launch()
            for node in nodes:
                node.await_ready()
            yield server.url, nodes


def run_on(folder: Path, requests: Path, engine: str, store: str | None) -> Process:
    args = ["run", str(requests), "--engine", engine, "--durable", "--json"]
    args += ["--witness", str(folder / "witness"), "--report", str(folder / "report")]
    args += [] if store is None else ["--store", store]
    return Process(folder, "run", *args)


@pytest.fixture(params=["nats", "postgres"])
def store(request: pytest.FixtureRequest) -> str | None:
    """The store's URL; none: the engine's own."""
    if request.param == "nats":
        return None
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.url(f"schema={server.new_schema()}")


@pytest.mark.long
def test_r2_5_the_sample_loses_no_count_to_a_process_that_is_killed_and_comes_again(
    tmp_path: Path, store: str | None
) -> None:
    witness = tmp_path / "witness"

    def await_share(share: float) -> None:
        # A request is a line or two there: some 200 bytes.
        size = share * REQUESTS * 200
        eventually(lambda: witness.stat().st_size > size, PATIENCE_S)

    with engine_and_nodes(tmp_path, [store] * 3) as (engine, nodes):
        run = run_on(tmp_path, TRACE, engine, store)
        with ended(run):
            run.launch()
            await_share(0.4)
            nodes[1].kill()
            await_share(0.6)
            nodes[1].start()
            assert run.wait(PATIENCE_S) == 0, run.err
            found = json.loads(run.out)
    assert found["answered"] == found["requests"] == REQUESTS
    assert found["failed"] == found["double_activations"] == 0
    assert found["activations"] > found["identities"]
    report = str(tmp_path / "report")
    compare = [sys.executable, "tests/compare_counts.py", str(TRACE), report]
    assert subprocess.run(compare, cwd=ROOT, check=False).returncode == 0


def test_r2_5_processes_that_share_no_store_have_doubles(tmp_path: Path) -> None:
    """The judge sees what is wrong: each node owns all, by a store of its own."""
    lines = gzip.decompress(TRACE.read_bytes()).splitlines(keepends=True)
    requests = tmp_path / "requests"
    requests.write_bytes(b"".join(lines[:3_000]))
    stores: list[str | None] = [
        f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "two")
    ]

    def double_count(engine: str, store: str | None) -> Any:
        done = placement(
            *run_on(tmp_path, requests, engine, store).args, timeout_s=PATIENCE_S
        )
        found = json.loads(done.stdout)
        assert found["failed"] == 0
        assert done.returncode == (found["double_activations"] > 0)
        return found["double_activations"]

    with engine_and_nodes(tmp_path, stores) as (engine, _):
        assert double_count(engine, stores[0]) == 0
        double_count(engine, stores[1])
        # Those of the first node, which a later start has replaced, handle on.
        assert double_count(engine, stores[0]) > 0
