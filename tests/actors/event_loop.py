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
        begun = _clocks()
        ready = super().select(timeout)
        if timeout is not None:
            self.idle_late_s += _idle_s(begun, max(0.0, timeout))
        return ready


async def _longest_gap(done: asyncio.Event, selector: _LateSelector) -> float:
    def read() -> dict[str, float]:
        # Where another thread takes the interpreter's lock while this is read, that
        # is a gap as well: the reading is a part of what is measured.
        begun = _clocks()
        waited = _without_processor_s()
        selector.idle_late_s += _idle_s(begun)
        return waited

    longest, last = 0.0, time.perf_counter()
    last_waited, last_late_s = _without_processor_s(), selector.idle_late_s
    while not done.is_set():
        await asyncio.sleep(0.001)
        waited, now, late_s = read(), time.perf_counter(), selector.idle_late_s
        gap_s = now - last - _machine_s(last_waited, waited, late_s - last_late_s)
        if gap_s > longest:
            # A thread may have waited after it was read.
            machine_s = _machine_s(last_waited, read(), late_s - last_late_s)
            longest = max(longest, now - last - machine_s)
        last, last_waited, last_late_s = now, waited, late_s
    return longest


def _machine_s(
    before: dict[str, float], after: dict[str, float], late_s: float
) -> float:
    """What the machine took: the longest wait of a thread, or the lateness.

    The longest, for all of them may have seen the same time, which is taken off once.
    """
    waits = (waited - before.get(thread, 0.0) for thread, waited in after.items())
    return max((late_s, *waits))


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _idle_s(begun: tuple[float, float], meant_s: float = 0.0) -> float:
    """How long it took beyond what was meant, and nothing of this process worked."""
    now, worked = _clocks()
    return max(0.0, now - begun[0] - meant_s - (worked - begun[1]))


def _without_processor_s() -> dict[str, float]:
    """How long each thread of this process has been ready and had no processor.

    The kernel counts it, where it is Linux; elsewhere a gap is all ours.
    """
    waited = {}
    for task in TASKS.iterdir() if TASKS.exists() else ():
        with suppress(OSError):  # a thread that has just ended
            waited[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return waited
