"""How long an event loop stands still, less what the machine takes of its time."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path

TASKS = Path("/proc/self/task")


def without_processor_s() -> float:
    """How long threads of this process have been ready and had no processor.

    What the machine adds to a gap: the kernel counts it for each thread, where it
    is Linux. Elsewhere nothing is known, and a gap is all ours.
    """
    if not TASKS.exists():
        return 0.0
    waited_ns = 0
    for task in TASKS.iterdir():
        with suppress(OSError):  # a thread that has just ended
            waited_ns += int((task / "schedstat").read_text().split()[1])
    return waited_ns / 1e9


async def longest_gap(done: asyncio.Event) -> float:
    """Tick every millisecond until `done`; the longest from one tick to the next.

    Without the time in which the machine had no processor for this process.
    """
    longest, last, last_waited = 0.0, time.perf_counter(), without_processor_s()
    while not done.is_set():
        await asyncio.sleep(0.001)
        now, waited = time.perf_counter(), without_processor_s()
        # A thread that has ended takes its share along.
        stolen = max(0.0, waited - last_waited)
        longest = max(longest, now - last - stolen)
        last, last_waited = time.perf_counter(), waited
    return longest
