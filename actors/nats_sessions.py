"""Sessions and membership in a JetStream bucket.

A session is listed as opened before its record exists, and taken from the list when
its record is closed: a list may be stale, but never lacks a session that is open.
What is known is never lost to an older reading: whoever has been seen open would
look closed without it.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Generic, TypeVar

import msgspec

from actors.nats_bucket import (
    Bucket,
    BucketError,
    NoAnswer,
    NotDone,
    NotNow,
    WrongRevision,
)
from actors.nats_token import key_token_of
from placement.contracts import SessionRecord, SessionView, StoreFailure
from placement.topology import Member, SessionId, Topology

CLUSTER_KEY = "cluster"
SESSION_PREFIX = "s."
_CLOSED_MAX = 10_000
_PAUSE_S, _PAUSE_S_MAX = 0.002, 0.05

Result = TypeVar("Result")


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
_session_from = msgspec.msgpack.Decoder(_StoredSession).decode
_cluster_from = msgspec.msgpack.Decoder(_StoredCluster).decode


def _session_key(session: SessionId) -> str:
    return f"{SESSION_PREFIX}{key_token_of(session)}"


def _session_data(record: SessionRecord) -> bytes:
    return _encode(_StoredSession(record.ttl_ms, record.count, record.closed))


def session_from(data: bytes, session: SessionId) -> SessionRecord:
    """The record that a key holds.

    Raises:
        msgspec.MsgspecError: it holds none.
    """
    stored = _session_from(data)
    return SessionRecord(
        session=session,
        ttl_ms=stored.ttl_ms,
        count=stored.count,
        closed=stored.closed,
    )


def topology_from(data: bytes) -> Topology:
    """The members that the key of the cluster holds."""
    return _topology_of(_cluster_from(data))


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


class Patience(Generic[Result]):
    """One request, made again where its answer is lost or others were faster.

    `unsure` says whether it may have happened, whatever comes of it.
    """

    def __init__(
        self, work: Callable[[Bucket, float], Awaitable[Result]], *, timeout_s: float
    ) -> None:
        self._work, self._timeout_s = work, timeout_s
        self.unsure = False

    async def perform(self, bucket: Bucket) -> Result:
        """Do the work; what it returns.

        Raises:
            StoreFailure: it cannot be done, or not in time.
        """
        loop = asyncio.get_running_loop()
        until, pause_s = loop.time() + self._timeout_s, 0.0
        while True:
            try:
                return await self._work(bucket, until)
            except (WrongRevision, NotNow, NoAnswer) as error:
                self.unsure = self.unsure or isinstance(error, NoAnswer)
                if loop.time() >= until:
                    raise self.failure(error) from error
                await asyncio.sleep(min(pause_s, until - loop.time()))
                pause_s = min(_PAUSE_S_MAX, pause_s + _PAUSE_S)
            except (NotDone, UnicodeEncodeError) as error:
                raise self.failure(error) from error

    def failure(self, error: Exception) -> StoreFailure:
        """What `error` means to whoever asked."""
        return StoreFailure(str(error), may_have_happened=self.unsure)


class NatsSessions:
    """What one connection knows of sessions and members, and how it writes them.

    Each method but the constructor is one request of `SessionStorage`, or a part of
    one, and may be repeated. Used on the connection's thread.

    Raises:
        BucketError: from every method; the whole request can be made again.
    """

    def __init__(self, *, where: str) -> None:
        self._where = where
        self._sessions: dict[SessionId, tuple[int, SessionRecord]] = {}
        self._doubted: set[SessionId] = set()
        self._closed: OrderedDict[SessionId, SessionRecord] = OrderedDict()
        self._cluster = (0, _StoredCluster())
        self._is_cluster_old = True

    async def open(self, record: SessionRecord, bucket: Bucket, until: float) -> bool:
        """Create `record`; false where that session has another record already."""
        session = record.session
        # Listed first: who reads the list must not miss a session that is open.
        await self._list(bucket, until, opened=session)
        found = self._session_at_hand(session)
        if found is None:
            with suppress(WrongRevision):
                await self._write_session(bucket, record, 0, until)
                return True
            found = await self.read_session(bucket, session, until)
            if found is None:
                raise WrongRevision(f"{self._where}: a reading without {session}")
        if found[1] != record or record.closed or record.count:
            return False
        await self._write_session(bucket, record, found[0], until)
        return True

    async def renew(
        self, session: SessionId, count: int, bucket: Bucket, until: float
    ) -> SessionView | None:
        """Raise the count to `count` and read all; none where it is not open."""
        found = self._session_at_hand(session)
        if found is None:
            found = await self.read_session(bucket, session, until)
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

    async def view(self, bucket: Bucket, until: float) -> SessionView:
        """Read all, without a session of one's own."""
        return (await self._view(bucket, until))[0]

    async def close(
        self, session: SessionId, count: int, bucket: Bucket, until: float
    ) -> bool:
        """Close it if its count is still `count`; true if it is closed then."""
        found = self._session_at_hand(session)
        if found is None or found[1].count != count:
            found = await self.read_session(bucket, session, until)
        if found is None:
            record = await self.settle(bucket, session, until)
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

    async def write_members(
        self,
        members: Sequence[Member],
        expected_epoch: int,
        bucket: Bucket,
        until: float,
    ) -> Topology:
        """Replace the members if the epoch is still that; the topology after it."""
        written = Topology(epoch=expected_epoch + 1, members=tuple(members))
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

    async def settle(
        self, bucket: Bucket, session: SessionId, until: float
    ) -> SessionRecord:
        """Create the record of an absent session, as closed; what it has now."""
        closed = SessionRecord(session=session, ttl_ms=0, closed=True)
        try:
            await self._write_session(bucket, closed, 0, until)
        except WrongRevision:
            found = await self.read_session(bucket, session, until)
            if found is None:
                raise  # a reading that is older than the record
            return found[1]
        return closed

    async def read_session(
        self, bucket: Bucket, session: SessionId, until: float
    ) -> tuple[int, SessionRecord] | None:
        """The newest that this connection knows of it, after another reading."""
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
            record = session_from(data, session)
        except msgspec.MsgspecError as error:
            raise NotDone(f"{self._where}: {key} is damaged: {error}") from error
        self._keep_session(revision, record)
        return revision, record

    async def _view(
        self, bucket: Bucket, until: float, *, known: SessionRecord | None = None
    ) -> tuple[SessionView, tuple[SessionId, ...]]:
        """A reading; and the closed sessions that are still listed as opened."""
        _, stored = await self._read_cluster(bucket, until)
        topology = _topology_of(stored)
        opened = [SessionId(each) for each in stored.opened]
        names = {*opened, *(member.session for member in topology.members)}
        self._forget_closed(names)

        async def read(session: SessionId) -> SessionRecord | None:
            if known is not None and session == known.session:
                return known
            found = await self.read_session(bucket, session, until)
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

    def _forget_closed(self, listed: set[SessionId]) -> None:
        """Keep nothing of sessions that others have closed.

        One is listed before its record exists, and until that is closed: where the
        list is newer than the record, what it lacks is closed.
        """
        revision, _ = self._cluster
        closed = [
            session
            for session, (last, _) in self._sessions.items()
            if session not in listed and last < revision
        ]
        for session in closed:
            del self._sessions[session]
        self._doubted.intersection_update(self._sessions)

    async def _list(
        self,
        bucket: Bucket,
        until: float,
        *,
        opened: SessionId | None = None,
        ended: tuple[SessionId, ...] = (),
    ) -> None:
        """Add to the sessions listed as opened, or take closed ones from them."""
        revision, stored = await self._cluster_at_hand(bucket, until)
        names = [each for each in stored.opened if each not in ended]
        if opened is not None and opened not in names:
            names.append(opened)
        if tuple(names) != stored.opened:
            changed = _StoredCluster(stored.epoch, stored.members, tuple(names))
            await self._write_cluster(bucket, changed, revision, until)

    def _session_at_hand(self, session: SessionId) -> tuple[int, SessionRecord] | None:
        """What to write over: the last known, unless a write has shown it to be old."""
        return None if session in self._doubted else self._sessions.get(session)

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
        found = await bucket.read(CLUSTER_KEY, until=until)
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
            CLUSTER_KEY, _encode(cluster), expected=expected, until=until
        )
        self._cluster, self._is_cluster_old = (revision, cluster), False
