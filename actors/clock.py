"""The clocks of real use."""

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol


class Clock(Protocol):
    """Time that only goes on, and the date for people."""

    def now_ns(self) -> int:
        """Nanoseconds since some start; goes on while the machine is suspended."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970, for people only."""


class SystemClock:
    """The machine's: CLOCK_BOOTTIME where there is one."""

    def __init__(self) -> None:
        clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        # Read several times a message: without a call of our own in between.
        self.now_ns: Callable[[], int] = partial(time.clock_gettime_ns, clock_id)

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000
