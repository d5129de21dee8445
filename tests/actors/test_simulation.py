"""A user's own cluster in virtual time: `Cluster.simulated`."""

import asyncio
import gc
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pykka
import pytest

from actors import Cluster, Grain, Kind, handler
from actors.activation import Activation
from actors.kind import BadKind
from actors.observer import Violation
from actors.real_clock import RealClock
from actors.recorded_node import RecordedNode
from actors.simulation import SimulatedCluster, Unsafe
from actors.trace import Asked, Ended, Entered, ProcessEnded
from actors.witness import ActivationWitness
from actors.world import ProcessClock, SteppedDispatcher, World
from placement.claim import ACQUIRING_MAX
from placement.entry import ActivationRecord, Pid
from placement.errors import (
    ActivationFailed,
    BadMessage,
    Deadlock,
    HandlerFailed,
    NotReady,
    OutcomeUnknown,
    PlacementError,
    StoreFailed,
)
from placement.event import Event
from placement.lease import Guard
from placement.topology import Member
from tests.actors.actors_under_test import (
    Account,
    Echo,
    InsufficientFunds,
    Scripted,
    Worker,
)


@dataclass
class Seen:
    numbers: list[int] = field(default_factory=list)


class Diary(Grain[Seen]):
    """Writes down what it has drawn and when, by its own timer."""

    @handler
    def begin(self, every: float) -> None:
        self.context.after(every, self._tick)

    async def _tick(self) -> None:
        self.state.numbers.append(self.context.random.randrange(10**9))
        await self.context.proxy(Account, "bank").deposit(Decimal(1))
        self.save()

    @handler
    def read(self) -> list[int]:
        return self.state.numbers

    @handler
    def now(self) -> float:
        return self.context.now()


KINDS: dict[str, Any] = {
    "account": Account,
    "echo": Echo,
    "scripted": Scripted,
    "diary": Diary,
}


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    with Cluster.simulated(seed=1, nodes=5, kinds=KINDS) as cluster:
        yield cluster
        cluster.check()


def test_the_verbs_of_a_cluster_drive_the_simulation(cluster: SimulatedCluster) -> None:
    account = cluster.proxy(Account, "42")

    assert cluster.ask(account.deposit(Decimal(10)), request_id="a") == Decimal(10)
    assert cluster.ask(account.deposit(Decimal(10)), request_id="a") == Decimal(10)
    cluster.tell(account.deposit(Decimal(1)))
    assert cluster.ask(account.balance()) == Decimal(11)
    echo = cluster.ref("echo/1")
    assert echo.ask({"n": 1}) == {"n": 1}
    assert echo.ask([1], block=False).get() == [1]
    found = cluster.resolve("account/42")
    assert found.pid.node in cluster.nodes
    snapshot = cluster.snapshot()
    assert snapshot.members == ("node-1", "node-2", "node-3", "node-4", "node-5")
    assert sum(snapshot.activations.values()) == 2
    assert cluster.seed == 1


def test_coroutines_await_other_grains_and_get_their_refusals(
    cluster: SimulatedCluster,
) -> None:
    account = cluster.proxy(Account, "1")
    cluster.ask(account.deposit(Decimal(10)))

    cluster.ask(account.transfer("2", Decimal(4)))

    assert cluster.ask(cluster.proxy(Account, "2").balance()) == Decimal(4)
    with pytest.raises(InsufficientFunds) as refused:
        cluster.ask(account.transfer("2", Decimal(40)))
    assert refused.value.have == Decimal(6)
    with pytest.raises(Deadlock):
        cluster.ask(account.circle(["2", "1"]))
    with pytest.raises(BadMessage):
        cluster.ref("account/1").ask({"": "nothing", "args": {}})


def test_a_grain_that_blocks_is_refused_and_told_the_remedy(
    cluster: SimulatedCluster,
) -> None:
    with pytest.raises(HandlerFailed, match="use await"):
        cluster.ask(cluster.proxy(Account, "1").blocking())
    with pytest.raises(HandlerFailed, match="awaits only what its context gives"):
        cluster.ask(cluster.proxy(Account, "1").foreign())


def test_timers_ring_in_virtual_time(cluster: SimulatedCluster) -> None:
    diary = cluster.proxy(Diary, "1")
    cluster.ask(diary.begin(50.0))

    cluster.advance(49.9)
    assert cluster.ask(diary.read()) == []
    cluster.advance(0.2)
    assert len(cluster.ask(diary.read())) == 1
    assert cluster.ask(cluster.proxy(Account, "bank").balance()) == Decimal(1)


def test_a_grain_sees_the_virtual_clock(cluster: SimulatedCluster) -> None:
    diary = cluster.proxy(Diary, "1")
    before, at_s = cluster.ask(diary.now()), cluster.now()

    cluster.advance(3_600)

    passed = cluster.ask(diary.now()) - before
    assert passed == pytest.approx(cluster.now() - at_s, abs=0.1)
    with pytest.raises(ValueError, match="time does not go back"):
        cluster.advance(-1)


def test_in_asyncio_code_an_answer_is_awaited_as_ever(
    cluster: SimulatedCluster,
) -> None:
    async def main() -> Any:
        async with Cluster.simulated(nodes=2, kinds=KINDS) as other:
            await other.proxy(Account, "1").deposit(Decimal(2))
            return await other.ref("echo/1").ask_async("said")

    assert asyncio.run(main()) == "said"
    with pytest.raises(HandlerFailed, match="as told"):
        asyncio.run(cluster.ref("scripted/1").ask_async(["raise"]))


# --- the same seed, the same run ---


def eventful(seed: int) -> str:
    """A run in which much happens; its digest."""
    with Cluster.simulated(seed=seed, nodes=3, kinds=KINDS, ttl=2.0) as cluster:
        for number in range(8):
            cluster.ask(cluster.proxy(Diary, str(number)).begin(1.0))
        cluster.store.fail("lost", times=3)
        cluster.cut({"node-1"}, {"node-2", "store"})
        cluster.crash("node-3")
        for number in range(20):
            account = cluster.proxy(Account, str(number))
            cluster.tell(account.deposit(Decimal(number)))
        cluster.advance(4)
        cluster.heal()
        cluster.pause("node-2", seconds=5)
        cluster.add_node("node-4")
        cluster.advance(10)
        cluster.check()
        return cluster.digest()


def test_the_same_seed_gives_the_same_digest_and_another_another() -> None:
    assert eventful(7) == eventful(7)
    assert eventful(7) != eventful(8)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_digest_does_not_depend_on_the_process(hash_seed: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.actors.test_simulation import eventful; print(eventful(7))",
        ],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert done.stdout.strip() == eventful(7)


# --- what cannot be simulated ---


def test_a_kind_with_a_thread_of_its_own_is_refused() -> None:
    with pytest.raises(BadKind, match="kind 'worker' is a ThreadingActor"):
        Cluster.simulated(kinds={"worker": Worker})
    with pytest.raises(BadKind, match="say by `actor_class`"):
        Cluster.simulated(kinds={"made": Kind(lambda _: Echo())})
    made = Kind(lambda _: Echo(), actor_class=Echo)
    with Cluster.simulated(kinds={"made": made}) as cluster:
        assert cluster.ref("made/1").ask(1) == 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one node"):
        Cluster.simulated(nodes=0, kinds=KINDS)
    with pytest.raises(ValueError, match="ttl must be at least"):
        Cluster.simulated(kinds=KINDS, ttl=0.0)
    with Cluster.simulated(nodes=1, kinds=KINDS) as cluster:
        with pytest.raises(KeyError):
            cluster.crash("node-9")
        with pytest.raises(KeyError):
            cluster.pause("node-9", seconds=1)
        with pytest.raises(ValueError, match="stands still"):
            cluster.pause("node-1", seconds=-1)
        with pytest.raises(ValueError, match="not explode"):
            cluster.store.fail("explode")
        with pytest.raises(KeyError, match="there is no node 'nod-1'"):
            cluster.cut({"nod-1"}, {"store"})
        with pytest.raises(KeyError, match="there is no node 'nod-1'"):
            cluster.store.fail(nodes={"nod-1"})
        with pytest.raises(ValueError, match="already"):
            cluster.add_node("node-1")


# --- the real clock ---


MODULES: dict[str, Any] = {"time": time, "random": random, "uuid": uuid}
NOW, AFTER, CHANCE = (
    "self.context.now()",
    "self.context.after(seconds, call)",
    "self.context.random",
)
REFUSED: tuple[tuple[str, str, list[Any], str], ...] = (
    ("time", "time", [], NOW),
    ("time", "time_ns", [], NOW),
    ("time", "monotonic", [], NOW),
    ("time", "monotonic_ns", [], NOW),
    ("time", "sleep", [0], AFTER),
    ("random", "choice", ["ab"], CHANCE),
    ("random", "choices", ["ab"], CHANCE),
    ("random", "getrandbits", [3], CHANCE),
    ("random", "randint", [1, 2], CHANCE),
    ("random", "random", [], CHANCE),
    ("random", "randrange", [2], CHANCE),
    ("random", "sample", ["ab", 1], CHANCE),
    ("random", "shuffle", [[]], CHANCE),
    ("random", "uniform", [1, 2], CHANCE),
    ("uuid", "uuid1", [], CHANCE),
    ("uuid", "uuid4", [], CHANCE),
)


class Worldly(Grain):
    """Reads what the simulation does not rule."""

    def on_activate(self) -> None:
        if self.context.identity.name == "uuid":
            uuid.uuid4()

    async def on_receive(self, message: Any) -> Any:
        match message:
            case ["call", module, function, *arguments]:
                return getattr(MODULES[module], function)(*arguments)
            case "later":
                await self.context.ref("echo/1").ask_async(1)
                return time.monotonic()
            case "caught":
                with suppress(RuntimeError):
                    random.shuffle([])
            case "log":
                logging.getLogger("worldly").warning("logs have a time")
            case "right":
                return [self.context.now(), self.context.random.random()]
            case "timer":
                self.context.after(1.0, lambda: round(time.monotonic()))
            case "put":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(time, "time", lambda: 3.0)
                    return time.time()
        return "done"


REAL = (time.time, time.monotonic, time.sleep, random.random, uuid.uuid4)


@pytest.fixture
def worldly() -> Iterator[SimulatedCluster]:
    kinds = {"worldly": Worldly, "echo": Echo}
    with Cluster.simulated(nodes=2, kinds=kinds) as cluster:
        yield cluster
    assert (
        time.time,
        time.monotonic,
        time.sleep,
        random.random,
        uuid.uuid4,
    ) == REAL


@pytest.mark.parametrize(
    ("message", "function", "remedy"),
    [
        *(
            (["call", module, name, *arguments], f"{module}.{name}", remedy)
            for module, name, arguments, remedy in REFUSED
        ),
        ("later", "time.monotonic", NOW),
    ],
)
def test_a_grain_that_reads_the_real_clock_is_told_the_line_and_the_remedy(
    worldly: SimulatedCluster, message: Any, function: str, remedy: str
) -> None:
    with pytest.raises(HandlerFailed) as failed:
        worldly.ref("worldly/1").ask(message)

    assert failed.value.type_name == "RealClock"
    assert f"{function}() was called by on_receive" in str(failed.value)
    assert "test_simulation.py:" in str(failed.value)
    assert remedy in str(failed.value)
    assert (time.time, time.sleep, random.random) == (REAL[0], REAL[2], REAL[3])
    with pytest.raises(RealClock, match=function):
        worldly.check()


def test_the_real_clock_is_noticed_in_hooks_timers_and_where_it_was_caught(
    worldly: SimulatedCluster,
) -> None:
    with pytest.raises(ActivationFailed, match=r"uuid.uuid4\(\) was called by on_act"):
        worldly.ref("worldly/uuid").ask("anything")
    worldly.shared.world.real_clock.refused = None
    worldly.ref("worldly/1").ask("timer")
    worldly.advance(2)
    with pytest.raises(RealClock, match=r"time\.monotonic"):
        worldly.check()
    worldly.shared.world.real_clock.refused = None
    assert worldly.ref("worldly/1").ask("caught") == "done"
    with pytest.raises(RealClock, match=r"random\.shuffle"):
        worldly.check()


def test_logs_the_context_and_what_a_test_puts_in_place_go_on(
    worldly: SimulatedCluster, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert worldly.ref("worldly/1").ask("log") == "done"
    assert "logs have a time" in caplog.text
    now_s, drawn = worldly.ref("worldly/1").ask("right")
    assert now_s > 1_735_689_600
    assert 0 <= drawn < 1
    assert worldly.ref("worldly/1").ask("put") == 3.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: 4.0)
        assert worldly.ref("worldly/1").ask(["call", "time", "time"]) == 4.0
    worldly.check()


# --- events ---


def test_a_subscriber_is_called_in_virtual_time(cluster: SimulatedCluster) -> None:
    events: list[tuple[float, Event]] = []
    with cluster.events.subscribe(lambda event: events.append((cluster.now(), event))):
        cluster.advance(100)
        cluster.resolve("echo/1")
        cluster.add_node("node-6")
        cluster.advance(1)
        assert [at_s for at_s, _ in events] == sorted(at_s for at_s, _ in events)
        names = Counter(event.name for _, event in events)
        assert names["Activated"] == 1
        assert names["TopologyAdopted"] >= 6  # on each node, and at the entry
        at_s, activated = next(e for e in events if e[1].name == "Activated")
        assert 100 <= at_s < 101
        assert activated.at_ms >= 1_735_689_600_000 + 100_000
    count = len(events)
    cluster.resolve("echo/2")
    assert len(events) == count


def test_a_subscriber_that_waits_is_refused_and_check_says_so() -> None:
    with Cluster.simulated(nodes=1, kinds=KINDS) as cluster:
        cluster.events.subscribe(lambda _: cluster.resolve("echo/2"))
        cluster.resolve("echo/1")
        cluster.advance(1)
        with pytest.raises(AssertionError, match="seed 1: a bug on") as found:
            cluster.check()
        assert "only outside of its own turns" in str(found.value.__cause__)


# --- breaking things ---


def ask_until_known(cluster: SimulatedCluster, name: str, request_id: str) -> Decimal:
    """Deposit one, and ask again under the same id until the outcome is known."""
    account = cluster.proxy(Account, name)
    for _ in range(10):
        try:
            return cluster.ask(account.deposit(Decimal(1)), request_id=request_id)
        except PlacementError:
            cluster.advance(0.5)
    raise AssertionError("never answered")


def test_what_was_answered_survives_a_crash_and_a_restart_under_the_same_name(
    cluster: SimulatedCluster,
) -> None:
    assert ask_until_known(cluster, "1", "first") == 1
    first = cluster.resolve("account/1")
    victim = first.pid.node

    cluster.crash(victim)
    cluster.add_node(victim)

    assert ask_until_known(cluster, "1", "second") == 2
    again = cluster.resolve("account/1")
    assert again.fencing_token > first.fencing_token
    assert again.owner != first.owner
    assert len(cluster.nodes) == 5
    assert isinstance(
        next(e for e in cluster.shared.records if isinstance(e, ProcessEnded)),
        ProcessEnded,
    )


def test_who_waits_on_a_node_that_crashes_hears_that(
    cluster: SimulatedCluster,
) -> None:
    home = cluster.resolve("echo/1").pid.node
    other = next(name for name in cluster.nodes if name != home)
    node = cluster.node(other)
    node.resolve("echo/1")
    sent = node.ref("echo/1").ask(1, block=False)
    held = node.ref("echo/2").ask(1, block=False)

    cluster.crash(other)

    with pytest.raises(OutcomeUnknown, match="was killed"):
        sent.get()
    with pytest.raises(NotReady, match="was killed"):
        held.get()


def test_a_node_leaves_in_good_order_and_others_serve_at_once(
    cluster: SimulatedCluster,
) -> None:
    cluster.ask(cluster.proxy(Account, "1").deposit(Decimal(3)))
    home = cluster.resolve("account/1").pid.node

    cluster.remove_node(home)

    at_s = cluster.now()
    assert cluster.ask(cluster.proxy(Account, "1").balance()) == Decimal(3)
    assert cluster.now() - at_s < 1.0
    assert home not in cluster.nodes


def test_a_paused_node_wakes_with_its_inbox_full_and_serves_nothing_of_it(
    cluster: SimulatedCluster,
) -> None:
    account = cluster.proxy(Account, "1")
    cluster.ask(account.deposit(Decimal(1)))
    home = cluster.resolve("account/1").pid.node
    future = cluster.ref("account/1").ask(
        {"": "balance", "args": {}}, block=False, timeout=30.0
    )

    cluster.pause(home, seconds=20)
    with pytest.raises(OutcomeUnknown):
        future.get()

    assert ask_until_known(cluster, "1", "x") == 2
    assert cluster.resolve("account/1").pid.node != home
    cluster.advance(30)
    assert home in {member.split("#")[0] for member in cluster.snapshot().members}


def test_heal_wakes_who_stands_still(cluster: SimulatedCluster) -> None:
    cluster.resolve("echo/1")
    cluster.pause("node-1", seconds=1_000)
    cluster.advance(1)

    cluster.heal()

    at_s = cluster.now()
    node = cluster.node("node-1")
    assert node.ref("echo/1").ask(1) == 1
    assert cluster.now() - at_s < 1


def test_what_is_cut_off_is_reached_again_after_heal(cluster: SimulatedCluster) -> None:
    cluster.ref("echo/1").ask(1)
    home = cluster.resolve("echo/1").pid.node
    others = set(cluster.nodes) - {home}

    cluster.cut({home}, {*others, "entry"})
    with pytest.raises(OutcomeUnknown):
        cluster.ref("echo/1").ask(2, timeout=1.0)
    cluster.heal()

    assert cluster.ref("echo/1").ask(3) == 3


def test_a_node_cut_off_from_the_store_loses_its_identities(
    cluster: SimulatedCluster,
) -> None:
    cluster.ask(cluster.proxy(Account, "1").deposit(Decimal(1)))
    home = cluster.resolve("account/1").pid.node

    cluster.cut({home}, {"store"})
    cluster.run_until(lambda: home not in cluster.snapshot().members)

    assert cluster.ask(cluster.proxy(Account, "1").balance()) == Decimal(1)
    assert cluster.resolve("account/1").pid.node != home
    cluster.heal()
    cluster.run_until(lambda: home in cluster.snapshot().members)
    with pytest.raises(TimeoutError, match="seed 1: not so within"):
        cluster.run_until(lambda: False, timeout=1)


@pytest.mark.parametrize("what", ["fail", "lost", "late", "slow", "away"])
def test_whatever_the_store_does_what_it_confirmed_is_counted_once(
    cluster: SimulatedCluster, what: str
) -> None:
    ask_until_known(cluster, "1", "before")

    cluster.store.fail(what, times=2)
    assert ask_until_known(cluster, "1", "meanwhile") == 2
    cluster.store.heal()

    assert ask_until_known(cluster, "1", "after") == 3


def test_a_store_that_fails_for_some_nodes_spares_the_others(
    cluster: SimulatedCluster,
) -> None:
    cluster.store.fail("away", nodes={"node-1"})

    cluster.run_until(lambda: "node-1" not in cluster.snapshot().members)

    assert cluster.ref("echo/1").ask(1) == 1


def test_r4_4_a_claim_that_the_store_does_not_answer_is_told_of_at_once(
    cluster: SimulatedCluster,
) -> None:
    found: list[Event] = []
    cluster.events.subscribe(found.append)
    cluster.store.fail("away")
    began = cluster.now()

    with pytest.raises(StoreFailed, match="cannot be reached"):
        cluster.ref("echo/1").ask(1)

    # After a second try, long before its deadline.
    assert cluster.now() - began < 3.0
    cluster.advance(0.001)
    assert "ClaimRefused" in {event.name for event in found}
    cluster.heal()
    cluster.run_until(lambda: len(cluster.snapshot().members) == 5)
    assert cluster.ref("echo/1").ask(1) == 1


class Child(Grain):
    def on_receive(self, message: Any) -> Any:
        return message


class Parent(Grain):
    """Is activated once its child has answered."""

    async def on_activate(self) -> None:
        child = self.context.ref(f"child/{self.context.identity.name}")
        self.answer = await child.ask_async("here")

    def on_receive(self, message: Any) -> Any:
        return self.answer


def test_activations_that_wait_for_others_keep_nobody_from_the_store() -> None:
    # As many as may ask the store at once, each waiting for one more.
    kinds = {"parent": Parent, "child": Child}
    with Cluster.simulated(seed=1, nodes=1, kinds=kinds) as cluster:
        futures = [
            cluster.ref(f"parent/{number}").ask("", block=False, timeout=60.0)
            for number in range(ACQUIRING_MAX)
        ]

        answers = Counter(future.get(timeout=60.0) for future in futures)

        assert answers == {"here": ACQUIRING_MAX}
        cluster.check()


def test_r1_2_a_strategy_that_counts_spreads_evenly() -> None:
    numbers = itertools.count()

    def by_turns(_: Any, eligible: tuple[Member, ...], __: Any) -> Member:
        return eligible[next(numbers) % len(eligible)]

    kinds = {"echo": Kind(Echo, strategy=by_turns)}
    with Cluster.simulated(seed=1, nodes=2, kinds=kinds) as cluster:
        names = [f"echo/{number}" for number in range(100)]
        assert [cluster.ref(name).ask(name) for name in names] == names

        hosts = Counter(cluster.resolve(name).pid.node for name in names)

        assert hosts == {"node-1": 50, "node-2": 50}
        assert next(numbers) == 100


# --- check ---


class _Open:
    def is_open(self, now_ns: int) -> bool:
        return True


class UnguardedNode(RecordedNode):
    def make(
        self,
        pid: Pid,
        record: ActivationRecord,
        guard: Guard,
        chain: tuple[str, ...],
    ) -> Activation:
        made = super().make(pid, record, guard, chain)
        made.guard = _Open()  # type: ignore[assignment]
        return made


class UnguardedCluster(SimulatedCluster):
    node_type = UnguardedNode


def wake_with_a_message(cluster: SimulatedCluster) -> None:
    """Have the home of an identity stand still with a message in its mailbox."""
    cluster.ask(cluster.proxy(Account, "1").deposit(Decimal(1)))
    home = cluster.resolve("account/1").pid.node
    local = cluster.node(home)
    local.resolve("account/1")
    local.tell(local.proxy(Account, "1").deposit(Decimal(1)))
    cluster.pause(home, seconds=20)
    cluster.advance(10)
    cluster.ask(cluster.proxy(Account, "1").deposit(Decimal(1)))
    cluster.advance(20)


def test_check_passes_where_the_guard_stops_what_wakes_too_late(
    cluster: SimulatedCluster,
) -> None:
    wake_with_a_message(cluster)

    cluster.check()


def test_check_fails_where_the_guard_is_disabled() -> None:
    with UnguardedCluster.start(seed=1, nodes=5, kinds=KINDS) as cluster:
        wake_with_a_message(cluster)

        with pytest.raises(Unsafe, match="seed 1: ") as found:
            cluster.check()

    rules = {violation.rule for violation in found.value.violations}
    assert {"closed-session", "one-activation"} <= rules
    assert all(
        isinstance(violation, Violation) and violation.identity == "account/1"
        for violation in found.value.violations
    )


def test_check_fails_where_a_message_is_handled_without_a_claim(
    cluster: SimulatedCluster,
) -> None:
    cluster.ref("echo/1").ask(1)
    entered = next(e for e in cluster.shared.records if isinstance(e, Entered))
    forged = msgspec.structs.replace(
        entered, token=entered.token + 1, at_ns=cluster.world.now_ns
    )
    cluster.shared.records.append(forged)

    with pytest.raises(Unsafe, match="entry-first: echo/1"):
        cluster.check()
    cluster.shared.records.remove(forged)


def test_every_message_and_each_entry_of_a_users_grain_is_recorded(
    cluster: SimulatedCluster,
) -> None:
    cluster.ask(cluster.proxy(Account, "1").deposit(Decimal(5)))
    cluster.ask(cluster.proxy(Account, "1").transfer("2", Decimal(1)))
    cluster.tell(cluster.proxy(Account, "2").deposit(Decimal(5)))
    cluster.ref("scripted/1").ask(["after", 1.0, "rung"])
    cluster.advance(2)
    cluster.ref("scripted/1").ask(["passivate"])
    cluster.advance(1)

    records = cluster.shared.records
    asked = [each for each in records if isinstance(each, Asked)]
    ended = {e.request: e.outcome for e in records if isinstance(e, Ended)}
    handled = Counter(
        e.request for e in records if isinstance(e, Entered) and e.purpose == "handle"
    )
    assert len(asked) == 5
    assert {each.request for each in asked} == set(ended)
    assert set(ended.values()) == {"answered"}
    assert len(handled) == 6
    assert set(handled.values()) == {1}
    purposes = {each.purpose for each in records if isinstance(each, Entered)}
    assert purposes == {"activate", "handle", "resume", "timer", "passivate"}


def test_an_ask_under_way_is_no_violation_and_one_that_never_ends_is(
    cluster: SimulatedCluster,
) -> None:
    home = cluster.resolve("echo/1").pid.node
    cluster.cut({home}, {"entry"})
    future = cluster.ref("echo/1").ask(1, block=False, timeout=5.0)

    cluster.check()
    cluster.advance(4)
    cluster.check()
    cluster.advance(2)
    with pytest.raises(OutcomeUnknown):
        future.get()
    cluster.check()
    ended = next(e for e in cluster.shared.records if isinstance(e, Ended))
    cluster.shared.records.remove(ended)
    cluster.check()  # it might still end: programs are granted a while
    cluster.advance(5)
    with pytest.raises(Unsafe, match="ends: echo/1"):
        cluster.check()
    cluster.shared.records.append(ended)


def test_an_error_tells_some_violations_and_counts_the_others() -> None:
    violation = Violation("order", "echo/1", 5, "was late")

    assert str(Unsafe(3, (violation,))).splitlines() == [
        "seed 3: 1 violations",
        "  order: echo/1: was late",
    ]
    lines = str(Unsafe(3, (violation,) * 12)).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  and 2 more"


# --- nothing is left ---


def test_stop_leaves_no_thread_and_no_actor() -> None:
    threads = set(threading.enumerate())
    cluster = Cluster.simulated(nodes=3, kinds=KINDS)
    cluster.events.subscribe(lambda _: None)
    cluster.ref("echo/1").ask(1)
    assert pykka.ActorRegistry.get_all() == []

    cluster.stop()
    cluster.stop()

    assert set(threading.enumerate()) == threads
    assert pykka.ActorRegistry.get_all() == []
    with pytest.raises(NotReady):
        cluster.ref("echo/1").ask(1)
    with pytest.raises(NotReady):
        cluster.add_node("node-9")
    cluster.check()


def test_stop_runs_the_last_hooks_also_where_nodes_stood_still() -> None:
    witness = ActivationWitness()
    cluster = Cluster.simulated(nodes=3, kinds=KINDS, witness=witness)
    for number in range(9):
        cluster.ref(f"echo/{number}").ask(1)
    cluster.pause("node-2", seconds=1_000)
    cluster.advance(0.1)

    cluster.stop()

    purposes = Counter(e.purpose for e in cluster.shared.records if type(e) is Entered)
    assert purposes["passivate"] == 9
    assert witness.double_count == 0


def test_many_simulations_one_after_the_other_leak_nothing() -> None:
    worlds = []
    for seed in range(5):
        with Cluster.simulated(seed=seed, nodes=3, kinds=KINDS) as cluster:
            cluster.ref("echo/1").ask(1)
            cluster.crash("node-1")
            cluster.add_node("node-1")
            worlds.append(weakref.ref(cluster.world))
            cluster.check()
        del cluster
    gc.collect()

    assert [world for world in worlds if world() is not None] == []


def test_a_thread_that_is_busy_runs_nothing_else_after_a_pause_cut_short() -> None:
    world = World(1)
    process = ProcessClock(world, offset_ns=5, rate_ppm=1_000_000)

    begun: list[tuple[str, int]] = []
    bugs: list[BaseException] = []
    thread = SteppedDispatcher(world, process, "t", lag_ns=1, on_bug=bugs.append)

    def turn(name: str) -> None:
        begun.append((name, world.now_ns - began_ns))
        world.spend(100)

    began_ns = world.now_ns
    process.pause(began_ns + 50)
    thread.post(turn, "first")
    world.run_until(began_ns + 10)
    process.resumes_ns = 0
    thread.wake()
    world.run_until(began_ns + 20)
    thread.post(turn, "second")
    world.run_until(began_ns + 1_000)

    assert begun == [("first", 10), ("second", 110)]
    assert not bugs
