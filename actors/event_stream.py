"""The event stream of a node: every transition and failure, numbered in order."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection
from typing import Any, Protocol, Self, TypeAlias

import pykka

from actors.log import log
from placement.event import Event, EventsLost, Happened, event_of

WAITING_MAX = 10_000
CANCEL_S = 5.0


class _Reader(pykka.ThreadingActor):
    """Calls the subscriber, on a thread of its own."""

    use_daemon_thread = True

    def __init__(
        self, subscriber: Callable[[Event], Any], take: Callable[[], Event | None]
    ) -> None:
        super().__init__()
        self._subscriber = subscriber
        self._take = take

    def on_receive(self, message: Any) -> None:
        while (event := self._take()) is not None:
            try:
                self._subscriber(event)
            except BaseException:  # the subscriber's trouble is nobody else's
                log.exception("a subscriber of events raised")


class Reader(Protocol):
    """Takes what waits for one subscriber, once it has been told that it may."""

    def tell(self, message: Any) -> None:
        """Something waits."""

    def stop(self, *, block: bool = True, timeout: float | None = None) -> Any:
        """Take what still waits, and end."""


StartReader: TypeAlias = Callable[
    [Callable[[Event], Any], Callable[[], Event | None]], Reader
]
"""Makes the reader of a subscriber, which takes events until there are none."""


def start_thread_reader(
    subscriber: Callable[[Event], Any], take: Callable[[], Event | None]
) -> Reader:
    """A reader with a thread of its own."""
    # Not by `start`, which would register it: a program that stops all of its
    # actors would stop its subscriptions with them.
    actor = _Reader(subscriber, take)
    actor._start_actor_loop()  # noqa: SLF001
    return actor.actor_ref


class Subscription:
    """One subscriber: what waits for it, and its reader once there is something.

    At most `WAITING_MAX` events wait; then the oldest are dropped, and an
    `EventsLost` in their place says how many. Where `names` are given it is of the
    events that are named so: the others cost it nothing.
    """

    def __init__(
        self,
        subscriber: Callable[[Event], Any],
        leave: Callable[["Subscription"], None],
        start_reader: StartReader = start_thread_reader,
        *,
        names: Collection[str] | None = None,
    ) -> None:
        if isinstance(names, str):
            raise TypeError(f"names are several, as {{{names!r}}}, not one text")
        self.names = None if names is None else frozenset(names)
        self._subscriber = subscriber
        self._start_reader = start_reader
        self.leave = leave
        self._lock = threading.Lock()
        self._waiting: deque[Event] = deque()
        self._lost: EventsLost | None = None
        self._reader: Reader | None = None
        self._is_awake = False
        self._is_cancelled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def put(self, event: Event) -> None:
        """Let the subscriber have it, soon."""
        with self._lock:
            if self._is_cancelled:
                return
            if len(self._waiting) >= WAITING_MAX:
                oldest = self._waiting.popleft()
                self._lost = EventsLost(
                    node=oldest.node,
                    number=oldest.number,
                    at_ms=oldest.at_ms,
                    epoch=oldest.epoch,
                    name="EventsLost",
                    count=(self._lost.count if self._lost else 0) + 1,
                )
            self._waiting.append(event)
            if self._is_awake:
                return
            self._is_awake = True
            if self._reader is None:
                self._reader = self._start_reader(self._subscriber, self._take)
            self._reader.tell(None)

    def _take(self) -> Event | None:
        with self._lock:
            if self._lost is not None:
                lost, self._lost = self._lost, None
                return lost
            if self._waiting:
                return self._waiting.popleft()
            self._is_awake = False
            return None

    def cancel(self, *, timeout_s: float = CANCEL_S) -> None:
        """Subscribe no more; what waits is delivered first, within the time."""
        self.leave(self)
        with self._lock:
            self._is_cancelled = True
            reader, self._reader = self._reader, None
        if reader is None:
            return
        if threading.current_thread().name.startswith("_Reader"):
            reader.stop(block=False)
            return
        try:
            reader.stop(timeout=timeout_s)
        except pykka.Timeout:
            log.warning("a subscriber of events does not come back")


class EventStream:
    """Numbers what happened on a node, and lets subscribers have it in order."""

    def __init__(
        self,
        node: str,
        wall_ms: Callable[[], int],
        epoch: Callable[[], int],
        start_reader: StartReader = start_thread_reader,
    ) -> None:
        self._node = node
        self._wall_ms = wall_ms
        self._epoch = epoch
        self._start_reader = start_reader
        self._lock = threading.Lock()
        self._number = 0
        self._subscriptions: list[Subscription] = []
        # What somebody subscribes to; none: all.
        self._wanted: frozenset[str] | None = frozenset()
        self.counts: Counter[str] = Counter()

    def publish(self, happened: Happened) -> None:
        """Number it, and hand it to whoever subscribes; returns at once."""
        with self._lock:
            self._number += 1
            self.counts[happened.name] += 1
            if self._wanted is not None and happened.name not in self._wanted:
                return
            event = event_of(
                happened,
                node=self._node,
                number=self._number,
                at_ms=self._wall_ms(),
                epoch=self._epoch(),
            )
            for subscription in self._subscriptions:
                if subscription.names is None or event.name in subscription.names:
                    subscription.put(event)

    def subscribe(
        self,
        subscriber: Callable[[Event], Any],
        *,
        names: Collection[str] | None = None,
    ) -> Subscription:
        """Have `subscriber` called with each event from now on, in order.

        Only with those of these `names`, where some are given.
        """
        subscription = Subscription(
            subscriber, self.remove, self._start_reader, names=names
        )
        self.add(subscription)
        return subscription

    def add(self, subscription: Subscription) -> None:
        """Let `subscription`, perhaps another stream's too, have these events."""
        with self._lock:
            self._subscriptions.append(subscription)
            self._look_what_is_wanted()

    def remove(self, subscription: Subscription) -> None:
        """Let `subscription` have no more of these events."""
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
                self._look_what_is_wanted()

    def _look_what_is_wanted(self) -> None:
        wanted: set[str] = set()
        for subscription in self._subscriptions:
            if subscription.names is None:
                self._wanted = None
                return
            wanted |= subscription.names
        self._wanted = frozenset(wanted)

    def close(self, left_s: Callable[[], float] = lambda: CANCEL_S) -> None:
        """Deliver what waits, within the time that is left; end the subscriptions."""
        for subscription in tuple(self._subscriptions):
            if subscription.leave == self.remove:
                subscription.cancel(timeout_s=min(CANCEL_S, left_s()))
