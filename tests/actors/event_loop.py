"""How long an event loop stands still, less what the machine takes of its time."""

import asyncio
import selectors
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
TASKS = Path("/proc/self/task")


def run_and_watch(main: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Run `main` beside a tick of a millisecond: its result, and the longest gap.

    The gap is in seconds, without the time in which the machine had no processor
    for this process.
    """
    selector = _LateSelector()

    async def watched() -> tuple[T, float]:
        done = asyncio.Event()
        ticking = asyncio.create_task(_longest_gap(done, selector))
        await asyncio.sleep(0)  # it has begun
        try:
            result = await main
        finally:
            done.set()
        return result, await ticking

    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(selector)
    ) as runner:
        return runner.run(watched())


class _LateSelector(selectors.DefaultSelector):
    """Counts how late it was told that its time is over, and nobody here worked.

    A virtual machine that stands still tells it late, and its kernel counts that
    nowhere. While another thread of this process keeps the interpreter's lock the
    processor time of the process goes on: that is not the machine's.
    """

    idle_late_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        started, worked = time.perf_counter(), time.process_time()
        ready = super().select(timeout)
        if timeout is not None:
            late_s = time.perf_counter() - started - max(0.0, timeout)
            worked_s = time.process_time() - worked
            self.idle_late_s += max(0.0, late_s - worked_s)
        return ready


async def _longest_gap(done: asyncio.Event, selector: _LateSelector) -> float:
    longest, last = 0.0, time.perf_counter()
    last_waited, last_late_s = _without_processor_s(), selector.idle_late_s
    while not done.is_set():
        await asyncio.sleep(0.001)
        now, waited = time.perf_counter(), _without_processor_s()
        late_s = selector.idle_late_s - last_late_s
        # Its own wait, or that of who had the interpreter's lock: the longest, for all
        # of them may have seen the same time, which is taken off once.
        waits = (s - last_waited.get(thread, 0.0) for thread, s in waited.items())
        longest = max(longest, now - last - max((late_s, *waits)))
        last, last_waited = time.perf_counter(), waited
        last_late_s = selector.idle_late_s
    return longest


def _without_processor_s() -> dict[str, float]:
    """How long each thread of this process has been ready and had no processor.

    The kernel counts it, where it is Linux; elsewhere a gap is all ours.
    """
    waited = {}
    for task in TASKS.iterdir() if TASKS.exists() else ():
        with suppress(OSError):  # a thread that has just ended
            waited[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return waited
