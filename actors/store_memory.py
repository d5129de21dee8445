"""The rules by which stored records change, and the store that keeps them in memory.

`RecordStore` decides every outcome of the contracts over rows and records;
where those are kept is for its subclasses to say. So two stores cannot differ
in a rule, and what is faulted or simulated in memory is what runs on a disk.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

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
    StoreFailure,
)
from placement.entry import Acquisition, ActivationEntry, ActivationRecord, Pid
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology

_INT_MIN = -(1 << 63)
_INT_MAX = (1 << 63) - 1

_Request = TypeVar("_Request", Acquire, Release, Load, Claim, Save, GiveUp)
_Outcome = TypeVar("_Outcome")


class BadStore(ValueError):
    """A store URL, or the file that it names, that cannot be a store, and why."""


class Unstorable(ValueError):
    """One request carries what no store of this kind can hold, and why."""


def wall_ms() -> int:
    """The wall clock in milliseconds, for people only."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Row:
    """What is stored of one identity: the fields of its entry, and its lock."""

    owner: SessionId | None = None
    attempt: int = 0
    fencing_token: int = 0
    version: int = 0
    revision: int = 0
    lock: Acquisition | None = None
    snapshot: bytes | None = None

    def entry(self, identity: Identity, now_ms: int) -> ActivationEntry:
        """The entry as whoever reads it at `now_ms` sees it."""
        owner = self.owner
        return ActivationEntry(
            identity=identity,
            owner=owner,
            attempt=self.attempt,
            fencing_token=self.fencing_token,
            record=ActivationRecord(
                pid=None if owner is None else Pid(identity, owner, self.fencing_token),
                snapshot=self.snapshot,
                version=self.version,
            ),
            revision=self.revision,
            observed_at_ms=now_ms,
        )

    def is_blank(self) -> bool:
        """Tell whether it holds nothing: never claimed, not locked."""
        return self.revision == 0 and self.lock is None


class RecordStore(ABC):
    """The contracts' outcomes, decided over rows and records kept by a subclass.

    The lock is kept beside the entry, and its writes leave the entry's revision
    alone. Beyond what the contracts ask, a session that is closed takes no lock
    (`LockRefused`) and claims nothing (`ClaimRefused`).
    """

    snapshot_bytes_max = 1_000_000_000

    def __init__(self, url: str, now_ms: Callable[[], int]) -> None:
        self._url = url
        self._now_ms = now_ms

    @property
    def url(self) -> str:
        """The URL that names it."""
        return self._url

    # --- what a subclass keeps ---

    @abstractmethod
    def _call(self, *, writes: bool) -> AbstractContextManager[object]:
        """Have the records for one call: all that it writes is kept, or nothing."""

    def _look_up(self, identities: Sequence[Identity]) -> None:
        """Have the rows of these at hand, where that is cheaper all at once."""
        return  # a memory has them at hand

    @abstractmethod
    def _row(self, identity: Identity) -> Row:
        """The row of `identity`, a blank one where there is none."""

    @abstractmethod
    def _keep_row(self, identity: Identity, row: Row) -> None:
        """Keep `row`, which `_row` has given and a rule has changed."""

    @abstractmethod
    def _next_revision(self) -> int:
        """Draw from the one growing revision."""

    @abstractmethod
    def _session(self, session: SessionId) -> SessionRecord | None:
        """The record of `session`."""

    @abstractmethod
    def _keep_session(self, record: SessionRecord) -> None:
        """Create or replace the record."""

    @abstractmethod
    def _open_sessions(self) -> Iterable[SessionRecord]:
        """All records that are not closed."""

    @abstractmethod
    def _topology(self) -> Topology:
        """The membership record."""

    @abstractmethod
    def _keep_topology(self, topology: Topology) -> None:
        """Replace the membership record."""

    # --- the contracts ---

    def try_acquire(
        self, requests: Sequence[Acquire], /
    ) -> Sequence[Acquired | LockHeld | LockRefused | Failed]:
        """Take each lock that is free, or already held by that acquisition."""
        return self._each(self._acquire, requests)

    def release(self, requests: Sequence[Release], /) -> Sequence[Released | Failed]:
        """Free each lock that its acquisition still holds; else change nothing."""
        return self._each(self._release, requests)

    def load(self, requests: Sequence[Load], /) -> Sequence[Loaded | Failed]:
        """Read entries."""
        return self._each(self._load, requests, writes=False)

    def claim(
        self, requests: Sequence[Claim], /
    ) -> Sequence[Claimed | ClaimRefused | Failed]:
        """Make claims; the same attempt repeated is confirmed, not made again."""
        return self._each(self._claim, requests)

    def save(self, requests: Sequence[Save], /) -> Sequence[Saved | Stale | Failed]:
        """Store snapshots; a version not greater is confirmed and not written."""
        return self._each(self._save, requests)

    def give_up(
        self, requests: Sequence[GiveUp], /
    ) -> Sequence[GivenUp | Stale | Failed]:
        """Clear owners; `Stale` only where a greater token has been claimed."""
        return self._each(self._give_up, requests)

    def open_session(self, record: SessionRecord, /) -> bool:
        """Create `record`; false where that session has another record already."""
        with self._sessions_call():
            check_numbers(record.count, record.ttl_ms)
            stored = self._session(record.session)
            if stored is None:
                self._keep_session(record)
                return True
            return stored == record and not stored.closed and stored.count == 0

    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        """Raise the count to `count` and read all; none where it is not open."""
        with self._sessions_call():
            check_numbers(count)
            stored = self._session(session)
            if stored is None or stored.closed:
                return None
            if count > stored.count:
                self._keep_session(replace(stored, count=count))
            return self._view()

    def read_sessions(self) -> SessionView:
        """Read all, without a session of one's own."""
        with self._sessions_call(writes=False):
            return self._view()

    def close_session(self, session: SessionId, count: int, /) -> bool:
        """Close it if its count is still `count`; true if it is closed then."""
        with self._sessions_call():
            stored = self._session(session)
            if stored is None:
                self._create_closed(session)
                return True
            if not stored.closed and stored.count == count:
                self._keep_session(replace(stored, closed=True))
                return True
            return stored.closed

    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        """Replace the members if the epoch is still that; the topology after it."""
        with self._sessions_call():
            stored = self._topology()
            if stored.epoch != expected_epoch:
                return stored
            written = Topology(epoch=stored.epoch + 1, members=tuple(members))
            self._keep_topology(written)
            return written

    # --- the rules, one request each ---

    def _acquire(
        self, request: Acquire, now_ms: int
    ) -> Acquired | LockHeld | LockRefused:
        identity, wanted = request.identity, request.acquisition
        row = self._row(identity)
        held = row.lock
        if held is None or not self._is_open_once_settled(held.session):
            if self._is_closed(wanted.session):
                return LockRefused(f"session {wanted.session} is closed")
            check_numbers(wanted.procedure)
            row.lock = wanted
            self._keep_row(identity, row)
        elif held != wanted:
            return LockHeld(held)
        return Acquired(row.entry(identity, now_ms), self._owner_is_open(row))

    def _release(self, request: Release, now_ms: int) -> Released:
        row = self._row(request.identity)
        if row.lock == request.acquisition:
            row.lock = None
            self._keep_row(request.identity, row)
        return Released()

    def _load(self, request: Load, now_ms: int) -> Loaded:
        row = self._row(request.identity)
        # A read closes nothing: an absent session is not known to be closed.
        is_open = row.owner is not None and not self._is_closed(row.owner)
        return Loaded(row.entry(request.identity, now_ms), is_open)

    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        identity = request.identity
        row = self._row(identity)
        if row.owner != request.session or row.attempt != request.attempt:
            refused = self._why_refused(row, request)
            if refused is not None:
                return ClaimRefused(row.entry(identity, now_ms), refused)
            check_numbers(request.attempt)
            row.owner, row.attempt = request.session, request.attempt
            row.fencing_token = row.revision = self._next_revision()
            row.lock = None
            self._keep_row(identity, row)
        return Claimed(row.entry(identity, now_ms))

    def _why_refused(self, row: Row, request: Claim) -> str | None:
        """Which condition of the claim does not hold."""
        lock, owner, wanted = row.lock, row.owner, request.acquisition
        if lock is None:
            if wanted is not None:
                return "nobody holds the lock"
        elif wanted is not None and lock != wanted:
            return f"procedure {lock.procedure} of {lock.session} holds the lock"
        elif self._is_open_once_settled(lock.session):
            if wanted is None:
                return f"procedure {lock.procedure} of {lock.session} holds the lock"
        elif wanted is not None:
            return f"the lock is free: session {lock.session} is closed"
        if row.revision != request.expected_revision:
            return f"revision is {row.revision}, not {request.expected_revision}"
        if owner is not None and self._is_open_once_settled(owner):
            return f"session {owner} owns it and is open"
        if self._is_closed(request.session):
            return f"session {request.session} is closed"
        return None

    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        row = self._row(request.identity)
        # Unequal, not less: a token never issued here writes nothing either.
        if row.owner is None or row.fencing_token != request.fencing_token:
            return Stale(row.fencing_token)
        if request.version > row.version:
            self._write_snapshot(row, request.snapshot, request.version)
            row.revision = self._next_revision()
            self._keep_row(request.identity, row)
        return Saved(row.version)

    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        row = self._row(request.identity)
        if row.fencing_token > request.fencing_token:
            return Stale(row.fencing_token)
        if row.owner is not None and row.fencing_token == request.fencing_token:
            if request.snapshot is not None and request.version > row.version:
                self._write_snapshot(row, request.snapshot, request.version)
            row.owner, row.attempt = None, 0
            row.revision = self._next_revision()
            self._keep_row(request.identity, row)
        return GivenUp()

    def _write_snapshot(self, row: Row, snapshot: bytes, version: int) -> None:
        check_numbers(version)
        if len(snapshot) > self.snapshot_bytes_max:
            raise Unstorable(
                f"snapshot has {len(snapshot)} bytes, at most {self.snapshot_bytes_max}"
            )
        row.snapshot, row.version = snapshot, version

    def _owner_is_open(self, row: Row) -> bool:
        return row.owner is not None and self._is_open_once_settled(row.owner)

    def _is_closed(self, session: SessionId) -> bool:
        record = self._session(session)
        return record is not None and record.closed

    def _is_open_once_settled(self, session: SessionId) -> bool:
        """Tell whether `session` is open; where it is absent, close it for good."""
        record = self._session(session)
        if record is None:
            self._create_closed(session)
            return False
        return not record.closed

    def _create_closed(self, session: SessionId) -> None:
        self._keep_session(SessionRecord(session=session, ttl_ms=0, closed=True))

    def _view(self) -> SessionView:
        topology = self._topology()
        found = {record.session: record for record in self._open_sessions()}
        for member in topology.members:
            if member.session not in found:
                record = self._session(member.session)
                if record is not None:
                    found[member.session] = record
        return SessionView(topology, tuple(found[key] for key in sorted(found)))

    def _each(
        self,
        rule: Callable[[_Request, int], _Outcome],
        requests: Sequence[_Request],
        *,
        writes: bool = True,
    ) -> list[_Outcome | Failed]:
        """Apply `rule` to each request; one that is unstorable fails alone."""
        outcomes: list[_Outcome | Failed] = []
        with self._call(writes=writes):
            now_ms = self._now_ms()
            self._look_up([request.identity for request in requests])
            for request in requests:
                try:
                    outcomes.append(rule(request, now_ms))
                # The second: a text that is no UTF-8. Rules check, then change.
                except (Unstorable, UnicodeEncodeError) as error:
                    outcomes.append(Failed(str(error), may_have_happened=False))
        return outcomes

    @contextmanager
    def _sessions_call(self, *, writes: bool = True) -> Iterator[None]:
        try:
            with self._call(writes=writes):
                yield
        except (Unstorable, UnicodeEncodeError) as error:
            raise StoreFailure(str(error), may_have_happened=False) from error


def check_numbers(*numbers: int) -> None:
    """Refuse numbers that do not fit into 64 bits."""
    for number in numbers:
        if not _INT_MIN <= number <= _INT_MAX:
            raise Unstorable(f"{number} does not fit into 64 bits")


@dataclass(slots=True)
class _Contents:
    """What the connections of one memory store share."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    rows: dict[Identity, Row] = field(default_factory=dict)
    sessions: dict[SessionId, SessionRecord] = field(default_factory=dict)
    open_sessions: dict[SessionId, SessionRecord] = field(default_factory=dict)
    topology: Topology = field(default_factory=Topology)
    revision: int = 0


class MemoryStore(RecordStore):
    """The store of one process: its contents end with the last connection.

    Connections made by `another` share the contents, also between threads. A
    `transaction()` keeps the other threads out until it ends; it takes nothing
    back where its body raises.
    """

    def __init__(
        self,
        *,
        now_ms: Callable[[], int] = wall_ms,
        contents: _Contents | None = None,
    ) -> None:
        super().__init__("memory://", now_ms)
        self._contents = _Contents() if contents is None else contents
        self._is_closed_connection = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the calls inside without another thread's in between."""
        with self._call(writes=True):
            yield

    def another(self) -> "MemoryStore":
        """Open another connection to the same contents."""
        return type(self)(now_ms=self._now_ms, contents=self._contents)

    def close(self) -> None:
        """Refuse every further call; other connections go on."""
        self._is_closed_connection = True

    def _call(self, *, writes: bool) -> AbstractContextManager[object]:
        if self._is_closed_connection:
            raise StoreFailure("this connection is closed", may_have_happened=False)
        return self._contents.lock

    def _row(self, identity: Identity) -> Row:
        return self._contents.rows.get(identity) or Row()

    def _keep_row(self, identity: Identity, row: Row) -> None:
        if row.is_blank():
            self._contents.rows.pop(identity, None)
        else:
            self._contents.rows[identity] = row

    def _next_revision(self) -> int:
        self._contents.revision += 1
        return self._contents.revision

    def _session(self, session: SessionId) -> SessionRecord | None:
        return self._contents.sessions.get(session)

    def _keep_session(self, record: SessionRecord) -> None:
        self._contents.sessions[record.session] = record
        if record.closed:
            self._contents.open_sessions.pop(record.session, None)
        else:
            self._contents.open_sessions[record.session] = record

    def _open_sessions(self) -> Iterable[SessionRecord]:
        return self._contents.open_sessions.values()

    def _topology(self) -> Topology:
        return self._contents.topology

    def _keep_topology(self, topology: Topology) -> None:
        self._contents.topology = topology
