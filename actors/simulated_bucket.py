"""A JetStream bucket in a simulation: reads may be old, and keys change one by one.

Over it runs what runs over NATS: how a request is decided, written, read back and
tried again is `NatsEntries` and `NatsSessions` themselves. What a server does to them
happens by decision: an answer is lost, a write arrives late, a reading is as old as
after a change of the leader, or nobody answers in the middle of a request.
"""

import asyncio
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias, cast

from actors.driven_loop import DrivenLoop
from actors.nats_bucket import Bucket, NoAnswer, NotDone, WrongRevision
from actors.nats_entries import ENTRY_PREFIX, Batch, NatsEntries, row_from
from actors.nats_sessions import (
    CLUSTER_KEY,
    SESSION_PREFIX,
    NatsSessions,
    Patience,
    session_from,
    topology_from,
)
from actors.nats_token import text_of_key_token
from actors.simulated_store import StoreCounter, Trouble
from actors.store_memory import RecordStore, Row
from actors.trace import (
    EntryClaimed,
    EntryGivenUp,
    EntrySaved,
    MembersChanged,
    Record,
    SessionChanged,
)
from actors.world import World
from placement.contracts import (
    Acquire,
    Claim,
    GiveUp,
    Load,
    Release,
    Save,
    SessionRecord,
    SessionView,
)
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology

#: How long a request waits for its answer. Requests of all kinds in turn wait less
#: than a time to live.
TIMEOUT_S = 0.3
_LEAST_S, _SPREAD_S = 0.0002, 0.0006
_STALE_MAX_NS = 1_000_000_000
_WHERE = "a simulated bucket"

#: When a key was written, its revision, and its data.
_Version: TypeAlias = tuple[int, int, bytes]


class BucketContents:
    """The keys, what they were a while ago, and a record of each change.

    The records are made of the bytes that are really there, before and after. A write
    is one step, as a server's is, whatever threads the conformance suite has.
    """

    def __init__(self, world: World, records: list[Record]) -> None:
        self._world, self._records = world, records
        #: Of each key what was a while ago, the last last.
        self._history: dict[str, list[_Version]] = {}
        self._revision = 0
        self._lock = threading.Lock()
        self.rows: dict[Identity, Row] = {}
        self.open_sessions: dict[SessionId, SessionRecord] = {}

    def connect(
        self, world: World, node: str, shared: StoreCounter
    ) -> "SimulatedBucketStore":
        """A connection of that node's."""
        return SimulatedBucketStore(self, world, node, shared)

    def read(self, key: str, *, age_ns: int = 0) -> tuple[int, bytes] | None:
        """The revision and data of `key`, as they were so long ago."""
        history = self._history.get(key, [])
        at_ns = self._world.moment_ns() - age_ns
        place = bisect_right(history, at_ns, key=lambda each: each[0])
        if not place:
            return None
        _, revision, data = history[place - 1]
        return revision, data

    def write(self, key: str, data: bytes, expected: int) -> int:
        """Write if the last revision is `expected`; the new one.

        Raises:
            WrongRevision: it is another.
        """
        with self._lock:
            history = self._history.setdefault(key, [])
            former = history[-1] if history else None
            if expected != (0 if former is None else former[1]):
                raise WrongRevision(f"{_WHERE}: {key}")
            revision = self._revision = self._revision + 1
            now_ns = self._world.moment_ns()
            history.append((now_ns, revision, data))
            while len(history) > 1 and history[1][0] < now_ns - _STALE_MAX_NS:
                del history[0]
            self._note(key, former, revision, data)
        return revision

    def write_late(self, key: str, data: bytes, expected: int) -> None:
        """As `write`; nobody hears of it."""
        try:
            self.write(key, data, expected)
        except WrongRevision:
            return

    def keys(self, prefix: str) -> list[str]:
        """Those that begin so."""
        return [key for key in self._history if key.startswith(prefix)]

    def purge(self, prefix: str) -> None:
        """Remove those that begin so, without a trace."""
        for key in self.keys(prefix):
            del self._history[key]

    # --- records ---

    def _note(
        self,
        key: str,
        former: _Version | None,
        revision: int,
        data: bytes,
    ) -> None:
        if key.startswith(ENTRY_PREFIX):
            identity = Identity.parse(text_of_key_token(key[len(ENTRY_PREFIX) :]))
            self._note_entry(identity, row_from(data, revision))
        elif key.startswith(SESSION_PREFIX):
            session = SessionId(text_of_key_token(key[len(SESSION_PREFIX) :]))
            self._note_session(former, session_from(data, session))
        elif key == CLUSTER_KEY:
            topology = topology_from(data)
            before = Topology() if former is None else topology_from(former[2])
            if topology.epoch != before.epoch:
                self._records.append(
                    MembersChanged(
                        self._world.now_ns,
                        topology.epoch,
                        tuple(str(member.session) for member in topology.members),
                    )
                )

    def _note_entry(self, identity: Identity, row: Row) -> None:
        now_ns, records = self._world.now_ns, self._records
        old = self.rows.get(identity, Row())
        self.rows[identity] = row
        token, name = row.fencing_token, str(identity)
        if token != old.fencing_token:
            owner, former = str(row.owner or ""), str(old.owner or "")
            records.append(
                EntryClaimed(now_ns, name, owner, token, former, old.fencing_token)
            )
        is_saved = row.version != old.version
        if is_saved:
            records.append(EntrySaved(now_ns, name, token, row.version))
        if row.owner is None and old.owner is not None:
            brought = row.version if is_saved else -1
            records.append(EntryGivenUp(now_ns, name, str(old.owner), token, brought))

    def _note_session(self, former: _Version | None, record: SessionRecord) -> None:
        session = record.session
        if record.closed:
            self.open_sessions.pop(session, None)
        else:
            self.open_sessions[session] = record
        if former is None or session_from(former[2], session).closed != record.closed:
            state = "closed" if record.closed else "open"
            self._records.append(
                SessionChanged(self._world.now_ns, str(session), state, record.count)
            )


class SimulatedBucket:
    """What `Bucket` is over one client, and what goes wrong with each request."""

    max_payload = 1 << 20

    def __init__(
        self, contents: BucketContents, world: World, draw: Callable[[], float]
    ) -> None:
        self.read_count = 0
        self._contents, self._world, self._draw = contents, world, draw
        self._trouble: Trouble | None = None
        self._fails_at = 0
        self._is_silent = False

    def begin(self, trouble: Trouble | None) -> None:
        """A call begins with which that is wrong."""
        self._trouble, self._is_silent = trouble, False
        if trouble is not None:
            self._is_silent = trouble.what == "away"
            self._fails_at = int(self._draw() * 3)

    async def write(self, key: str, data: bytes, *, expected: int, until: float) -> int:
        """As `Bucket`."""
        await self._travel(until)
        trouble, contents = self._trouble, self._contents
        if trouble is not None and trouble.what in {"lost", "late"}:
            self._fails_at -= 1
            if self._fails_at < 0 and (self._fails_at == -1 or self._draw() < 1 / 3):
                if trouble.what == "late":
                    at_ns = self._world.moment_ns() + trouble.delay_ns
                    self._world.at(at_ns, contents.write_late, key, data, expected)
                else:
                    contents.write_late(key, data, expected)
                # Half of them end the connection: what follows is never done.
                self._is_silent = self._draw() < 1 / 2
                raise NoAnswer(f"{_WHERE}: the answer is lost")
        return contents.write(key, data, expected)

    async def read(self, key: str, *, until: float) -> tuple[int, bytes] | None:
        """As `Bucket`; where something is wrong each reading has an age of its own."""
        await self._travel(until)
        self.read_count += 1
        trouble, age_ns = self._trouble, 0
        if trouble is not None and trouble.what in {"stale", "lost", "late"}:
            largest = min(_STALE_MAX_NS, trouble.delay_ns or _STALE_MAX_NS // 4)
            age_ns = int(self._draw() * largest)
        return self._contents.read(key, age_ns=age_ns)

    async def keys(self, key: str, *, until: float) -> list[str]:
        """As `Bucket`."""
        await self._travel(until)
        return self._contents.keys(key.removesuffix(">"))

    async def purge(self, key: str, *, until: float) -> None:
        """As `Bucket`."""
        await self._travel(until)
        self._contents.purge(key.removesuffix(">"))

    async def _travel(self, until: float) -> None:
        """Take as long as a request does, or find that nobody answers."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(_LEAST_S + self._draw() * _SPREAD_S)
        if self._is_silent:
            await asyncio.sleep(max(0.0, until - loop.time()))
            raise NoAnswer(f"{_WHERE}: nobody answers")
        trouble = self._trouble
        if trouble is None:
            return
        if trouble.what == "fail":
            raise NotDone(f"{_WHERE}: refused")
        if trouble.what == "slow":
            delay_s = self._draw() * trouble.delay_ns / 1e9
            if loop.time() + delay_s >= until:
                # It is done, and whoever asked hears nothing of it any more.
                self._trouble = Trouble("lost")
                self._fails_at = 0
            await asyncio.sleep(min(delay_s, max(0.0, until - loop.time())))


class SimulatedBucketStore:
    """A connection to the bucket, as one thread of one process has it."""

    def __init__(
        self, contents: BucketContents, world: World, node: str, shared: StoreCounter
    ) -> None:
        self._contents, self._world = contents, world
        self._node, self._shared = node, shared
        shared.connection_count += 1
        draw = world.stream(f"bucket {shared.connection_count}").random
        self._bucket = SimulatedBucket(contents, world, draw)
        self._loop = DrivenLoop.new()
        self._known = NatsSessions(where=_WHERE)
        self._entries = NatsEntries(self._known, where=_WHERE, timeout_s=TIMEOUT_S)

    @property
    def url(self) -> str:
        """The URL that names it."""
        return "nats://simulated"

    def another(self) -> "SimulatedBucketStore":
        """Open another connection to the same contents."""
        return self._contents.connect(self._world, self._node, self._shared)

    def close(self) -> None:
        """The contents stay."""

    def transaction(self) -> AbstractContextManager[None]:
        """Several keys never change together; what is wrong is so for all calls."""
        return self._call("entries")

    @contextmanager
    def _call(self, what: str) -> Iterator[None]:
        trouble = None
        for fault in self._shared.faults:
            trouble = fault.trouble(self._node) or trouble
        self._bucket.begin(trouble)
        began_s = self._loop.time()
        try:
            yield
        finally:
            self._world.spend(round((self._loop.time() - began_s) * 1e9))
            made = self._shared.after_call.pop((self._node, what), None)
            if made is not None:
                made()

    def _each(
        self, rule: Callable[[RecordStore, Any, int], Any], requests: Sequence[Any]
    ) -> list[Any]:
        self._shared.operation_count += len(requests)
        now_ms = self._world.moment_ns() // 1_000_000
        batch = Batch(rule, requests, now_ms, [None] * len(requests))
        bucket = cast("Bucket", self._bucket)
        self._loop.run(self._entries.work(bucket, batch))
        return batch.outcomes

    def _sessions(self, work: Any) -> Any:
        self._shared.session_count += 1
        with self._call("sessions"):
            patience = Patience[Any](work, timeout_s=TIMEOUT_S)
            return self._loop.run(patience.perform(cast("Bucket", self._bucket)))

    # --- the contracts ---

    def try_acquire(self, requests: Sequence[Acquire], /) -> Any:
        """As the store over NATS."""
        return self._each(RecordStore._acquire, requests)  # noqa: SLF001

    def release(self, requests: Sequence[Release], /) -> Any:
        """As the store over NATS."""
        return self._each(RecordStore._release, requests)  # noqa: SLF001

    def load(self, requests: Sequence[Load], /) -> Any:
        """As the store over NATS."""
        return self._each(RecordStore._load, requests)  # noqa: SLF001

    def claim(self, requests: Sequence[Claim], /) -> Any:
        """As the store over NATS."""
        return self._each(RecordStore._claim, requests)  # noqa: SLF001

    def save(self, requests: Sequence[Save], /) -> Any:
        """As the store over NATS."""
        return self._each(RecordStore._save, requests)  # noqa: SLF001

    def give_up(self, requests: Sequence[GiveUp], /) -> Any:
        """As the store over NATS."""
        return self._each(RecordStore._give_up, requests)  # noqa: SLF001

    def open_session(self, record: SessionRecord, /) -> bool:
        """As the store over NATS."""
        return bool(self._sessions(partial(self._known.open, record)))

    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        """As the store over NATS."""
        found: SessionView | None = self._sessions(
            partial(self._known.renew, session, count)
        )
        return found

    def read_sessions(self) -> SessionView:
        """As the store over NATS."""
        found: SessionView = self._sessions(self._known.view)
        return found

    def close_session(self, session: SessionId, count: int, /) -> bool:
        """As the store over NATS."""
        return bool(self._sessions(partial(self._known.close, session, count)))

    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        """As the store over NATS."""
        written: Topology = self._sessions(
            partial(self._known.write_members, members, expected_epoch)
        )
        return written
