"""Cases that have hurt others, each named by what must happen instead."""

from typing import Any

import pytest

from actors import Cluster, Grain, Kind
from actors.simulation import SimulatedCluster
from actors.trace import EntryClaimed
from placement.contracts import GiveUp, Save, Stale
from placement.errors import NoAuthority, OutcomeUnknown, PlacementError
from placement.event import Event
from placement.identity import Identity
from placement.topology import SessionId


class Memo(Grain):
    """Keeps the last text that it was sent, stored."""

    def on_activate(self) -> None:
        self.text = (self.context.snapshot or b"").decode()

    async def on_receive(self, message: Any) -> Any:
        match message:
            case ["keep", text]:
                self.text = text
                self.context.save(text.encode())
            case ["wait", other, seconds]:
                try:
                    await self.context.ref(other).ask_async("get", timeout=seconds)
                except PlacementError:
                    return "waited"
        return self.text


def cluster_of(
    *, seed: int = 1, nodes: Any = 3, idle_after: float | None = None
) -> SimulatedCluster:
    kinds = {"memo": Kind(Memo, idle_after=idle_after)}
    return Cluster.simulated(seed=seed, nodes=nodes, kinds=kinds)


def token_of(cluster: SimulatedCluster, identity: str) -> int:
    return cluster.resolve(identity).fencing_token


def served(cluster: SimulatedCluster, identity: str, message: Any = "get") -> Any:
    """Ask until somebody surely has handled it: a crash may take an ask along."""
    for _ in range(5):
        try:
            return cluster.ref(identity).ask(message)
        except OutcomeUnknown:
            continue
    raise AssertionError("five asks in a row have no known outcome")


def identity_at(cluster: SimulatedCluster, node: str) -> str:
    """An identity that the node of that name hosts."""
    for number in range(100):
        if cluster.resolve(f"memo/{number}").pid.node == node:
            return f"memo/{number}"
    raise AssertionError(f"{node} hosts none of a hundred")


def test_a_cache_hit_prolongs_the_idle_time() -> None:
    cluster = cluster_of(idle_after=2.0)
    memo = cluster.ref("memo/1")
    memo.ask("get")
    first = token_of(cluster, "memo/1")
    for _ in range(5):
        cluster.advance(1.5)
        memo.ask("get")
    assert token_of(cluster, "memo/1") == first
    cluster.advance(6.0)
    memo.ask("get")
    assert token_of(cluster, "memo/1") > first
    cluster.stop()


def test_idle_time_starts_when_the_handling_ends() -> None:
    cluster = cluster_of(nodes=["a", "b"], idle_after=4.0)
    here, there = identity_at(cluster, "a"), identity_at(cluster, "b")
    cluster.ref(here).ask("get")
    first = token_of(cluster, here)
    cluster.cut({"a"}, {"b"}, both_ways=False)
    waiting = cluster.ref(here).ask(["wait", there, 6.0], block=False, timeout=20.0)
    cluster.run_until(lambda: waiting.is_done)
    assert waiting.get() == "waited"
    cluster.heal()
    cluster.advance(2.0)
    assert token_of(cluster, here) == first
    cluster.stop()


def test_a_remote_owner_is_answered_with_its_reference_and_nothing_starts_here() -> (
    None
):
    cluster = cluster_of(nodes=["a", "b"])
    there = identity_at(cluster, "b")
    before = len(cluster.node("a").snapshot().activations)
    found = cluster.node("a").resolve(there)
    assert found.locality == "remote"
    assert found.pid.node == "b"
    assert len(cluster.node("a").snapshot().activations) == before
    cluster.stop()


def test_no_authority_has_no_side_effects() -> None:
    cluster = cluster_of()
    records = len(cluster.shared.records)
    with pytest.raises(NoAuthority):
        cluster.ref("unknown/1").ask("get")
    changed = {type(each).__name__ for each in cluster.shared.records[records:]}
    assert not changed & {"EntryClaimed", "EntrySaved", "EntryGivenUp"}
    assert cluster.shared.store.load([]) == []
    assert not cluster.shared.store._contents.rows
    cluster.stop()


def test_a_topology_change_while_a_claim_waits_answers_or_refuses_the_waiter() -> None:
    for seed in range(10):
        cluster = cluster_of(seed=seed)
        cluster.store.fail("slow", delay=1.0)
        futures = [
            cluster.ref(f"memo/{number}").ask("get", block=False) for number in range(9)
        ]
        cluster.advance(0.5)
        cluster.crash("node-1")
        cluster.store.heal()
        cluster.advance(12.5)
        assert all(future.is_done for future in futures)
        cluster.check()
        cluster.stop()


def test_an_unknown_members_departure_changes_nothing() -> None:
    cluster = cluster_of()
    epoch = cluster.snapshot().epoch
    known = token_of(cluster, "memo/1")
    assert cluster._entry.forget_session(SessionId("nobody.1#1")) == ()
    cluster.advance(3.0)
    assert cluster.snapshot().epoch == epoch
    assert token_of(cluster, "memo/1") == known
    cluster.stop()


def test_a_departure_invalidates_only_what_was_there() -> None:
    cluster = cluster_of()
    pids = [cluster.resolve(f"memo/{number}").pid for number in range(30)]
    cluster.crash("node-2")
    cluster.advance(8.0)
    cache = cluster._entry._outbox._deliveries.cache
    for pid in pids:
        assert (cache.peek(pid.identity) == pid) == (pid.node != "node-2")
    cluster.stop()


def test_a_stale_reference_from_before_a_rolling_restart_is_not_used() -> None:
    cluster = cluster_of()
    memo = cluster.ref("memo/1")
    memo.ask(["keep", "x"])
    before = cluster.resolve("memo/1").pid
    for number in (1, 2, 3):
        cluster.remove_node(f"node-{number}")
        cluster.add_node(f"node-{number}")
    assert memo.ask("get") == "x"
    after = cluster.resolve("memo/1").pid
    assert after.fencing_token > before.fencing_token
    assert after.session != before.session
    cluster.check()
    cluster.stop()


def test_a_same_named_node_is_another_member_and_its_former_writes_are_refused() -> (
    None
):
    cluster = cluster_of(nodes=1)
    cluster.ref("memo/1").ask(["keep", "x"])
    former = cluster.resolve("memo/1").pid
    cluster.crash("node-1")
    cluster.add_node("node-1")
    cluster.advance(8.0)
    assert served(cluster, "memo/1") == "x"
    now = cluster.resolve("memo/1").pid
    assert (now.node, former.node) == ("node-1", "node-1")
    assert now.session != former.session
    late = Save(former.identity, former.fencing_token, 99, b"late")
    assert cluster.shared.store.save([late]) == [Stale(now.fencing_token)]
    gone = GiveUp(former.identity, former.fencing_token)
    assert cluster.shared.store.give_up([gone]) == [Stale(now.fencing_token)]
    assert served(cluster, "memo/1") == "x"
    cluster.stop()


def test_a_late_stop_from_a_former_owner_stops_nothing() -> None:
    cluster = cluster_of(idle_after=1.0)
    first = token_of(cluster, "memo/1")
    cluster.advance(4.0)
    cluster.ref("memo/1").ask("get")
    second = cluster.resolve("memo/1").pid
    assert second.fencing_token > first
    hosting = cluster.node(second.node)._hosting
    assert hosting.passivate(Identity("memo", "1"), fencing_token=first) == ()
    assert token_of(cluster, "memo/1") == second.fencing_token
    cluster.stop()


def claims_of(cluster: SimulatedCluster, identity: str) -> list[Any]:
    return [
        each
        for each in cluster.shared.records
        if isinstance(each, EntryClaimed) and each.identity == identity
    ]


def test_the_host_dies_between_the_stored_entry_and_the_start() -> None:
    cluster = cluster_of()
    cluster.ref("memo/1").tell("get")
    cluster.run_until(lambda: claims_of(cluster, "memo/1"))
    (claimed,) = claims_of(cluster, "memo/1")
    cluster.crash(claimed.session.partition(".")[0])
    assert served(cluster, "memo/1") == ""
    assert token_of(cluster, "memo/1") > claimed.token
    cluster.check()
    cluster.stop()


def test_a_node_that_was_cold_started_over_old_rows_serves_them() -> None:
    cluster = cluster_of()
    for number in range(20):
        cluster.ref(f"memo/{number}").ask(["keep", f"text {number}"])
    for name in cluster.nodes:
        cluster.crash(name)
    cluster.advance(60.0)
    cluster.add_node("cold")
    cluster.advance(8.0)
    for number in range(20):
        assert served(cluster, f"memo/{number}") == f"text {number}"
    cluster.check()
    cluster.stop()


def test_the_locks_holder_dies() -> None:
    cluster = cluster_of()
    rows = cluster.shared.store._contents.rows
    identity = Identity("memo", "1")
    cluster.ref("memo/1").tell("get")
    cluster.run_until(lambda: identity in rows and rows[identity].lock is not None)
    lock = rows[identity].lock
    assert lock is not None
    cluster.crash(lock.session.partition(".")[0])
    assert served(cluster, "memo/1") == ""
    cluster.check()
    cluster.stop()


def test_a_stop_is_confirmed_after_its_deadline() -> None:
    cluster = cluster_of(seed=3)
    here = identity_at(cluster, "node-2")
    cluster.ref(here).ask(["keep", "x"])
    cluster.pause("node-2", seconds=12.0)
    cluster.remove_node("node-2", timeout=1.0)
    assert cluster.nodes == ("node-1", "node-3")
    assert served(cluster, here) == "x"
    cluster.advance(20.0)
    assert served(cluster, here) == "x"
    cluster.check()
    cluster.stop()


def test_a_paused_coordinators_late_write_is_refused() -> None:
    for seed in range(5):
        cluster = cluster_of(seed=seed)
        cluster.store.fail("late", nodes=["node-1"], delay=9.0)
        for number in range(12):
            cluster.ref(f"memo/{number}").tell("get")
        cluster.advance(0.05)
        cluster.pause("node-1", seconds=12.0)
        cluster.advance(8.0)
        cluster.store.heal()
        for number in range(12):
            assert served(cluster, f"memo/{number}") == ""
        cluster.advance(15.0)
        cluster.check()
        cluster.stop()


def test_every_dropped_message_is_an_event() -> None:
    cluster = cluster_of()
    seen: list[Event] = []
    with cluster.events.subscribe(seen.append):
        cluster.ref("unknown/1").tell("get")
        cluster.cut({"entry"}, {"node-1", "node-2", "node-3"})
        cluster.ref("memo/1").tell("get")
        cluster.advance(15.0)
    dropped = [event for event in seen if event.name == "MessageDropped"]
    assert {str(event.identity) for event in dropped} == {"unknown/1", "memo/1"}
    assert all(event.reason for event in dropped)
    cluster.stop()


def test_a_full_inbox_on_the_senders_own_node_is_an_event_for_what_is_told() -> None:
    kinds = {"memo": Kind(Memo, inbox_max=2)}
    cluster = Cluster.simulated(nodes=1, kinds=kinds)
    cluster.resolve("memo/1")
    node = cluster.node("node-1")
    node.resolve("memo/1")
    seen: list[Event] = []
    with cluster.events.subscribe(seen.append):
        for _ in range(5):
            node.ref("memo/1").tell("get")
        cluster.advance(1.0)
    dropped = [event for event in seen if event.name == "MessageDropped"]
    assert len(dropped) == 3
    assert all("Overloaded" in event.reason for event in dropped)
    cluster.stop()


def test_flapping_members_do_not_multiply_work() -> None:
    cluster = cluster_of()
    for number in range(50):
        cluster.ref(f"memo/{number}").ask("get")
    frames, operations = (
        cluster.shared.network.frame_count,
        cluster.shared.calls.operation_count,
    )
    for turn in range(6):
        cluster.add_node(f"flap-{turn}")
        cluster.remove_node(f"flap-{turn}")
    for number in range(50):
        cluster.ref(f"memo/{number}").ask("get")
    assert cluster.shared.network.frame_count - frames < 1_500
    assert cluster.shared.calls.operation_count - operations < 400
    cluster.check()
    cluster.stop()
