"""The clocks of real use."""

import time
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
        self._clock_id = clock_id

    def now_ns(self) -> int:
        """Nanoseconds since the machine started."""
        return time.clock_gettime_ns(self._clock_id)

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000
