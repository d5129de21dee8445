"""Futures that wait without polling, and that both kinds of `await` understand."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any

import pykka

from actors.log import log
from placement.errors import OutcomeUnknown

if TYPE_CHECKING:
    import asyncio


class _Running(threading.local):
    """Whose user code runs on this thread; none outside of an activation."""

    activation: Any = None


running = _Running()


class BlockingInGrain(RuntimeError):
    """A Grain must not wait for an answer; it awaits it."""

    def __init__(self) -> None:
        super().__init__(
            "a Grain must not block: use await ref.ask_async(...), or await the call"
        )


def must_not_block() -> bool:
    """Tell whether the user code of a Grain runs on this thread."""
    activation = running.activation
    return activation is not None and not activation.may_block()


class Future(pykka.Future[Any]):
    """An answer to come: the first `set` or `set_error` decides.

    `owner` is the activation that may await it inside its own turn.
    """

    # What it begins with is the class's: one is made for every ask.
    owner: Any = None
    _is_done = False
    _value: Any = None
    _error: BaseException | None = None
    _callbacks: tuple[Callable[["Future"], object], ...] = ()
    _get_hook: Callable[[float | None], Any] | None = None

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def set_get_hook(self, func: Callable[[float | None], Any]) -> None:
        """Have `get` call `func`, as in pykka."""
        super().__init__()
        super().set_get_hook(func)

    @property
    def is_done(self) -> bool:
        """Whether it has an answer or an error."""
        return self._is_done

    def get(self, *, timeout: float | None = None) -> Any:
        """Wait for the answer, at most `timeout` seconds.

        Raises:
            OutcomeUnknown: none came in time.
            BlockingInGrain: it would have a Grain wait.
            PlacementError: the refusal or failure that came instead.
        """
        if self._get_hook is not None:
            return super().get(timeout=timeout)
        if not self._is_done:
            if must_not_block():
                raise BlockingInGrain
            latch = threading.Lock()
            latch.acquire()
            self.on_done(lambda _: latch.release())
            limit = -1 if timeout is None else min(max(0, timeout), TIMEOUT_MAX)
            if not latch.acquire(timeout=limit):
                raise OutcomeUnknown(f"no answer within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value

    def set(self, value: Any = None) -> None:
        """Answer, unless it has been."""
        with self._lock:
            if self._is_done:
                return
            self._value, self._is_done = value, True
            callbacks, self._callbacks = self._callbacks, ()
        if callbacks:
            self._tell(callbacks)

    def set_error(self, error: BaseException) -> None:
        """End without an answer, unless it has one."""
        self._fail(error)

    def set_exception(self, exc_info: Any = None) -> None:
        """End with the exception of a (type, value, traceback), as in pykka."""
        if exc_info is None:
            raise ValueError("set_exception takes an exc_info; set_error an error")
        self._fail(exc_info[1])

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._is_done:
                return
            self._error, self._is_done = error, True
            callbacks, self._callbacks = self._callbacks, ()
        self._tell(callbacks)

    def _tell(self, callbacks: tuple[Callable[["Future"], object], ...]) -> None:
        for callback in callbacks:
            try:
                callback(self)
            except BaseException:  # the trouble of one who waits is nobody else's
                log.exception("a callback of a future raised")

    def on_done(self, callback: Callable[["Future"], object]) -> None:
        """Call `callback` once it is done: on the thread that answers, or now."""
        with self._lock:
            if not self._is_done:
                self._callbacks = (*self._callbacks, callback)
                return
        callback(self)

    def __await__(self) -> Generator[Any, Any, Any]:
        activation = running.activation
        # A ThreadingActor may run an event loop of its own, and await in that.
        if activation is not None and not (activation.may_block() and _has_loop()):
            answer = yield self
            return answer
        loop = _running_loop()
        if self._get_hook is not None:
            hooked = yield from loop.run_in_executor(None, self.get).__await__()
            return hooked
        arrived, bell = loop.create_future(), _bell_of(loop)
        self.on_done(lambda _: bell.ring_for(arrived))
        yield from arrived.__await__()
        return self.get(timeout=0)


def _has_loop() -> bool:
    try:
        _running_loop()
    except RuntimeError:
        return False
    return True


class _Bell:
    """Wakes an event loop for answers from other threads: once for many."""

    def __init__(self, loop: "asyncio.AbstractEventLoop") -> None:
        self._loop = weakref.ref(loop)
        self._arrived: deque[asyncio.Future[None]] = deque()
        self._is_rung = False

    def is_of(self, loop: "asyncio.AbstractEventLoop") -> bool:
        """Whether it wakes `loop`."""
        return self._loop() is loop

    def ring_for(self, arrived: "asyncio.Future[None]") -> None:
        """Have `arrived` be done in the loop; from any thread."""
        self._arrived.append(arrived)
        if self._is_rung:
            return
        self._is_rung = True
        loop = self._loop()
        if loop is not None:
            # A loop that is closed: nobody waits any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._let_in)

    def _let_in(self) -> None:
        # First the flag, then the look: what comes in between rings once more.
        self._is_rung = False
        while self._arrived:
            arrived = self._arrived.popleft()
            if not arrived.done():
                arrived.set_result(None)


class _OfThread(threading.local):
    """The bell of the loop that ran last on this thread."""

    bell: _Bell | None = None


_of_thread = _OfThread()


def _bell_of(loop: "asyncio.AbstractEventLoop") -> _Bell:
    """The bell of `loop`, which runs on this thread."""
    bell = _of_thread.bell
    if bell is None or not bell.is_of(loop):
        bell = _of_thread.bell = _Bell(loop)
    return bell


def _running_loop() -> "asyncio.AbstractEventLoop":
    import asyncio  # noqa: PLC0415  only programs that use it pay for it

    return asyncio.get_running_loop()
