import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from actors import Cluster, Grain, Kind, PlacementNode
from actors.activation import Mail
from actors.cluster import StoreInUse
from actors.engine import EmbeddedEngine, Settings
from actors.future import Future
from actors.grain import ARGUMENTS, CALL
from actors.outbox import Outbox
from actors.placement_actor import NeedNewTopology
from actors.store_memory import MemoryStore
from actors.store_url import open_store
from actors.witness import ActivationWitness
from messages.frames import LoopBack
from placement.contracts import SessionRecord, StoreFailure
from placement.errors import (
    TEXT_MAX,
    ActivationFailed,
    BadMessage,
    Deadlock,
    HandlerFailed,
    NoAuthority,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    PlacementError,
)
from placement.identity import BadIdentity, Identity
from placement.partition import PartitionTable
from placement.topology import Address, SessionId
from tests.actors.actors_under_test import (
    GATES,
    Account,
    Blocked,
    Echo,
    FailingWorker,
    InsufficientFunds,
    Scripted,
    Stopping,
    Worker,
)
from tests.actors.event_loop import run_and_watch
from tests.waiting import eventually

KINDS: dict[str, Any] = {
    "account": Account,
    "echo": Echo,
    "scripted": Scripted,
    "stopping": Kind(Stopping, on_error="stop"),
    "blocked": Kind(Blocked, inbox_max=3),
    "worker": Worker,
    "failing": FailingWorker,
}
FAST: dict[str, Any] = {"ttl": 1.0, "partitions": 64}


@pytest.fixture
def witness() -> ActivationWitness:
    return ActivationWitness()


@pytest.fixture
def cluster(witness: ActivationWitness) -> Iterator[Cluster]:
    with Cluster.embedded(nodes=3, kinds=KINDS, witness=witness, **FAST) as cluster:
        yield cluster
    assert witness.double_count == 0


def until_answered(act: Callable[[], Any], within_s: float = 10.0) -> Any:
    """Ask until the outcome is known, as a caller with an id would."""
    until = time.monotonic() + within_s
    while True:
        try:
            return act()
        except (OutcomeUnknown, NotReady):
            assert time.monotonic() < until


def test_r2_1_a_request_starts_the_activation_on_the_responsible_node(
    cluster: Cluster,
) -> None:
    found = cluster.resolve("echo/1")

    node = cluster.node(found.pid.node)
    table = node._table
    assert table is not None
    owner = table.owner_of(found.identity)
    assert owner is not None
    assert owner.session == found.owner == found.pid.session
    assert [each.identity for each in node.snapshot().activations] == ["echo/1"]
    assert found.fencing_token > 0
    assert found.locality == "remote"


def test_r2_2_an_active_identity_is_returned_and_not_started_again(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    pids = {cluster.resolve("echo/1").pid}
    for name in cluster.nodes:
        pids.add(cluster.node(name).resolve("echo/1").pid)

    assert len(pids) == 1
    assert witness.activation_count == 1


def test_r2_5_a_thousand_threads_asking_through_five_nodes_start_one_activation(
    witness: ActivationWitness,
) -> None:
    asked = 0

    class Counting(MemoryStore):
        def try_acquire(self, requests: Any, /) -> Any:
            nonlocal asked
            asked += len(requests)
            return super().try_acquire(requests)

        def claim(self, requests: Any, /) -> Any:
            nonlocal asked
            asked += len(requests)
            return super().claim(requests)

        def another(self) -> "Counting":
            return self

        def close(self) -> None:
            pass

    answers: list[Any] = []
    with Cluster.embedded(
        nodes=5, kinds=KINDS, witness=witness, store=Counting(), **FAST
    ) as cluster:
        nodes = [cluster.node(name) for name in cluster.nodes]
        barrier = threading.Barrier(1_000)

        def ask(number: int) -> None:
            ref = nodes[number % 5].ref("echo/new")
            barrier.wait()
            answers.append(ref.ask(number, timeout=30))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(1_000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(answers) == list(range(1_000))
    assert asked == 1
    assert witness.activation_count == 1
    assert witness.double_count == 0


def test_r2_5_no_identity_is_active_twice_while_nodes_are_killed_join_and_leave(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def load(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            name = f"{number}-{count % 7}"
            try:
                cluster.ask(cluster.proxy(Account, name).deposit(Decimal(1)))
            except (OutcomeUnknown, NotReady):
                continue
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=load, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: witness.activation_count == 28)
    cluster.add_node("node-4")
    cluster.kill_node("node-2")
    eventually(lambda: len(cluster.snapshot().members) == 3)
    eventually(lambda: witness.activation_count > 28)
    cluster.remove_node("node-1")
    cluster.add_node("node-2")
    eventually(lambda: len(cluster.snapshot().members) == 3)
    stop.set()
    for thread in threads:
        thread.join()

    assert failures == []
    assert witness.double_count == 0


def test_r2_3_a_draining_node_starts_nothing_and_others_do(cluster: Cluster) -> None:
    drained = cluster.node("node-1")
    drained.drain()
    eventually(
        lambda: all(
            m.draining for m in cluster._entry.topology.members if m.node == "node-1"
        )
    )

    hosts = {cluster.resolve(f"echo/{n}").pid.node for n in range(60)}

    assert hosts == {"node-2", "node-3"}
    assert drained.snapshot().activations == ()


def test_r2_3_an_unknown_kind_is_refused_with_the_reason(cluster: Cluster) -> None:
    with pytest.raises(NoAuthority, match="kind 'nobody'"):
        cluster.ref("nobody/1").ask(1)


def test_r2_4_every_waiter_hears_why_the_activation_failed(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    futures = [
        cluster.node(name).ref("scripted/fails").ask(n, block=False)
        for n in range(5)
        for name in cluster.nodes
    ]

    for future in futures:
        with pytest.raises(ActivationFailed, match="no activation today"):
            future.get(timeout=10)
    with pytest.raises(ActivationFailed, match="RuntimeError: not made"):
        cluster.ref("failing/1").ask(1)


def test_r3_4_owner_and_state_survive_a_restart_of_every_node(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    with Cluster.embedded(nodes=2, kinds=KINDS, store=url, **FAST) as cluster:
        account = cluster.proxy(Account, "42")
        cluster.ask(account.deposit(Decimal("2.50")))
        before = cluster.resolve("account/42").fencing_token

    began = time.monotonic()
    with Cluster.embedded(nodes=2, kinds=KINDS, store=url, **FAST) as cluster:
        account = cluster.proxy(Account, "42")
        assert cluster.ask(account.balance()) == Decimal("2.50")
        assert cluster.resolve("account/42").fencing_token > before
    assert time.monotonic() - began < 1.0


def test_r3_5_an_entry_is_freed_when_its_activation_ends_or_its_holder_dies(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    ref = cluster.ref("scripted/1")
    ref.ask(["log", "kept"])
    assert ref.ask(["passivate"]) == "soon"
    eventually(lambda: not sum(cluster.snapshot().activations.values()))
    # Started anew from the snapshot that on_passivate returned.
    assert ref.ask(["snapshot"]) == "['kept']"

    cluster.kill_node(cluster.resolve("scripted/1").pid.node)
    assert until_answered(lambda: ref.ask(["snapshot"])) == "['kept']"
    assert witness.of("scripted/1").activations == 3


def test_r4_1_a_client_resolves_and_sends_and_hosts_nothing(cluster: Cluster) -> None:
    client = PlacementNode(
        "client", kinds=KINDS, engine=cluster._engine, settings=cluster._settings
    )
    client.start_client()

    assert client.ref("echo/1").ask("hello") == "hello"
    assert client.state == "client"
    assert client.snapshot().activations == ()
    assert client.session is None
    client.stop()


def test_r4_2_stop_passivates_and_leaves_no_session_open() -> None:
    store = MemoryStore()
    with Cluster.embedded(nodes=2, kinds=KINDS, store=store.another(), **FAST) as c:
        c.ref("scripted/1").ask(["log", 1])
        events: list[str] = []
        c.events.subscribe(lambda event: events.append(event.name))

    view = store.read_sessions()
    assert all(record.closed for record in view.sessions)
    assert "Passivated" in events
    assert "Stopped" in events


def test_r4_3_before_start_and_after_stop_everything_is_refused() -> None:
    node = PlacementNode("n", kinds=KINDS, **FAST)
    with pytest.raises(NotReady, match="has not started"):
        node.ref("echo/1").ask(1)
    with pytest.raises(NotReady, match="has not started"):
        node.resolve("echo/1")
    node.start_member()
    assert node.ref("echo/1").ask(1) == 1
    assert node.resolve("echo/1").locality == "local"
    with pytest.raises(NotReady, match="starts once"):
        node.start_member()
    node.stop()
    with pytest.raises(NotReady, match="has stopped"):
        node.ref("echo/1").ask(1)
    with pytest.raises(NotReady, match="has stopped"):
        node.resolve("echo/1")
    node.stop()


def test_r4_4_events_come_in_order_and_r4_5_bear_a_time(cluster: Cluster) -> None:
    seen: list[Any] = []
    with cluster.node("node-1").events.subscribe(seen.append):
        for n in range(30):
            cluster.resolve(f"echo/{n}")

        eventually(lambda: any(event.name == "Activated" for event in seen))
    numbers = [event.number for event in seen]
    assert numbers == sorted(set(numbers))
    assert all(abs(event.at_ms - time.time() * 1000) < 60_000 for event in seen)
    assert all(event.node == "node-1" and event.epoch > 0 for event in seen)
    assert "node-1" in str(seen[0])


def test_who_subscribes_to_some_names_gets_those_only(cluster: Cluster) -> None:
    every: list[Any] = []
    some: list[Any] = []
    stream = cluster.node("node-1").events
    names = {"Activated", "Claimed"}
    with stream.subscribe(some.append, names=names):
        for n in range(30):
            cluster.resolve(f"echo/{n}")
        eventually(lambda: any(event.name == "Activated" for event in some))
        with cluster.events.subscribe(every.append):
            for n in range(30, 60):
                cluster.resolve(f"echo/{n}")
            eventually(lambda: {"Activated", "Cached"} <= {each.name for each in every})
    assert {event.name for event in some} == names
    heard = [event.number for event in every if event.node == "node-1"]
    assert heard == list(range(heard[0], heard[-1] + 1))
    with pytest.raises(TypeError, match="several"):
        stream.subscribe(some.append, names="Activated")


def test_a_subscriber_that_raises_or_is_slow_harms_nobody(cluster: Cluster) -> None:
    gate = threading.Event()
    seen: list[Any] = []

    def raises(_: Any) -> None:
        raise RuntimeError("a bad subscriber")

    def waits(_: Any) -> None:
        gate.wait(10)

    for subscriber in (raises, waits, seen.append):
        cluster.events.subscribe(subscriber)
    assert cluster.ref("echo/1").ask(1) == 1
    eventually(lambda: any(event.name == "Activated" for event in seen))
    gate.set()


def test_r1_2_a_topology_change_shows_in_every_later_placement(
    cluster: Cluster,
) -> None:
    cluster.add_node("node-4")
    hosts = {cluster.resolve(f"echo/{n}").pid.node for n in range(80)}
    assert "node-4" in hosts

    cluster.remove_node("node-4")
    after = {cluster.resolve(f"echo/{n}").pid.node for n in range(80)}
    assert "node-4" not in after


def test_r1_5_a_snapshot_is_immutable(cluster: Cluster) -> None:
    cluster.resolve("echo/1")
    snapshot = cluster.snapshot()

    assert snapshot.state == "running"
    assert sum(snapshot.partitions.values()) == 64
    assert sum(snapshot.activations.values()) == 1
    with pytest.raises(AttributeError):
        snapshot.epoch = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        cluster.node("node-1").snapshot().members = ()  # type: ignore[misc]


def test_declared_errors_arrive_as_the_same_class_from_another_node(
    cluster: Cluster,
) -> None:
    account = cluster.proxy(Account, "1")
    cluster.ask(account.deposit(Decimal(5)))
    for name in cluster.nodes:
        node = cluster.node(name)
        with pytest.raises(InsufficientFunds) as caught:
            node.ask(node.proxy(Account, "1").transfer("2", Decimal(9)))
        assert caught.value.have == Decimal(5)
    cluster.ask(account.transfer("2", Decimal(5)))
    assert cluster.ask(cluster.proxy(Account, "2").balance()) == Decimal(5)


def test_a_request_id_that_is_repeated_has_no_second_effect(cluster: Cluster) -> None:
    account = cluster.proxy(Account, "1")
    for _ in range(3):
        cluster.ask(account.deposit(Decimal(1)), request_id="pay-17")
    assert cluster.ask(account.balance()) == Decimal(1)
    assert cluster.ref("scripted/1").ask(["request id"], request_id="r") == "r"


def test_a_circle_of_calls_is_refused_at_once_as_deadlock(cluster: Cluster) -> None:
    account = cluster.proxy(Account, "1")
    began = time.monotonic()
    with pytest.raises(Deadlock, match="account/1 -> account/2 -> account/3"):
        cluster.ask(account.circle(["2", "3", "1"]))
    with pytest.raises(Deadlock, match="account/1 -> account/1"):
        cluster.ask(account.circle(["1"]))
    assert time.monotonic() - began < 2.0
    assert cluster.ask(account.circle(["2", "3"])) == "nowhere"


def test_an_exception_goes_to_the_asker_and_puts_the_state_back(
    cluster: Cluster,
) -> None:
    account = cluster.proxy(Account, "1")
    cluster.ask(account.deposit(Decimal(3)))
    with pytest.raises(HandlerFailed) as caught:
        cluster.ask(account.spoil())
    assert caught.value.type_name == "KeyError"
    assert cluster.ask(account.balance()) == Decimal(3)


def test_on_error_stop_ends_the_activation(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    ref = cluster.ref("stopping/1")
    with pytest.raises(HandlerFailed, match="as told"):
        ref.ask(["raise"])
    eventually(lambda: not sum(cluster.snapshot().activations.values()))
    assert ref.ask(["read"]) == []
    assert witness.of("stopping/1").activations == 2


def test_inside_a_grain_blocking_and_foreign_awaits_are_refused(
    cluster: Cluster,
) -> None:
    account = cluster.proxy(Account, "1")
    with pytest.raises(HandlerFailed, match="use await"):
        cluster.ask(account.blocking())
    with pytest.raises(HandlerFailed, match="a Grain awaits only what its context"):
        cluster.ask(account.foreign())


def test_grains_ask_and_tell_each_other(cluster: Cluster) -> None:
    a, b = cluster.ref("scripted/a"), cluster.ref("scripted/b")
    assert a.ask(["ask", "scripted/b", ["log", 1]]) == [1]
    a.ask(["tell", "scripted/b", ["log", 2]])
    eventually(lambda: b.ask(["read"]) == [1, 2])
    now, chance = a.ask(["now"])
    assert abs(now - time.time()) < 60
    assert 0 <= chance < 1


def test_timers_run_as_turns_and_can_be_cancelled(cluster: Cluster) -> None:
    ref = cluster.ref("scripted/1")
    ref.ask(["after cancelled", 0.0, "never"])
    ref.ask(["after", 0.01, "later"])
    eventually(lambda: ref.ask(["read"]) == ["later"])
    ref.ask(["after", 60, "not any more"])
    ref.ask(["passivate"])
    eventually(lambda: not sum(cluster.snapshot().activations.values()))
    with pytest.raises(HandlerFailed, match="from 0 on"):
        ref.ask(["after", -1, "no"])


def test_bad_payloads_and_calls_are_refused_to_the_caller(cluster: Cluster) -> None:
    with pytest.raises(BadMessage, match=r"payload\['a'\]\[1\]: a set"):
        cluster.ref("echo/1").ask({"a": [1, {2}]})
    with pytest.raises(BadMessage, match="no handler 'nothing'"):
        cluster.ref("account/1").ask({"": "nothing", "args": {}})
    with pytest.raises(BadMessage, match="argument 'amount'"):
        cluster.ref("account/1").ask({"": "deposit", "args": {"amount": "much"}})
    with pytest.raises(HandlerFailed, match="takes calls of its handlers only"):
        cluster.ref("account/1").ask("hello")
    with pytest.raises(HandlerFailed, match="its answer"):
        cluster.ref("scripted/1").ask(["bad answer"])
    with pytest.raises(BadIdentity):
        cluster.ref("nothing")


def test_saves_hold_back_the_answer_and_survive(cluster: Cluster) -> None:
    ref = cluster.ref("scripted/1")
    assert ref.ask(["save", "one"]) == "saved"
    cluster.kill_node(cluster.resolve("scripted/1").pid.node)
    assert until_answered(lambda: ref.ask(["snapshot"])) == "one"
    assert ref.ask(["token"]) == cluster.resolve("scripted/1").fencing_token


def test_awaiting_an_answer_never_blocks_the_event_loop(cluster: Cluster) -> None:
    async def main() -> Decimal:
        account = cluster.proxy(Account, "1")
        total = Decimal(0)
        for _ in range(50):
            total = await account.deposit(Decimal(1))
        assert await cluster.ref("echo/1").ask_async("a") == "a"
        assert await cluster.ref("echo/1").ask("b", block=False) == "b"
        return total

    total, gap = run_and_watch(main())
    assert total == Decimal(50)
    assert gap <= 0.02


def test_the_event_loop_ticks_on_while_an_answer_is_waited_for(
    cluster: Cluster,
) -> None:
    GATES["ticks"] = threading.Event()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while ticks < 100:
            await asyncio.sleep(0.001)
            ticks += 1
        # Only ticks open the gate: were the loop blocked, none would come.
        GATES["ticks"].set()

    async def main() -> Any:
        ticking = asyncio.create_task(tick())
        answer = await cluster.ref("blocked/t").ask_async("ticks")
        await ticking
        return answer

    assert asyncio.run(main()) == "back"
    assert ticks == 100


def test_a_cluster_is_an_async_context_too() -> None:
    async def main() -> Any:
        async with Cluster.embedded(nodes=1, kinds=KINDS, **FAST) as cluster:
            return await cluster.ref("echo/1").ask_async(1)

    assert asyncio.run(main()) == 1


def test_messages_of_one_sender_keep_their_order_over_a_leave(
    cluster: Cluster,
) -> None:
    ref = cluster.ref("scripted/ordered")
    ref.ask(["read"])
    futures = [ref.ask(["log", n], block=False) for n in range(50)]
    host = cluster.resolve("scripted/ordered").pid.node
    leaving = threading.Thread(target=cluster.remove_node, args=(host,))
    leaving.start()
    futures += [ref.ask(["log", n], block=False) for n in range(50, 300)]
    leaving.join()

    answers = [future.get(timeout=10) for future in futures]

    last = [answer[-1] for answer in answers]
    assert last == list(range(300))
    # After the move the log begins anew; within each life it is in order.
    for answer in answers:
        assert answer == sorted(answer)


def test_a_full_inbox_refuses_and_a_stuck_grain_is_named(cluster: Cluster) -> None:
    GATES["g"] = threading.Event()
    ref = cluster.ref("blocked/1")
    futures = [ref.ask("g", block=False) for _ in range(10)]
    with pytest.raises(Overloaded, match="its inbox is full"):
        futures[-1].get(timeout=5)
    eventually(lambda: cluster.snapshot().stuck == ("blocked/1",))
    node = cluster.node(cluster.resolve("blocked/1").pid.node)
    eventually(lambda: node.events.counts["Stuck"] == 1)
    GATES["g"].set()
    assert futures[0].get(timeout=5) == "back"


def test_an_ask_that_is_not_answered_in_time_is_unknown(cluster: Cluster) -> None:
    GATES["late"] = threading.Event()
    with pytest.raises(OutcomeUnknown) as caught:
        cluster.ref("blocked/2").ask("late", timeout=0.2)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.may_have_happened
    GATES["late"].set()


def test_idle_activations_are_passivated(witness: ActivationWitness) -> None:
    kinds = {"echo": Kind(Echo, idle_after=0.05)}
    with Cluster.embedded(nodes=1, kinds=kinds, witness=witness, **FAST) as cluster:
        cluster.ref("echo/1").ask(1)
        eventually(lambda: not sum(cluster.snapshot().activations.values()))
        assert cluster.ref("echo/1").ask(2) == 2
    assert witness.activation_count == 2


def test_threading_actors_block_save_fail_and_stop(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    ref = cluster.ref("worker/1")
    assert ref.ask("count") == 101
    assert cluster.ask(cluster.proxy(Worker, "1").add(9)) == 110
    assert ref.ask(["ask", "echo/1", "deep"]) == "deep"
    assert ref.ask(["save", "kept"]) == "kept"
    with pytest.raises(HandlerFailed, match="as told"):
        ref.ask(["raise"])
    assert ref.ask(["stop"]) == "stopping"
    eventually(lambda: ref.ask(["snapshot"]) == "kept")
    assert witness.of("worker/1").activations == 2


def test_a_threading_actor_inside_its_handler_ends_with_its_node(
    cluster: Cluster,
) -> None:
    GATES["w"] = threading.Event()
    ref = cluster.ref("worker/1")
    host = cluster.resolve("worker/1").pid.node
    future = ref.ask(["wait", "w"], block=False)
    cluster.kill_node(host)
    with pytest.raises(OutcomeUnknown):
        future.get(timeout=10)
    GATES["w"].set()
    assert until_answered(lambda: ref.ask("count")) == 101


def test_a_node_that_cannot_renew_lapses_and_rejoins(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    ref = cluster.ref("scripted/1")
    ref.ask(["save", "x"])
    node = cluster.node(cluster.resolve("scripted/1").pid.node)
    before = node.session
    assert before is not None
    store = cast("EmbeddedEngine", cluster._engine).store
    record = next(r for r in store.read_sessions().sessions if r.session == before)
    count = record.count
    while not store.close_session(before, count):
        count += 1

    eventually(lambda: node.session not in {before, None})
    assert until_answered(lambda: ref.ask(["snapshot"])) == "x"
    assert witness.double_count == 0
    assert node.events.counts["SessionLapsed"] == 1


def test_a_threading_actor_lapses_with_its_session(cluster: Cluster) -> None:
    GATES["lapse"] = threading.Event()
    ref = cluster.ref("worker/1")
    node = cluster.node(cluster.resolve("worker/1").pid.node)
    future = ref.ask(["wait", "lapse"], block=False)
    idle = cluster.ref("worker/idle")
    idle.ask("count")
    before = node.session
    assert before is not None
    store = cast("EmbeddedEngine", cluster._engine).store
    count = 0
    while not store.close_session(before, count):
        count += 1
    with pytest.raises(OutcomeUnknown):
        future.get(timeout=10)
    GATES["lapse"].set()
    assert until_answered(lambda: ref.ask("count")) == 101


def test_what_makes_no_sense_is_refused_before_a_store_is_made(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/never.db"
    bad: list[dict[str, Any]] = [
        {"nodes": 0},
        {"nodes": ["a", "a"]},
        {"nodes": ["entry"]},
        {"ttl": -1},
        {"ttl": 1.0, "renew_every": 2.0},
        {"margin": 9.0},
        {"partitions": 0},
        {"cluster": ""},
        {"kinds": {"echo": Kind(Echo, handler_max=3.0)}},
        {"kinds": {"echo": int}},
        {"kinds": {"a/b": Echo}},
        {"kinds": {"": Echo}},
        {"nodes": ["a.b"]},
        {"nodes": ["a#b"]},
        {"nodes": [""]},
    ]
    for options in bad:
        with pytest.raises(ValueError, match=r"."):
            Cluster.embedded(**{"kinds": KINDS, "store": url, **options})
    bad_nodes: list[dict[str, Any]] = [
        {"name": "a.b"},
        {"kinds": {"a/b": Echo}},
        *({"weight": each} for each in (0, -1.0, math.inf, math.nan, True, "1", None)),
    ]
    for options in bad_nodes:
        with pytest.raises(ValueError, match=r"."):
            PlacementNode(**{"name": "n", "store": url, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_refuses_a_store_in_which_others_live(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    store = open_store(url)
    session = SessionId("other.1#1")
    store.open_session(SessionRecord(session=session, ttl_ms=60_000))
    stop = threading.Event()

    def renew() -> None:
        mine, count = open_store(url), 0
        while not stop.wait(0.05):
            count += 1
            mine.renew_session(session, count)
        mine.close()

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(StoreInUse, match="of another process"):
        Cluster.embedded(nodes=1, kinds=KINDS, store=url, **FAST)
    stop.set()
    thread.join()
    store.close()


def test_a_store_is_in_use_by_whoever_opens_a_session_while_others_are_waited_out(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    store = open_store(url)
    store.open_session(SessionRecord(session=SessionId("gone.1#1"), ttl_ms=60_000))

    def later() -> None:
        mine = open_store(url)
        session = SessionId("other.1#1")
        mine.open_session(SessionRecord(session=session, ttl_ms=60_000))
        mine.close()

    timer = threading.Timer(0.5, later)
    timer.start()
    with pytest.raises(StoreInUse, match=r"other\.1#1 of another process"):
        Cluster.embedded(nodes=1, kinds=KINDS, store=url, **FAST)
    timer.join()
    store.close()


def test_a_node_alone_refuses_a_store_in_which_others_live(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    with Cluster.embedded(nodes=1, kinds=KINDS, store=url, **FAST):
        for start in ("start_member", "start_client"):
            node = PlacementNode("n", kinds=KINDS, store=url, **FAST)
            with pytest.raises(StoreInUse, match="of another process"):
                getattr(node, start)()
            node.stop()
    with PlacementNode("n", kinds=KINDS, store=url, **FAST) as node:
        node.start_member()
        assert node.ref("echo/1").ask(1) == 1


def test_a_node_that_waits_out_a_crash_says_when_its_time_is_not_enough(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    store = open_store(url)
    store.open_session(SessionRecord(session=SessionId("gone.1#1"), ttl_ms=60_000))
    store.close()
    node = PlacementNode("n", kinds=KINDS, store=url, **FAST)
    with pytest.raises(NotReady, match=r"gone\.1#1 is not over yet"):
        node.start_member(timeout=0.1)
    node.stop()


def test_a_cluster_waits_out_what_a_crash_left_behind(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    store = open_store(url)
    store.open_session(SessionRecord(session=SessionId("gone.1#1"), ttl_ms=200))
    store.close()

    with Cluster.embedded(nodes=1, kinds=KINDS, store=url, **FAST) as cluster:
        assert cluster.ref("echo/1").ask(1) == 1


def test_nodes_are_named_and_counted(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="already"):
        cluster.add_node("node-1")
    with pytest.raises(KeyError):
        cluster.kill_node("node-9")
    with pytest.raises(ValueError, match="without"):
        PlacementNode("a.b")
    with pytest.raises(BadMessage, match="a call of a proxy"):
        cluster.ask(5)
    with pytest.raises(PlacementError):
        cluster.ref("nobody/1").ask(1)
    cluster.stop()
    with pytest.raises(NotReady):
        cluster.add_node("node-7")


class Surrogate(Grain):
    """Says what is not valid UTF-8, as the name of a file may be."""

    def on_activate(self) -> None:
        if self.context.identity.name.startswith("fails"):
            raise ValueError("file x\udcff")

    def on_receive(self, message: Any) -> Any:
        if message == "long":
            raise ValueError("y" * 10_000_000)
        raise ValueError("file y\udcff")


def test_an_error_of_no_valid_text_reaches_whoever_asked_and_ends_no_actor() -> None:
    kinds = {"surrogate": Surrogate, "echo": Echo}
    with Cluster.embedded(nodes=2, kinds=kinds, **FAST) as cluster:
        for node in (cluster, *(cluster.node(name) for name in cluster.nodes)):
            for n in range(4):
                with pytest.raises(ActivationFailed, match=r"file x\\udcff"):
                    node.ref(f"surrogate/fails-{n}").ask(1)
                with pytest.raises(HandlerFailed, match=r"file y\\udcff"):
                    node.ref(f"surrogate/{n}").ask(1)
                with pytest.raises(HandlerFailed) as caught:
                    node.ref(f"surrogate/{n}").ask("long")
                assert caught.value.text == "y" * (TEXT_MAX - 1) + "…"
        assert cluster.ref("echo/1").ask(1) == 1


def test_a_node_with_a_bug_breaks_and_others_take_over(
    cluster: Cluster, witness: ActivationWitness
) -> None:
    ref = cluster.ref("scripted/1")
    ref.ask(["save", "kept"])
    host = cluster.resolve("scripted/1").pid.node
    node = cluster.node(host)
    seen: list[Any] = []
    node.events.subscribe(seen.append)

    node._coordinator.tell("no message of a coordinator")

    eventually(lambda: node.state == "broken")
    eventually(lambda: any(event.name == "Broken" for event in seen))
    with pytest.raises(NotReady, match="broken by a bug"):
        node.ref("echo/1").ask(1)
    assert until_answered(lambda: ref.ask(["snapshot"])) == "kept"
    assert cluster.resolve("scripted/1").pid.node != host
    assert witness.double_count == 0


def test_where_a_strategy_raises_or_chooses_garbage_the_default_chooses() -> None:
    def raises(*_: Any) -> Any:
        raise KeyError("a bad strategy")

    kinds = {
        "raises": Kind(Echo, strategy=raises),
        "garbage": Kind(Echo, strategy=lambda *_: cast("Any", [])),
        "nobody": Kind(Echo, strategy=lambda *_: cast("Any", None)),
    }
    with Cluster.embedded(nodes=2, kinds=kinds, **FAST) as cluster:
        seen: list[Any] = []
        cluster.events.subscribe(seen.append)
        for kind in kinds:
            found = cluster.resolve(f"{kind}/1")
            assert cluster.ref(f"{kind}/1").ask(5) == 5
            table = cluster.node("node-1")._table
            assert table is not None
            assert found.owner == table.host_of(found.identity).session
        eventually(lambda: sum(e.name == "StrategyFailed" for e in seen) == 3)
    failed = {str(e.identity): e.reason for e in seen if e.name == "StrategyFailed"}
    assert failed["raises/1"] == "KeyError: 'a bad strategy'"
    assert "it chose []" in failed["garbage/1"]
    assert "it chose None" in failed["nobody/1"]


def test_answers_arrive_while_the_topology_changes() -> None:
    with PlacementNode("n", kinds=KINDS, **FAST) as node:
        node.start_member()
        outbox, table = node._outbox, node._table
        assert table is not None
        mails = []
        for number in range(50_000):
            identity = Identity("echo", "1")
            mail = Mail(None, "", (), 0, True, outbox, -number, identity, Future())
            outbox._asked[-number] = mail
            mails.append(mail)
        pid = node.resolve("echo/1").pid

        def answer() -> None:
            for mail in mails:
                outbox.answered(mail, 1, pid)

        thread = threading.Thread(target=answer)
        thread.start()
        while thread.is_alive():
            outbox.adopt(table, ())
        thread.join()
        assert node.ref("echo/1").ask(1) == 1


def test_deadlines_of_answered_asks_are_not_kept() -> None:
    with PlacementNode("n", kinds=KINDS, **FAST) as node:
        node.start_member()
        ref = node.ref("echo/1")
        for _ in range(20):
            futures = [ref.ask(n, block=False, timeout=9_000) for n in range(200)]
            assert [each.get(timeout=10) for each in futures] == list(range(200))
        assert len(node._outbox._deadlines) <= 1_024 + 200


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_told_message_that_is_refused_is_named_in_an_event(
    cluster: Cluster, *, is_remote: bool
) -> None:
    found = cluster.resolve("blocked/1")
    host = cluster.node(found.pid.node)
    sender: Any = cluster if is_remote else host
    seen: list[Any] = []
    host.events.subscribe(seen.append)
    GATES["told"] = threading.Event()
    for _ in range(10):
        sender.ref("blocked/1").tell("told")
    eventually(lambda: any("its inbox is full" in each.reason for each in seen))
    GATES["told"].set()
    account = cluster.resolve("account/1")
    host = cluster.node(account.pid.node)
    host.events.subscribe(seen.append)
    (cluster if is_remote else host).ref("account/1").tell(
        {CALL: "no_such", ARGUMENTS: {}}
    )
    eventually(lambda: any("no_such" in each.reason for each in seen))
    dropped = [each for each in seen if each.name == "MessageDropped"]
    assert {str(each.identity) for each in dropped} == {"blocked/1", "account/1"}
    assert dropped[0].reason.startswith("Overloaded: ")
    assert dropped[-1].reason.startswith("BadMessage: ")


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_told_message_may_wait_in_a_mailbox_for_longer_than_an_ask(
    witness: ActivationWitness, *, is_remote: bool
) -> None:
    GATES["slow"] = threading.Event()
    with Cluster.embedded(
        nodes=1, kinds=KINDS, witness=witness, ask_timeout=0.1, **FAST
    ) as cluster:
        sender: Any = cluster if is_remote else cluster.node("node-1")
        ref = sender.ref("blocked/1")
        until_answered(lambda: cluster.resolve("blocked/1"))
        first = ref.ask("slow", block=False, timeout=10)
        ref.tell("slow")
        threading.Event().wait(0.3)
        GATES["slow"].set()
        assert first.get(timeout=5) == "back"
        eventually(lambda: sum(witness.handled_by.values()) == 2)
        assert cluster.node("node-1").events.counts["MessageDropped"] == 0


def test_what_another_node_would_refuse_is_refused_to_the_sender(
    cluster: Cluster,
) -> None:
    host = cluster.node(cluster.resolve("echo/1").pid.node)
    for sender in (cluster, host):
        ref = sender.ref("echo/1")
        assert ref.ask([1] * 100_000) == [1] * 100_000
        with pytest.raises(BadMessage, match="payload: it has 200000 items"):
            ref.ask([1] * 200_000)
        with pytest.raises(BadMessage, match="at most 1048576"):
            ref.tell([0.5] * 120_000)
        for request_id in ("x" * 513, "\udcff", cast("Any", 5)):
            with pytest.raises(BadMessage, match="request_id"):
                ref.ask(1, request_id=request_id)
            with pytest.raises(BadMessage, match="request_id"):
                ref.tell(1, request_id=request_id)
        assert ref.ask(1, request_id="x" * 512) == 1


@pytest.mark.parametrize("timeout", [math.nan, 0, -1, -math.inf, "1", True, b"", [1]])
def test_a_timeout_that_is_none_is_refused_before_anything_is_sent(
    cluster: Cluster, timeout: Any
) -> None:
    outbox = cluster._entry._outbox
    before = outbox._take_number()
    ref, call = cluster.ref("echo/1"), cluster.proxy(Account, "1").balance()
    asks: tuple[Callable[[], Any], ...] = (
        lambda: ref.ask(1, timeout=timeout),
        lambda: ref.ask(1, block=False, timeout=timeout),
        lambda: asyncio.run(ref.ask_async(1, timeout=timeout)),
        lambda: cluster.ask(call, timeout=timeout),
        lambda: cluster.resolve("echo/1", timeout=timeout),
    )
    for ask in asks:
        with pytest.raises(ValueError, match="timeout"):
            ask()
    assert outbox._take_number() == before + 1


@pytest.mark.parametrize("timeout", [math.inf, 1e10, 1e300, 10**400, 1e-9])
def test_a_long_timeout_is_a_year_and_a_short_one_is_over(
    cluster: Cluster, timeout: Any
) -> None:
    try:
        for name in cluster.nodes:
            assert cluster.node(name).ref("echo/1").ask(1, timeout=timeout) == 1
        assert cluster.ask(
            cluster.proxy(Account, "1").balance(), timeout=timeout
        ) == Decimal(0)
        assert cluster.resolve("echo/1", timeout=timeout).identity == "echo/1"
    except (OutcomeUnknown, PlacementError):
        assert timeout < 1


def test_settings_of_more_than_a_year_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ask_timeout must be .* at most a year"):
        Settings(ask_timeout=1e10)


def test_the_mappings_of_snapshots_cannot_be_changed(cluster: Cluster) -> None:
    seen = cluster.snapshot()
    mappings: tuple[Any, ...] = (
        seen.partitions,
        seen.activations,
        seen.nodes,
        seen.nodes["node-1"].partitions,
    )
    for mapping in mappings:
        assert mapping
        with pytest.raises(TypeError):
            mapping["x"] = 1


def test_a_drain_is_an_event_of_its_own(cluster: Cluster) -> None:
    node = cluster.node("node-1")
    node.drain()
    assert node.events.counts["Draining"] == 1


def stuck_node(gate: str) -> tuple[PlacementNode, Future]:
    """A node in whose turn a Grain does not come back."""
    GATES[gate] = threading.Event()
    node = PlacementNode("n", kinds=KINDS, **FAST)
    node.start_member()
    future = node.ref("blocked/1").ask(gate, block=False)
    eventually(lambda: node._grains.busy_since_ns > 0)
    node.events.subscribe(lambda _: GATES[gate].wait(20))
    return node, future


@pytest.mark.parametrize("verb", ["stop", "kill"])
def test_an_end_is_done_in_its_time_whatever_hangs(verb: str) -> None:
    node, future = stuck_node(verb)
    began_s = time.monotonic()
    getattr(node, verb)(timeout=0.5)
    assert time.monotonic() - began_s < 3
    with pytest.raises((OutcomeUnknown, NotReady)):
        future.get(timeout=1)
    GATES[verb].set()


def test_a_second_stop_waits_for_the_first_and_a_kill_cuts_it_short() -> None:
    node, _ = stuck_node("second")
    ended: list[str] = []

    def stop(which: str) -> None:
        node.stop(timeout=60)
        ended.append(which)

    threads = [threading.Thread(target=stop, args=(which,)) for which in ("1", "2")]
    for thread in threads:
        thread.start()
    eventually(lambda: node.state == "stopping")
    threads[1].join(0.1)
    assert ended == []
    killer = threading.Thread(target=node.kill)
    killer.start()
    eventually(lambda: node.is_dead)
    GATES["second"].set()
    for thread in (*threads, killer):
        thread.join(10)
    assert sorted(ended) == ["1", "2"]
    assert node._is_over


def test_the_cluster_serves_while_a_node_is_added_and_ends_it_when_stopped() -> None:
    gate, waits = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def open_session(self, record: Any, /) -> Any:
            if record.session.startswith("slow."):
                waits.set()
                raise StoreFailure("not now")
            return super().open_session(record)

        def another(self) -> "Slow":
            return self

        def close(self) -> None:
            pass

    cluster = Cluster.embedded(nodes=1, kinds=KINDS, store=Slow(), **FAST)
    failed: list[BaseException] = []

    def add() -> None:
        try:
            cluster.add_node("slow")
        except NotReady as error:
            failed.append(error)
        gate.set()

    thread = threading.Thread(target=add)
    thread.start()
    assert waits.wait(5)
    assert cluster.nodes == ("node-1",)
    assert cluster.ref("echo/1").ask(1) == 1
    with pytest.raises(ValueError, match="already"):
        cluster.add_node("slow")
    second = threading.Thread(target=cluster.stop)
    second.start()
    cluster.stop()
    second.join(5)
    assert gate.wait(5)
    thread.join()
    assert len(failed) == 1


def test_nothing_is_kept_of_nodes_that_are_gone(cluster: Cluster) -> None:
    node = cluster.node("node-1")
    for name in ("node-4", "node-5"):
        cluster.add_node(name)
        cluster.remove_node(name)
    cluster.add_node("node-6")
    cluster.kill_node("node-6")
    assert len(cluster.events._streams) == 1 + 3
    assert len(node._guards) == 1
    eventually(lambda: len(node._postbox._departed) == 2)


def test_a_resolution_is_known_until_its_reference_is_dropped() -> None:
    node = PlacementNode("n", kinds=KINDS, **FAST)
    with node:
        node.start_member()
        first = node.resolve("echo/1")
        assert node.resolve("echo/1") is first
        assert node.forget(first.pid)
        again = node.resolve("echo/1")
        assert again is not first
        assert again.pid == first.pid
        unhashable: Any = []
        with pytest.raises(BadIdentity, match="an identity is a text, not list"):
            node.resolve(unhashable)
    with pytest.raises(NotReady):
        node.resolve("echo/1")


def test_a_burst_of_asks_to_new_identities_is_answered_whole() -> None:
    with Cluster.embedded(nodes=3, kinds=KINDS, ask_timeout=60.0) as cluster:
        futures = [
            cluster.ref(f"echo/{number}").ask(number, block=False)
            for number in range(5_000)
        ]
        assert [each.get(timeout=60) for each in futures] == list(range(5_000))
        assert sum(cluster.snapshot().activations.values()) == 5_000
        for name in cluster.nodes:
            assert cluster.node(name).events.counts["SessionLapsed"] == 0


def test_a_node_that_has_much_to_do_for_long_stays_a_member() -> None:
    with Cluster.embedded(nodes=1, kinds=KINDS, ttl=2.0) as cluster:
        node = cluster.node("node-1")
        system = node._engine.system
        done = threading.Event()
        # Thrice the time to live, before all that is posted from now on; and more in
        # the actor's inbox than it takes out in any of these turns.
        for _ in range(600):
            system.post(time.sleep, 0.01)
            for _ in range(10):
                node._tell_placement(NeedNewTopology(1))
        system.post(done.set)
        assert done.wait(30)
        assert cluster.ref("echo/1").ask(1) == 1
        assert node.events.counts["SessionLapsed"] == 0


def test_nobody_else_can_say_that_a_node_is_heard() -> None:
    with Cluster.embedded(nodes=1, kinds=KINDS, **FAST) as cluster:
        node = cluster.node("node-1")
        # What it says to itself over the wire is lost from now on.
        node._postbox._hand_over = lambda *_: True  # type: ignore[method-assign]

        def lapses_however_often_another_says_so() -> bool:
            for nonce in range(200):
                node._engine.system.post(
                    node._frame, Address("other.1"), LoopBack(nonce)
                )
            return node.events.counts["SessionLapsed"] > 0

        eventually(lapses_however_often_another_says_so)


class WatchedOutbox(Outbox):
    """Sees how far its node says that it is, when it learns of the members."""

    node: ClassVar[PlacementNode]
    states: ClassVar[list[str]] = []

    def adopt(
        self,
        table: PartitionTable,
        closed: Iterable[SessionId],
        left: Iterable[SessionId] = (),
    ) -> None:
        session = self.node.session
        if session is not None and session in table.topology:
            self.states.append(self.node.state)
        super().adopt(table, closed, left)


class WatchedNode(PlacementNode):
    outbox_type = WatchedOutbox


def test_a_node_has_started_only_when_its_messages_find_their_way() -> None:
    node = WatchedOutbox.node = WatchedNode("n", kinds=KINDS, **FAST)
    with node:
        node.start_member()
        assert WatchedOutbox.states[0] == "starting"
        assert node.ref("echo/1").ask(1) == 1
