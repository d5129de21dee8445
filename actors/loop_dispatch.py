"""A dispatcher whose turns run on the thread of a connection, between its own."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from actors.clock import Clock
from actors.dispatch import TimedDispatcher, Turn

#: Turns at once; then the loop has its turn, which reads, writes and answers pings.
TURNS_AT_ONCE = 1_024


class LoopThread(Protocol):
    """A thread that runs an event loop."""

    def soon(self, turn: Callable[[], object], /) -> bool:
        """Run `turn` there; false where that thread has ended. From any thread.

        What is asked for on that thread may run before the loop's next round.
        """

    def after(self, seconds: float, turn: Callable[[], object], /) -> Any:
        """Run `turn` in `seconds`; what it returns has `cancel`. On that thread."""

    def is_current(self) -> bool:
        """Whether the caller is on that thread."""


class LoopDispatcher(TimedDispatcher):
    """Runs turns on a thread that has an event loop to run too.

    What arrives on that thread reaches its turn without another one being woken: of
    the time that a short message takes between two processes such wakes are most.
    A turn that takes long holds up the loop.
    """

    def __init__(
        self,
        thread: LoopThread,
        clock: Clock,
        *,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        super().__init__(clock, on_bug)
        self._thread = thread
        self._is_awake = False
        self._alarm: Any = None
        self._alarm_ns = 0
        self._ended = threading.Event()

    def post(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` soon; from any thread."""
        self._turns.append((turn, arguments))
        if not self._is_awake:
            self._is_awake = True
            self._thread.soon(self._run)

    def is_current(self) -> bool:
        """Whether the caller is a turn of this dispatcher, or the loop's own."""
        return self._thread.is_current()

    def stop(self, timeout_s: float) -> bool:
        """Run what has been posted, then end; false: it is still busy."""
        self.post(self._end)
        if self.is_current():
            return True
        # A thread that has ended runs nothing of it any more.
        if not self._thread.soon(lambda: None):
            return True
        return self._ended.wait(timeout_s)

    def _run(self) -> None:
        turns, left = self._turns, TURNS_AT_ONCE
        while left and not self._is_ending:
            left -= 1
            if self._timers and self._timers[0][0] <= self.now_ns():
                # What was posted before has its turn too.
                self._due()
                if turns:
                    self._take(*turns.popleft())
            elif turns:
                self._take(*turns.popleft())
            else:
                break
        if self._is_ending:
            self._disarm()
            turns.clear()
            self._ended.set()
            return
        if not turns:
            # First the flag, then the look: a turn posted in between is seen, or runs
            # this once more.
            self._is_awake = False
            self._arm()
            if not turns or self._is_awake:
                return
            self._is_awake = True
        # Not sooner: the loop has its turn first.
        self._thread.after(0.0, self._run)

    def _arm(self) -> None:
        """Have it run when its first timer is due."""
        if not self._timers:
            self._disarm()
            return
        due_ns = self._timers[0][0]
        if self._alarm is None or self._alarm_ns != due_ns:
            self._disarm()
            self._alarm_ns = due_ns
            wait_s = max(0.0, (due_ns - self.now_ns()) / 1e9)
            self._alarm = self._thread.after(wait_s, self._ring)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _ring(self) -> None:
        # The loop goes by a clock of its own: where it was early this arms again.
        self._alarm = None
        self._is_awake = True
        self._run()
