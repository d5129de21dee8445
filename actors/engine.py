"""Engines: what the nodes of one place share: transport, store, system dispatcher."""

import math
import secrets
import threading
import time
from collections.abc import Callable
from random import Random
from types import TracebackType
from typing import Any, Protocol

import pykka

from actors.clock import Clock, SystemClock
from actors.dispatch import Dispatcher, ThreadDispatcher, Turn
from actors.event_stream import StartReader, start_thread_reader
from actors.future import Future
from actors.log import log
from actors.store_actor import StoreActor, Turnstile
from actors.store_url import open_store
from actors.transport import InProcessTransport, Transport
from placement.contracts import Store
from placement.errors import NotReady
from placement.partition import PARTITIONS_DEFAULT, PartitionTable
from placement.session import Watch
from placement.topology import Address, SessionId, Topology
from placement.value import value

_STOP_S = 10.0
_YEAR_S = 365 * 86_400.0


class StoreInUse(ValueError):
    """Another process's sessions are alive in the store, and cannot be reached."""


@value(kw_only=True, sealed=True)
class Settings:
    """What holds for a whole cluster; times in seconds.

    `renew_every` is a third of `ttl` unless given, `margin` a fifth.

    Raises:
        ValueError: a setting makes no sense; the message names it.
    """

    cluster: str = "default"
    partitions: int = PARTITIONS_DEFAULT
    ttl: float = 5.0
    renew_every: float | None = None
    margin: float | None = None
    ask_timeout: float = 10.0
    cache_ttl: float = 60.0
    cache_size: int = 1_000_000

    def __post_init__(self) -> None:
        if not self.cluster or len(self.cluster) > 64:  # noqa: PLR2004
            raise ValueError("cluster must be a name of 1 to 64 characters")
        if not 1 <= self.partitions <= 1 << 20:
            raise ValueError(f"partitions must be 1 to 2**20, not {self.partitions}")
        for name in ("ttl", "ask_timeout", "cache_ttl"):
            seconds = getattr(self, name)
            if not 0.01 <= seconds <= _YEAR_S:  # noqa: PLR2004
                raise ValueError(
                    f"{name} must be at least 0.01 s and at most a year, not {seconds}"
                )
        if not 0 <= self.margin_s < self.ttl:
            raise ValueError(f"margin must be 0 to ttl, not {self.margin}")
        if not 0 < self.renew_every_s < self.ttl - self.margin_s:
            raise ValueError(
                f"renew_every of {self.renew_every_s} s must be above 0 and below "
                f"ttl less margin, {self.ttl - self.margin_s} s"
            )

    @property
    def renew_every_s(self) -> float:
        """How often a session is renewed."""
        return self.ttl / 3 if self.renew_every is None else self.renew_every

    @property
    def margin_s(self) -> float:
        """How long before its time to live a guard shuts."""
        return self.ttl / 5 if self.margin is None else self.margin


class GrainDispatcher(Dispatcher, Protocol):
    """A dispatcher of Grains, of which one sees where a turn does not come back."""

    busy_since_ns: int
    """When the turn under way began, 0 between turns."""

    def stop(self, timeout_s: float) -> bool:
        """Run what has been posted, then end; false: it is still busy."""

    def kill(self) -> None:
        """End after the turn under way, and run nothing else."""


class SystemDispatcher(Dispatcher, Protocol):
    """A dispatcher of coordinators and placement actors, which ends with its engine."""

    def take_now(self, turn: Turn, /, *arguments: Any) -> bool:
        """Run `turn` now, where nothing waits and the caller may; tell whether."""

    def stop(self, timeout_s: float) -> bool:
        """Run what has been posted, then end; false: it is still busy."""


class Condition(Protocol):
    """Facts that change, and whoever waits for one; as `threading.Condition`."""

    def __enter__(self) -> Any:
        """Change a fact from now on."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> Any:
        """It has been changed."""

    def notify_all(self) -> None:
        """Have those who wait look again."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until `predicate` holds, at most `timeout` seconds."""


class Engine(Protocol):
    """What a node runs on: time, turns, store, wire, and how its callers wait.

    Nothing else of a node makes a thread, waits, reads a clock or draws a number,
    so that the same node runs over threads or step by step.
    """

    clock: Clock
    transport: Transport
    random: Random
    system: SystemDispatcher
    entries: "pykka.ActorRef[Any]"
    sessions: "pykka.ActorRef[Any]"

    @property
    def start_reader(self) -> StartReader:
        """How the subscribers of events are read for."""

    def dispatcher(self, name: str) -> GrainDispatcher:
        """A dispatcher for one node's Grains."""

    def address(self, name: str) -> Address:
        """A new address for a start of the node `name`; it never recurs."""

    def table(self, topology: Topology) -> PartitionTable:
        """The table of `topology`."""

    def future(self) -> Future:
        """An answer that a program outside may wait for."""

    def condition(self) -> Condition:
        """What a program outside waits on for facts of a node."""

    def bug(self, error: BaseException) -> None:
        """A turn of this project's own has raised `error`; it has been logged."""

    def close(self) -> None:
        """Free what it holds."""


class ThreadEngine:
    """Nodes that run over threads, on one store and one transport."""

    def __init__(
        self,
        store: Store,
        make_transport: Callable[[Dispatcher], Transport],
        *,
        partitions: int,
        clock: Clock | None = None,
        make_system: Callable[[Clock], SystemDispatcher] | None = None,
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self.store = store
        self.start_reader: StartReader = start_thread_reader
        self.random = Random(secrets.randbits(64))  # noqa: S311
        self._table = PartitionTable.build(Topology(), partitions)
        self.system: SystemDispatcher = (
            ThreadDispatcher("placement-system", self.clock)
            if make_system is None
            else make_system(self.clock)
        )
        self.transport = make_transport(self.system)
        self._lanes = (
            ThreadDispatcher("placement-entries", self.clock),
            ThreadDispatcher("placement-sessions", self.clock),
        )
        # Where two connections write at once nobody has to wait for the other.
        has_one_writer = getattr(store, "has_one_writer", False)
        turnstile = Turnstile() if has_one_writer else None
        self.entries: pykka.ActorRef[Any] = StoreActor.start(
            self._connected_for_entries(self.store),
            dispatcher=self._lanes[0],
            turnstile=turnstile,
        )
        self.sessions: pykka.ActorRef[Any] = StoreActor.start(
            self.store.another(), dispatcher=self._lanes[1], turnstile=turnstile
        )

    def _connected_for_entries(self, store: Store) -> Store:
        """The connection over which entries are written."""
        return store.another()

    def take_over(self, *, timeout_s: float = math.inf) -> None:
        """Before the first node starts: nothing, where others can be reached."""

    def dispatcher(self, name: str) -> GrainDispatcher:
        """A dispatcher for one node's Grains."""
        return ThreadDispatcher(name, self.clock)

    def future(self) -> Future:
        """An answer that a program outside may wait for."""
        return Future()

    def condition(self) -> Condition:
        """What a program outside waits on for facts of a node."""
        return threading.Condition()

    def bug(self, error: BaseException) -> None:
        """Nothing more than the log has said: the node ends by itself."""

    def address(self, name: str) -> Address:
        """A new address for a start of the node `name`; it never recurs."""
        boot = f"{self.clock.wall_ms():x}{secrets.token_hex(4)}"
        return Address(f"{name}.{boot}")

    def table(self, topology: Topology) -> PartitionTable:
        """The table of `topology`, computed once for all nodes here."""
        if self._table.topology != topology:
            self._table = self._table.adopt(topology)
        return self._table

    def close(self, *, timeout_s: float | None = None) -> None:
        """Free threads and connections, within a time: a store may hang."""
        until_s = time.monotonic() + (_STOP_S if timeout_s is None else timeout_s)

        def left_s() -> float:
            return max(0.0, until_s - time.monotonic())

        for actor in (self.entries, self.sessions):
            try:
                actor.stop(timeout=left_s())
            except pykka.Timeout:
                log.warning("the store does not come back", store=self.store.url)
        for dispatcher in (*self._lanes, self.system):
            dispatcher.stop(left_s())
        self.store.close()


class EmbeddedEngine(ThreadEngine):
    """Everything in one process: nodes exchange bytes by calls, and share a store.

    Raises:
        BadStore: the URL, or what it names, cannot be a store.
        StoreFailure: the store cannot be opened now.
    """

    def __init__(
        self,
        store: str | Store = "memory://",
        *,
        partitions: int = PARTITIONS_DEFAULT,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(
            open_store(store) if isinstance(store, str) else store,
            lambda _: InProcessTransport(),
            partitions=partitions,
            clock=clock,
        )

    def take_over(self, *, timeout_s: float = math.inf) -> None:
        """Wait out sessions that a crash has left in the store.

        Raises:
            StoreInUse: one of them is renewed, or another is opened: its process
                lives, and cannot be reached from here.
            NotReady: the time was not enough.
            StoreFailure: the store cannot be read now.
        """
        watch, pause = Watch(), threading.Event()
        first: dict[SessionId, int] | None = None
        until_s = time.monotonic() + timeout_s
        while True:
            view = self.store.read_sessions()
            now_ns = self.clock.now_ns()
            watch.view(view, now_ns)
            counts = watch.counts()
            if first is None:
                first = counts
            # What a crash has left was there from the first, and stands still.
            alive = sorted(s for s, count in counts.items() if first.get(s) != count)
            if alive:
                raise StoreInUse(
                    f"store {self.store.url}: session {alive[0]} of another process "
                    "is alive in it; who cannot reach it needs the store for itself"
                )
            if not counts:
                return
            if time.monotonic() >= until_s:
                raise NotReady(f"session {min(counts)} is not over yet")
            for close in watch.expired(now_ns, besides=None):
                self.store.close_session(close.session, close.count)
            pause.wait(0.05)
