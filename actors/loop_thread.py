"""A thread with an event loop, and a dispatcher whose turns run on it."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from actors.clock import Clock
from actors.dispatch import TimedDispatcher, Turn
from actors.log import log

#: Turns at once; then the loop has its turn, which reads, writes and answers pings.
TURNS_AT_ONCE = 1_024


class LoopThread:
    """A thread that runs an event loop, for connections and whoever goes with them.

    All methods are for any thread unless they say otherwise.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._near: deque[Callable[[], object]] = deque()
        self._is_near = self._is_hearing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def is_current(self) -> bool:
        """Whether the caller is on that thread."""
        return threading.get_ident() == self._thread.ident

    def soon(self, turn: Callable[[], object], /) -> bool:
        """Run `turn` there; false where that thread has ended.

        What is asked for on that thread may run before the loop's next round: each
        asks the system what has arrived, which takes as long as a short message does.
        """
        try:
            if self.is_current():
                # Nobody has to be woken: behind what is being heard, or said.
                self._near.append(turn)
                if not (self._is_near or self._is_hearing):
                    self._is_near = True
                    self.loop.call_soon(self._run_near)
            else:
                self.loop.call_soon_threadsafe(turn)
        except RuntimeError:
            return False
        return True

    def after(self, seconds: float, turn: Callable[[], object], /) -> Any:
        """Run `turn` in `seconds`; what it returns has `cancel`. On that thread."""
        return self.loop.call_later(seconds, turn)

    def hear(
        self, hear: Callable[[str, bytes], object], subject: str, data: bytes
    ) -> None:
        """Have a message heard; what that asks for waits for `heard`."""
        self._is_hearing = True
        try:
            hear(subject, data)
        finally:
            self._is_hearing = False

    def heard(self, *, is_all: bool) -> None:
        """A message has been heard; perhaps it is the last of what was read."""
        if is_all:
            self._run_near()
        elif self._near and not self._is_near:
            self._is_near = True
            self.loop.call_soon(self._run_near)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End it after this round of the loop. On that thread."""
        self.loop.stop()

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended, at most so long; not on that thread."""
        self._thread.join(timeout_s)

    def _run_near(self) -> None:
        """Run what was asked for on this thread, and what that asks for."""
        self._is_near = self._is_hearing = True
        near = self._near
        try:
            while near:
                try:
                    near.popleft()()
                except Exception:  # of one; the others have their turn
                    log.exception("a turn on the thread of a connection raised")
        finally:
            self._is_near = self._is_hearing = False

    def _run(self) -> None:
        loop = self.loop
        asyncio.set_event_loop(loop)
        loop.set_exception_handler(_say)
        try:
            loop.run_forever()
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=0.5))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


def _say(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.error(
        "the thread of a connection",
        said=context.get("message"),
        exc_info=context.get("exception"),
    )


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
        self._rouse()

    def take_now(self, turn: Turn, /, *arguments: Any) -> bool:
        """Run `turn` where the caller is on its thread and nothing waits; or do not.

        As if it had been posted, in fewer steps.
        """
        if self._is_awake or self.busy_since_ns or not self._thread.is_current():
            return False
        self._take(turn, arguments)
        if not self._is_awake:
            self._arm()
        return True

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

    def _rouse(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            self._thread.soon(self._run)

    def _run(self) -> None:
        turns, urgent, left = self._turns, self._urgent, TURNS_AT_ONCE
        while left and not self._is_ending:
            left -= 1
            if urgent:
                self._take(*urgent.popleft())
            elif self._timers and self._timers[0][0] <= self.now_ns():
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
            urgent.clear()
            self._ended.set()
            return
        if not turns and not urgent:
            # First the flag, then the look: a turn posted in between is seen, or runs
            # this once more.
            self._is_awake = False
            self._arm()
            if not (turns or urgent) or self._is_awake:
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
