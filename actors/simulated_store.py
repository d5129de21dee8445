"""The store of a simulation: the memory store, its writes recorded, its calls faulty.

What a store does wrong in life happens here by decision: it refuses before the
commit, loses the answer, commits late, takes long, or cannot be reached.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from actors.store_memory import MemoryStore, Row
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
    Claimed,
    ClaimRefused,
    Failed,
    GivenUp,
    GiveUp,
    Load,
    Release,
    Save,
    Saved,
    SessionRecord,
    SessionView,
    Stale,
    StoreFailure,
)
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology

_LEAST_NS = 200_000
_SPREAD_NS = 600_000
_STALE_MAX_NS = 1_000_000_000


class RecordingStore(MemoryStore):
    """The contents of the store, and a record of each change of them."""

    world: World
    records: list[Record]

    @classmethod
    def of(cls, world: World, records: list[Record]) -> "RecordingStore":
        """An empty one."""
        store = cls(now_ms=lambda: world.now_ns // 1_000_000)
        store.world, store.records = world, records
        return store

    def connect(
        self, world: World, node: str, shared: "StoreCounter"
    ) -> "SimulatedStore":
        """A connection of that node's."""
        return SimulatedStore(self, world, node, shared)

    @property
    def rows(self) -> dict[Identity, Row]:
        """All entries, as they really are."""
        return self._contents.rows

    @property
    def open_sessions(self) -> dict[SessionId, SessionRecord]:
        """All sessions that are open."""
        return self._contents.open_sessions

    def _claim(self, request: Claim, now_ms: int) -> Claimed | ClaimRefused:
        row = self._row(request.identity)
        former, former_token = row.owner, row.fencing_token
        outcome = super()._claim(request, now_ms)
        row = self._row(request.identity)
        if isinstance(outcome, Claimed) and row.fencing_token != former_token:
            self.records.append(
                EntryClaimed(
                    self.world.now_ns,
                    str(request.identity),
                    str(row.owner or ""),
                    row.fencing_token,
                    former or "",
                    former_token,
                )
            )
        return outcome

    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        version = self._row(request.identity).version
        outcome = super()._save(request, now_ms)
        self._record_save(request.identity, request.fencing_token, version)
        return outcome

    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        row = self._row(request.identity)
        owner, version = row.owner, row.version
        brought = -1 if request.snapshot is None else request.version
        outcome = super()._give_up(request, now_ms)
        self._record_save(request.identity, request.fencing_token, version)
        if owner is not None and self._row(request.identity).owner is None:
            self.records.append(
                EntryGivenUp(
                    self.world.now_ns,
                    str(request.identity),
                    str(owner),
                    request.fencing_token,
                    brought,
                )
            )
        return outcome

    def _record_save(self, identity: Any, token: int, former_version: int) -> None:
        version = self._row(identity).version
        if version != former_version:
            self.records.append(
                EntrySaved(self.world.now_ns, str(identity), token, version)
            )

    def _keep_session(self, record: SessionRecord) -> None:
        former = self._session(record.session)
        super()._keep_session(record)
        if former is None or former.closed != record.closed:
            self.records.append(
                SessionChanged(
                    self.world.now_ns,
                    str(record.session),
                    "closed" if record.closed else "open",
                    record.count,
                )
            )

    def _keep_topology(self, topology: Topology) -> None:
        super()._keep_topology(topology)
        self.records.append(
            MembersChanged(
                self.world.now_ns,
                topology.epoch,
                tuple(str(member.session) for member in topology.members),
            )
        )


@dataclass(frozen=True, slots=True)
class Trouble:
    """What goes wrong with one call.

    `what` is `fail` (nothing was written), `lost` (written, the answer is lost),
    `late` (the answer is lost, written after `delay_ns`), `slow` (the answer
    comes after `delay_ns`), `away` (nothing arrives; known after `delay_ns`) or
    `stale` (written, and the sessions are told as they were read `delay_ns` ago).
    """

    what: str
    delay_ns: int = 0


class StoreFault(Protocol):
    """Something that is wrong with the store for a while."""

    def trouble(self, node: str) -> Trouble | None:
        """What goes wrong with a call by that node; none: nothing."""


class StoreCounter:
    """The calls of all processes, and what is wrong with the store now."""

    def __init__(self) -> None:
        self.faults: list[StoreFault] = []
        self.operation_count = 0
        self.session_count = 0
        self.connection_count = 0
        #: The readings of the sessions, by whomever, and when, the oldest first.
        self.views: list[tuple[int, SessionView]] = []
        #: Called once when a call by that node to `entries` or `sessions` has been
        #: made, and its answer is under way.
        self.after_call: dict[tuple[str, str], Callable[[], None]] = {}


class SimulatedStore:
    """A connection to the store, as one thread of one process has it."""

    def __init__(
        self, contents: MemoryStore, world: World, node: str, shared: StoreCounter
    ) -> None:
        self._contents = contents
        self._world = world
        self._node = node
        self._shared = shared
        self._late: list[Callable[[], Any]] | None = None
        self._age_ns = 0

    @property
    def url(self) -> str:
        """The URL that names it."""
        return self._contents.url

    def another(self) -> "SimulatedStore":
        """Open another connection to the same contents."""
        return SimulatedStore(self._contents, self._world, self._node, self._shared)

    def close(self) -> None:
        """The contents stay."""

    # --- trouble ---

    @contextmanager
    def _call(self, what: str) -> Iterator[None]:
        # Of a call before this one, which read nothing.
        self._age_ns = 0
        trouble = None
        for fault in self._shared.faults:
            trouble = fault.trouble(self._node) or trouble
        try:
            if trouble is None:
                yield
                world = self._world
                world.spend(_LEAST_NS + int(world.jitter() * _SPREAD_NS))
            else:
                with self._troubled(trouble):
                    yield
        finally:
            if self._shared.after_call:
                made = self._shared.after_call.pop((self._node, what), None)
                if made is not None:
                    made()

    @contextmanager
    def _troubled(self, trouble: Trouble) -> Iterator[None]:
        world = self._world
        match trouble.what:
            case "stale":
                self._age_ns = trouble.delay_ns
                yield
                world.spend(_LEAST_NS)
            case "fail":
                world.spend(_LEAST_NS)
                raise StoreFailure("simulated: refused", may_have_happened=False)
            case "away":
                world.spend(trouble.delay_ns)
                raise StoreFailure("simulated: cannot be reached")
            case "late":
                calls: list[Callable[[], Any]] = []
                self._late = calls
                try:
                    yield
                finally:
                    self._late = None
                world.at(world.now_ns + trouble.delay_ns, _perform, calls)
                world.spend(_LEAST_NS)
                raise StoreFailure("simulated: no answer, not written yet")
            case "lost":
                yield
                world.spend(_LEAST_NS)
                raise StoreFailure("simulated: the answer is lost")
            case _:
                yield
                world.spend(trouble.delay_ns)

    def transaction(self) -> AbstractContextManager[None]:
        """Make the calls inside at once."""
        return self._call("entries")

    def _entries(self, method: Callable[[Any], Any], requests: Sequence[Any]) -> Any:
        self._shared.operation_count += len(requests)
        if self._late is not None:
            self._late.append(lambda: method(requests))
            return [Failed("void")] * len(requests)
        return method(requests)

    def _sessions(self, method: Callable[..., Any], *arguments: Any) -> Any:
        self._shared.session_count += 1
        with self._call("sessions"):
            if self._late is not None:
                self._late.append(lambda: method(*arguments))
                return None
            return method(*arguments)

    # --- the contracts ---

    def try_acquire(self, requests: Sequence[Acquire], /) -> Any:
        """As the contents do."""
        return self._entries(self._contents.try_acquire, requests)

    def release(self, requests: Sequence[Release], /) -> Any:
        """As the contents do."""
        return self._entries(self._contents.release, requests)

    def load(self, requests: Sequence[Load], /) -> Any:
        """As the contents do."""
        return self._entries(self._contents.load, requests)

    def claim(self, requests: Sequence[Claim], /) -> Any:
        """As the contents do."""
        return self._entries(self._contents.claim, requests)

    def save(self, requests: Sequence[Save], /) -> Any:
        """As the contents do."""
        return self._entries(self._contents.save, requests)

    def give_up(self, requests: Sequence[GiveUp], /) -> Any:
        """As the contents do."""
        return self._entries(self._contents.give_up, requests)

    def open_session(self, record: SessionRecord, /) -> bool:
        """As the contents do."""
        return bool(self._sessions(self._contents.open_session, record))

    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        """As the contents do."""
        view: SessionView | None = self._sessions(
            self._contents.renew_session, session, count
        )
        return None if view is None else self._aged(view)

    def read_sessions(self) -> SessionView:
        """As the contents do."""
        view: SessionView = self._sessions(self._contents.read_sessions)
        return self._aged(view)

    def _aged(self, view: SessionView) -> SessionView:
        """The reading, or an older one where the store is stale."""
        views, now_ns = self._shared.views, self._world.now_ns
        while views and views[0][0] < now_ns - _STALE_MAX_NS:
            del views[0]
        views.append((now_ns, view))
        age_ns, self._age_ns = self._age_ns, 0
        if not age_ns:
            return view
        return next(each for at_ns, each in views if at_ns >= now_ns - age_ns)

    def close_session(self, session: SessionId, count: int, /) -> bool:
        """As the contents do."""
        return bool(self._sessions(self._contents.close_session, session, count))

    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        """As the contents do."""
        written: Topology = self._sessions(
            self._contents.write_members, members, expected_epoch
        )
        return written


def _perform(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()
