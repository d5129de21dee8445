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

A read decides nothing: `nats_entries` and `nats_sessions` say what confirms it.

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
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from actors.loop_thread import LoopThread
from actors.nats_bucket import (
    Bucket,
    BucketError,
    NoAnswer,
    NotDone,
    NotNow,
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
from actors.nats_entries import Batch, NatsEntries
from actors.nats_sessions import NatsSessions, Patience
from actors.store_memory import (
    BadStore,
    RecordStore,
    Unstorable,
    check_numbers,
    wall_ms,
)
from actors.url_options import number_of
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
from placement.topology import Member, SessionId, Topology

if TYPE_CHECKING:
    from actors.nats_client import NatsClient

OPTIONS = ("cluster", "replicas", "timeout_ms")

_CLUSTER = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_REPLICAS_MAX = 5  # JetStream's own
_TIMEOUT_MS_DEFAULT, _TIMEOUT_MS_MAX = 2_000, 600_000

_CALL_S_MAX = 600.0
_PREPARE_TRIES = 5
_PAUSE_S = 0.05

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
    def refuse(why: str) -> BadStore:
        return BadStore(f"{server}: {why}")

    text = server.options.get(name)
    return (
        None if text is None else number_of(name, text, largest=largest, refuse=refuse)
    )


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
        thread: LoopThread | None = None,
    ) -> None:
        self._place, self._now_ms = place, now_ms
        self._timeout_s = place.timeout_ms / 1000
        self._where = f"NATS {place.server}"
        self._bucket: Bucket | None = None
        self._sessions = NatsSessions(where=self._where)
        self._entries = NatsEntries(
            self._sessions, where=self._where, timeout_s=self._timeout_s
        )
        self._is_up = threading.Event()
        self._is_up.set()
        self._down_since_s = 0.0
        self._is_over = False
        try:
            self._connection = NatsConnection.open(
                place.server, name="placement-store", thread=thread
            )
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

    def another(self, *, thread: LoopThread | None = None) -> "NatsStore":
        """Open another connection to the same bucket, which it never creates.

        It runs on a thread of its own unless another is given, where calls must not
        be made.
        """
        return NatsStore(self._place, now_ms=self._now_ms, creates=False, thread=thread)

    def close(self) -> None:
        """Close the connection."""
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
        batch = Batch(rule, requests, self._now_ms(), [None] * len(requests))
        until_s = self._until_s()
        while True:
            try:
                self._call(lambda bucket: self._entries.work(bucket, batch))
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

    # --- sessions ---

    def open_session(self, record: SessionRecord, /) -> bool:
        """Create `record`; false where that session has another record already."""
        _check(record.count, record.ttl_ms)
        return self._sessions_call(partial(self._sessions.open, record))

    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        """Raise the count to `count` and read all; none where it is not open."""
        _check(count)
        return self._sessions_call(partial(self._sessions.renew, session, count))

    def read_sessions(self) -> SessionView:
        """Read all, without a session of one's own."""
        return self._sessions_call(self._sessions.view)

    def close_session(self, session: SessionId, count: int, /) -> bool:
        """Close it if its count is still `count`; true if it is closed then."""
        return self._sessions_call(partial(self._sessions.close, session, count))

    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        """Replace the members if the epoch is still that; the topology after it."""
        return self._sessions_call(
            partial(self._sessions.write_members, members, expected_epoch)
        )

    # --- the connection ---

    def _sessions_call(
        self, work: Callable[[Bucket, float], Awaitable[_Result]]
    ) -> _Result:
        """Do `work`, again and again where its answer is lost or others were faster."""
        until_s = self._until_s()
        patience = Patience(work, timeout_s=self._timeout_s)
        while True:
            try:
                return self._call(patience.perform)
            except _Lost as error:
                patience.unsure = patience.unsure or error.may_have_happened
                if not self._await_connection(until_s):
                    raise patience.failure(error) from error

    def _call(self, work: Callable[[Bucket], Awaitable[_Result]]) -> _Result:
        """Do `work` on the connection's thread, with the bucket of its client."""

        async def on_client(client: "NatsClient") -> _Result:
            bucket = self._bucket
            if bucket is None or bucket.client is not client:
                bucket = Bucket(client, self._place.bucket, where=self._where)
                self._bucket = bucket
                try:
                    await bucket.listen()
                except Exception as error:
                    if self._bucket is bucket:
                        self._bucket = None
                    raise NatsLost(
                        f"{self._where}: {error}", may_have_happened=False
                    ) from error
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
            # Servers that start just now take a while to see each other, and until
            # then refuse, or do not answer at all.
            over = loop.time() + _PREPARE_TRIES * self._timeout_s
            while True:
                until = loop.time() + self._timeout_s
                try:
                    if creates:
                        await bucket.create(replicas=replicas, until=until)
                    else:
                        await bucket.look(replicas=replicas, until=until)
                except (NotNow, NoAnswer):
                    if loop.time() >= over:
                        raise
                    await asyncio.sleep(_PAUSE_S)
                else:
                    return

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


def _check(*numbers: int) -> None:
    try:
        check_numbers(*numbers)
    except Unstorable as error:
        raise StoreFailure(str(error), may_have_happened=False) from error
