"""Every store passes the conformance suite, and a store that is wrong does not."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.conformance import StoreConformance, run_conformance
from actors.store_memory import MemoryStore, Row
from actors.store_url import open_store
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    ClaimRefused,
    Failed,
    GivenUp,
    GiveUp,
    Load,
    Loaded,
    LockHeld,
    LockRefused,
    Release,
    Released,
    Save,
    Saved,
    SessionRecord,
    SessionView,
    Stale,
    Store,
)
from placement.entry import Acquisition
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology
from tests.actors.postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parents[2]


class TestMemoryStore(StoreConformance):
    def open_store(self) -> Store:
        return open_store("memory://")


class TestSqliteStore(StoreConformance):
    options = ""

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path}/store.db{self.options}"

    def open_store(self) -> Store:
        return open_store(self.url)

    def reopen(self, store: Store) -> Store:
        store.close()
        return open_store(self.url)


class TestSqliteStoreSyncedLess(TestSqliteStore):
    options = "?synchronous=NORMAL"


@pytest.mark.servers
class TestPostgresStore(StoreConformance):
    @pytest.fixture(autouse=True)
    def in_a_database(self, postgres: PostgresServer) -> None:
        self.url = postgres.url(f"schema={postgres.new_schema()}")

    def open_store(self) -> Store:
        return open_store(self.url)

    def reopen(self, store: Store) -> Store:
        store.close()
        return open_store(self.url)


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{folder}/{number}.db"])
def test_r3_6_every_store_passes_the_conformance_suite(
    url: str, tmp_path: Path
) -> None:
    made: list[str] = []

    def make_store() -> Store:
        made.append(url.format(folder=tmp_path, number=len(made)))
        return open_store(made[-1])

    failures = run_conformance(make_store)

    assert failures == []
    assert len(made) > 60


def test_r3_6_the_suite_needs_no_pytest() -> None:
    code = "import sys, actors.conformance; sys.exit('pytest' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == 0


def test_r3_6_the_suite_finds_faults_where_asserts_are_off() -> None:
    code = (
        "import sys; from actors.conformance import run_conformance; "
        "from actors.store_memory import MemoryStore; "
        "MemoryStore._release = lambda self, request, now_ms: None; "
        "sys.exit(len(run_conformance(MemoryStore)))"
    )

    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, check=False)

    assert done.returncode > 0


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{folder}/store.db"])
def test_r2_3_a_closed_session_takes_no_lock_and_claims_nothing(
    url: str, tmp_path: Path
) -> None:
    cart, gone, there = Identity("cart", "42"), SessionId("a.1#1"), SessionId("b.1#1")
    with closing(open_store(url.format(folder=tmp_path))) as store:
        for session in (gone, there):
            store.open_session(SessionRecord(session=session, ttl_ms=5_000))
        store.close_session(gone, 0)

        late = store.try_acquire([Acquire(cart, Acquisition(gone, 1))])
        mine = Acquisition(there, 2)
        acquired = store.try_acquire([Acquire(cart, mine)])
        claimed = store.claim([Claim(cart, gone, 1, mine, 0)])

        assert late == [LockRefused("session a.1#1 is closed")]
        assert isinstance(acquired[0], Acquired)
        assert isinstance(claimed[0], ClaimRefused)
        assert claimed[0].message == "session a.1#1 is closed"


def test_a_transaction_in_memory_keeps_other_threads_out() -> None:
    store = MemoryStore()
    other = store.another()
    order: list[str] = []

    def write() -> None:
        other.write_members([], 0)
        order.append("other")

    thread = threading.Thread(target=write)
    with store.transaction():
        thread.start()
        thread.join(0.05)
        order.append("transaction")
        assert store.read_sessions().topology.epoch == 0
    thread.join()

    assert order == ["transaction", "other"]


# --- stores that are wrong ---------------------------------------------------


class ClaimsWithoutTheLock(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        return super()._why_refused(replace(row, lock=request.acquisition), request)


class TakesAnyProcedureOfTheHolder(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        mine = request.acquisition
        if mine and row.lock and row.lock.session == mine.session:
            request = replace(request, acquisition=row.lock)
        return super()._why_refused(row, request)


class ClaimsUnderTheLockOfAClosedSession(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        mine = request.acquisition
        if mine and row.lock == mine and self._is_closed(mine.session):
            mine = Acquisition(request.session, 0)
            row = replace(row, lock=mine)
        return super()._why_refused(row, replace(request, acquisition=mine))


class TakesALockThatIsHeld(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        if request.acquisition is None:
            row = replace(row, lock=None)
        return super()._why_refused(row, request)


class KeepsTheLockThatAClaimTook(MemoryStore):
    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        outcome = super()._claim(request, now_ms)
        if request.acquisition is None and isinstance(outcome, Claimed):
            self._row(request.identity).lock = Acquisition(request.session, -1)
        return outcome


class TakesNoLockOfAClosedSession(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        if request.acquisition is None and row.lock is not None:
            return "it is locked"
        return super()._why_refused(row, request)


class TakesTheLockAtAnyRevision(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        if request.acquisition is None:
            request = replace(request, expected_revision=row.revision)
        return super()._why_refused(row, request)


class IgnoresTheRevision(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        now = replace(request, expected_revision=row.revision)
        return super()._why_refused(row, now)


class ClaimsOverAnOpenOwner(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        return super()._why_refused(replace(row, owner=None), request)


class ClaimsOverItself(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        if row.owner == request.session:
            row = replace(row, owner=None)
        return super()._why_refused(row, request)


class ClaimsAgain(MemoryStore):
    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        row = self._row(request.identity)
        if (row.owner, row.attempt) == (request.session, request.attempt):
            row.fencing_token = row.revision = self._next_revision()
        return super()._claim(request, now_ms)


class RefusesARepeatedClaim(MemoryStore):
    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        row = self._row(request.identity)
        if (row.owner, row.attempt) == (request.session, request.attempt):
            return ClaimRefused(row.entry(request.identity, now_ms), "owned")
        return super()._claim(request, now_ms)


class KeepsTheLockAfterAClaim(MemoryStore):
    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        outcome = super()._claim(request, now_ms)
        if isinstance(outcome, Claimed):
            self._row(request.identity).lock = request.acquisition
        return outcome


class ClaimsFromAnEarlierRead(MemoryStore):
    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        outcome = super()._claim(request, now_ms)
        if isinstance(outcome, Claimed):
            record = replace(outcome.entry.record, snapshot=None)
            return Claimed(replace(outcome.entry, record=record))
        return outcome


class SharesTheLock(MemoryStore):
    def _acquire(
        self, request: Acquire, now_ms: int
    ) -> Acquired | LockHeld | LockRefused:
        outcome = super()._acquire(request, now_ms)
        if isinstance(outcome, LockHeld):
            self._row(request.identity).lock = request.acquisition
            return super()._acquire(request, now_ms)
        return outcome


class DeniesTheSameAcquisition(MemoryStore):
    def _acquire(
        self, request: Acquire, now_ms: int
    ) -> Acquired | LockHeld | LockRefused:
        held = self._row(request.identity).lock
        if held is not None and held == request.acquisition:
            return LockHeld(held)
        return super()._acquire(request, now_ms)


class KeepsTheLockOfAClosedSession(MemoryStore):
    def _acquire(
        self, request: Acquire, now_ms: int
    ) -> Acquired | LockHeld | LockRefused:
        held = self._row(request.identity).lock
        if held is not None and held != request.acquisition:
            return LockHeld(held)
        return super()._acquire(request, now_ms)


class ReleasesAnyLock(MemoryStore):
    def _release(self, request: Release, now_ms: int) -> Released:
        self._row(request.identity).lock = None
        return Released()


class ReleasesEveryLockOfTheSession(MemoryStore):
    def _release(self, request: Release, now_ms: int) -> Released:
        held = self._row(request.identity).lock
        if held is not None and held.session == request.acquisition.session:
            request = replace(request, acquisition=held)
        return super()._release(request, now_ms)


class LetsAnOlderTokenSave(MemoryStore):
    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        row = self._row(request.identity)
        if 0 < request.fencing_token < row.fencing_token:
            request = replace(request, fencing_token=row.fencing_token)
        return super()._save(request, now_ms)


class LetsTheFormerOwnerSave(MemoryStore):
    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        row = self._row(request.identity)
        if row.owner is None and row.fencing_token == request.fencing_token:
            self._write_snapshot(row, request.snapshot, request.version)
            return Saved(row.version)
        return super()._save(request, now_ms)


class WritesAnyVersion(MemoryStore):
    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        row = self._row(request.identity)
        if row.fencing_token == request.fencing_token:
            row.version = request.version - 1
        return super()._save(request, now_ms)


class TakesEmptyForNone(MemoryStore):
    def _write_snapshot(self, row: Row, snapshot: bytes, version: int) -> None:
        super()._write_snapshot(row, snapshot, version)
        row.snapshot = snapshot or None


class CutsSnapshots(MemoryStore):
    def _write_snapshot(self, row: Row, snapshot: bytes, version: int) -> None:
        super()._write_snapshot(row, snapshot[:65_536], version)


class RepeatsTokensAfterGivingUp(MemoryStore):
    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        outcome = super()._give_up(request, now_ms)
        self._contents.revision = min(
            self._contents.revision, request.fencing_token - 1
        )
        return outcome


class ForgetsTheSnapshotAfterGivingUp(MemoryStore):
    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        outcome = super()._give_up(request, now_ms)
        self._row(request.identity).snapshot = None
        return outcome


class DropsTheLastSnapshot(MemoryStore):
    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        return super()._give_up(replace(request, snapshot=None), now_ms)


class LetsAnOlderTokenGiveUp(MemoryStore):
    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        token = self._row(request.identity).fencing_token
        return super()._give_up(replace(request, fencing_token=token), now_ms)


class RefusesToGiveUpAgain(MemoryStore):
    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        row = self._row(request.identity)
        if row.owner is None:
            return Stale(row.fencing_token)
        return super()._give_up(request, now_ms)


class TakesAbsentForClosed(MemoryStore):
    def _is_open_once_settled(self, session: SessionId) -> bool:
        record = self._session(session)
        return record is not None and not record.closed


class TakesAbsentForOpen(MemoryStore):
    def _is_open_once_settled(self, session: SessionId) -> bool:
        return not self._is_closed(session)


class ClosesByReading(MemoryStore):
    def _load(self, request: Load, now_ms: int) -> Loaded:
        outcome = super()._load(request, now_ms)
        if outcome.entry.owner is not None:
            is_open = self._is_open_once_settled(outcome.entry.owner)
            return Loaded(outcome.entry, is_open)
        return outcome


class StopsAtTheFirstRefusal(MemoryStore):
    def _each(
        self,
        rule: Callable[[Any, int], Any],
        requests: Sequence[Any],
        *,
        writes: bool = True,
    ) -> list[Any]:
        outcomes: list[Any] = []
        for request in requests:
            outcomes += super()._each(rule, [request], writes=writes)
            if isinstance(outcomes[-1], LockHeld | ClaimRefused | Stale):
                left = len(requests) - len(outcomes)
                return outcomes + [Failed("stopped", may_have_happened=False)] * left
        return outcomes


class FoldsCase(MemoryStore):
    def _row(self, identity: Identity) -> Row:
        return super()._row(Identity.parse(identity.lower()))

    def _keep_row(self, identity: Identity, row: Row) -> None:
        super()._keep_row(Identity.parse(identity.lower()), row)


class ReopensClosedSessions(MemoryStore):
    def open_session(self, record: SessionRecord, /) -> bool:
        if self._is_closed(record.session):
            self._keep_session(record)
        return super().open_session(record)


class OpensRenewedSessionsAgain(MemoryStore):
    def open_session(self, record: SessionRecord, /) -> bool:
        stored = self._session(record.session)
        return super().open_session(record) or (stored is not None and stored.count > 0)


class ConfirmsAnotherRecord(MemoryStore):
    def open_session(self, record: SessionRecord, /) -> bool:
        stored = self._session(record.session)
        return super().open_session(
            replace(record, ttl_ms=record.ttl_ms if stored is None else stored.ttl_ms)
        )


class LowersTheCount(MemoryStore):
    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        stored = self._session(session)
        if stored is not None and not stored.closed:
            self._keep_session(replace(stored, count=count))
        return super().renew_session(session, count)


class RenewsWhatIsClosed(MemoryStore):
    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        return super().renew_session(session, count) or self._view()


class RenewsAndShowsOnlyItself(MemoryStore):
    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        view = super().renew_session(session, count)
        if view is None:
            return None
        mine = tuple(each for each in view.sessions if each.session == session)
        return SessionView(view.topology, mine)


class ClosesAtAnyCount(MemoryStore):
    def close_session(self, session: SessionId, count: int, /) -> bool:
        stored = self._session(session)
        return super().close_session(session, count if stored is None else stored.count)


class DoesNotCloseWhatIsAbsent(MemoryStore):
    def close_session(self, session: SessionId, count: int, /) -> bool:
        return self._session(session) is None or super().close_session(session, count)


class HidesClosedMembers(MemoryStore):
    def _view(self) -> SessionView:
        view = super()._view()
        seen = tuple(each for each in view.sessions if not each.closed)
        return SessionView(view.topology, seen)


class ReplacesMembersAtAnyEpoch(MemoryStore):
    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        return super().write_members(members, self._topology().epoch)


class ForgetsWhatMembersOffer(MemoryStore):
    def _keep_topology(self, topology: Topology) -> None:
        bare = tuple(Member(session=each.session) for each in topology.members)
        super()._keep_topology(Topology(epoch=topology.epoch, members=bare))


class SharesNothing(MemoryStore):
    def another(self) -> MemoryStore:
        return MemoryStore()


class LosesTheCountOnReopening(MemoryStore):
    def another(self) -> MemoryStore:
        self._contents.revision = 0
        return super().another()


class SavesWithoutARevision(MemoryStore):
    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        row = self._row(request.identity)
        before = row.revision
        outcome = super()._save(request, now_ms)
        row.revision = before
        return outcome


class FindsNoOwnerOpen(MemoryStore):
    def _owner_is_open(self, row: Row) -> bool:
        return row.owner is None or super()._owner_is_open(row)


class LocksEverything(MemoryStore):
    def _acquire(
        self, request: Acquire, now_ms: int
    ) -> Acquired | LockHeld | LockRefused:
        for row in self._contents.rows.values():
            if row.lock is not None and row.lock != request.acquisition:
                return LockHeld(row.lock)
        return super()._acquire(request, now_ms)


class NeverReleases(MemoryStore):
    def _release(self, request: Release, now_ms: int) -> Released:
        return Released()


class ClaimsForTheHolderOnly(MemoryStore):
    def _why_refused(self, row: Row, request: Claim) -> str | None:
        mine = request.acquisition
        if mine is not None and mine.session != request.session:
            return "not the holder"
        return super()._why_refused(row, request)


class ForgetsTheAttempt(MemoryStore):
    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        outcome = super()._claim(request, now_ms)
        return replace(outcome, entry=replace(outcome.entry, attempt=0))


class SavesWithoutAClaim(MemoryStore):
    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        row = self._row(request.identity)
        if row.revision == 0:
            row.snapshot, row.revision = request.snapshot, self._next_revision()
            self._keep_row(request.identity, row)
        return super()._save(request, now_ms)


class DropsSaves(MemoryStore):
    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        return Saved(request.version)


class DoesNotCount(MemoryStore):
    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        return super().renew_session(session, 0)


class RefusesToCloseAgain(MemoryStore):
    def close_session(self, session: SessionId, count: int, /) -> bool:
        return not self._is_closed(session) and super().close_session(session, count)


class HasOneTransaction(MemoryStore):
    @contextmanager
    def transaction(self) -> Iterator[None]:
        yield
        self.close()


class AnswersWithoutARequest(MemoryStore):
    def _each(
        self,
        rule: Callable[[Any, int], Any],
        requests: Sequence[Any],
        *,
        writes: bool = True,
    ) -> list[Any]:
        return super()._each(rule, requests, writes=writes) or [Failed("nothing")]


class HasNoUrl(MemoryStore):
    @property
    def url(self) -> str:
        return "memory"


class LetsThreadsIn(MemoryStore):
    """Between reading a row and writing it another thread has its turn.

    Not by luck: the first of several threads that reads a row goes on with what it
    has read when another thread has claimed that identity.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._maker = threading.get_ident()
        self._is_first = threading.Lock()
        self._is_claimed = threading.Event()

    def another(self) -> MemoryStore:
        other: Any = super().another()
        other._maker, other._is_first = self._maker, self._is_first
        other._is_claimed = self._is_claimed
        return other  # type: ignore[no-any-return]

    def _call(self, *, writes: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def _row(self, identity: Identity) -> Row:
        row = super()._row(identity)
        is_another = threading.get_ident() != self._maker
        if is_another and self._is_first.acquire(blocking=False):
            assert self._is_claimed.wait(30)
        return row

    def _keep_row(self, identity: Identity, row: Row) -> None:
        super()._keep_row(identity, row)
        if row.owner is not None:
            self._is_claimed.set()


WRONG_STORES = {
    ClaimsWithoutTheLock: "r3_2_a_claim_without_the_lock_is_refused",
    TakesAnyProcedureOfTheHolder: "r3_2_a_claim_by_another_acquisition_is_refused",
    ClaimsUnderTheLockOfAClosedSession: (
        "r3_2_a_claim_under_the_lock_of_a_closed_session_is_refused"
    ),
    TakesALockThatIsHeld: (
        "r3_2_a_claim_that_takes_the_lock_is_refused_while_it_is_held"
    ),
    KeepsTheLockThatAClaimTook: (
        "r3_1_a_claim_without_an_acquisition_takes_the_lock_and_frees_it"
    ),
    TakesNoLockOfAClosedSession: "r3_5_a_claim_takes_the_lock_of_a_closed_session",
    TakesTheLockAtAnyRevision: (
        "r3_3_a_late_claim_that_takes_the_lock_changes_nothing"
    ),
    IgnoresTheRevision: "r3_3_a_claim_against_a_moved_revision_is_refused",
    ClaimsOverAnOpenOwner: "r3_3_a_claim_over_an_open_owner_is_refused",
    ClaimsOverItself: "r3_3_a_claim_over_an_open_owner_is_refused",
    ClaimsAgain: "r3_3_the_same_claim_again_is_confirmed_not_made_again",
    RefusesARepeatedClaim: "r3_3_the_same_claim_again_is_confirmed_not_made_again",
    KeepsTheLockAfterAClaim: "r3_5_a_claim_releases_the_lock",
    ClaimsFromAnEarlierRead: "r3_5_a_claim_over_a_closed_owner_stands",
    SharesTheLock: "r3_1_one_acquisition_excludes_every_other",
    DeniesTheSameAcquisition: "r3_1_the_same_acquisition_again_has_the_same_outcome",
    KeepsTheLockOfAClosedSession: "r3_5_a_lock_is_free_when_its_session_is_closed",
    ReleasesAnyLock: "r3_5_a_release_by_another_acquisition_changes_nothing",
    ReleasesEveryLockOfTheSession: (
        "r3_5_a_late_release_leaves_the_next_holder_its_lock"
    ),
    LetsAnOlderTokenSave: "r3_3_an_older_token_saves_nothing",
    LetsTheFormerOwnerSave: "r3_3_who_has_given_up_saves_nothing",
    WritesAnyVersion: "r3_4_a_version_not_greater_is_confirmed_and_not_written",
    TakesEmptyForNone: "r3_4_an_empty_snapshot_is_not_none",
    CutsSnapshots: "r3_4_a_snapshot_of_a_mebibyte_comes_back",
    RepeatsTokensAfterGivingUp: "r3_3_tokens_grow_with_every_claim",
    ForgetsTheSnapshotAfterGivingUp: (
        "r3_3_giving_up_keeps_snapshot_version_and_token"
    ),
    DropsTheLastSnapshot: "r3_4_giving_up_saves_the_last_snapshot",
    LetsAnOlderTokenGiveUp: "r3_3_an_older_token_gives_nothing_up",
    RefusesToGiveUpAgain: "r3_3_giving_up_again_changes_nothing",
    TakesAbsentForClosed: "r3_5_an_owner_found_absent_is_closed_for_good",
    TakesAbsentForOpen: (
        "r3_5_the_lock_of_an_absent_session_is_free_once_it_is_closed"
    ),
    ClosesByReading: "r3_3_an_absent_owner_is_open_until_it_is_closed",
    StopsAtTheFirstRefusal: (
        "r3_3_each_acquisition_and_claim_of_a_sequence_stands_alone"
    ),
    FoldsCase: "r3_4_identities_of_every_form_are_told_apart",
    ReopensClosedSessions: "r3_5_a_closed_session_is_not_opened_again",
    OpensRenewedSessionsAgain: "r3_5_a_renewed_session_is_not_opened_again",
    ConfirmsAnotherRecord: "r3_5_a_session_is_opened_once",
    LowersTheCount: "r3_5_a_count_not_greater_is_confirmed",
    RenewsWhatIsClosed: "r3_5_a_session_that_is_not_open_is_not_renewed",
    RenewsAndShowsOnlyItself: "r3_5_renewing_reads_everyone",
    ClosesAtAnyCount: "r3_5_closing_is_conditional_on_the_count",
    DoesNotCloseWhatIsAbsent: (
        "r3_5_closing_an_absent_session_creates_its_closed_record"
    ),
    HidesClosedMembers: "r3_5_a_closed_record_is_seen_while_it_is_a_member",
    ReplacesMembersAtAnyEpoch: "r3_3_members_are_replaced_at_their_epoch_only",
    ForgetsWhatMembersOffer: "r3_4_a_member_is_kept_with_all_its_fields",
    SharesNothing: "r3_6_another_connection_shares_the_contents",
    LosesTheCountOnReopening: "r3_4_everything_survives_a_reopening",
    SavesWithoutARevision: "r3_3_every_write_of_an_entry_moves_its_revision",
    FindsNoOwnerOpen: "r3_1_a_free_lock_is_acquired_and_the_entry_read",
    LocksEverything: "r3_1_the_lock_of_one_identity_leaves_others_free",
    NeverReleases: "r3_5_a_released_lock_is_free",
    ClaimsForTheHolderOnly: (
        "r3_4_a_host_claims_under_the_acquisition_of_a_coordinator"
    ),
    ForgetsTheAttempt: "r3_4_a_claim_writes_the_owner_and_returns_the_entry",
    SavesWithoutAClaim: "r3_3_nothing_is_saved_where_nothing_was_claimed",
    DropsSaves: "r3_4_a_snapshot_is_kept_with_its_version",
    DoesNotCount: "r3_5_renewing_raises_the_count",
    RefusesToCloseAgain: "r3_5_closing_again_is_confirmed",
    HasOneTransaction: "r3_4_a_transaction_follows_another",
    AnswersWithoutARequest: "r3_3_an_empty_sequence_has_no_outcome",
    HasNoUrl: "r3_6_it_has_every_method_of_the_contracts",
    LetsThreadsIn: "r3_1_of_many_threads_exactly_one_claims_each_identity",
}


@pytest.mark.parametrize(
    ("wrong", "finder"),
    WRONG_STORES.items(),
    ids=[wrong.__name__ for wrong in WRONG_STORES],
)
def test_r3_6_a_wrong_store_fails_it(wrong: type[MemoryStore], finder: str) -> None:
    failures = run_conformance(wrong)

    assert f"test_{finder}" in [failure.check for failure in failures]
    assert all(failure.reason for failure in failures)


def test_r3_6_every_check_finds_a_wrong_store() -> None:
    checks = {name for name in dir(StoreConformance) if name.startswith("test_")}

    found = {
        failure.check for wrong in WRONG_STORES for failure in run_conformance(wrong)
    }

    assert checks - found == set()


def test_r3_6_a_store_without_open_store_is_told_what_to_override() -> None:
    with pytest.raises(NotImplementedError, match="override open_store"):
        StoreConformance().open_store()
