"""The conformance suite of the store contracts: what every store has to pass.

A store's author subclasses `StoreConformance` in a test module and runs pytest:

    class TestMyStore(StoreConformance):
        @pytest.fixture(autouse=True)
        def in_a_folder(self, tmp_path):
            self.folder = tmp_path

        def open_store(self):
            return MyStore(self.folder)

        def reopen(self, store):
            store.close()
            return MyStore(self.folder)

or calls `run_conformance(make_store)`, which needs no pytest and returns what
failed. Each check is one sentence of `placement.contracts`; `r3_1` and the like
are the requirements that it proves.
"""

# ruff: noqa: D102 - the checks' names are their sentences

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TypeVar

from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    ClaimRefused,
    GivenUp,
    GiveUp,
    Load,
    Loaded,
    LockHeld,
    Release,
    Released,
    Save,
    Saved,
    SessionRecord,
    SessionView,
    Stale,
    Store,
    StoreFailure,
)
from placement.entry import Acquisition, ActivationEntry, Pid
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology

A, B, C = (SessionId(f"node-{name}.1#1") for name in "abc")
GHOST = SessionId("node-ghost.1#1")
CART, USER, ROOM = Identity("cart", "42"), Identity("user", "7"), Identity("room", "x")

TTL_MS = 5_000
MIB = 1 << 20

# A store may refuse to wait longer for the others: who claims then asks again.
_TRIES_MAX = 100

_Kind = TypeVar("_Kind")
_Result = TypeVar("_Result")

# Attempts and procedures: no two checks, and no two threads, use one twice.
_numbers = count(1)


class NotConforming(AssertionError):
    """What the store did, and what the contract says instead."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A check that a store does not pass, and why."""

    check: str
    reason: str


class Conformance:
    """The hooks that a store's author overrides."""

    _opened: tuple[Store, ...] = ()

    def open_store(self) -> Store:
        """Open a store without contents; called once for each check."""
        raise NotImplementedError("override open_store: it makes an empty store")

    def reopen(self, store: Store) -> Store:
        """Close `store`, the only connection, and open its contents again.

        Override it where the contents outlive the process: this one only changes
        the connection.
        """
        again = store.another()
        store.close()
        return again

    def teardown_method(self) -> None:
        """Close what the check has opened."""
        for store in self._opened:
            store.close()

    def _new(self, *sessions: SessionId) -> Store:
        """An empty store in which `sessions` are open."""
        store = self._closing(self.open_store())
        for session in sessions:
            _open(store, session)
        return store

    def _another(self, store: Store) -> Store:
        return self._closing(store.another())

    def _closing(self, store: Store) -> Store:
        self._opened = (*self._opened, store)
        return store


class LockConformance(Conformance):
    """The checks of `PlacementLock`."""

    def test_r3_1_a_free_lock_is_acquired_and_the_entry_read(self) -> None:
        store = self._new(A)

        acquired = _acquire(store, CART, _acquisition(A))

        _equal(_plain(acquired.entry), ActivationEntry(identity=CART), "entry")
        _check(not acquired.owner_is_open, "no owner is not an open one")

    def test_r3_1_one_acquisition_excludes_every_other(self) -> None:
        store = self._new(A, B)
        first = _acquisition(A)
        _acquire(store, CART, first)

        for other in (_acquisition(B), _acquisition(A)):
            held = _only(store.try_acquire([Acquire(CART, other)]), LockHeld)
            _equal(held.holder, first, "holder")

    def test_r3_1_the_lock_of_one_identity_leaves_others_free(self) -> None:
        store = self._new(A, B)

        _acquire(store, CART, _acquisition(A))

        _acquire(store, USER, _acquisition(B))

    def test_r3_1_the_same_acquisition_again_has_the_same_outcome(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(A)
        first = _acquire(store, CART, mine)

        again = _acquire(store, CART, mine)

        _equal(_plain(again.entry), _plain(first.entry), "entry")
        _only(store.try_acquire([Acquire(CART, _acquisition(B))]), LockHeld)
        _release(store, CART, mine)
        _acquire(store, CART, _acquisition(B))

    def test_r3_1_acquiring_tells_whether_the_owner_is_open(self) -> None:
        store = self._new(A, B)
        owned = _own(store, CART, A)
        mine = _acquisition(B)

        while_open = _acquire(store, CART, mine)
        _close(store, A)
        when_closed = _acquire(store, CART, mine)

        _equal(_plain(while_open.entry).owner, A, "owner")
        _check(while_open.owner_is_open, "the owner is open")
        _equal(when_closed.entry.fencing_token, owned.fencing_token, "token")
        _check(not when_closed.owner_is_open, "the owner is closed")

    def test_r3_5_a_released_lock_is_free(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(A)
        _acquire(store, CART, mine)

        _release(store, CART, mine)

        _acquire(store, CART, _acquisition(B))

    def test_r3_5_a_release_by_another_acquisition_changes_nothing(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(A)
        _acquire(store, CART, mine)

        _release(store, CART, _acquisition(A))
        _release(store, CART, Acquisition(B, mine.procedure))

        held = _only(store.try_acquire([Acquire(CART, _acquisition(B))]), LockHeld)
        _equal(held.holder, mine, "holder")

    def test_r3_5_a_late_release_leaves_the_next_holder_its_lock(self) -> None:
        store = self._new(A, B)
        first, second = _acquisition(A), _acquisition(A)
        _acquire(store, CART, first)
        _release(store, CART, first)
        _acquire(store, CART, second)

        _release(store, CART, first)

        held = _only(store.try_acquire([Acquire(CART, _acquisition(B))]), LockHeld)
        _equal(held.holder, second, "holder")

    def test_r3_5_a_release_changes_no_entry(self) -> None:
        store = self._new(A, B)
        _own(store, CART, A)
        mine = _acquisition(B)
        before = _acquire(store, CART, mine).entry

        _release(store, CART, mine)
        _release(store, CART, mine)

        _equal(_load(store, CART), _plain(before), "entry")

    def test_r3_5_a_lock_is_free_when_its_session_is_closed(self) -> None:
        store = self._new(A, B)
        _acquire(store, CART, _acquisition(A))

        _close(store, A)

        _acquire(store, CART, _acquisition(B))

    def test_r3_5_a_lock_is_not_free_while_its_session_is_open(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(A)
        _acquire(store, CART, mine)

        store.renew_session(A, 1)
        _check(not store.close_session(A, 0), "a renewed session was closed")

        held = _only(store.try_acquire([Acquire(CART, _acquisition(B))]), LockHeld)
        _equal(held.holder, mine, "holder")

    def test_r3_5_the_lock_of_an_absent_session_is_free_once_it_is_closed(
        self,
    ) -> None:
        store = self._new(B)
        _acquire(store, CART, _acquisition(GHOST))

        _acquire(store, CART, _acquisition(B))

        _check(not _opens(store, GHOST), "a session found absent was opened later")

    def test_r3_1_of_many_threads_exactly_one_claims_each_identity(self) -> None:
        sessions = [SessionId(f"node-{number}.1#1") for number in range(6)]
        store = self._new(*sessions)
        identities = [Identity("race", str(number)) for number in range(50)]
        won: dict[Identity, list[ActivationEntry]] = {one: [] for one in identities}

        def racer(session: SessionId) -> Callable[[], None]:
            mine = self._another(store)

            def run() -> None:
                for identity in identities:
                    entry = _try_to_own(mine, identity, session)
                    if entry is not None:
                        won[identity].append(entry)

            return run

        _in_threads([racer(session) for session in sessions])

        for identity, entries in won.items():
            _equal(len(entries), 1, f"claims of {identity} that stand")
            _equal(_load(store, identity).owner, entries[0].owner, "owner")
        tokens = {entries[0].fencing_token for entries in won.values()}
        _equal(len(tokens), len(identities), "different tokens")


class ActivationConformance(Conformance):
    """The checks of `ActivationStorage`."""

    # --- claims ---

    def test_r3_4_a_claim_writes_the_owner_and_returns_the_entry(self) -> None:
        store = self._new(A)
        mine = _acquisition(A)
        before = _acquire(store, CART, mine).entry
        request = Claim(CART, A, next(_numbers), mine, before.revision)

        entry = _only(store.claim([request]), Claimed).entry

        _equal(entry.identity, CART, "identity")
        _equal(entry.owner, A, "owner")
        _equal(entry.attempt, request.attempt, "attempt")
        _equal(entry.revision, entry.fencing_token, "revision of the claim's write")
        _equal(entry.record.pid, Pid(CART, A, entry.fencing_token), "pid")
        _equal(entry.record.snapshot, None, "snapshot")
        _equal(entry.record.version, 0, "version")
        _check(entry.fencing_token > before.fencing_token, "the token grows")
        loaded = _only(store.load([Load(CART)]), Loaded)
        _equal(_plain(loaded.entry), _plain(entry), "entry loaded")
        _check(loaded.owner_is_open, "the owner is open")

    def test_r3_4_a_host_claims_under_the_acquisition_of_a_coordinator(self) -> None:
        store = self._new(A, B)

        entry = _own(store, CART, B, acquisition=_acquisition(A))

        _equal(entry.owner, B, "owner")

    def test_r3_2_a_claim_without_the_lock_is_refused(self) -> None:
        store = self._new(A)

        request = Claim(CART, A, next(_numbers), _acquisition(A), 0)

        _refused(store, request)
        _equal(_load(store, CART).owner, None, "owner")

    def test_r3_2_a_claim_by_another_acquisition_is_refused(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(A)
        revision = _acquire(store, CART, mine).entry.revision

        for other in (_acquisition(A), Acquisition(B, mine.procedure)):
            _refused(store, Claim(CART, A, next(_numbers), other, revision))

    def test_r3_2_a_claim_after_the_lock_was_released_is_refused(self) -> None:
        store = self._new(A, B)
        mine, other = _acquisition(A), _acquisition(B)
        revision = _acquire(store, CART, mine).entry.revision
        request = Claim(CART, A, next(_numbers), mine, revision)
        _release(store, CART, mine)

        _refused(store, request)
        _acquire(store, CART, other)
        _refused(store, request)

    def test_r3_2_a_claim_under_the_lock_of_a_closed_session_is_refused(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(A)
        revision = _acquire(store, CART, mine).entry.revision

        _close(store, A)

        _refused(store, Claim(CART, B, next(_numbers), mine, revision))

    def test_r3_1_a_claim_without_an_acquisition_takes_the_lock_and_frees_it(
        self,
    ) -> None:
        store = self._new(A, B)

        first = _only(store.claim([_taking(A, 0)]), Claimed).entry

        _equal(first.owner, A, "owner")
        _equal(first.record.pid, Pid(CART, A, first.fencing_token), "pid")
        _acquire(store, CART, _acquisition(B))

    def test_r3_2_a_claim_that_takes_the_lock_is_refused_while_it_is_held(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(B)
        revision = _acquire(store, CART, mine).entry.revision

        for session in (A, B):
            _refused(store, _taking(session, revision))

        # The refused have not taken it either.
        request = Claim(CART, B, next(_numbers), mine, revision)
        _equal(_only(store.claim([request]), Claimed).entry.owner, B, "owner")

    def test_r3_5_a_claim_takes_the_lock_of_a_closed_session(self) -> None:
        store = self._new(A, B)
        _acquire(store, CART, _acquisition(A))
        _close(store, A)

        _equal(_only(store.claim([_taking(B, 0)]), Claimed).entry.owner, B, "owner")

    def test_r3_3_a_late_claim_that_takes_the_lock_changes_nothing(self) -> None:
        store = self._new(A, B)
        request = _taking(A, 0)
        first = _only(store.claim([request]), Claimed).entry
        again = _only(store.claim([request]), Claimed).entry
        _equal(_plain(again), _plain(first), "entry")
        _refused(store, _taking(B, first.revision))
        _give_up(store, GiveUp(CART, first.fencing_token))

        refused = _refused(store, request)

        _equal(refused.entry.owner, None, "owner")
        later = _only(store.claim([_taking(B, refused.entry.revision)]), Claimed).entry
        _check(later.fencing_token > first.fencing_token, "the token grows")

    def test_r3_3_a_claim_against_a_moved_revision_is_refused(self) -> None:
        store = self._new(A, B)
        owned = _own(store, CART, A)
        mine = _acquisition(B)
        read = _acquire(store, CART, mine).entry
        _give_up(store, GiveUp(CART, owned.fencing_token, 1, b"later"))

        _refused(store, Claim(CART, B, next(_numbers), mine, read.revision))

        current = _acquire(store, CART, mine).entry
        request = Claim(CART, B, next(_numbers), mine, current.revision)
        entry = _only(store.claim([request]), Claimed).entry
        _equal(entry.record.snapshot, b"later", "snapshot")

    def test_r3_3_a_claim_over_an_open_owner_is_refused(self) -> None:
        store = self._new(A, B)
        owned = _own(store, CART, A)

        for session in (B, A):
            mine = _acquisition(session)
            revision = _acquire(store, CART, mine).entry.revision
            _refused(store, Claim(CART, session, next(_numbers), mine, revision))
            _release(store, CART, mine)

        _equal(_load(store, CART), _plain(owned), "entry")

    def test_r3_5_a_claim_over_a_closed_owner_stands(self) -> None:
        store = self._new(A, B)
        first = _own(store, CART, A)
        _save(store, Save(CART, first.fencing_token, 3, b"state"))
        _close(store, A)

        second = _own(store, CART, B)

        _equal(second.owner, B, "owner")
        _equal(second.record.snapshot, b"state", "snapshot")
        _equal(second.record.version, 3, "version")
        _check(second.fencing_token > first.fencing_token, "the token grows")

    def test_r3_5_an_owner_found_absent_is_closed_for_good(self) -> None:
        store = self._new(A, B)
        _own(store, CART, GHOST, acquisition=_acquisition(A))

        acquired = _acquire(store, CART, _acquisition(B))

        _check(not acquired.owner_is_open, "an absent owner found is closed")
        _check(not _opens(store, GHOST), "a session found absent was opened later")

    def test_r3_3_an_absent_owner_is_open_until_it_is_closed(self) -> None:
        store = self._new(A)
        _own(store, CART, GHOST, acquisition=_acquisition(A))

        loaded = _only(store.load([Load(CART)]), Loaded)

        _check(loaded.owner_is_open, "absence was taken for closed")
        _check(_opens(store, GHOST), "a read has closed a session")

    def test_r3_3_a_refused_claim_changes_nothing(self) -> None:
        store = self._new(A, B)
        owned = _own(store, CART, A)
        mine = _acquisition(B)
        revision = _acquire(store, CART, mine).entry.revision

        request = Claim(CART, B, next(_numbers), mine, revision)
        refused = _refused(store, request)

        _equal(refused.entry.owner, A, "owner in the refusal")
        _check(bool(refused.message), "a refusal says why")
        _equal(_load(store, CART).fencing_token, owned.fencing_token, "token")
        held = _only(store.try_acquire([Acquire(CART, _acquisition(A))]), LockHeld)
        _equal(held.holder, mine, "holder")

    def test_r3_3_the_same_claim_again_is_confirmed_not_made_again(self) -> None:
        store = self._new(A, B)
        mine = _acquisition(A)
        revision = _acquire(store, CART, mine).entry.revision
        request = Claim(CART, A, next(_numbers), mine, revision)
        first = _only(store.claim([request]), Claimed).entry

        again = _only(store.claim([request]), Claimed).entry
        _save(store, Save(CART, first.fencing_token, 1, b"state"))
        later = _only(store.claim([request]), Claimed).entry

        _equal(_plain(again), _plain(first), "entry")
        _equal(later.fencing_token, first.fencing_token, "token")
        _equal(_load(store, CART).fencing_token, first.fencing_token, "token stored")

    def test_r3_3_a_claim_repeated_after_its_giving_up_is_refused(self) -> None:
        store = self._new(A)
        mine = _acquisition(A)
        revision = _acquire(store, CART, mine).entry.revision
        request = Claim(CART, A, next(_numbers), mine, revision)
        entry = _only(store.claim([request]), Claimed).entry
        _give_up(store, GiveUp(CART, entry.fencing_token))

        _refused(store, request)
        # Also where the acquisition arrives once more, as a late message may.
        _acquire(store, CART, mine)
        _refused(store, request)

    def test_r3_5_a_claim_releases_the_lock(self) -> None:
        store = self._new(A, B)

        owned = _own(store, CART, A)
        acquired = _acquire(store, CART, _acquisition(B))

        _equal(acquired.entry.fencing_token, owned.fencing_token, "token")

    # --- tokens ---

    def test_r3_3_tokens_grow_with_every_claim(self) -> None:
        store = self._new(A, B)
        tokens = []

        for session in (A, A, B, A):
            entry = _own(store, CART, session)
            tokens.append(entry.fencing_token)
            _give_up(store, GiveUp(CART, entry.fencing_token))
            other = Identity("other", str(len(tokens)))
            tokens.append(_own(store, other, session).fencing_token)
            mine = _acquisition(session)
            _acquire(store, CART, mine)
            _release(store, CART, mine)

        _equal(tokens, sorted(set(tokens)), "tokens")

    def test_r3_4_everything_survives_a_reopening(self) -> None:
        store = self._new(A, B, C)
        cart, user = _own(store, CART, A), _own(store, USER, B)
        _save(store, Save(CART, cart.fencing_token, 7, b"state"))
        _give_up(store, GiveUp(USER, user.fencing_token, 2, b"last"))
        lock = _acquisition(B)
        _acquire(store, ROOM, lock)
        store.renew_session(A, 5)
        _close(store, C)
        members = (Member(session=A, kinds=("cart",)), Member(session=C))
        store.write_members(members, 0)
        carts, users = _load(store, CART), _load(store, USER)
        view = store.read_sessions()

        store = self._closing(self.reopen(store))

        _equal(_load(store, CART), carts, "entry with an owner")
        _equal(_load(store, USER), users, "entry given up")
        _equal(store.read_sessions(), view, "sessions and members")
        held = _only(store.try_acquire([Acquire(ROOM, _acquisition(A))]), LockHeld)
        _equal(held.holder, lock, "holder")
        _check(not _opens(store, C), "a closed session was opened again")
        newer = _own(store, USER, A).fencing_token
        _check(newer > max(cart.fencing_token, user.fencing_token), "the token grows")

    def test_r3_3_every_write_of_an_entry_moves_its_revision(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token
        revisions = [_load(store, CART).revision]

        _save(store, Save(CART, token, 1, b"state"))
        revisions.append(_load(store, CART).revision)
        _give_up(store, GiveUp(CART, token))
        revisions.append(_load(store, CART).revision)
        revisions.append(_own(store, CART, A).revision)

        _equal(revisions, sorted(set(revisions)), "revisions")

    # --- saves ---

    def test_r3_4_a_snapshot_is_kept_with_its_version(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token

        saved = _save(store, Save(CART, token, 4, b"state"))

        _equal(saved.version, 4, "version confirmed")
        record = _load(store, CART).record
        _equal((record.snapshot, record.version), (b"state", 4), "record")
        _equal(record.pid, Pid(CART, A, token), "pid")

    def test_r3_4_a_version_not_greater_is_confirmed_and_not_written(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token
        _save(store, Save(CART, token, 4, b"four"))
        before = _load(store, CART)

        for version in (4, 3):
            saved = _save(store, Save(CART, token, version, b"late"))
            _equal(saved.version, 4, "version confirmed")

        _equal(_load(store, CART), before, "entry")

    def test_r3_3_an_older_token_saves_nothing(self) -> None:
        store = self._new(A, B)
        older = _own(store, CART, A).fencing_token
        _close(store, A)
        newer = _own(store, CART, B).fencing_token

        stale = _only(store.save([Save(CART, older, 9, b"old")]), Stale)

        _equal(stale.current, newer, "current token")
        _equal(_load(store, CART).record.snapshot, None, "snapshot")

    def test_r3_3_who_has_given_up_saves_nothing(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token
        _give_up(store, GiveUp(CART, token))

        stale = _only(store.save([Save(CART, token, 9, b"late")]), Stale)

        _equal(stale.current, token, "current token")
        _equal(_load(store, CART).record.snapshot, None, "snapshot")

    def test_r3_3_nothing_is_saved_where_nothing_was_claimed(self) -> None:
        store = self._new(A)

        stale = _only(store.save([Save(CART, 1, 1, b"state")]), Stale)

        _equal(stale.current, 0, "current token")
        _equal(_load(store, CART), ActivationEntry(identity=CART), "entry")

    def test_r3_4_an_empty_snapshot_is_not_none(self) -> None:
        store = self._new(A)
        entry = _own(store, CART, A)
        _equal(entry.record.snapshot, None, "snapshot never saved")

        _save(store, Save(CART, entry.fencing_token, 1, b""))

        _equal(_load(store, CART).record.snapshot, b"", "snapshot saved empty")
        _give_up(store, GiveUp(CART, entry.fencing_token))
        _equal(_own(store, CART, A).record.snapshot, b"", "snapshot claimed")

    def test_r3_4_a_snapshot_of_a_mebibyte_comes_back(self) -> None:
        store = self._new(A, B)
        snapshot = bytes(range(256)) * (MIB // 256)
        token = _own(store, CART, A).fencing_token

        _save(store, Save(CART, token, 1, snapshot))
        _close(store, A)

        _check(_own(store, CART, B).record.snapshot == snapshot, "it was changed")

    def test_r3_4_identities_of_every_form_are_told_apart(self) -> None:
        store = self._new(A)
        identities = [
            Identity("k" * 64, "n"),
            Identity("k", "n" * 512),
            Identity("k", "é" * 256),
            Identity("k", "\N{OLD ITALIC LETTER A}" * 128),
            *(Identity("k", name) for name in ("a", "A", "a ", " a", "a/b", "a/B")),
            # The same to a reader, composed and not.
            *(Identity("k", name) for name in ("\u00e9", "e\u0301")),
            *(Identity("k", name) for name in ("%", "_", "*", ">", "a.b", "'", '"')),
            Identity("K", "a"),
        ]
        owned = {identity: _own(store, identity, A) for identity in identities}
        for number, entry in enumerate(owned.values()):
            snapshot = str(number).encode()
            _save(store, Save(entry.identity, entry.fencing_token, 1, snapshot))

        for number, (identity, entry) in enumerate(owned.items()):
            loaded = _load(store, identity)
            _equal(loaded.identity, identity, "identity")
            _equal(loaded.fencing_token, entry.fencing_token, f"token of {identity!r}")
            _equal(loaded.record.snapshot, str(number).encode(), f"{identity!r}")

    # --- giving up ---

    def test_r3_3_giving_up_keeps_snapshot_version_and_token(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token
        _save(store, Save(CART, token, 5, b"state"))

        _give_up(store, GiveUp(CART, token))

        entry = _load(store, CART)
        _equal(entry.owner, None, "owner")
        _equal(entry.record.pid, None, "pid")
        _equal(entry.fencing_token, token, "token")
        _equal(entry.record.snapshot, b"state", "snapshot")
        _equal(entry.record.version, 5, "version")
        loaded = _only(store.load([Load(CART)]), Loaded)
        _check(not loaded.owner_is_open, "no owner is not an open one")

    def test_r3_3_giving_up_again_changes_nothing(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token
        request = GiveUp(CART, token, 1, b"last")
        _give_up(store, request)
        before = _load(store, CART)

        _give_up(store, request)
        _give_up(store, GiveUp(CART, token, 2, b"after the last"))

        _equal(_load(store, CART), before, "entry")

    def test_r3_3_an_older_token_gives_nothing_up(self) -> None:
        store = self._new(A)
        older = _own(store, CART, A).fencing_token
        _give_up(store, GiveUp(CART, older))
        owned = _own(store, CART, A)

        stale = _only(store.give_up([GiveUp(CART, older, 9, b"old")]), Stale)

        _equal(stale.current, owned.fencing_token, "current token")
        _equal(_load(store, CART), _plain(owned), "entry")

    def test_r3_3_giving_up_what_was_never_claimed_is_no_refusal(self) -> None:
        store = self._new(A)

        _give_up(store, GiveUp(CART, 1, 1, b"state"))

        _equal(_load(store, CART), ActivationEntry(identity=CART), "entry")

    def test_r3_4_giving_up_saves_the_last_snapshot(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token
        _save(store, Save(CART, token, 1, b"first"))

        _give_up(store, GiveUp(CART, token, 2, b"last"))

        record = _load(store, CART).record
        _equal((record.snapshot, record.version), (b"last", 2), "record")

    def test_r3_4_giving_up_writes_no_version_that_is_not_greater(self) -> None:
        store = self._new(A)
        token = _own(store, CART, A).fencing_token
        _save(store, Save(CART, token, 2, b"two"))

        _give_up(store, GiveUp(CART, token, 2, b"late"))

        entry = _load(store, CART)
        _equal(entry.owner, None, "owner")
        _equal(entry.record.snapshot, b"two", "snapshot")

    # --- sequences and transactions ---

    def test_r3_3_each_acquisition_and_claim_of_a_sequence_stands_alone(self) -> None:
        store = self._new(A, B)
        fine, owned, locked = Identity("k", "fine"), CART, USER
        revision = _own(store, owned, B).revision
        _acquire(store, locked, _acquisition(B))
        mine = _acquisition(A)
        wanted = [(fine, 0), (owned, revision), (locked, 0), (ROOM, 0)]

        acquired = store.try_acquire([Acquire(each, mine) for each, _ in wanted])
        claimed = store.claim(
            [Claim(each, A, next(_numbers), mine, at) for each, at in wanted]
        )
        released = store.release([Release(each, mine) for each, _ in wanted])

        _kinds(acquired, [Acquired, Acquired, LockHeld, Acquired])
        _kinds(claimed, [Claimed, ClaimRefused, ClaimRefused, Claimed])
        _kinds(released, [Released] * 4)
        loaded = store.load([Load(each) for each, _ in wanted])
        _kinds(loaded, [Loaded] * 4)
        owners = [_load(store, each).owner for each, _ in wanted]
        _equal(owners, [A, B, None, A], "owners")

    def test_r3_3_each_save_and_giving_up_of_a_sequence_stands_alone(self) -> None:
        store = self._new(A)
        first, older = _own(store, CART, A), _own(store, USER, A)
        _give_up(store, GiveUp(USER, older.fencing_token))
        newer, absent = _own(store, USER, A), ROOM
        tokens = [
            (CART, first.fencing_token),
            (USER, older.fencing_token),
            (absent, 1),
            (USER, newer.fencing_token),
        ]

        saved = store.save([Save(each, token, 1, b"new") for each, token in tokens])
        given_up = store.give_up([GiveUp(each, token) for each, token in tokens])

        _kinds(saved, [Saved, Stale, Stale, Saved])
        _kinds(given_up, [GivenUp, Stale, GivenUp, GivenUp])
        for identity in (CART, USER):
            entry = _load(store, identity)
            _equal((entry.owner, entry.record.snapshot), (None, b"new"), "entry")

    def test_r3_1_one_sequence_gives_a_lock_to_one_acquisition(self) -> None:
        store = self._new(A, B)

        outcomes = store.try_acquire(
            [Acquire(CART, _acquisition(A)), Acquire(CART, _acquisition(B))]
        )

        kinds = sorted(type(outcome).__name__ for outcome in outcomes)
        _equal(kinds, ["Acquired", "LockHeld"], "outcomes")

    def test_r3_3_an_empty_sequence_has_no_outcome(self) -> None:
        store = self._new()

        _equal(list(store.try_acquire([])), [], "outcomes of try_acquire")
        _equal(list(store.release([])), [], "outcomes of release")
        _equal(list(store.load([])), [], "outcomes of load")
        _equal(list(store.claim([])), [], "outcomes of claim")
        _equal(list(store.save([])), [], "outcomes of save")
        _equal(list(store.give_up([])), [], "outcomes of give_up")

    def test_r3_4_a_transaction_holds_several_calls(self) -> None:
        store = self._new(A, B)
        other = self._another(store)

        with store.transaction():
            entry = _own(store, CART, A)
            _save(store, Save(CART, entry.fencing_token, 1, b"state"))
            _give_up(store, GiveUp(CART, entry.fencing_token))
            again = _own(store, CART, B)
            _equal(_load(store, CART), _plain(again), "entry inside")
            store.write_members([Member(session=A)], 0)

        _equal(_load(other, CART), _plain(again), "entry outside")
        _equal(again.record.snapshot, b"state", "snapshot")
        _check(again.fencing_token > entry.fencing_token, "the token grows")
        _equal(other.read_sessions().topology.epoch, 1, "epoch")

    def test_r3_4_a_transaction_follows_another(self) -> None:
        store = self._new(A)

        for number in range(3):
            with store.transaction():
                _own(store, Identity("k", str(number)), A)
        with store.transaction():
            pass

        for number in range(3):
            _equal(_load(store, Identity("k", str(number))).owner, A, "owner")

    def test_r3_6_it_has_every_method_of_the_contracts(self) -> None:
        store = self._new()

        _check(isinstance(store, Store), "it lacks a method of Store")
        _check("://" in store.url, f"{store.url!r} is no URL")

    def test_r3_6_another_connection_shares_the_contents(self) -> None:
        store = self._new(A)
        other = self._another(store)

        entry = _own(store, CART, A)
        store.close()

        _equal(_load(other, CART), _plain(entry), "entry")
        _equal(other.url, store.url, "url")


class SessionConformance(Conformance):
    """The checks of `SessionStorage`."""

    def test_r3_5_a_session_is_opened_once(self) -> None:
        store = self._new()

        _check(_opens(store, A), "a new session was not opened")
        _check(_opens(store, A), "the same opening again was refused")
        other = SessionRecord(session=A, ttl_ms=TTL_MS + 1)
        _check(not store.open_session(other), "another record was confirmed")

        view = store.read_sessions()
        _equal(view.sessions, (SessionRecord(session=A, ttl_ms=TTL_MS),), "sessions")
        _equal(view.topology, Topology(), "topology")

    def test_r3_5_a_renewed_session_is_not_opened_again(self) -> None:
        store = self._new(A)

        store.renew_session(A, 1)

        _check(not _opens(store, A), "a session in use was opened again")

    def test_r3_5_a_closed_session_is_not_opened_again(self) -> None:
        store = self._new(A)

        _close(store, A)

        _check(not _opens(store, A), "a closed session was opened again")

    def test_r3_5_renewing_raises_the_count(self) -> None:
        store = self._new(A)

        for number in (1, 2, 7):
            view = _renew(store, A, number)
            _equal([each.count for each in view.sessions], [number], "count")

    def test_r3_5_a_count_not_greater_is_confirmed(self) -> None:
        store = self._new(A)
        _renew(store, A, 4)

        for number in (4, 2):
            view = _renew(store, A, number)
            _equal([each.count for each in view.sessions], [4], "count")

    def test_r3_5_renewing_reads_everyone(self) -> None:
        store = self._new(B, A, C)
        members = (Member(session=A, kinds=("cart",)), Member(session=B))
        store.write_members(members, 0)

        view = _renew(store, B, 1)

        _equal([each.session for each in view.sessions], [A, B, C], "sessions")
        _equal(view.topology, Topology(epoch=1, members=members), "topology")
        _equal(store.read_sessions(), view, "the view without a session")

    def test_r3_5_a_session_that_is_not_open_is_not_renewed(self) -> None:
        store = self._new(A)
        _close(store, A)

        _equal(store.renew_session(A, 1), None, "renewal of a closed session")
        _equal(store.renew_session(B, 1), None, "renewal of an absent session")
        _check(_opens(store, B), "a refused renewal has made a record")

    def test_r3_5_closing_is_conditional_on_the_count(self) -> None:
        store = self._new(A)
        _renew(store, A, 3)

        _check(not store.close_session(A, 2), "closed by an older count")
        _check(not store.close_session(A, 4), "closed by a count never written")
        _equal([each.closed for each in _renew(store, A, 3).sessions], [False], "it")
        _check(store.close_session(A, 3), "not closed by its count")

        _equal(store.renew_session(A, 4), None, "renewal after the closing")

    def test_r3_5_closing_again_is_confirmed(self) -> None:
        store = self._new(A)
        _close(store, A)

        _check(store.close_session(A, 0), "the same closing again was refused")
        _check(store.close_session(A, 5), "it is closed, whatever its count")

    def test_r3_5_closing_an_absent_session_creates_its_closed_record(self) -> None:
        store = self._new(A)

        _check(store.close_session(GHOST, 0), "an absent session was not closed")

        _check(not _opens(store, GHOST), "it was opened later")
        _equal(store.renew_session(GHOST, 1), None, "renewal")
        sessions = [each.session for each in store.read_sessions().sessions]
        _equal(sessions, [A], "open sessions")

    def test_r3_5_a_closed_record_is_seen_while_it_is_a_member(self) -> None:
        store = self._new(A, B, C)
        store.write_members([Member(session=A), Member(session=B)], 0)

        _close(store, B)
        _close(store, C)

        seen = [(each.session, each.closed) for each in _renew(store, A, 1).sessions]
        _equal(seen, [(A, False), (B, True)], "sessions")
        store.write_members([Member(session=A)], 1)
        seen = [(each.session, each.closed) for each in store.read_sessions().sessions]
        _equal(seen, [(A, False)], "sessions once it is none")

    def test_r3_5_a_session_is_never_both_renewed_and_closed(self) -> None:
        sessions = [SessionId(f"node-{number}.1#1") for number in range(30)]
        store = self._new(*sessions)
        renewing, closing = self._another(store), self._another(store)
        renewed: list[bool] = []
        closed: list[bool] = []

        def renew() -> None:
            for each in sessions:
                view = _patiently(partial(renewing.renew_session, each, 1))
                renewed.append(view is not None)

        def close() -> None:
            closed.extend(
                _patiently(partial(closing.close_session, each, 0)) for each in sessions
            )

        _in_threads([renew, close])

        for session, was_renewed, was_closed in zip(
            sessions, renewed, closed, strict=True
        ):
            _check(was_renewed != was_closed, f"{session}: both, or neither, happened")

    def test_r3_3_members_are_replaced_at_their_epoch_only(self) -> None:
        store = self._new()
        alone, both = [Member(session=A)], [Member(session=A), Member(session=B)]

        first = store.write_members(alone, 0)
        second = store.write_members(both, 1)
        late = store.write_members([Member(session=C)], 1)
        early = store.write_members([Member(session=C)], 3)

        _equal(first, Topology(epoch=1, members=tuple(alone)), "first write")
        _equal(second, Topology(epoch=2, members=tuple(both)), "second write")
        _equal(late, second, "what a write at a past epoch is told")
        _equal(early, second, "what a write at a future epoch is told")
        _equal(store.read_sessions().topology, second, "topology")

    def test_r3_3_the_same_writing_of_members_again_is_confirmed(self) -> None:
        store = self._new()

        first = store.write_members([Member(session=A)], 0)
        again = store.write_members([Member(session=A)], 0)

        _equal(again, first, "topology")

    def test_r3_4_a_member_is_kept_with_all_its_fields(self) -> None:
        store = self._new()
        members = (
            Member(session=A, kinds=("cart", "user.v-2"), weight=0.1, draining=True),
            Member(session=SessionId("nœud.1#2"), kinds=(), weight=1e-300),
            Member(session=SessionId("z.9#123456789012345"), weight=2.5),
        )

        store.write_members(members, 0)

        _equal(store.read_sessions().topology, Topology(epoch=1, members=members), "it")
        _equal(store.write_members([], 1), Topology(epoch=2), "no member")

    def test_r3_3_one_epoch_means_one_set_of_members(self) -> None:
        store = self._new()
        sessions = [SessionId(f"node-{number}.1#1") for number in range(8)]
        seen: list[Topology] = []

        def joiner(session: SessionId) -> Callable[[], None]:
            mine = self._another(store)

            def run() -> None:
                known = Topology()
                while session not in known:
                    wanted = known.with_member(Member(session=session))
                    known = _patiently(
                        partial(mine.write_members, wanted.members, known.epoch)
                    )
                    seen.append(known)

            return run

        _in_threads([joiner(session) for session in sessions])

        final = store.read_sessions().topology
        _equal(final.epoch, len(sessions), "epoch")
        _equal([each.session for each in final.members], sessions, "members")
        by_epoch = {topology.epoch: topology for topology in seen}
        for topology in seen:
            _equal(topology, by_epoch[topology.epoch], f"members at {topology.epoch}")


class StoreConformance(LockConformance, ActivationConformance, SessionConformance):
    """All checks of `Store`; subclass it and override `open_store`."""


def run_conformance(
    make_store: Callable[[], Store],
    *,
    reopen: Callable[[Store], Store] | None = None,
) -> list[Failure]:
    """Run every check on a store of its own; return what failed, by name.

    `make_store` opens an empty store; `reopen` is `StoreConformance.reopen`.
    """

    class Run(StoreConformance):
        def open_store(self) -> Store:
            return make_store()

        def reopen(self, store: Store) -> Store:
            return super().reopen(store) if reopen is None else reopen(store)

    failures: list[Failure] = []
    for check in sorted(name for name in dir(Run) if name.startswith("test_")):
        run = Run()
        try:
            getattr(run, check)()
        # A wrong store may raise anything.
        except Exception as error:
            failures.append(Failure(check, f"{type(error).__name__}: {error}"))
        finally:
            run.teardown_method()
    return failures


# --- what the checks are written in ------------------------------------------


def _check(condition: bool, otherwise: str) -> None:  # noqa: FBT001
    # Not an assert: under `python -O` every store would pass.
    if not condition:
        raise NotConforming(otherwise)


def _equal(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise NotConforming(f"{what}: found {found!r}, the contract says {wanted!r}")


def _only(outcomes: Sequence[object], kind: type[_Kind]) -> _Kind:
    """The outcome of a sequence of one request."""
    _kinds(outcomes, [kind])
    outcome = outcomes[0]
    assert isinstance(outcome, kind)
    return outcome


def _kinds(outcomes: Sequence[object], kinds: Sequence[type[object]]) -> None:
    found = [type(outcome).__name__ for outcome in outcomes]
    if found != [kind.__name__ for kind in kinds]:
        wanted = ", ".join(kind.__name__ for kind in kinds)
        raise NotConforming(f"found {list(outcomes)!r}, the contract says {wanted}")


def _plain(entry: ActivationEntry) -> ActivationEntry:
    """`entry` without the reader's clock."""
    return replace(entry, observed_at_ms=0)


def _acquisition(session: SessionId) -> Acquisition:
    return Acquisition(session, next(_numbers))


def _acquire(store: Store, identity: Identity, acquisition: Acquisition) -> Acquired:
    return _only(store.try_acquire([Acquire(identity, acquisition)]), Acquired)


def _release(store: Store, identity: Identity, acquisition: Acquisition) -> None:
    _only(store.release([Release(identity, acquisition)]), Released)


def _own(
    store: Store,
    identity: Identity,
    session: SessionId,
    *,
    acquisition: Acquisition | None = None,
) -> ActivationEntry:
    """Acquire the lock and claim; the entry as the claim returned it."""
    mine = _acquisition(session) if acquisition is None else acquisition
    revision = _acquire(store, identity, mine).entry.revision
    request = Claim(identity, session, next(_numbers), mine, revision)
    return _only(store.claim([request]), Claimed).entry


def _try_to_own(
    store: Store, identity: Identity, session: SessionId
) -> ActivationEntry | None:
    """Claim, with the lock or without: only who has it may win."""
    mine = _acquisition(session)
    (got,) = _patiently(lambda: store.try_acquire([Acquire(identity, mine)]))
    revision = got.entry.revision if isinstance(got, Acquired) else 0
    request = Claim(identity, session, next(_numbers), mine, revision)
    (outcome,) = _patiently(lambda: store.claim([request]))
    _patiently(lambda: store.release([Release(identity, mine)]))
    return outcome.entry if isinstance(outcome, Claimed) else None


def _taking(session: SessionId, revision: int) -> Claim:
    """A claim of the cart that takes the lock itself."""
    return Claim(CART, session, next(_numbers), None, revision)


def _refused(store: Store, request: Claim) -> ClaimRefused:
    return _only(store.claim([request]), ClaimRefused)


def _load(store: Store, identity: Identity) -> ActivationEntry:
    return _plain(_only(store.load([Load(identity)]), Loaded).entry)


def _save(store: Store, request: Save) -> Saved:
    return _only(store.save([request]), Saved)


def _give_up(store: Store, request: GiveUp) -> None:
    _only(store.give_up([request]), GivenUp)


def _opens(store: Store, session: SessionId) -> bool:
    return store.open_session(SessionRecord(session=session, ttl_ms=TTL_MS))


def _open(store: Store, session: SessionId) -> None:
    _check(_opens(store, session), f"a new session {session} was not opened")


def _renew(store: Store, session: SessionId, number: int) -> SessionView:
    view = store.renew_session(session, number)
    if view is None:
        raise NotConforming(f"the open session {session} was not renewed")
    return view


def _close(store: Store, session: SessionId) -> None:
    """Close an open session, whatever its count is."""
    counts = {each.session: each.count for each in store.read_sessions().sessions}
    _check(session in counts, f"the open session {session} is not seen")
    _check(store.close_session(session, counts[session]), f"{session} was not closed")


def _patiently(call: Callable[[], _Result]) -> _Result:
    """Repeat a call that fails, as every request may be."""
    for _ in range(_TRIES_MAX - 1):
        try:
            return call()
        except StoreFailure:
            continue
    return call()


def _in_threads(bodies: Sequence[Callable[[], None]]) -> None:
    """Run the bodies at once; raise the first error that one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(bodies))

    def run(body: Callable[[], None]) -> None:
        start.wait()
        try:
            body()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
