"""A simulated cluster as a user has it: the same verbs, in virtual time."""

import threading
from dataclasses import dataclass, field
from typing import Any

import pykka
import pytest

from actors import Cluster, Grain, Kind, handler
from actors.kind import BadKind
from actors.simulation import Unsafe
from placement.errors import HandlerFailed, OutcomeUnknown, PlacementError
from placement.event import Event
from placement.lease import Guard


@dataclass
class Count:
    value: int = 0
    seen: list[str] = field(default_factory=list)


class Counter(Grain[Count]):
    @handler
    async def add(self) -> int:
        request = self.context.request_id
        if request not in self.state.seen:
            self.state.seen.append(request)
            self.state.value += 1
            self.save()
        return self.state.value

    @handler
    async def value(self) -> int:
        return self.state.value

    @handler
    async def add_to(self, other: str) -> int:
        return await self.context.proxy(Counter, other).add()


class Forgetful(Counter):
    """Wrong: it answers, and forgets to save."""

    @handler
    async def add(self) -> int:
        self.state.value += 1
        return self.state.value


class Clock(Grain):
    def on_activate(self) -> None:
        self.rung: list[float] = []

    def on_receive(self, message: Any) -> Any:
        match message:
            case "now":
                return self.context.now()
            case "random":
                return self.context.random.random()
            case "ring":
                self.context.after(5.0, self.ring)
            case "rung":
                return self.rung
            case "block":
                return self.context.ref("clock/other").ask("now")
        return None

    def ring(self) -> None:
        self.rung.append(self.context.now())


KINDS: dict[str, Kind | type] = {"counter": Counter, "clock": Clock}


class Worker(pykka.ThreadingActor):
    pass


def test_a_counter_is_safe_when_the_node_that_hosts_it_crashes() -> None:
    """What README shows: fifteen lines that prove a Grain."""
    for seed in range(1, 6):
        cluster = Cluster.simulated(seed=seed, nodes=3, kinds=KINDS)
        counter = cluster.proxy(Counter, "1")
        for number in range(10):
            assert cluster.ask(counter.add(), request_id=f"r{number}") == number + 1
        cluster.crash(cluster.resolve("counter/1").pid.node)
        cluster.advance(10.0)
        assert cluster.ask(counter.value()) == 10
        cluster.check()
        cluster.stop()


def test_a_grain_that_forgets_to_save_is_found_out() -> None:
    cluster = Cluster.simulated(seed=1, nodes=3, kinds={"counter": Forgetful})
    counter = cluster.proxy(Forgetful, "1")
    answered = [cluster.ask(counter.add()) for _ in range(3)]
    cluster.crash(cluster.resolve("counter/1").pid.node)
    cluster.advance(10.0)

    assert answered == [1, 2, 3]
    assert cluster.ask(counter.value()) == 0
    cluster.stop()


def run_of(seed: int) -> tuple[str, list[Any]]:
    cluster = Cluster.simulated(seed=seed, nodes=3, kinds=KINDS)
    seen = [cluster.ref(f"clock/{number % 4}").ask("random") for number in range(20)]
    cluster.pause("node-1", seconds=7.0)
    cluster.advance(12.0)
    seen.append(cluster.ref("clock/1").ask("now"))
    digest: str = cluster.shared.network.digest().hexdigest()
    cluster.stop()
    return digest, seen


def test_the_same_seed_is_the_same_run_and_another_seed_is_not() -> None:
    assert run_of(7) == run_of(7)
    assert run_of(7)[0] != run_of(8)[0]


def test_time_is_virtual_and_timers_run_by_it() -> None:
    cluster = Cluster.simulated(kinds=KINDS)
    clock = cluster.ref("clock/1")
    before = clock.ask("now")
    clock.ask("ring")
    cluster.advance(4.5)
    assert clock.ask("rung") == []
    cluster.advance(1.0)
    (rung,) = clock.ask("rung")
    assert rung - before == pytest.approx(5.0, abs=0.1)
    with pytest.raises(ValueError, match="time does not go back"):
        cluster.advance(-1)
    with pytest.raises(TimeoutError, match="seed 1: not so within 2"):
        cluster.run_until(lambda: False, timeout=2.0)
    cluster.stop()


def test_grains_call_each_other_and_block_nowhere() -> None:
    cluster = Cluster.simulated(seed=3, nodes=5, kinds=KINDS)
    one = cluster.proxy(Counter, "1")
    assert cluster.ask(one.add_to("2"), request_id="a") == 1
    assert cluster.ask(cluster.proxy(Counter, "2").value()) == 1
    with pytest.raises(HandlerFailed, match="BlockingInGrain"):
        cluster.ref("clock/1").ask("block")
    cluster.stop()


def test_kinds_with_threads_of_their_own_are_refused() -> None:
    with pytest.raises(BadKind, match="its own thread cannot be simulated"):
        Cluster.simulated(kinds={"worker": Worker})


def test_a_cut_between_nodes_is_mended() -> None:
    cluster = Cluster.simulated(seed=2, nodes=["a", "b"], kinds=KINDS)
    at_a = next(
        f"clock/{number}"
        for number in range(50)
        if cluster.resolve(f"clock/{number}").pid.node == "a"
    )
    cluster.cut({"a"}, {"entry"})
    with pytest.raises(OutcomeUnknown):
        cluster.ref(at_a).ask("now", timeout=3.0)
    assert cluster.node("b").ref(at_a).ask("now", timeout=3.0) > 0
    cluster.heal()
    assert cluster.ref(at_a).ask("now") > 0
    cluster.check()
    cluster.stop()


def test_a_node_cut_off_from_the_store_gives_way_to_others() -> None:
    cluster = Cluster.simulated(seed=4, nodes=3, kinds=KINDS)
    counter = cluster.proxy(Counter, "1")
    assert cluster.ask(counter.add(), request_id="a") == 1
    host = cluster.resolve("counter/1").pid.node
    cluster.cut({host}, {"store"})
    cluster.advance(15.0)
    assert cluster.ask(counter.add(), request_id="b") == 2
    assert cluster.resolve("counter/1").pid.node != host
    cluster.heal()
    cluster.advance(10.0)
    assert cluster.ask(counter.add(), request_id="c") == 3
    cluster.check()
    cluster.stop()


def test_a_store_that_fails_is_a_failure_and_no_more() -> None:
    cluster = Cluster.simulated(seed=5, nodes=3, kinds=KINDS)
    counter = cluster.proxy(Counter, "1")
    assert cluster.ask(counter.add(), request_id="a") == 1
    for what in ("fail", "lost", "late", "slow", "away"):
        cluster.store.fail(what, times=2)
        try:
            cluster.ask(counter.add(), request_id=what, timeout=8.0)
        except PlacementError:
            cluster.store.heal()
            cluster.advance(10.0)
            cluster.ask(counter.add(), request_id=what)
        cluster.store.heal()
    assert cluster.ask(counter.value()) == 6
    with pytest.raises(ValueError, match="the store can fail"):
        cluster.store.fail("burn")
    cluster.check()
    cluster.stop()


def test_a_paused_node_wakes_and_handles_nothing_that_is_not_its_own() -> None:
    cluster = Cluster.simulated(seed=6, nodes=3, kinds=KINDS)
    counter = cluster.proxy(Counter, "1")
    assert cluster.ask(counter.add(), request_id="a") == 1
    first = cluster.resolve("counter/1").pid
    cluster.pause(first.node, seconds=20.0)
    late = cluster.ref("counter/1").ask(
        {"": "add", "args": {}}, block=False, request_id="late", timeout=30.0
    )
    cluster.advance(30.0)
    assert late.is_done
    second = cluster.resolve("counter/1").pid
    assert second.fencing_token > first.fencing_token
    assert cluster.ask(counter.add(), request_id="b") in {2, 3}
    cluster.check()
    cluster.stop()


def test_a_crashed_node_starts_again_under_its_name_as_another_member() -> None:
    cluster = Cluster.simulated(seed=7, nodes=3, kinds=KINDS)
    before = cluster.node("node-2").session
    cluster.kill_node("node-2")
    assert cluster.nodes == ("node-1", "node-3")
    with pytest.raises(KeyError):
        cluster.crash("node-2")
    cluster.add_node("node-2")
    assert cluster.node("node-2").session not in {None, before}
    cluster.remove_node("node-1")
    assert cluster.nodes == ("node-2", "node-3")
    assert cluster.ask(cluster.proxy(Counter, "9").add(), request_id="x") == 1
    assert sum(cluster.snapshot().activations.values()) == 1
    cluster.check()
    cluster.stop()


def test_subscribers_are_called_in_virtual_time() -> None:
    cluster = Cluster.simulated(seed=8, kinds=KINDS)
    seen: list[Event] = []
    with cluster.events.subscribe(seen.append):
        cluster.resolve("clock/1")
        cluster.advance(1.0)
    assert "Activated" in [event.name for event in seen]
    assert [e.number for e in seen if e.node == "node-1"] == sorted(
        e.number for e in seen if e.node == "node-1"
    )
    cluster.stop()


def test_a_broken_rule_and_a_bug_of_a_part_are_told_with_the_seed() -> None:
    cluster = Cluster.simulated(seed=9, kinds=KINDS)
    cluster.resolve("counter/1")
    cluster.shared.records.append(cluster.shared.records[-1]._replace(at_ns=10**18))
    claimed = next(
        each for each in cluster.shared.records if type(each).__name__ == "EntryClaimed"
    )
    cluster.shared.records.append(claimed._replace(at_ns=10**18))
    with pytest.raises(Unsafe, match="seed 9") as caught:
        cluster.check()
    assert "token-grows" in {each.rule for each in caught.value.violations}
    cluster.process("node-1").bug(RuntimeError("broken"))
    with pytest.raises(AssertionError, match="seed 9: a bug on node-1"):
        cluster.check()
    cluster.stop()


def test_a_node_that_asks_no_guard_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster.simulated(seed=6, nodes=3, kinds=KINDS)
    cluster.ask(cluster.proxy(Counter, "1").value())
    host = cluster.resolve("counter/1").pid.node
    cluster.pause(host, seconds=20.0)
    for _ in range(5):
        cluster.ref("counter/1").tell({"": "value", "args": {}})
    monkeypatch.setattr(Guard, "is_open", lambda *_: True)
    cluster.advance(15.0)
    cluster.ask(cluster.proxy(Counter, "1").value())
    cluster.advance(15.0)

    with pytest.raises(Unsafe) as caught:
        cluster.check()
    assert "closed-session" in {each.rule for each in caught.value.violations}
    cluster.abandon()


def test_simulated_clusters_leave_nothing_behind() -> None:
    threads = threading.active_count()
    registered = len(pykka.ActorRegistry.get_all())
    for seed in range(20):
        cluster = Cluster.simulated(seed=seed, kinds=KINDS)
        cluster.ref("clock/1").ask("now")
        cluster.stop()
        cluster.stop()
    assert threading.active_count() == threads
    assert len(pykka.ActorRegistry.get_all()) == registered
