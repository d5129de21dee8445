"""The store in a JetStream key-value bucket, one bucket a cluster.

    e.IDENTITY            entry, lock and snapshot of an identity
    p.IDENTITY.NAME.N     the parts of a snapshot above a bound, under a name used once
    s.SESSION             the record of a session
    cluster               members, epoch, and the sessions that have been opened

The stream's own sequence is the one growing revision: the fencing token of a claim
is the revision of its write. Several keys never change together, so they change in
an order in which every prefix is safe: a closed record is seen before the entry is
written; the parts of a snapshot are there before the entry that names them, and go
after it has been replaced; a session is listed as opened before its record exists,
and taken from the list when its record is closed.

A read decides nothing. What an operation is to confirm without having written is
confirmed by writing what was read back, on condition of its revision; only what
stays true whatever happened since (a closed record, a greater token), and refusals
that can be asked again, are answered from a read. Where an answer is lost, the key
is read and the same decided again, until the time is over.

Server operations: an acquisition, a claim, a save, a giving up and a release are one
write each, with a read before it where this connection has not seen the key lately
(an acquisition first tries to create); besides, one read a batch for each session
that a lock or an owner names. A snapshot above the bound is a write more for each of
its parts, and a purge of the former. A renewal is one write, one read, and one read
for each other open session, in three round trips; opening and closing are two writes.

Permissions that a node needs besides its inbox, for the cluster NAME: to publish
`$KV.placement_NAME.>`, and `$JS.API.STREAM.VERB.KV_placement_NAME` for the verbs
INFO, CREATE (once), MSG.GET and PURGE.
"""

import asyncio
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from actors.nats_bucket import (
    Bucket,
    BucketError,
    NoAnswer,
    NotDone,
    NotNow,
    WrongRevision,
    token_of,
)
from actors.nats_connection import (
    BadNatsUrl,
    ConnectionEvent,
    MissingExtra,
    NatsConnection,
    NatsFailure,
    NatsLost,
    NatsRefused,
    NatsUrl,
    parse_nats_url,
)
from actors.store_memory import (
    BadStore,
    RecordStore,
    Row,
    Unstorable,
    check_numbers,
    wall_ms,
)
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
from placement.entry import Acquisition
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology

if TYPE_CHECKING:
    from nats.aio.client import Client

OPTIONS = ("cluster", "replicas", "timeout_ms")
#: How many identities of a batch are written at once.
IN_FLIGHT_MAX = 256
#: A snapshot above this has keys of its own: a lock's writes need not carry it.
INLINE_BYTES_MAX = 64 << 10
PART_BYTES_MAX = 256 << 10
SNAPSHOT_BYTES_MAX = 256 << 20

_CLUSTER = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_NUMBER = re.compile(r"[0-9]{1,10}\Z")
_REPLICAS_MAX = 5  # JetStream's own
_TIMEOUT_MS_DEFAULT, _TIMEOUT_MS_MAX = 2_000, 600_000

_OWN = -1  # in a record: the revision of the very write that holds it
_PARTS_IN_FLIGHT_MAX = 8
_CALL_S_MAX = 600.0
_PAUSE_S, _PAUSE_S_MAX = 0.002, 0.05
_KNOWN_BYTES_MAX = 64 << 20
_KNOWN_BYTES_EACH = 600
_CLOSED_MAX = 10_000

_Result = TypeVar("_Result")
_Request = TypeVar("_Request", Acquire, Release, Load, Claim, Save, GiveUp)
_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsPlace:
    """Which servers hold the bucket of which cluster. Its text shows no secret.

    `replicas` is how many servers keep each write; none: 3 where the server is one of
    a cluster, else 1. `timeout_ms` is how long a request waits for its answer.
    """

    server: NatsUrl
    cluster: str = "default"
    replicas: int | None = None
    timeout_ms: int = _TIMEOUT_MS_DEFAULT

    @classmethod
    def parse(cls, url: str) -> "NatsPlace":
        """Read a URL as `nats://host:4222/?cluster=default&replicas=3`.

        Raises:
            BadStore: it is none, and why; the message shows no secret.
        """
        try:
            server = parse_nats_url(url, more=OPTIONS)
        except BadNatsUrl as error:
            raise BadStore(str(error)) from None
        cluster = server.options.get("cluster", "default")
        if not _CLUSTER.match(cluster):
            raise BadStore(
                f"{server}: cluster must be 1 to 64 of A-Z a-z 0-9 _ -, "
                f"not {cluster[:80]!r}"
            )
        replicas = _number(server, "replicas", _REPLICAS_MAX)
        timeout_ms = _number(server, "timeout_ms", _TIMEOUT_MS_MAX)
        return cls(
            server=server,
            cluster=cluster,
            replicas=replicas,
            timeout_ms=timeout_ms or _TIMEOUT_MS_DEFAULT,
        )

    @property
    def bucket(self) -> str:
        """The name of the cluster's bucket."""
        return f"placement_{self.cluster}"

    @property
    def url(self) -> str:
        """The URL that names it, without what is secret."""
        more = "" if self.replicas is None else f"&replicas={self.replicas}"
        return f"{self.server}/?cluster={self.cluster}{more}"

    def look(self) -> None:
        """Check that the server lets us in, and the bucket if it is there.

        It creates nothing.

        Raises:
            BadStore: no store can be opened there, and why.
        """
        try:
            NatsStore(self, creates=False).close()
        except StoreFailure as error:
            raise BadStore(str(error)) from error

    def open(self, *, now_ms: Callable[[], int] = wall_ms) -> "NatsStore":
        """Open the store, and create its bucket where there is none.

        Raises:
            BadStore: no store can be opened there, and why.
            StoreFailure: not now.
        """
        return NatsStore(self, now_ms=now_ms)


def _number(server: NatsUrl, name: str, largest: int) -> int | None:
    text = server.options.get(name)
    if text is None:
        return None
    if not _NUMBER.match(text) or not 1 <= int(text) <= largest:
        raise BadStore(f"{server}: {name} must be a number from 1 to {largest}")
    return int(text)


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


class _StoredSession(msgspec.Struct, array_like=True, frozen=True):
    ttl_ms: int
    count: int
    closed: bool


class _StoredMember(msgspec.Struct, array_like=True, frozen=True):
    session: str
    kinds: tuple[str, ...]
    weight: float
    draining: bool


class _StoredCluster(msgspec.Struct, array_like=True, frozen=True):
    epoch: int = 0
    members: tuple[_StoredMember, ...] = ()
    opened: tuple[str, ...] = ()


_encode = msgspec.msgpack.Encoder().encode
_entry_from = msgspec.msgpack.Decoder(_StoredEntry).decode
_session_from = msgspec.msgpack.Decoder(_StoredSession).decode
_cluster_from = msgspec.msgpack.Decoder(_StoredCluster).decode

_CLUSTER_KEY = "cluster"


def _session_key(session: SessionId) -> str:
    return f"s.{token_of(session)}"


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


def _session_data(record: SessionRecord) -> bytes:
    return _encode(_StoredSession(record.ttl_ms, record.count, record.closed))


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
        self.row, self.kept, self.sessions = replace(row), None, sessions

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
class _Batch:
    """Requests, their outcomes until now, and what may have happened besides."""

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


# --- the store ---------------------------------------------------------------


class _Lost(StoreFailure):
    """The connection was lost meanwhile, or is not there."""


class NatsStore:
    """A connection to the store of one cluster.

    A call that finds the connection lost waits for another within `timeout_ms`, and
    then decides again over what it reads. Where that is too long, what was not
    confirmed is `Failed`, or the call raises `StoreFailure`.

    Raises:
        BadStore: no store can be opened there, and why.
        StoreFailure: not now.
    """

    def __init__(
        self,
        place: NatsPlace,
        *,
        now_ms: Callable[[], int] = wall_ms,
        creates: bool = True,
    ) -> None:
        self._place, self._now_ms = place, now_ms
        self._timeout_s = place.timeout_ms / 1000
        self._where = f"NATS {place.server}"
        self._bucket: Bucket | None = None
        self._rules = _Rules()
        self._known = _KnownEntries()
        self._sessions: dict[SessionId, tuple[int, SessionRecord]] = {}
        self._doubted: set[SessionId] = set()
        self._closed: OrderedDict[SessionId, SessionRecord] = OrderedDict()
        self._cluster = (0, _StoredCluster())
        self._is_cluster_old = True
        self._parts_in_flight = asyncio.Semaphore(_PARTS_IN_FLIGHT_MAX)
        self._is_up = threading.Event()
        self._is_up.set()
        self._down_since_s = 0.0
        self._is_over = False
        try:
            self._connection = NatsConnection.open(place.server, name="placement-store")
        except (BadNatsUrl, MissingExtra) as error:
            raise BadStore(str(error)) from None
        except NatsRefused as error:
            raise BadStore(str(error)) from error
        except NatsFailure as error:
            raise StoreFailure(str(error), may_have_happened=False) from error
        self._connection.listen(self._heard)
        try:
            self._prepare(creates=creates)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<NatsStore {self.url}>"

    @property
    def url(self) -> str:
        """The URL that names it, without what is secret."""
        return self._place.url

    def transaction(self) -> AbstractContextManager[None]:
        """Do nothing: several keys never change together here."""
        return nullcontext()

    def another(self) -> "NatsStore":
        """Open another connection to the same bucket, which it never creates."""
        return NatsStore(self._place, now_ms=self._now_ms, creates=False)

    def close(self) -> None:
        """Close the connection and end its thread."""
        self._is_over = True
        self._connection.close()

    # --- entries and locks ---

    def try_acquire(
        self, requests: Sequence[Acquire], /
    ) -> Sequence[Acquired | LockHeld | LockRefused | Failed]:
        """Take each lock that is free, or already held by that acquisition."""
        return self._each(RecordStore._acquire, requests)  # noqa: SLF001

    def release(self, requests: Sequence[Release], /) -> Sequence[Released | Failed]:
        """Free each lock that its acquisition still holds; else change nothing."""
        return self._each(RecordStore._release, requests)  # noqa: SLF001

    def load(self, requests: Sequence[Load], /) -> Sequence[Loaded | Failed]:
        """Read entries, from the leader."""
        return self._each(RecordStore._load, requests)  # noqa: SLF001

    def claim(
        self, requests: Sequence[Claim], /
    ) -> Sequence[Claimed | ClaimRefused | Failed]:
        """Make claims; the same attempt repeated is confirmed, not made again."""
        return self._each(RecordStore._claim, requests)  # noqa: SLF001

    def save(self, requests: Sequence[Save], /) -> Sequence[Saved | Stale | Failed]:
        """Store snapshots; a version not greater is confirmed and not written."""
        return self._each(RecordStore._save, requests)  # noqa: SLF001

    def give_up(
        self, requests: Sequence[GiveUp], /
    ) -> Sequence[GivenUp | Stale | Failed]:
        """Clear owners; `Stale` only where a greater token has been claimed."""
        return self._each(RecordStore._give_up, requests)  # noqa: SLF001

    def _each(
        self,
        rule: Callable[[RecordStore, _Request, int], _Outcome],
        requests: Sequence[_Request],
    ) -> list[_Outcome | Failed]:
        if not requests:
            return []
        batch = _Batch(rule, requests, self._now_ms(), [None] * len(requests))
        until_s = self._until_s()
        while True:
            try:
                self._call(lambda bucket: self._work(bucket, batch))
            except _Lost as error:
                if self._await_connection(until_s):
                    continue
                if batch.outcomes.count(None) == len(requests):
                    unsure = bool(batch.unsure)
                    raise StoreFailure(str(error), may_have_happened=unsure) from error
                for place, outcome in enumerate(batch.outcomes):
                    if outcome is None:
                        batch.outcomes[place] = batch.failed(place, str(error))
            return batch.outcomes

    async def _work(self, bucket: Bucket, batch: _Batch) -> None:
        """Do what is left of the batch, many identities at once."""
        groups = batch.left()

        async def worker() -> None:
            for group in groups:
                for place in group:
                    batch.outcomes[place] = await self._one(bucket, batch, place)

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(len(batch.requests), IN_FLIGHT_MAX)):
                workers.create_task(worker())

    async def _one(self, bucket: Bucket, batch: _Batch, place: int) -> Any:
        """The outcome of one request."""
        if batch.silence:
            # A thousand that wait for a silent server, one after the other, would
            # hold up everything.
            return batch.failed(place, batch.silence)
        loop = asyncio.get_running_loop()
        deed = _Deed(bucket, batch, place, loop.time() + self._timeout_s)
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

    async def _try(self, deed: "_Deed") -> Any:
        """Decide over what is known of the key, or read of it; write what follows."""
        identity, request = deed.identity, deed.request
        known = self._known.get(identity)
        is_read = known is None or isinstance(request, Load)
        if known is None and isinstance(request, Acquire) and not deed.has_read:
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
            row = replace(known.row)
        deed.has_read = True
        await self._write_entry(deed, known, row)
        if isinstance(outcome, Claimed):
            if known.parts is not None:
                await self._sweep(deed, row.fencing_token, known.parts)
            return Claimed(row.entry(identity, deed.batch.now_ms))
        return outcome

    async def _decide(self, deed: "_Deed", known: _Known) -> tuple[Any, Row | None]:
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

    async def _tell_session(self, deed: "_Deed", missing: _Missing) -> None:
        """Read the session, once a batch; or have its record created, as closed."""
        session, sessions = missing.session, deed.batch.sessions
        async with deed.batch.asking.setdefault(session, asyncio.Lock()):
            if missing.settle and sessions.get(session) is None:
                sessions[session] = await self._settle(deed.bucket, session, deed.until)
            elif not missing.settle and session not in sessions:
                found = await self._read_session(deed.bucket, session, deed.until)
                sessions[session] = None if found is None else found[1]

    async def _read_entry(self, deed: "_Deed") -> _Known:
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

    async def _write_entry(self, deed: "_Deed", known: _Known, row: Row) -> None:
        """Write `row` over what is known; it has its revision then."""
        parts = known.parts
        if row.version != known.row.version:
            # The rules change a snapshot only with its version.
            parts = None
            if row.snapshot is not None and len(row.snapshot) > self._inline_max:
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

    @property
    def _inline_max(self) -> int:
        return min(INLINE_BYTES_MAX, self._connection.max_payload // 2)

    async def _upload(self, deed: "_Deed", snapshot: bytes) -> _Parts:
        """Write the parts of a snapshot, under a name that is used once."""
        size = min(PART_BYTES_MAX, self._connection.max_payload // 2)
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

    async def _with_snapshot(self, deed: "_Deed", known: _Known) -> _Known:
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

    async def _sweep(self, deed: "_Deed", fencing_token: int, used: _Parts) -> None:
        """Remove what a crash has left of snapshots that never got into the entry.

        Under an older token none will: its save is conditional on what the claim
        has replaced.
        """
        bucket, identity = deed.bucket, deed.identity
        with suppress(BucketError, ValueError):
            left = await bucket.keys(f"p.{token_of(identity)}.>", until=deed.until)
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
            await bucket.purge(f"p.{token_of(identity)}.{parts.name}.>", until=until)

    # --- sessions ---

    def open_session(self, record: SessionRecord, /) -> bool:
        """Create `record`; false where that session has another record already."""
        session = record.session
        _check(record.count, record.ttl_ms)

        async def work(bucket: Bucket, until: float) -> bool:
            # Listed first: who reads the list must not miss a session that is open.
            await self._list(bucket, until, opened=session)
            found = self._session_at_hand(session)
            if found is None:
                with suppress(WrongRevision):
                    await self._write_session(bucket, record, 0, until)
                    return True
                found = await self._read_session(bucket, session, until)
                if found is None:
                    raise WrongRevision(f"{self._where}: a reading without {session}")
            if found[1] != record or record.closed or record.count:
                return False
            await self._write_session(bucket, record, found[0], until)
            return True

        return self._sessions_call(work)

    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        """Raise the count to `count` and read all; none where it is not open."""
        _check(count)

        async def work(bucket: Bucket, until: float) -> SessionView | None:
            found = self._session_at_hand(session)
            if found is None:
                found = await self._read_session(bucket, session, until)
            if found is None or found[1].closed:
                return None
            revision, record = found
            renewed = replace(record, count=max(count, record.count))
            await self._write_session(bucket, renewed, revision, until)
            view, ended = await self._view(bucket, until, known=renewed)
            if ended:
                # By a member that died before it could.
                with suppress(BucketError):
                    await self._list(bucket, until, ended=ended)
            return view

        return self._sessions_call(work)

    def read_sessions(self) -> SessionView:
        """Read all, without a session of one's own."""

        async def work(bucket: Bucket, until: float) -> SessionView:
            return (await self._view(bucket, until))[0]

        return self._sessions_call(work)

    def close_session(self, session: SessionId, count: int, /) -> bool:
        """Close it if its count is still `count`; true if it is closed then."""

        async def work(bucket: Bucket, until: float) -> bool:
            found = self._session_at_hand(session)
            if found is None or found[1].count != count:
                found = await self._read_session(bucket, session, until)
            if found is None:
                record = await self._settle(bucket, session, until)
                if not record.closed:
                    raise WrongRevision(f"{self._where}: {session} was opened just now")
            elif not found[1].closed:
                if found[1].count != count:
                    return False
                closed = replace(found[1], closed=True)
                await self._write_session(bucket, closed, found[0], until)
            with suppress(BucketError):
                await self._list(bucket, until, ended=(session,))
            return True

        return self._sessions_call(work)

    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        """Replace the members if the epoch is still that; the topology after it."""
        written = Topology(epoch=expected_epoch + 1, members=tuple(members))

        async def work(bucket: Bucket, until: float) -> Topology:
            revision, stored = await self._cluster_at_hand(bucket, until)
            if stored.epoch != expected_epoch:
                revision, stored = await self._read_cluster(bucket, until)
            if stored.epoch != expected_epoch:
                return _topology_of(stored)
            changed = _StoredCluster(
                written.epoch, _members_of(written.members), stored.opened
            )
            await self._write_cluster(bucket, changed, revision, until)
            return written

        return self._sessions_call(work)

    async def _view(
        self, bucket: Bucket, until: float, *, known: SessionRecord | None = None
    ) -> tuple[SessionView, tuple[SessionId, ...]]:
        """A reading; and the closed sessions that are still listed as opened."""
        _, stored = await self._read_cluster(bucket, until)
        topology = _topology_of(stored)
        opened = [SessionId(each) for each in stored.opened]
        names = {*opened, *(member.session for member in topology.members)}

        async def read(session: SessionId) -> SessionRecord | None:
            if known is not None and session == known.session:
                return known
            found = await self._read_session(bucket, session, until)
            return None if found is None else found[1]

        ordered = sorted(names)
        records = await asyncio.gather(*map(read, ordered))
        by_session = dict(zip(ordered, records, strict=True))
        seen = tuple(
            record
            for session, record in by_session.items()
            if record is not None and (not record.closed or session in topology)
        )
        ended = tuple(
            session
            for session in opened
            if (record := by_session[session]) is not None and record.closed
        )
        return SessionView(topology, seen), ended

    async def _list(
        self,
        bucket: Bucket,
        until: float,
        *,
        opened: SessionId | None = None,
        ended: tuple[SessionId, ...] = (),
    ) -> None:
        """Add to the sessions that have been opened, or take away from them.

        Taken away are only closed ones: a list may be stale, but never lacks a
        session that is open.
        """
        revision, stored = await self._cluster_at_hand(bucket, until)
        names = [each for each in stored.opened if each not in ended]
        if opened is not None and opened not in names:
            names.append(opened)
        if tuple(names) != stored.opened:
            changed = _StoredCluster(stored.epoch, stored.members, tuple(names))
            await self._write_cluster(bucket, changed, revision, until)

    async def _settle(
        self, bucket: Bucket, session: SessionId, until: float
    ) -> SessionRecord:
        """Create the record of an absent session, as closed; what it has now."""
        closed = SessionRecord(session=session, ttl_ms=0, closed=True)
        try:
            await self._write_session(bucket, closed, 0, until)
        except WrongRevision:
            found = await self._read_session(bucket, session, until)
            if found is None:
                raise  # a reading that is older than the record
            return found[1]
        return closed

    def _session_at_hand(self, session: SessionId) -> tuple[int, SessionRecord] | None:
        """What to write over: the last known, unless a write has shown it to be old."""
        return None if session in self._doubted else self._sessions.get(session)

    async def _read_session(
        self, bucket: Bucket, session: SessionId, until: float
    ) -> tuple[int, SessionRecord] | None:
        """The newest that this connection knows of it, after another reading.

        What is known is never lost to an older reading: whoever has been seen open
        would look closed without it.
        """
        closed = self._closed.get(session)
        if closed is not None:
            return 0, closed  # for good, and written no more
        key = _session_key(session)
        found = await bucket.read(key, until=until)
        self._doubted.discard(session)
        known = self._sessions.get(session)
        if found is None or (known is not None and found[0] < known[0]):
            return known
        revision, data = found
        try:
            stored = _session_from(data)
        except msgspec.MsgspecError as error:
            raise NotDone(f"{self._where}: {key} is damaged: {error}") from error
        record = SessionRecord(
            session=session,
            ttl_ms=stored.ttl_ms,
            count=stored.count,
            closed=stored.closed,
        )
        self._keep_session(revision, record)
        return revision, record

    async def _write_session(
        self, bucket: Bucket, record: SessionRecord, expected: int, until: float
    ) -> None:
        session = record.session
        self._doubted.add(session)
        revision = await bucket.write(
            _session_key(session),
            _session_data(record),
            expected=expected,
            until=until,
        )
        self._doubted.discard(session)
        self._keep_session(revision, record)

    def _keep_session(self, revision: int, record: SessionRecord) -> None:
        session = record.session
        if not record.closed:
            self._sessions[session] = (revision, record)
            return
        self._sessions.pop(session, None)
        self._closed[session] = record
        if len(self._closed) > _CLOSED_MAX:
            self._closed.popitem(last=False)

    async def _cluster_at_hand(
        self, bucket: Bucket, until: float
    ) -> tuple[int, _StoredCluster]:
        """What to write over: the last known, until a write has shown it to be old."""
        if self._is_cluster_old:
            return await self._read_cluster(bucket, until)
        return self._cluster

    async def _read_cluster(
        self, bucket: Bucket, until: float
    ) -> tuple[int, _StoredCluster]:
        """The newest that this connection knows, after another reading."""
        found = await bucket.read(_CLUSTER_KEY, until=until)
        if found is not None and found[0] > self._cluster[0]:
            try:
                self._cluster = found[0], _cluster_from(found[1])
            except msgspec.MsgspecError as error:
                raise NotDone(
                    f"{self._where}: the membership is damaged: {error}"
                ) from error
        self._is_cluster_old = False
        return self._cluster

    async def _write_cluster(
        self, bucket: Bucket, cluster: _StoredCluster, expected: int, until: float
    ) -> None:
        self._is_cluster_old = True
        revision = await bucket.write(
            _CLUSTER_KEY, _encode(cluster), expected=expected, until=until
        )
        self._cluster, self._is_cluster_old = (revision, cluster), False

    # --- the connection ---

    def _sessions_call(
        self, work: Callable[[Bucket, float], Awaitable[_Result]]
    ) -> _Result:
        """Do `work`, again and again where its answer is lost or others were faster."""
        until_s, unsure = self._until_s(), False

        async def patiently(bucket: Bucket) -> _Result:
            nonlocal unsure
            loop = asyncio.get_running_loop()
            until, pause_s = loop.time() + self._timeout_s, 0.0
            while True:
                try:
                    return await work(bucket, until)
                except (WrongRevision, NotNow, NoAnswer) as error:
                    unsure = unsure or isinstance(error, NoAnswer)
                    if loop.time() >= until:
                        raise StoreFailure(
                            str(error), may_have_happened=unsure
                        ) from error
                    await asyncio.sleep(min(pause_s, until - loop.time()))
                    pause_s = min(_PAUSE_S_MAX, pause_s + _PAUSE_S)
                except (NotDone, UnicodeEncodeError) as error:
                    raise StoreFailure(str(error), may_have_happened=unsure) from error

        while True:
            try:
                return self._call(patiently)
            except _Lost as error:
                unsure = unsure or error.may_have_happened
                if not self._await_connection(until_s):
                    raise StoreFailure(str(error), may_have_happened=unsure) from error

    def _call(self, work: Callable[[Bucket], Awaitable[_Result]]) -> _Result:
        """Do `work` on the connection's thread, with the bucket of its client."""

        async def on_client(client: "Client") -> _Result:
            bucket = self._bucket
            if bucket is None or bucket.client is not client:
                bucket = Bucket(client, self._place.bucket, where=self._where)
                self._bucket = bucket
                await bucket.listen()
            return await work(bucket)

        try:
            return self._connection.call(on_client, timeout_s=_CALL_S_MAX)
        except NatsFailure as error:
            failure = _Lost if isinstance(error, NatsLost) else StoreFailure
            raise failure(
                str(error), may_have_happened=error.may_have_happened
            ) from error

    def _prepare(self, *, creates: bool) -> None:
        """Create the bucket, or check it."""
        replicas = self._place.replicas

        async def work(bucket: Bucket) -> None:
            loop = asyncio.get_running_loop()
            until = loop.time() + self._timeout_s
            while True:
                try:
                    if creates:
                        return await bucket.create(replicas=replicas, until=until)
                    await bucket.look(replicas=replicas, until=until)
                except NotNow:
                    if loop.time() >= until:
                        raise
                    await asyncio.sleep(_PAUSE_S_MAX)
                else:
                    return None

        try:
            self._call(work)
        except NotDone as error:
            raise BadStore(str(error)) from error
        except BucketError as error:
            raise StoreFailure(str(error), may_have_happened=creates) from error

    def _heard(self, event: ConnectionEvent) -> None:
        match event.name:
            case "Disconnected":
                self._down_since_s = time.monotonic()
                self._is_up.clear()
            case "Reconnected":
                self._is_up.set()
            case "ServerError" | "SubscriptionLost":
                bucket = self._bucket
                if bucket is not None:
                    bucket.refuse(event.reason)

    def _until_s(self) -> float:
        """When a call that begins now has waited long enough for a connection."""
        is_up = self._is_up.is_set()
        return self._timeout_s + (time.monotonic() if is_up else self._down_since_s)

    def _await_connection(self, until_s: float) -> bool:
        left_s = until_s - time.monotonic()
        return not self._is_over and left_s > 0 and self._is_up.wait(left_s)


class _Deed:
    """One request on its way: until when, and what it has left behind."""

    def __init__(self, bucket: Bucket, batch: _Batch, place: int, until: float) -> None:
        self.bucket, self.batch, self.place, self.until = bucket, batch, place, until
        self.request = batch.requests[place]
        self.identity: Identity = self.request.identity
        self.has_read = False
        self.upload: _Parts | None = None

    @property
    def fencing_token(self) -> int:
        """That under which it saves."""
        token: int = self.request.fencing_token
        return token

    @property
    def key(self) -> str:
        """Where its entry is."""
        return f"e.{token_of(self.identity)}"


def _part_keys(identity: Identity, parts: _Parts) -> list[str]:
    return [
        f"p.{token_of(identity)}.{parts.name}.{number}" for number in range(parts.count)
    ]


def _topology_of(stored: _StoredCluster) -> Topology:
    return Topology(
        epoch=stored.epoch,
        members=tuple(
            Member(
                session=SessionId(each.session),
                kinds=each.kinds,
                weight=each.weight,
                draining=each.draining,
            )
            for each in stored.members
        ),
    )


def _members_of(members: Iterable[Member]) -> tuple[_StoredMember, ...]:
    return tuple(
        _StoredMember(each.session, each.kinds, each.weight, each.draining)
        for each in members
    )


def _check(*numbers: int) -> None:
    try:
        check_numbers(*numbers)
    except Unstorable as error:
        raise StoreFailure(str(error), may_have_happened=False) from error
