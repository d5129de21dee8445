"""Peers and limits: raw pykka, and the barest loops that do the same work."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import pykka
from pykka._envelope import Envelope

WAIT_S = 60.0


class Tally:
    """What has been handled, by whoever is measured.

    No class counts: to write an attribute of a class costs as much as a message.
    """

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


TOLD = Tally()


class RawEcho(pykka.ThreadingActor):
    """What pykka alone does."""

    def on_receive(self, message: Any) -> Any:
        """Answer with the message; set the event that ends a round of tells."""
        if isinstance(message, threading.Event):
            message.set()
            return None
        TOLD.count += 1
        return message


@contextmanager
def raw_echo() -> Iterator[pykka.ActorRef[RawEcho]]:
    """An actor of pykka alone."""
    ref = RawEcho.start()
    try:
        yield ref
    finally:
        ref.stop()


class BareLoop:
    """Two switches of threads and nothing else: a deque and two locks."""

    def __init__(self) -> None:
        self._inbox: deque[Any] = deque()
        self._outbox: deque[Any] = deque()
        self._bell, self._answered = threading.Lock(), threading.Lock()
        self._bell.acquire()
        self._answered.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.append(self)
        self._bell.release()
        self._thread.join(WAIT_S)

    def ask(self, message: Any) -> Any:
        """Ask and wait; from one thread."""
        self._inbox.append(message)
        self._bell.release()
        self._answered.acquire()
        return self._outbox.popleft()

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            message = self._inbox.popleft()
            if message is self:
                return
            self._outbox.append(message)
            self._answered.release()


class PooledInbox:
    """An actor on a thread that many share: the least that a told message needs.

    An envelope in a deque, a turn for all that wait, a handler called for each.
    """

    turn_max = 64

    def __init__(self) -> None:
        self._turns: deque[Callable[[], None]] = deque()
        self._inbox: deque[Any] = deque()
        self._is_scheduled = self._is_asleep = self._is_over = False
        self._bell = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._post(self._drain)
        self._thread.join(WAIT_S)

    def on_receive(self, message: Any) -> Any:
        """Handle one message."""
        if isinstance(message, threading.Event):
            message.set()
        else:
            TOLD.count += 1

    def tell(self, message: Any) -> None:
        """Put it in, and have the inbox drained."""
        self._inbox.append(Envelope(message))
        if not self._is_scheduled:
            self._is_scheduled = True
            self._post(self._drain)

    def _post(self, turn: Callable[[], None]) -> None:
        self._turns.append(turn)
        if self._is_asleep:
            self._is_asleep = False
            self._bell.release()

    def _drain(self) -> None:
        # First the flag, then the look: what is put in between schedules again.
        self._is_scheduled = False
        for _ in range(self.turn_max):
            if not self._inbox:
                return
            self.on_receive(self._inbox.popleft().message)
        self._is_scheduled = True
        self._post(self._drain)

    def _run(self) -> None:
        while not self._is_over or self._turns:
            if self._turns:
                self._turns.popleft()()
                continue
            self._is_asleep = True
            # Rung in between it looks once in vain.
            if not self._turns:
                self._bell.acquire()
            self._is_asleep = False


class Waker:
    """A thread that does nothing but wake the futures of an event loop."""

    def __init__(self) -> None:
        self._wanted: deque[asyncio.Future[Any]] = deque()
        self._bell = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._is_over = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._bell.release()
        self._thread.join(WAIT_S)

    async def wake(self) -> int:
        """Wait until the other thread has woken this coroutine."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._wanted.append(future)
        self._bell.release()
        return await future

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            if self._is_over:
                return
            future = self._wanted.popleft()
            future.get_loop().call_soon_threadsafe(future.set_result, 1)
