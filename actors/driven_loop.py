"""An event loop in virtual time: coroutines of asyncio, run to their end at once.

What waits costs no time but the loop's own, which goes on to the next timer when
nothing else is to be done. Turns come in the order in which they were asked for, so
that equal coroutines run alike everywhere.
"""

import asyncio
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class DrivenLoop(asyncio.AbstractEventLoop):
    """The loop of one thread of a simulation; its seconds begin at 0.

    It has what coroutines ask for that read and write nothing of the system's.
    """

    @classmethod
    def new(cls) -> "DrivenLoop":
        """Make one: only what would read or write is abstract in it."""
        return cls()

    def __init__(self) -> None:
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._number = 0
        self._now_s = 0.0
        self._errors: list[BaseException] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, and all that it has begun, to the end; what it returns.

        Raises:
            RuntimeError: it waits for what nobody will do.
        """
        events._set_running_loop(self)  # noqa: SLF001  as each loop does
        try:
            task: asyncio.Task[T] = self.create_task(work)
            while self._ready or self._timers:
                self._step()
        finally:
            events._set_running_loop(None)  # noqa: SLF001
        if self._errors:
            raise self._errors.pop()
        if not task.done():
            task.cancel()
            raise RuntimeError(f"{work} waits for what nobody will do")
        return task.result()

    def _step(self) -> None:
        if not self._ready:
            when_s, _, timer = heapq.heappop(self._timers)
            if timer.cancelled():
                return
            self._now_s = max(self._now_s, when_s)
            self._ready.append(timer)
        handle = self._ready.popleft()
        if not handle.cancelled():
            handle._run()  # noqa: SLF001

    # --- what asyncio asks of a loop ---

    def time(self) -> float:
        """Seconds since the loop was made, none of which really passed."""
        return self._now_s

    def call_soon(
        self,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Run it after what is ready already."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run it in `delay` seconds."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run it at `when`; of those at one time the first asked for first."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, timer))
        return timer

    def create_future(self) -> "asyncio.Future[Any]":
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, **more: Any
    ) -> "asyncio.Task[Any]":
        """A task of this loop."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, **more)
        return task

    def get_debug(self) -> bool:
        """It looks at nothing else."""
        return False

    def is_running(self) -> bool:
        """Whether it is asked from within."""
        return True

    def is_closed(self) -> bool:
        """It holds nothing that is to be closed."""
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody has taken: `run` raises it."""
        error = context.get("exception")
        self._errors.append(error or RuntimeError(context["message"]))
