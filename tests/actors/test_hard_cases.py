"""The cases that hurt others, each as a sentence, in a simulated cluster."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors import Cluster, Grain, Kind, handler
from actors.lookup import PartitionIdentityLookup
from actors.node import PlacementNode
from actors.simulation import SimulatedCluster
from actors.store_memory import Row
from actors.trace import Entered, EntryClaimed, EntryGivenUp, EntrySaved
from messages.frames import Passivate
from placement.contracts import Claim, ClaimRefused, GiveUp, Save, Stale
from placement.errors import (
    NoAuthority,
    PlacementError,
)
from placement.event import Event
from placement.identity import Identity
from placement.topology import Member, SessionId

TTL_S = 5.0
IDLE_S = 10.0


@dataclass
class Total:
    value: int = 0
    seen: list[str] = field(default_factory=list)


class Counting(Grain[Total]):
    """Counts each request once."""

    @handler
    def add(self) -> int:
        if self.context.request_id not in self.state.seen:
            self.state.seen.append(self.context.request_id)
            self.state.value += 1
            self.save()
        return self.state.value

    @handler
    async def ask_first(self, identity: str) -> str:
        """Handle for as long as that one does not answer."""
        await self.context.ref(identity).ask_async("please", timeout=60.0)
        return "at last"

    @handler
    async def save_then_tell(self, identity: str, number: int) -> list[Any]:
        """How what waits for the save has ended, and after how long."""
        self.save()
        began_s = self.context.now()
        try:
            found = await self.context.ref(identity).ask_async(number, timeout=1.0)
        except PlacementError as error:
            found = str(error)
        return [found, round(self.context.now() - began_s, 3)]


class Distant(Counting):
    """Hosted elsewhere than where it is decided on."""


class Noting(Grain):
    """Keeps what it is told; has a bad day now and then."""

    def on_activate(self) -> None:
        self.noted: list[int] = []
        if self.context.identity.name == "failing":
            raise RuntimeError("no activation today")

    def on_receive(self, message: Any) -> Any:
        if message != "read":
            self.noted.append(message)
        return self.noted


def elsewhere(
    identity: Identity, eligible: tuple[Member, ...], owner: Member | None
) -> Member:
    """Never on the node whose coordinator decides."""
    return next(each for each in eligible if each != owner)


KINDS: dict[str, Any] = {
    "away": Kind(Distant, idle_after=IDLE_S, strategy=elsewhere),
    "count": Kind(Counting, idle_after=IDLE_S),
    "note": Kind(Noting, idle_after=None, inbox_max=5),
}


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    with Cluster.simulated(seed=5, nodes=4, kinds=KINDS, ttl=TTL_S) as cluster:
        yield cluster
        cluster.heal()
        cluster.advance(1)
        cluster.check()


def add(cluster: SimulatedCluster, name: str, request_id: str) -> int:
    """Add one, and ask again under the same id until the outcome is known."""
    counting = cluster.proxy(Counting, name)
    for _ in range(40):
        try:
            return cluster.ask(counting.add(), request_id=request_id)
        except PlacementError:
            cluster.advance(0.5)
    raise AssertionError("never answered")


def row_of(cluster: SimulatedCluster, identity: str) -> Row:
    return cluster.shared.store.rows.get(Identity.parse(identity), Row())


def entered(cluster: SimulatedCluster, identity: str) -> list[Entered]:
    return [
        each
        for each in cluster.shared.records
        if isinstance(each, Entered) and each.identity == identity
    ]


def claims(cluster: SimulatedCluster, identity: str) -> list[EntryClaimed]:
    return [
        each
        for each in cluster.shared.records
        if isinstance(each, EntryClaimed) and each.identity == identity
    ]


def store_outcomes(cluster: SimulatedCluster) -> list[tuple[Any, Any]]:
    """Every claim, save and giving up from now on, with what the store said."""
    outcomes: list[tuple[Any, Any]] = []
    store: Any = cluster.shared.store

    def watched(rule: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        def perform(request: Any, now_ms: int) -> Any:
            outcome = rule(request, now_ms)
            outcomes.append((request, outcome))
            return outcome

        return perform

    for name in ("_claim", "_save", "_give_up"):
        setattr(store, name, watched(getattr(store, name)))
    return outcomes


def cached(node: PlacementNode, identity: str) -> Any:
    return node._outbox._deliveries.cache.peek(Identity.parse(identity))


def homes(cluster: SimulatedCluster, count: int) -> dict[str, list[str]]:
    """Start so many identities; which are on which node."""
    found: dict[str, list[str]] = {name: [] for name in cluster.nodes}
    for number in range(count):
        found[cluster.resolve(f"note/{number}").pid.node].append(f"note/{number}")
    return found


def events_of(cluster: SimulatedCluster, name: str) -> list[Event]:
    """The events of that name from now on; they fill in as they come."""
    events: list[Event] = []

    def keep(event: Event) -> None:
        if event.name == name:
            events.append(event)

    cluster.events.subscribe(keep)
    return events


# --- idle ---


def test_a_cache_hit_prolongs_the_idle_time(cluster: SimulatedCluster) -> None:
    add(cluster, "1", "first")
    first = cluster.resolve("count/1").pid

    for number in range(10):
        cluster.advance(IDLE_S * 0.6)
        assert cached(cluster._entry, "count/1") == first
        cluster.ref("count/1").tell({"": "add", "args": {}}, request_id=str(number))

    assert cluster.resolve("count/1").pid == first
    cluster.advance(IDLE_S * 1.1)
    assert sum(cluster.snapshot().activations.values()) == 0
    assert add(cluster, "1", "last") == 12


def test_idle_time_starts_when_the_handling_ends() -> None:
    # With so long a time to live nobody loses anything by standing still.
    with Cluster.simulated(seed=5, nodes=3, kinds=KINDS, ttl=200.0) as cluster:
        waiting = cluster.resolve("count/1").pid
        other = next(
            on[0]
            for home, on in homes(cluster, 9).items()
            if on and home != waiting.node
        )
        cluster.pause(cluster.resolve(other).pid.node, seconds=2.5 * IDLE_S)
        answer = cluster.ref("count/1").ask(
            {"": "ask_first", "args": {"identity": other}}, block=False, timeout=60.0
        )

        assert answer.get() == "at last"

        assert cluster.now() > 2.5 * IDLE_S
        cluster.advance(IDLE_S * 0.9)
        assert waiting in cluster.node(waiting.node).hosted()
        cluster.advance(IDLE_S * 0.3)
        assert waiting not in cluster.node(waiting.node).hosted()
        cluster.check()


# --- looking up ---


def test_a_remote_owner_is_answered_with_its_reference_and_nothing_starts_here(
    cluster: SimulatedCluster,
) -> None:
    found = cluster.resolve("note/1")
    before = len(entered(cluster, "note/1"))

    for name in cluster.nodes:
        resolution = cluster.node(name).resolve("note/1")
        assert resolution.pid == found.pid
        is_home = name == found.pid.node
        assert resolution.locality == ("local" if is_home else "remote")
        hosted = [each.identity for each in cluster.node(name).snapshot().activations]
        assert hosted == (["note/1"] if is_home else [])

    assert len(entered(cluster, "note/1")) == before
    assert len(claims(cluster, "note/1")) == 1


def test_no_authority_has_no_side_effects(cluster: SimulatedCluster) -> None:
    cluster.resolve("note/1")
    cluster.advance(1)
    store: Any = cluster.shared.store
    contents = store._contents
    before = (dict(contents.rows), contents.revision, contents.topology)

    with pytest.raises(NoAuthority):
        cluster.ref("nobody/1").ask(1)
    with pytest.raises(NoAuthority):
        cluster.resolve("nobody/1")
    cluster.ref("nobody/1").tell(1)
    cluster.advance(1)

    assert (dict(contents.rows), contents.revision, contents.topology) == before
    assert cached(cluster._entry, "nobody/1") is None
    for name in cluster.nodes:
        assert cluster.node(name).waiting() == ()
    assert cluster._entry.waiting() == ()


def change_join(cluster: SimulatedCluster, _: str) -> None:
    node = cluster.node_type(
        "node-9",
        kinds=cluster._kinds,
        engine=cluster._engine_for("node-9"),
        settings=cluster._settings,
    )
    cluster._nodes["node-9"] = node
    node.begin_member()


def change_crash(cluster: SimulatedCluster, home: str) -> None:
    cluster.crash(home)


def change_leave(cluster: SimulatedCluster, home: str) -> None:
    cluster.node(home).begin_stop()


def test_what_waits_for_a_save_ends_by_its_own_deadline_and_is_not_sent_later(
    cluster: SimulatedCluster,
) -> None:
    counting = cluster.proxy(Counting, "1")
    cluster.ask(counting.add())
    cluster.ref("note/1").ask(0)
    home = cluster.resolve("count/1").pid.node

    cluster.store.fail("slow", nodes={home}, times=1, delay=0.5)
    found, seconds = cluster.ask(counting.save_then_tell("note/1", 1))
    assert found == [0, 1]
    assert 0.5 <= seconds < 1.0

    cluster.store.fail("slow", nodes={home}, times=1, delay=2.5)
    found, seconds = cluster.ask(counting.save_then_tell("note/1", 2))
    assert "is not confirmed yet" in found
    assert seconds == 1.0
    cluster.advance(5)
    assert cluster.ref("note/1").ask("read") == [0, 1]


@pytest.mark.parametrize("change", [change_join, change_crash, change_leave])
@pytest.mark.parametrize("number", range(4))
def test_a_topology_change_while_a_claim_waits_answers_or_refuses_the_waiter(
    cluster: SimulatedCluster, change: Callable[..., None], number: int
) -> None:
    table = cluster._entry._table
    assert table is not None
    owner = table.owner_of(Identity.parse(f"note/{number}"))
    assert owner is not None
    home = owner.session.split(".")[0]
    cluster.store.fail("slow", nodes={home}, times=2, delay=1.5)
    waiters = [
        cluster.node(name).seek(f"note/{number}", timeout=30.0)
        for name in cluster.nodes
        if name != home
    ]
    cluster.advance(0.1)
    assert cluster.node(home)._claims.running_count == 1

    change(cluster, home)

    at_s = cluster.now()
    for waiter in waiters:
        pid = waiter.get()
        assert pid.session in cluster.shared.store.open_sessions
    assert cluster.now() - at_s < 3 * TTL_S
    assert len({waiter.get() for waiter in waiters}) == 1
    cluster.advance(0.5)
    for node in cluster._nodes.values():
        assert [each for each in node.waiting() if each[0] == "claim"] == []


# --- departures ---


def test_an_unknown_members_departure_changes_nothing(
    cluster: SimulatedCluster,
) -> None:
    pids = {name: cluster.resolve(f"note/{name}").pid for name in "abcdef"}
    epoch = cluster.snapshot().epoch
    operations = cluster.shared.calls.operation_count
    lookup = PartitionIdentityLookup(cluster._entry)

    assert lookup.on_member_left(SessionId("node-77.1#1")) == ()

    for name, pid in pids.items():
        assert cached(cluster._entry, f"note/{name}") == pid
        assert cluster.resolve(f"note/{name}").pid == pid
    assert cluster.shared.calls.operation_count == operations
    assert cluster.snapshot().epoch == epoch


def test_a_departure_invalidates_only_what_was_there(
    cluster: SimulatedCluster,
) -> None:
    on = homes(cluster, 24)
    assert all(on.values())
    dropped = events_of(cluster, "Dropped")
    activated = events_of(cluster, "Activated")

    cluster.crash("node-2")
    cluster.run_until(lambda: "node-2" not in cluster.snapshot().members)
    cluster.advance(0.1)

    assert {str(e.identity) for e in dropped if e.node == "entry"} == set(on["node-2"])
    assert activated == []
    for name in cluster.nodes:
        for identity in on[name]:
            assert cached(cluster._entry, identity).node == name
            assert cluster.resolve(identity).pid.node == name
    for identity in on["node-2"]:
        assert cluster.resolve(identity).pid.node != "node-2"
    cluster.advance(0.1)
    assert len(activated) == len(on["node-2"])


def test_a_stale_reference_from_before_a_rolling_restart_is_not_used(
    cluster: SimulatedCluster,
) -> None:
    before = {}
    for number in range(12):
        add(cluster, str(number), "before")
        before[number] = cluster.resolve(f"count/{number}").pid
    bounces = events_of(cluster, "MessageDropped")

    for name in cluster.nodes:
        cluster.remove_node(name)
        cluster.add_node(name)

    members = {member.session for member in cluster._entry.topology.members}
    for number, pid in before.items():
        assert pid.session not in members
        known = cached(cluster._entry, f"count/{number}")
        assert known is None or known.session in members
        assert add(cluster, str(number), "after") == 2
        now = cluster.resolve(f"count/{number}").pid
        assert now.session in members
        assert now.fencing_token > pid.fencing_token
    assert bounces == []


def test_a_same_named_node_is_another_member_and_its_former_selfs_write_is_refused(
    cluster: SimulatedCluster,
) -> None:
    add(cluster, "1", "first")
    former = cluster.resolve("count/1").pid
    outcomes = store_outcomes(cluster)
    cluster.store.fail("late", nodes={former.node}, times=1, delay=2.5 * TTL_S)
    cluster.ref("count/1").tell({"": "add", "args": {}}, request_id="late")
    cluster.run_until(lambda: cluster.shared.calls.faults[0]._left == 0)  # type: ignore[attr-defined]

    cluster.crash(former.node)
    cluster.store.heal()
    cluster.add_node(former.node)
    assert add(cluster, "1", "second") == 2
    cluster.advance(3 * TTL_S)

    late = [
        o
        for r, o in outcomes
        if isinstance(r, Save) and r.fencing_token == former.fencing_token
    ]
    assert [type(outcome) for outcome in late] == [Stale]
    assert cluster.node(former.node).session != former.session
    assert cluster.node(former.node).address != former.address
    assert add(cluster, "1", "third") == 3
    saved = [e.token for e in cluster.shared.records if isinstance(e, EntrySaved)]
    assert saved == sorted(saved)


# --- what comes late ---


def test_a_late_stop_from_a_former_owner_stops_nothing(
    cluster: SimulatedCluster,
) -> None:
    add(cluster, "1", "first")
    former = cluster.resolve("count/1").pid
    outcomes = store_outcomes(cluster)
    # Its giving up arrives at the store when another has been the owner for long.
    cluster.store.fail("late", nodes={former.node}, times=1, delay=3 * TTL_S)
    cluster.node(former.node).passivate_idle(0)
    cluster.run_until(lambda: cluster.shared.calls.faults[0]._left == 0)  # type: ignore[attr-defined]
    cluster.crash(former.node)
    cluster.store.heal()
    assert add(cluster, "1", "second") == 2
    current = cluster.resolve("count/1").pid
    assert current.fencing_token > former.fencing_token

    other = next(name for name in cluster.nodes if name != current.node)
    cluster.node(other)._postbox.send(
        current.address, Passivate("count/1", former.fencing_token)
    )
    for number in range(3, 7):
        assert add(cluster, "1", str(number)) == number
        cluster.advance(TTL_S)

    assert cluster.resolve("count/1").pid == current
    assert [
        type(outcome)
        for request, outcome in outcomes
        if isinstance(request, GiveUp) and request.fencing_token == former.fencing_token
    ] == [Stale]
    given_up = [e for e in cluster.shared.records if isinstance(e, EntryGivenUp)]
    assert [each for each in given_up if each.identity == "count/1"] == []


def test_the_host_dies_between_the_stored_entry_and_the_start(
    cluster: SimulatedCluster,
) -> None:
    future = cluster.ref("count/1").ask({"": "add", "args": {}}, block=False)
    cluster.run_until(lambda: claims(cluster, "count/1"))
    claim = claims(cluster, "count/1")[0]
    assert entered(cluster, "count/1") == []

    cluster.crash(claim.session.split(".")[0])

    assert future.get() == 1
    assert add(cluster, "1", "again") == 2
    assert {each.token for each in entered(cluster, "count/1")} == {
        claims(cluster, "count/1")[-1].token
    }
    assert claims(cluster, "count/1")[-1].token > claim.token


def test_a_node_that_was_cold_started_over_old_rows_serves_them(
    cluster: SimulatedCluster,
) -> None:
    for number in range(6):
        add(cluster, str(number), "before")
    tokens = {n: cluster.resolve(f"count/{n}").fencing_token for n in range(6)}

    for name in cluster.nodes:
        cluster.crash(name)
    cluster.add_node("node-1")

    assert cluster.nodes == ("node-1",)
    for number in range(6):
        assert add(cluster, str(number), "after") == 2
        assert cluster.resolve(f"count/{number}").fencing_token > tokens[number]


def test_the_locks_holder_dies(cluster: SimulatedCluster) -> None:
    future = cluster.ref("away/1").ask({"": "add", "args": {}}, block=False)
    cluster.run_until(lambda: row_of(cluster, "away/1").lock is not None)
    lock = row_of(cluster, "away/1").lock
    assert lock is not None
    assert claims(cluster, "away/1") == []

    cluster.crash(lock.session.split(".")[0])

    assert future.get() == 1
    assert cluster.now() < 3 * TTL_S
    assert row_of(cluster, "away/1").lock is None


def test_a_stop_is_confirmed_after_its_deadline(cluster: SimulatedCluster) -> None:
    add(cluster, "1", "first")
    former = cluster.resolve("count/1").pid
    timed_out = events_of(cluster, "StopTimedOut")
    cluster.store.fail("slow", nodes={former.node}, delay=3.0)
    at_s = cluster.now()

    cluster.remove_node(former.node, timeout=1.0)

    assert cluster.now() - at_s < 6 * TTL_S
    cluster.store.heal()
    cluster.advance(0.1)
    assert [event.node for event in timed_out] == [former.node]
    assert add(cluster, "1", "second") == 2
    current = cluster.resolve("count/1").pid
    cluster.advance(IDLE_S * 0.9)
    assert cluster.resolve("count/1").pid == current


def test_a_paused_hosts_late_claim_is_refused(cluster: SimulatedCluster) -> None:
    outcomes = store_outcomes(cluster)
    table = cluster.node("node-1")._table
    assert table is not None
    owner = table.owner_of(Identity("count", "1"))
    assert owner is not None
    cluster.store.fail("late", nodes={owner.node}, times=1, delay=4 * TTL_S)
    future = cluster.ref("count/1").ask(
        {"": "add", "args": {}}, block=False, timeout=4 * TTL_S, request_id="first"
    )
    cluster.run_until(lambda: cluster.shared.calls.faults[0]._left == 0)  # type: ignore[attr-defined]

    cluster.pause(owner.node, seconds=3 * TTL_S)

    assert future.get() == 1
    cluster.advance(5 * TTL_S)
    late = [
        o for r, o in outcomes if isinstance(r, Claim) and r.session == owner.session
    ]
    assert [type(outcome) for outcome in late] == [ClaimRefused]
    assert add(cluster, "1", "second") == 2


# --- what is dropped, and what it costs ---


def test_every_dropped_message_is_an_event(cluster: SimulatedCluster) -> None:
    dropped = events_of(cluster, "MessageDropped")
    told = Counter[str]()

    def tell(identity: str, number: int, *, of: str = "entry") -> None:
        sender = cluster._entry if of == "entry" else cluster.node(of)
        sender.ref(identity).tell(number)
        told[identity] += 1

    for number in range(40):
        tell("note/full", number)  # more than its inbox takes at once
        tell("note/failing", number)
        tell("nobody/1", number)
        tell(f"note/{number % 5}", number, of="node-1")
    cluster.advance(1)
    home = cluster.resolve("note/0").pid.node
    cluster.pause(home, seconds=3 * TTL_S)
    for number in range(40):
        for name in range(5):
            tell(f"note/{name}", 100 + number, of="node-1")
    cluster.advance(TTL_S / 2)
    cluster.add_node("node-5")
    cluster.advance(4 * TTL_S)
    leaving = cluster.resolve("note/1").pid.node
    for number in range(40):
        tell("note/1", 200 + number)
    cluster.remove_node(leaving)
    cluster.advance(15)

    handled = Counter(
        each.identity
        for each in cluster.shared.records
        if isinstance(each, Entered) and each.purpose == "handle"
    )
    said = Counter(str(event.identity) for event in dropped)
    assert handled + said == told
    assert {"note/full", "note/failing", "nobody/1"} <= set(said)
    assert said["nobody/1"] == said["note/failing"] == 40
    assert all(event.reason for event in dropped)


def test_a_full_inbox_on_the_senders_own_node_is_an_event_for_what_is_told(
    cluster: SimulatedCluster,
) -> None:
    home = cluster.node(cluster.resolve("note/1").pid.node)
    home.resolve("note/1")
    dropped = events_of(cluster, "MessageDropped")

    for number in range(8):
        home.ref("note/1").tell(number)
    cluster.advance(1)

    assert len(dropped) == 3  # it takes five
    assert all("Overloaded" in event.reason for event in dropped)


def test_a_node_that_stands_still_is_removed_as_by_a_crash(
    cluster: SimulatedCluster,
) -> None:
    add(cluster, "1", "first")
    home = cluster.resolve("count/1").pid.node
    cluster.pause(home, seconds=2.5 * TTL_S)

    cluster.remove_node(home, timeout=1.0)

    assert home not in cluster.nodes
    assert add(cluster, "1", "second") == 2
    cluster.advance(4 * TTL_S)
    assert add(cluster, "1", "third") == 3


def test_flapping_members_do_not_multiply_work(cluster: SimulatedCluster) -> None:
    for number in range(30):
        add(cluster, str(number), "first")
    frames = cluster.shared.network.frame_count
    operations = cluster.shared.calls.operation_count
    requests = 0

    for turn in range(12):
        flapping = f"flap-{turn % 2}"
        cluster.add_node(flapping)
        for number in range(30):
            assert add(cluster, str(number), f"{turn}") == turn + 2
            requests += 1
        if turn % 3:
            cluster.remove_node(flapping)
        else:
            cluster.crash(flapping)
            cluster.run_until(
                lambda: f"flap-{turn % 2}" not in cluster.snapshot().members  # noqa: B023
            )

    assert cluster.shared.network.frame_count - frames < 20 * requests
    assert cluster.shared.calls.operation_count - operations < 8 * requests
    for name in cluster.nodes:
        assert cluster.node(name).waiting() == ()
