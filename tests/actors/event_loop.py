"""How long an event loop stands still, less what the machine takes of its time."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


@contextmanager
def gap_of_the_machine() -> Iterator[Callable[[], float]]:
    """What a process that does nothing else has had as its longest gap meanwhile.

    A virtual machine may stand still, and its kernel knows nothing of that. To be
    asked once.
    """
    code = "from tests.actors.event_loop import tick_alone; tick_alone()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as alone:
        assert alone.stdin is not None
        assert alone.stdout is not None
        assert alone.stdout.readline() == b"ready\n"
        stdout = alone.stdout

        def ask() -> float:
            assert alone.stdin is not None
            alone.stdin.close()
            return float(stdout.readline())

        yield ask


def tick_alone() -> None:
    """Tick until standard input ends, and print the longest gap."""

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    async def tick() -> float:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), done.set)
        say("ready")
        return await longest_gap(done)

    say(str(asyncio.run(tick())))
