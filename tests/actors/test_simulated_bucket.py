"""The store of a simulation that is like one over NATS, and what goes wrong with it."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, cast

import pytest

from actors import Cluster
from actors import nats_entries as entries_module
from actors.conformance import StoreConformance
from actors.driven_loop import DrivenLoop
from actors.faults import FAULTS, STALE
from actors.nats_bucket import Bucket
from actors.nats_sessions import NatsSessions
from actors.simulated_bucket import BucketContents, SimulatedBucketStore
from actors.simulated_store import StoreCounter, Trouble
from actors.trace import EntryClaimed, EntryGivenUp, EntrySaved, Record, SessionChanged
from actors.trial import Result, Scenario, Trial
from actors.world import World
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    Failed,
    GivenUp,
    GiveUp,
    Load,
    Save,
    Saved,
    SessionRecord,
    Store,
    StoreFailure,
)
from placement.entry import Acquisition
from placement.identity import Identity
from placement.topology import SessionId
from tests.actors.actors_under_test import Account

CART = Identity("cart", "ü 1")
A, B = SessionId("a.1#1"), SessionId("b.1#1")


class Wrong:
    """What is wrong with all calls, if anything."""

    def __init__(self) -> None:
        self.now: Trouble | None = None

    def trouble(self, node: str) -> Trouble | None:
        return self.now


class Setting:
    """A bucket of its own, and what is wrong with it."""

    def __init__(self, seed: int = 1) -> None:
        self.world = World(seed)
        self.records: list[Record] = []
        self.contents = BucketContents(self.world, self.records)
        self.calls, self.wrong = StoreCounter(), Wrong()
        self.calls.faults.append(self.wrong)

    def connect(self) -> SimulatedBucketStore:
        return self.contents.connect(self.world, "node", self.calls)

    def one(self, call: Callable[[Sequence[Any]], Sequence[Any]], request: Any) -> Any:
        with self.connect().transaction():
            (outcome,) = call([request])
        return outcome

    def wait(self, seconds: float) -> None:
        """Let time pass, that of the turn under way first."""
        world = self.world
        world.now_ns, world.spent_ns = world.moment_ns(), 0
        world.run_until(world.now_ns + round(seconds * 1e9))


class TestSimulatedBucket(StoreConformance):
    def open_store(self) -> Store:
        return cast("Store", Setting().connect())


# --- what is wrong, happens ---


def opened(setting: Setting) -> SimulatedBucketStore:
    store = setting.connect()
    for session in (A, B):
        assert store.open_session(SessionRecord(session=session, ttl_ms=1000))
    return store


def claim(session: SessionId, attempt: int = 1, revision: int = 0) -> Claim:
    return Claim(CART, session, attempt, None, revision)


def test_the_records_are_of_what_has_really_changed() -> None:
    setting = Setting()
    store = opened(setting)
    (made,) = store.claim([claim(A)])
    token = made.entry.fencing_token
    assert store.save([Save(CART, token, 1, b"x")]) == [Saved(1)]
    assert store.give_up([GiveUp(CART, token)]) == [GivenUp()]
    assert store.close_session(A, 0)

    found = [each for each in setting.records if not isinstance(each, SessionChanged)]
    at_ns = setting.world.now_ns
    assert found == [
        EntryClaimed(at_ns, CART, A, token, "", 0),
        EntrySaved(at_ns, CART, token, 1),
        EntryGivenUp(at_ns, CART, A, token),
    ]
    states = [
        (each.session, each.state)
        for each in setting.records
        if isinstance(each, SessionChanged)
    ]
    assert states == [(A, "open"), (B, "open"), (A, "closed")]
    assert list(setting.contents.open_sessions) == [B]
    assert setting.contents.rows[CART].snapshot == b"x"


def test_a_reading_may_be_old_and_grants_nothing() -> None:
    setting = Setting()
    mine = opened(setting)
    setting.wait(2.0)
    (made,) = mine.claim([claim(A)])
    setting.wait(0.1)
    setting.wrong.now = Trouble("stale", 1_000_000_000)

    seen = set()
    for _ in range(50):
        other = setting.connect()
        with other.transaction():
            (loaded,) = other.load([Load(CART)])
        seen.add(loaded.entry.owner)
    # Of before the claim, and of after it.
    assert seen == {None, A}

    for attempt in range(50):
        refused = setting.one(setting.connect().claim, claim(B, attempt + 10))
        assert not isinstance(refused, Claimed)
    assert setting.contents.rows[CART].owner == A
    assert setting.contents.rows[CART].fencing_token == made.entry.fencing_token


async def take_for_closed(
    _: NatsSessions, bucket: Bucket, session: SessionId, until: float
) -> SessionRecord:
    """Write nothing about a session that was not found."""
    return SessionRecord(session=session, ttl_ms=0, closed=True)


@pytest.mark.parametrize("is_settled", [True, False])
def test_a_session_that_an_old_reading_lacks_is_over_only_once_that_is_written(
    is_settled: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_settled:
        monkeypatch.setattr(NatsSessions, "settle", take_for_closed)
    owners = set()
    for seed in range(150):
        setting = Setting(seed)
        here, there = setting.connect(), setting.connect()
        assert here.open_session(SessionRecord(session=B, ttl_ms=1_000))
        setting.wait(2.0)
        assert there.open_session(SessionRecord(session=A, ttl_ms=1_000))
        (made,) = there.claim([claim(A)])
        assert isinstance(made, Claimed)
        # Of readings up to a second old half are older than that, each by itself.
        setting.wait(0.5)
        setting.wrong.now = Trouble("stale", 1_000_000_000)
        lock = Acquisition(B, 1)
        with here.transaction():
            (acquired,) = here.try_acquire([Acquire(CART, lock)])
            if isinstance(acquired, Acquired):
                revision = acquired.entry.revision
                here.claim([Claim(CART, B, 2, lock, revision)])
        owners.add(setting.contents.rows[CART].owner)

    # Where nobody writes that it never was, an open session is robbed.
    assert owners == ({A} if is_settled else {A, B})


def test_a_write_may_arrive_late_and_then_finds_another_revision() -> None:
    arrived = refused = 0
    for seed in range(40):
        setting = Setting(seed)
        store = opened(setting)
        setting.wrong.now = Trouble("late", 500_000_000)
        with store.transaction():
            (outcome,) = store.claim([claim(A)])
        setting.wrong.now = None
        was_written = CART in setting.contents.rows
        if isinstance(outcome, Failed) and not was_written:
            assert outcome.may_have_happened
            if seed % 2:
                # Another is faster.
                (made,) = setting.connect().claim([claim(B)])
                assert isinstance(made, Claimed)
            setting.wait(1.0)
            assert setting.contents.rows[CART].owner == (B if seed % 2 else A)
            arrived, refused = arrived + (not seed % 2), refused + seed % 2

    assert arrived
    assert refused


def test_an_answer_may_be_lost_and_is_read_back_or_said_to_be_unknown() -> None:
    outcomes = set()
    for seed in range(40):
        setting = Setting(seed)
        store = opened(setting)
        setting.wrong.now = Trouble("lost")
        with store.transaction():
            (outcome,) = store.claim([claim(A)])
        outcomes.add(type(outcome))
        if isinstance(outcome, Failed):
            assert outcome.may_have_happened
        else:
            assert setting.contents.rows[CART].owner == A

    assert outcomes == {Claimed, Failed}


def test_a_call_of_several_keys_may_end_between_them() -> None:
    ends = set()
    for seed in range(60):
        setting = Setting(seed)
        store = setting.connect()
        setting.wrong.now = Trouble("lost")
        with suppress(StoreFailure):
            store.open_session(SessionRecord(session=A, ttl_ms=1000))
        # It is listed before it is opened.
        is_listed = setting.contents.read("cluster") is not None
        is_opened = A in setting.contents.open_sessions
        assert is_listed or not is_opened
        ends.add((is_listed, is_opened))

    assert ends == {(True, False), (True, True)}


def test_who_is_refused_or_not_answered_hears_whether_it_may_have_happened() -> None:
    setting = Setting()
    store = opened(setting)
    for what, may_have_happened in (("fail", False), ("away", False)):
        setting.wrong.now = Trouble(what)
        with store.transaction():
            (outcome,) = store.claim([claim(A)])
        assert isinstance(outcome, Failed)
        assert outcome.may_have_happened is may_have_happened
        assert CART not in setting.contents.rows
    setting.wrong.now = Trouble("away")
    with pytest.raises(StoreFailure, match="nobody answers"):
        store.read_sessions()


# --- the loop ---


def test_the_loop_runs_all_to_the_end_in_no_time_and_in_order() -> None:
    loop, seen = DrivenLoop.new(), list[str]()

    async def wait(name: str, seconds: float) -> str:
        await asyncio.sleep(seconds)
        seen.append(name)
        return name

    async def work() -> Sequence[str]:
        late = asyncio.ensure_future(wait("late", 3600.0))
        names = await asyncio.gather(wait("b", 2.0), wait("a", 1.0), wait("c", 2.0))
        assert not late.done()
        return names

    assert list(loop.run(work())) == ["b", "a", "c"]
    assert seen == ["a", "b", "c", "late"]
    assert loop.time() == 3600.0


def test_the_loop_raises_what_nobody_has_taken_and_says_what_never_ends() -> None:
    async def fail() -> None:
        raise ValueError("mine")

    async def work() -> None:
        asyncio.get_running_loop().call_soon(raised, 1)

    def raised(_: int) -> None:
        raise LookupError("nobody's")

    async def stuck() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(ValueError, match="mine"):
        DrivenLoop.new().run(fail())
    with pytest.raises(LookupError, match="nobody's"):
        DrivenLoop.new().run(work())
    with pytest.raises(RuntimeError, match="nobody will do"):
        DrivenLoop.new().run(stuck())


# --- whole clusters ---


def test_a_users_cluster_may_have_such_a_store() -> None:
    kinds = {"account": Account}
    with Cluster.simulated(seed=1, nodes=3, kinds=kinds, store="nats") as cluster:
        account = cluster.proxy(Account, "42")
        assert cluster.ask(account.deposit(Decimal(10))) == Decimal(10)
        home = cluster.resolve("account/42").pid.node
        cluster.kill_node(home)
        cluster.run_until(lambda: home not in cluster.snapshot().members)
        assert cluster.ask(account.balance()) == Decimal(10)
        cluster.check()

    with pytest.raises(ValueError, match="memory or nats, not 'disk'"):
        Cluster.simulated(seed=1, nodes=1, kinds=kinds, store="disk")


def trial(seed: int) -> Result:
    scenario = Scenario(faults=(*FAULTS, STALE), store="nats")
    return Trial(seed, scenario).perform()


@pytest.mark.seeds
@pytest.mark.parametrize("seed", range(1, 4))
def test_r2_5_whatever_the_store_does_no_rule_is_broken(seed: int) -> None:
    found = trial(seed)

    assert found.violations == ()
    assert found.answered > 3_000


@pytest.mark.seeds
def test_a_connection_that_confirms_by_reading_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entries_module, "_is_to_confirm", lambda *_: False)

    assert {each.rule for each in trial(129).violations} == {"left-behind"}
