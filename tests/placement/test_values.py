import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from placement.entry import Pid
from placement.errors import (
    REASONS,
    TEXT_MAX,
    HandlerFailed,
    NoAuthority,
    OutcomeUnknown,
    PlacementError,
    Refusal,
    Rejected,
    text_of,
)
from placement.event import EventsLost, Happened, PidCacheEvent, event_of
from placement.identity import NAME_BYTES_MAX, BadIdentity, Identity
from placement.lease import Guard
from placement.partition import PartitionTable
from placement.pidcache import PidCache, PlacementResolution
from placement.registry import VirtualActorRegistry
from placement.rendezvous import RendezvousHasher, partition_of
from placement.topology import Member, SessionId, Topology, node_of
from tests.placement.builders import CART, A, B, C, member, table, topology

# --- identity ---


def test_an_identity_is_kind_and_name_and_a_text() -> None:
    identity = Identity.parse("account/a/b c")

    assert (identity.kind, identity.name) == ("account", "a/b c")
    assert identity == "account/a/b c" == Identity("account", "a/b c")
    assert Identity.parse(identity) is identity
    assert copy.copy(identity) == pickle.loads(pickle.dumps(identity)) == identity


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("account", "not of the form kind/name"),
        ("/a", "kind '' must be"),
        ("a b/c", "kind 'a b' must be"),
        ("k" * 65 + "/c", "must be 1 to 64"),
        ("a/", "the name after kind/ is empty"),
        ("a/b\n", "contains a control character"),
        ("a/\x85", "contains a control character"),
        ("a/\ud800", "is not valid UTF-8"),
        ("a/" + "é" * 257, "name has 514 bytes, at most 512"),
        (5, "an identity is a text, not int"),
    ],
)
def test_what_is_no_identity_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(BadIdentity) as caught:
        Identity.parse(text)
    assert said in str(caught.value)


def test_an_identity_is_made_of_two_texts_within_their_limits() -> None:
    with pytest.raises(BadIdentity, match="made of two texts"):
        Identity("a", 5)  # type: ignore[arg-type]
    assert Identity("k" * 64, "n" * NAME_BYTES_MAX)


# --- errors ---


class Declared(Rejected):
    have: int
    unit: str = "EUR"


def test_every_reason_has_its_error_and_comes_back_as_it() -> None:
    for name, error in REASONS.items():
        found = Refusal(name, "why").error()
        assert type(found) is error
        assert found.message == "why"
        assert Refusal.of(found) == Refusal(name, "why")
    assert OutcomeUnknown("x").may_have_happened
    assert isinstance(OutcomeUnknown("x"), TimeoutError)
    assert type(Refusal("Unheard", "why").error()) is PlacementError
    assert PlacementError().message == "PlacementError"


def test_a_handlers_failure_keeps_its_type_and_text() -> None:
    error = HandlerFailed("KeyError", "'a'")

    found = Refusal.of(error).error()

    assert isinstance(found, HandlerFailed)
    assert (found.type_name, found.text, found.message) == ("KeyError", "'a'", "'a'")


def test_a_declared_error_takes_exactly_its_fields() -> None:
    error = Declared(have=5)
    assert error.have == 5
    assert error.unit == "EUR"
    assert str(error) == "have=5"
    assert str(Rejected("too little", have=5)) == "too little"
    assert Declared.field_types() == {"have": int, "unit": str}
    assert Rejected.find(Declared.declared_name()) is Declared
    with pytest.raises(TypeError, match=r"unknown fields \['much'\], missing"):
        Declared(much=1)  # type: ignore[call-arg]
    assert Rejected("plain", anything=1).fields == {"anything": 1}


# --- topology, hashing, partitions ---


def test_a_topology_is_sorted_and_known_by_its_epoch() -> None:
    found = topology(B, A)
    assert [each.session for each in found.members] == [A, B]
    assert A in found
    assert C not in found
    joined = found.with_member(member(C))
    assert joined.epoch == found.epoch + 1
    assert C in joined
    left = joined.without([A])
    assert (left.epoch, [m.session for m in left.members]) == (3, [B, C])
    drained = joined.with_member(member(A, draining=True))
    assert [m.session for m in drained.owners()] == [B, C]
    assert member(A).hosts("cart")
    assert not member(A).hosts("other")
    assert not member(A, draining=True).hosts("cart")
    assert node_of(A) == member(A).node == "a"
    assert member(A).address == "a.1"


def sessions(count: int) -> list[SessionId]:
    return [SessionId(f"n{number}.1#1") for number in range(count)]


PLACED = "5=n4.1#1 6=n2.1#1 7=n4.1#1"


def placed() -> str:
    found = PartitionTable.build(topology(*sessions(5)))
    owners = []
    for number in (5, 6, 7):
        owner = found.owner_of(Identity("account", str(number)))
        assert owner is not None
        owners.append(f"{number}={owner.session}")
    return " ".join(owners)


@pytest.mark.parametrize("seed", ["0", "1"])
def test_r1_4_the_same_inputs_give_the_same_placement_in_every_process(
    seed: str,
) -> None:
    program = "from tests.placement.test_values import placed; print(placed())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    )

    assert run.stdout.strip() == placed() == PLACED


def test_r1_1_an_identity_has_one_partition_and_that_one_owner() -> None:
    found = table(A, B, C)
    for number in range(100):
        identity = Identity("cart", str(number))
        partition = found.partition_of(identity)
        assert partition == partition_of(identity, 16)
        assert found.owner_of(identity) == found.owners[partition]
    assert found.epoch == 1
    assert sum(found.counts().values()) == 16


memberships = st.lists(
    st.sets(st.integers(0, 6)).map(
        lambda numbers: tuple(SessionId(f"n{number}.1#1") for number in sorted(numbers))
    ),
    min_size=1,
    max_size=5,
)


@given(memberships, st.sampled_from([1.0, 2.5]))
def test_r1_4_a_table_updated_step_by_step_is_the_one_computed_anew(
    steps: list[tuple[SessionId, ...]], weight: float
) -> None:
    found = PartitionTable.build(Topology(), 32)
    for epoch, named in enumerate(steps, start=1):
        members = tuple(
            member(each, weight=weight if number == epoch else 1.0)
            for number, each in enumerate(named)
        )
        latest = Topology(epoch=epoch, members=members)
        found = found.adopt(latest)
        assert found == PartitionTable.build(latest, 32)


@given(memberships)
def test_r1_2_a_change_moves_only_what_it_must(
    steps: list[tuple[SessionId, ...]],
) -> None:
    before = PartitionTable.build(topology(*steps[0]), 64)
    named = steps[-1]
    after = before.adopt(topology(*named, epoch=2))
    if not before.owners or not after.owners:
        return
    for old, new in zip(before.owners, after.owners, strict=True):
        stayed = old.session in named
        assert old.session == new.session or not stayed or new.session not in steps[0]


def test_partitions_are_shared_by_weight_and_not_with_those_that_drain() -> None:
    heavy = Topology(
        members=(member(A, weight=3.0), member(B), member(C, draining=True))
    )
    counts = PartitionTable.build(heavy).counts()
    assert counts[C] == 0
    assert 2.6 < counts[A] / counts[B] < 3.4
    with pytest.raises(ValueError, match="at least 1"):
        PartitionTable.build(heavy, 0)


def test_the_host_is_the_owner_or_the_next_that_is_eligible() -> None:
    found = table(A, B)
    owner = found.owner_of(CART)
    assert owner is not None
    assert found.host_of(CART) == owner
    other = found.host_of(CART, avoid=frozenset({owner.session}))
    assert other.session in {A, B} - {owner.session}
    with pytest.raises(NoAuthority, match="no member that knows kind 'what'"):
        found.host_of(Identity("what", "1"))


def test_rendezvous_ranks_the_chosen_first() -> None:
    hasher = RendezvousHasher([member(B), member(A), member(C)])
    assert [each.session for each in hasher.members] == [A, B, C]
    firsts: Counter[SessionId] = Counter()
    for number in range(300):
        key = number.to_bytes(4, "big")
        chosen = hasher.choose(key)
        assert chosen is not None
        assert hasher.ranked(key)[0] == chosen
        firsts[chosen.session] += 1
    assert min(firsts.values()) > 60
    assert RendezvousHasher([]).choose(b"x") is None


def test_a_pid_says_where_and_which() -> None:
    pid = Pid(CART, A, 7)
    assert (pid.node, pid.address, str(pid)) == ("a", "a.1", "cart/1@a.1#1/7")


# --- guard, cache, registry, events ---


def test_a_guard_that_has_said_no_is_shut_for_good() -> None:
    guard = Guard(A, until_ns=10)
    assert guard.is_open(9)
    guard.extend(5)
    assert guard.until_ns == 10
    guard.extend(20)
    assert guard.is_open(19)
    assert not guard.is_open(20)
    guard.extend(100)
    assert guard.is_shut
    assert not guard.is_open(0)

    other = Guard(B, until_ns=10)
    other.shut()
    assert not other.is_open(0)


def pid(number: int, token: int = 1, session: SessionId = A) -> Pid:
    return Pid(Identity("cart", str(number)), session, token)


def test_what_is_kept_of_a_reference_is_found_as_long_as_the_reference() -> None:
    cache, pid = PidCache(ttl_ns=10, size_max=2), Pid(CART, A, 7)
    members = (Member(session=A), Member(session=B))
    cache.adopt(Topology(epoch=1, members=members))
    kept = PlacementResolution(
        identity=CART,
        pid=pid,
        owner=A,
        locality="local",
        fencing_token=7,
        epoch=1,
        observed_at_ms=0,
    )
    cache.keep(kept)
    assert cache.resolution(CART, 0) is None
    cache.put(pid, 0)
    assert cache.resolution(CART, 0) is None
    cache.keep(kept)
    assert cache.resolution(CART, 9) is kept
    assert cache.resolution(str(CART), 9) is kept
    assert cache.resolution(CART, 10) is None
    cache.adopt(Topology(epoch=2, members=members))
    assert cache.get(CART, 9) == pid
    assert cache.resolution(CART, 9) is None  # it may be another's now
    cache.keep(kept)
    assert cache.resolution(CART, 9) is None
    cache.put(Pid(CART, B, 8), 0)
    cache.keep(kept)  # of a reference that is known no more
    assert cache.resolution(CART, 0) is None
    cache.clear()
    assert len(cache) == 0


def test_the_cache_forgets_by_time_size_token_and_topology() -> None:
    cache = PidCache(ttl_ns=10, size_max=2)
    assert cache.get(CART, 0) is None
    cache.put(pid(1, token=5), 0)
    cache.put(pid(1, token=4), 0)
    assert cache.get(CART, 9) == pid(1, token=5)
    assert cache.get(CART, 10) is None
    assert len(cache) == 0

    cache.put(pid(1), 0)
    cache.put(pid(2, session=B), 0)
    cache.put(pid(3), 0)
    assert cache.evicted_count == 1
    assert cache.get(CART, 0) is None
    assert not cache.remove(pid(3, 9).identity, token=0)
    assert cache.remove(pid(3).identity, token=1)
    assert not cache.remove(pid(3).identity)
    assert cache.adopt(topology(A)) == (pid(2, session=B),)
    cache.put(pid(4), 0)
    assert cache.forget_sessions([B]) == ()
    assert cache.forget_sessions([A]) == (pid(4).identity,)
    with pytest.raises(ValueError, match="above 0"):
        PidCache(ttl_ns=0, size_max=1)


def test_a_reference_is_good_for_its_time_to_live_less_a_thousandth_at_most() -> None:
    ttl_ns = 1_024_000
    cache = PidCache(ttl_ns=ttl_ns, size_max=10)
    for number, at_ns in enumerate((5_000_000, 5_000_999, 5_001_000, 1_000_000)):
        cache.put(pid(number), at_ns)
        at_least_ns = at_ns + ttl_ns - ttl_ns // 1024
        assert cache.get(pid(number).identity, at_least_ns) == pid(number)
        assert cache.get(pid(number).identity, at_ns + ttl_ns) is None


class Worker:
    """An activation that says whether it is busy."""

    def __init__(self, pid: Pid, idle_after_ns: int | None) -> None:
        self.pid = pid
        self.idle_after_ns = idle_after_ns
        self.last_used_ns = 0
        self.is_straight = False
        self.busy = False

    def is_busy(self) -> bool:
        return self.busy


def test_the_registry_finds_idle_activations_and_only_those() -> None:
    registry: VirtualActorRegistry[Worker] = VirtualActorRegistry()
    assert registry.due_ns is None
    one = Worker(pid(1), 10)
    registry.add(one, now_ns=0)
    registry.add(Worker(pid(2), None), now_ns=0)
    registry.add(Worker(pid(3), 10), now_ns=0)
    assert registry.due_ns == 10
    one.last_used_ns = 5
    assert registry.idle(9) == ()
    assert registry.idle(10) == (pid(3),)
    assert registry.idle(15) == (pid(1),)
    assert registry.idle(20) == (pid(3),)
    assert registry.remove(pid(3, token=9)) is None
    removed = registry.remove(pid(3))
    assert removed is not None
    assert removed.pid == pid(3)
    assert registry.idle(100) == (pid(1),)
    assert [each.pid for each in registry.all()] == [pid(1), pid(2)]
    assert len(registry) == 2
    assert registry.find(pid(3).identity) is None


def test_what_is_busy_is_not_idle_and_its_idle_time_starts_at_the_end() -> None:
    registry: VirtualActorRegistry[Worker] = VirtualActorRegistry()
    worker = Worker(pid(1), 10)
    registry.add(worker, now_ns=0)
    worker.busy = True
    assert registry.idle(10) == registry.idle(20) == ()
    worker.busy, worker.last_used_ns = False, 25
    assert registry.idle(30) == ()
    assert registry.due_ns == 35
    assert registry.idle(35) == (pid(1),)


#: Steps of a second, since what is due soon is kept otherwise than what is not.
_SECOND_NS = 1_000_000_000
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "use", "busy", "remove", "look", "look"]),
        st.integers(0, 5),
        st.sampled_from(
            [0, *(_SECOND_NS * n // 10 for n in (1, 5, 20, 90, 300, 1000))]
        ),
    ),
    max_size=60,
)
_LOOK = ("look", 0, 100 * _SECOND_NS)
_LOOK_SOON = ("look", 0, 20 * _SECOND_NS)


@example([("add", 5, 0), _LOOK, _LOOK, _LOOK, _LOOK, _LOOK])
@example([("add", 5, 0), _LOOK_SOON, ("use", 5, 0), *6 * [_LOOK]])
@example([("add", 5, 0), _LOOK, ("use", 5, 0), *6 * [_LOOK]])
@example([("add", 5, 0), _LOOK_SOON, ("remove", 5, 0), ("add", 5, 0), *6 * [_LOOK]])
@example([("add", 5, 0), ("busy", 5, 0), _LOOK, _LOOK, ("busy", 5, 0), *6 * [_LOOK]])
@given(_STEPS)
def test_idle_ones_are_found_as_by_looking_at_each_all_the_time(
    steps: list[tuple[str, int, int]],
) -> None:
    registry: VirtualActorRegistry[Worker] = VirtualActorRegistry()
    there: dict[int, Worker] = {}
    idle_at_ns: dict[int, int] = {}
    now_ns, token = 0, 0
    for what, number, ns in steps:
        worker = there.get(number)
        if what == "add" and worker is None:
            token += 1
            idle_after_ns = None if number == 0 else number * number * 3 * _SECOND_NS
            worker = there[number] = Worker(pid(number, token=token), idle_after_ns)
            registry.add(worker, now_ns=now_ns)
            if idle_after_ns is not None:
                idle_at_ns[number] = now_ns + idle_after_ns
        elif what == "use" and worker is not None:
            worker.last_used_ns = now_ns
        elif what == "busy" and worker is not None:
            worker.busy = not worker.busy
        elif what == "remove" and worker is not None:
            assert registry.remove(worker.pid) is worker
            del there[number]
            idle_at_ns.pop(number, None)
        elif what == "look":
            for each, at_ns in idle_at_ns.items():
                unused_ns = there[each].last_used_ns + (there[each].idle_after_ns or 0)
                idle_at_ns[each] = max(at_ns, unused_ns)
            # Up to the next time at which there may be one, and not beyond it.
            due_ns = registry.due_ns
            assert not idle_at_ns or due_ns is not None
            if due_ns is not None:
                assert due_ns <= min([*idle_at_ns.values(), due_ns])
            now_ns = now_ns + ns if due_ns is None else min(now_ns + ns, due_ns)
            found = registry.idle(now_ns)
            looked_at = [each for each, at_ns in idle_at_ns.items() if at_ns <= now_ns]
            idle = [there[each].pid for each in looked_at if not there[each].busy]
            assert sorted(found, key=str) == sorted(idle, key=str)
            for each in looked_at:
                idle_at_ns[each] = now_ns + (there[each].idle_after_ns or 0)
    assert len(registry) == len(there)


def test_r4_5_an_event_bears_its_time_and_says_what_happened() -> None:
    happened = Happened(
        kind="cache", name="Dropped", identity=CART, session=A, token=3, reason="gone"
    )
    event = event_of(happened, node="n", number=4, at_ms=99, epoch=2)
    assert isinstance(event, PidCacheEvent)
    assert str(event) == "99 n #4 epoch 2 Dropped cart/1 at a.1#1 token 3 (gone)"
    lost = EventsLost(node="n", number=1, at_ms=1, epoch=0, name="EventsLost", count=2)
    assert str(lost) == "1 n #1 epoch 0 EventsLost"
    assert isinstance(member(A), Member)


@given(st.text(st.characters()))
def test_what_an_error_says_can_be_encoded_and_is_bounded(text: str) -> None:
    for said in (text_of(text), text_of(text * 5_000)):
        said.encode()
        assert len(said) <= TEXT_MAX
    assert Refusal("NotReady", text).message == text_of(text)
    assert HandlerFailed("E", text).text == text_of(text)
    if text.isascii():
        assert text_of(text[:TEXT_MAX]) == text[:TEXT_MAX]
