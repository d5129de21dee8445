"""Entries, locks and snapshots of a JetStream bucket: batches of requests over it.

The rules are those of `RecordStore`, over one row at a time. What an operation is to
confirm without having written is confirmed by writing what was read back, on
condition of its revision; only what stays true whatever happened since (a closed
record, a greater token), and refusals that can be asked again, are answered from a
read. Where an answer is lost, the key is read and the same decided again, until the
time is over.

A snapshot above a bound has keys of its own, whose names are used once: they are
there before the entry that names them, and go after it has been replaced.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from actors.nats_bucket import (
    Bucket,
    BucketError,
    NoAnswer,
    NotDone,
    NotNow,
    WrongRevision,
)
from actors.nats_sessions import NatsSessions
from actors.nats_token import key_token_of
from actors.store_memory import RecordStore, Row, Unstorable
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    ClaimRefused,
    Failed,
    GivenUp,
    Load,
    Released,
    SessionRecord,
    Stale,
)
from placement.entry import Acquisition
from placement.identity import Identity
from placement.topology import SessionId, Topology

#: How many identities of a batch are written at once. More are no faster on one
#: machine (each is a task), and fewer are slower over a network.
IN_FLIGHT_MAX = 128
#: A snapshot above this has keys of its own: a lock's writes need not carry it.
INLINE_BYTES_MAX = 64 << 10
PART_BYTES_MAX = 256 << 10
SNAPSHOT_BYTES_MAX = 256 << 20

_OWN = -1  # in a record: the revision of the very write that holds it
_PARTS_IN_FLIGHT_MAX = 8
_PAUSE_S, _PAUSE_S_MAX = 0.002, 0.05
_KNOWN_BYTES_MAX = 64 << 20
_KNOWN_BYTES_EACH = 600


# --- what is stored ----------------------------------------------------------


class _Parts(msgspec.Struct, array_like=True, frozen=True):
    """The keys of a snapshot that is not in its entry."""

    name: str
    count: int
    size: int


class _StoredEntry(msgspec.Struct, array_like=True, frozen=True):
    owner: str | None
    attempt: int
    fencing_token: int
    version: int
    revision: int
    lock_session: str | None
    lock_procedure: int
    snapshot: bytes | None
    parts: _Parts | None = None


ENTRY_PREFIX = "e."
_encode = msgspec.msgpack.Encoder().encode
_entry_from = msgspec.msgpack.Decoder(_StoredEntry).decode


def _entry_data(row: Row, parts: _Parts | None) -> bytes:
    lock = row.lock
    return _encode(
        _StoredEntry(
            row.owner,
            row.attempt,
            row.fencing_token,
            row.version,
            row.revision,
            None if lock is None else lock.session,
            0 if lock is None else lock.procedure,
            None if parts is not None else row.snapshot,
            parts,
        )
    )


def _copy_of(row: Row) -> Row:
    # By hand: dataclasses.replace takes a tenth of the time of a whole write.
    return Row(
        owner=row.owner,
        attempt=row.attempt,
        fencing_token=row.fencing_token,
        version=row.version,
        revision=row.revision,
        lock=row.lock,
        snapshot=row.snapshot,
    )


def _row_of(stored: _StoredEntry, revision: int) -> Row:
    session = stored.lock_session
    return Row(
        owner=None if stored.owner is None else SessionId(stored.owner),
        attempt=stored.attempt,
        fencing_token=revision
        if stored.fencing_token == _OWN
        else stored.fencing_token,
        version=stored.version,
        revision=revision if stored.revision == _OWN else stored.revision,
        lock=None
        if session is None
        else Acquisition(SessionId(session), stored.lock_procedure),
        snapshot=stored.snapshot,
    )


def row_from(data: bytes, revision: int) -> Row:
    """The entry that a key holds; a snapshot in keys of its own is left out."""
    return _row_of(_entry_from(data), revision)


def _part_keys(identity: Identity, parts: _Parts) -> list[str]:
    return [
        f"p.{key_token_of(identity)}.{parts.name}.{number}"
        for number in range(parts.count)
    ]


def _inline_max(bucket: Bucket) -> int:
    return min(INLINE_BYTES_MAX, bucket.max_payload // 2)


# --- the rules ---------------------------------------------------------------


class _Missing(Exception):
    """A rule asks for a session; `settle`: that has no record, and is to have one."""

    def __init__(self, session: SessionId, *, settle: bool) -> None:
        super().__init__(session)
        self.session, self.settle = session, settle


class _Rules(RecordStore):
    """The rules of `RecordStore` over one row; it keeps nothing itself.

    `kept` is the row that the rule wants written. What the rule asks of a session
    that is not in `sessions` ends it with `_Missing`, before it has changed anything
    but its own copy of the row.
    """

    snapshot_bytes_max = SNAPSHOT_BYTES_MAX

    def __init__(self) -> None:
        super().__init__("", int)
        self.row = Row()
        self.kept: Row | None = None
        self.sessions: dict[SessionId, SessionRecord | None] = {}

    def begin(self, row: Row, sessions: dict[SessionId, SessionRecord | None]) -> None:
        """Decide over a copy of `row`."""
        self.row, self.kept, self.sessions = _copy_of(row), None, sessions

    def _call(self, *, writes: bool) -> AbstractContextManager[object]:
        raise NotImplementedError

    def _row(self, identity: Identity) -> Row:
        return self.row

    def _keep_row(self, identity: Identity, row: Row) -> None:
        self.kept = row

    def _next_revision(self) -> int:
        return _OWN

    def _session(self, session: SessionId) -> SessionRecord | None:
        if session not in self.sessions:
            raise _Missing(session, settle=False)
        return self.sessions[session]

    def _create_closed(self, session: SessionId) -> None:
        raise _Missing(session, settle=True)

    def _keep_session(self, record: SessionRecord) -> None:
        raise NotImplementedError

    def _open_sessions(self) -> Iterable[SessionRecord]:
        raise NotImplementedError

    def _topology(self) -> Topology:
        raise NotImplementedError

    def _keep_topology(self, topology: Topology) -> None:
        raise NotImplementedError


def _is_claim(request: Any) -> bool:
    return isinstance(request, Claim)


def _expects_nothing(request: Any) -> bool:
    """Tell whether a key that is not known may be tried as if it were new."""
    return isinstance(request, Acquire) or (
        isinstance(request, Claim)
        and request.acquisition is None
        and request.expected_revision == 0
    )


def _is_to_confirm(request: Any, outcome: Any, row: Row) -> bool:
    """Tell whether an outcome without a write rests on the row being the newest."""
    match outcome:
        case Acquired() | Released() | Claimed():
            return True
        case ClaimRefused():
            # A later revision refuses for good. Otherwise an earlier try of this
            # claim may still be on its way, and must not arrive after the refusal.
            return bool(row.revision <= request.expected_revision)
        case Stale() | GivenUp():
            return bool(row.fencing_token < request.fencing_token)
        case _:
            return False


@dataclass(frozen=True, slots=True)
class _Known:
    """A key as this connection has seen it last; the row is not to be changed."""

    revision: int = 0
    row: Row = field(default_factory=Row)
    parts: _Parts | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the snapshot is at hand."""
        return self.parts is None or self.row.snapshot is not None


class _KnownEntries:
    """What this connection has seen last of identities, up to some bytes."""

    def __init__(self) -> None:
        self._known: OrderedDict[Identity, _Known] = OrderedDict()
        self._bytes = 0

    def get(self, identity: Identity) -> _Known | None:
        """The last seen, if it is kept."""
        known = self._known.get(identity)
        if known is not None:
            self._known.move_to_end(identity)
        return known

    def keep(self, identity: Identity, known: _Known) -> None:
        """Keep it, and forget what was not asked for longest."""
        self.forget(identity)
        self._known[identity] = known
        self._bytes += _size(known)
        while self._bytes > _KNOWN_BYTES_MAX:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)

    def forget(self, identity: Identity) -> None:
        """Have it read anew."""
        known = self._known.pop(identity, None)
        if known is not None:
            self._bytes -= _size(known)


def _size(known: _Known) -> int:
    return _KNOWN_BYTES_EACH + len(known.row.snapshot or b"")


@dataclass(slots=True, eq=False)
class Batch:
    """Requests of one kind, their outcomes, and what may have happened besides."""

    rule: Callable[[RecordStore, Any, int], Any]
    requests: Sequence[Any]
    now_ms: int
    outcomes: list[Any]
    unsure: set[int] = field(default_factory=set)
    sessions: dict[SessionId, SessionRecord | None] = field(default_factory=dict)
    asking: dict[SessionId, asyncio.Lock] = field(default_factory=dict)
    silence: str = ""

    def left(self) -> Iterator[list[int]]:
        """The places of the requests without an outcome, of one identity together."""
        groups: dict[Identity, list[int]] = {}
        for place, request in enumerate(self.requests):
            if self.outcomes[place] is None:
                groups.setdefault(request.identity, []).append(place)
        return iter(tuple(groups.values()))

    def failed(self, place: int, why: str) -> Failed:
        """The outcome of a request that was given up."""
        return Failed(why, may_have_happened=place in self.unsure)


class _Deed:
    """One request on its way: until when, and what it has left behind."""

    def __init__(self, bucket: Bucket, batch: Batch, place: int, until: float) -> None:
        self.bucket, self.batch, self.place, self.until = bucket, batch, place, until
        self.request = batch.requests[place]
        self.identity: Identity = self.request.identity
        self.key = f"{ENTRY_PREFIX}{key_token_of(self.identity)}"
        self.has_read = False
        self.upload: _Parts | None = None

    @property
    def fencing_token(self) -> int:
        """That under which it saves."""
        token: int = self.request.fencing_token
        return token


# --- entries -----------------------------------------------------------------


class NatsEntries:
    """What one connection knows of entries, and how it decides and writes them.

    `sessions` are those of the same connection. Used on the connection's thread.
    """

    def __init__(self, sessions: NatsSessions, *, where: str, timeout_s: float) -> None:
        self._sessions, self._where, self._timeout_s = sessions, where, timeout_s
        self._rules = _Rules()
        self._known = _KnownEntries()
        self._parts_in_flight = asyncio.Semaphore(_PARTS_IN_FLIGHT_MAX)

    async def work(self, bucket: Bucket, batch: Batch) -> None:
        """Do what is left of the batch, many identities at once."""
        await self._read_sessions(bucket, batch)
        groups = batch.left()

        async def worker() -> None:
            for group in groups:
                for place in group:
                    batch.outcomes[place] = await self._one(bucket, batch, place)

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(len(batch.requests), IN_FLIGHT_MAX)):
                workers.create_task(worker())

    async def _read_sessions(self, bucket: Bucket, batch: Batch) -> None:
        """Read whose the claims are, mostly one session's, before all of them ask."""
        for session in {each.session: 0 for each in batch.requests if _is_claim(each)}:
            if session in batch.sessions:
                continue
            until = asyncio.get_running_loop().time() + self._timeout_s
            try:
                found = await self._sessions.read_session(bucket, session, until)
            except NoAnswer as error:
                batch.silence = str(error)
                return
            except BucketError:
                continue  # each claim that asks for it tries again, and says so
            batch.sessions[session] = None if found is None else found[1]

    async def _one(self, bucket: Bucket, batch: Batch, place: int) -> Any:
        """The outcome of one request."""
        if batch.silence:
            # A thousand that wait for a silent server, one after the other, would
            # hold up everything.
            return batch.failed(place, batch.silence)
        loop = asyncio.get_running_loop()
        try:
            deed = _Deed(bucket, batch, place, loop.time() + self._timeout_s)
        except UnicodeEncodeError as error:
            return batch.failed(place, str(error))
        tries = 0
        while True:
            try:
                outcome = await self._try(deed)
            except (WrongRevision, NotNow, NoAnswer) as error:
                self._known.forget(deed.identity)
                if loop.time() >= deed.until:
                    if isinstance(error, NoAnswer):
                        batch.silence = str(error)
                    outcome = batch.failed(place, str(error))
                else:
                    # Who lost to another begins again at once, at first.
                    tries += 1 if isinstance(error, WrongRevision) else 4
                    pause_s = min(_PAUSE_S_MAX, _PAUSE_S * max(0, tries - 2))
                    await asyncio.sleep(min(pause_s, deed.until - loop.time()))
                    continue
            except (NotDone, Unstorable, UnicodeEncodeError) as error:
                self._known.forget(deed.identity)
                outcome = batch.failed(place, str(error))
            if deed.upload is not None and place not in batch.unsure:
                await self._discard(bucket, deed.identity, deed.upload, deed.until)
            return outcome

    async def _try(self, deed: _Deed) -> Any:
        """Decide over what is known of the key, or read of it; write what follows."""
        identity, request = deed.identity, deed.request
        known = self._known.get(identity)
        is_read = known is None or isinstance(request, Load)
        if known is None and not deed.has_read and _expects_nothing(request):
            known, is_read = _Known(), False
        elif is_read:
            known = await self._read_entry(deed)
        assert known is not None
        if not known.is_whole and isinstance(request, Acquire | Claim | Load):
            known = await self._with_snapshot(deed, known)
        outcome, row = await self._decide(deed, known)
        if row is None:
            if not is_read:
                # Others may have written since: only a read may refuse.
                self._known.forget(identity)
                deed.has_read = True
                return await self._try(deed)
            if not _is_to_confirm(request, outcome, known.row):
                return outcome
            row = _copy_of(known.row)
        deed.has_read = True
        await self._write_entry(deed, known, row)
        if isinstance(outcome, Claimed):
            if known.parts is not None:
                await self._sweep(deed, row.fencing_token, known.parts)
            return Claimed(row.entry(identity, deed.batch.now_ms))
        return outcome

    async def _decide(self, deed: _Deed, known: _Known) -> tuple[Any, Row | None]:
        """The rule's outcome, and the row that it wants written."""
        rules, batch = self._rules, deed.batch
        while True:
            rules.begin(known.row, batch.sessions)
            try:
                outcome = batch.rule(rules, deed.request, batch.now_ms)
            except _Missing as missing:
                await self._tell_session(deed, missing)
            else:
                return outcome, rules.kept

    async def _tell_session(self, deed: _Deed, missing: _Missing) -> None:
        """Read the session, once a batch; or have its record created, as closed."""
        session, sessions = missing.session, deed.batch.sessions
        async with deed.batch.asking.setdefault(session, asyncio.Lock()):
            if missing.settle and sessions.get(session) is None:
                sessions[session] = await self._sessions.settle(
                    deed.bucket, session, deed.until
                )
            elif not missing.settle and session not in sessions:
                found = await self._sessions.read_session(
                    deed.bucket, session, deed.until
                )
                sessions[session] = None if found is None else found[1]

    async def _read_entry(self, deed: _Deed) -> _Known:
        found = await deed.bucket.read(deed.key, until=deed.until)
        known = self._known.get(deed.identity)
        if known is not None and (found is None or found[0] < known.revision):
            return known  # an older reading proves nothing
        if found is None:
            return _Known()
        revision, data = found
        try:
            stored = _entry_from(data)
        except msgspec.MsgspecError as error:
            raise NotDone(f"{self._where}: {deed.key} is damaged: {error}") from error
        if known is None or known.revision < revision:
            known = _Known(revision, _row_of(stored, revision), stored.parts)
            self._known.keep(deed.identity, known)
        return known

    async def _write_entry(self, deed: _Deed, known: _Known, row: Row) -> None:
        """Write `row` over what is known; it has its revision then."""
        parts = known.parts
        if row.version != known.row.version:
            # The rules change a snapshot only with its version.
            parts = None
            if row.snapshot is not None and len(row.snapshot) > _inline_max(
                deed.bucket
            ):
                parts = deed.upload or await self._upload(deed, row.snapshot)
        try:
            revision = await deed.bucket.write(
                deed.key,
                _entry_data(row, parts),
                expected=known.revision,
                until=deed.until,
            )
        except (NoAnswer, asyncio.CancelledError):
            deed.batch.unsure.add(deed.place)
            self._known.forget(deed.identity)
            raise
        if row.fencing_token == _OWN:
            row.fencing_token = revision
        if row.revision == _OWN:
            row.revision = revision
        self._known.keep(deed.identity, _Known(revision, row, parts))
        if parts is not None and parts == deed.upload:
            deed.upload = None  # in use now
        if known.parts is not None and known.parts != parts:
            await self._discard(deed.bucket, deed.identity, known.parts, deed.until)

    # --- snapshots that have keys of their own ---

    async def _upload(self, deed: _Deed, snapshot: bytes) -> _Parts:
        """Write the parts of a snapshot, under a name that is used once."""
        size = min(PART_BYTES_MAX, deed.bucket.max_payload // 2)
        starts = range(0, len(snapshot), size)
        name = f"{deed.fencing_token}-{secrets.token_hex(12)}"
        parts = _Parts(name, len(starts), len(snapshot))
        deed.upload = parts
        keys = _part_keys(deed.identity, parts)

        async def write(key: str, start: int) -> None:
            async with self._parts_in_flight:
                await deed.bucket.write(
                    key, snapshot[start : start + size], expected=0, until=deed.until
                )

        try:
            await asyncio.gather(*map(write, keys, starts))
        except BucketError as error:
            deed.upload = None
            await self._discard(deed.bucket, deed.identity, parts, deed.until)
            if isinstance(error, WrongRevision):
                raise NotDone(str(error)) from error
            raise
        return parts

    async def _with_snapshot(self, deed: _Deed, known: _Known) -> _Known:
        parts = known.parts
        assert parts is not None

        async def read(key: str) -> bytes:
            async with self._parts_in_flight:
                found = await deed.bucket.read(key, until=deed.until)
            if found is None:
                # Its entry has been replaced meanwhile, or is damaged.
                raise NotNow(f"{self._where}: {key} is missing")
            return found[1]

        keys = _part_keys(deed.identity, parts)
        snapshot = b"".join(await asyncio.gather(*map(read, keys)))
        if len(snapshot) != parts.size:
            raise NotDone(f"{self._where}: the parts of {deed.key} are damaged")
        whole = _Known(known.revision, replace(known.row, snapshot=snapshot), parts)
        self._known.keep(deed.identity, whole)
        return whole

    async def _sweep(self, deed: _Deed, fencing_token: int, used: _Parts) -> None:
        """Remove what a crash has left of snapshots that never got into the entry.

        Under an older token none will: its save is conditional on what the claim
        has replaced.
        """
        bucket, identity = deed.bucket, deed.identity
        with suppress(BucketError, ValueError):
            left = await bucket.keys(f"p.{key_token_of(identity)}.>", until=deed.until)
            names = {key.split(".")[2] for key in left} - {used.name}
            for name in sorted(names):
                if int(name.partition("-")[0]) < fencing_token:
                    parts = _Parts(name, 0, 0)
                    await self._discard(bucket, identity, parts, deed.until)

    async def _discard(
        self, bucket: Bucket, identity: Identity, parts: _Parts, until: float
    ) -> None:
        """Remove parts that no entry names any more; what is left does no harm."""
        with suppress(BucketError):
            await bucket.purge(
                f"p.{key_token_of(identity)}.{parts.name}.>", until=until
            )
