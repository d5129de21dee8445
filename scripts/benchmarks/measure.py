"""How a thing is measured: beside its limit, in turn, in the same process.

The two sides of a pair alternate (A B A B), so that a noisy machine disturbs both
alike. What counts is the median of the ratios of neighbours, never an absolute
time. No side measures an empty path: each raises where its results are wrong.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["/s", "ms", "B", "x"]
"""Operations a second, or what a thing takes, of which less is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure. `size` is the largest population that is made."""

    rounds: int
    run_in_s: float
    round_s: float
    runs: int
    size: int

    def at_most(self, count: int) -> int:
        """A population of `count`, or as many as are allowed."""
        return min(count, self.size)


# Two threads that wake each other begin on one processor, where a wake costs a few
# microseconds; after 15 to 30 ms the kernel moves one of them to another, where each
# costs 30 us more. Rounds shorter than that would compare placements, not programs:
# so each begins with a run-in that is not timed, until the threads are where they
# stay, and is then timed for much longer than a move takes.
FULL = Effort(rounds=9, run_in_s=0.25, round_s=0.4, runs=5, size=1_000_000)
QUICK = Effort(rounds=5, run_in_s=0.25, round_s=0.3, runs=3, size=100_000)


@dataclass(frozen=True, slots=True)
class Work:
    """A side: `perform(count)` does so many operations, and checks them."""

    perform: Callable[[int], None]
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Both sides' values, round by round, and what else is worth saying."""

    ours: tuple[float, ...]
    limit: tuple[float, ...]
    note: str = ""

    def ratios(self, unit: Unit) -> tuple[float, ...]:
        """How near to the limit each round came; more is better, 1 is there."""
        pairs = zip(self.ours, self.limit, strict=True)
        if unit == "/s":
            return tuple(ours / limit for ours, limit in pairs)
        return tuple(limit / ours for ours, limit in pairs)


def spread_of(values: tuple[float, ...]) -> float:
    """Half of the distance between the quartiles of `values`, by their median."""
    if len(values) < 2:  # noqa: PLR2004  one value has no quartiles
        return 0.0
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return (high - low) / 2 / middle if middle else 0.0


def rate_of(work: Work, *, run_in_s: float, round_s: float) -> float:
    """Operations a second of `work` in one round."""
    perform, batch = work.perform, work.batch
    until = time.perf_counter() + run_in_s
    while time.perf_counter() < until:
        perform(batch)
    done, began = 0, time.perf_counter()
    while True:
        perform(batch)
        done += batch
        elapsed = time.perf_counter() - began
        if elapsed >= round_s:
            return done / elapsed


def pair(ours: Work, limit: Work, effort: Effort) -> Measurement:
    """Rates of both sides, in turn."""
    return in_turn(
        lambda: rate_of(ours, run_in_s=effort.run_in_s, round_s=effort.round_s),
        lambda: rate_of(limit, run_in_s=effort.run_in_s, round_s=effort.round_s),
        effort.rounds,
    )


def in_turn(
    ours: Callable[[], float], limit: Callable[[], float], rounds: int
) -> Measurement:
    """Values of both sides, in turn."""
    gc.collect()
    our_values, limit_values = [], []
    for _ in range(rounds):
        our_values.append(ours())
        limit_values.append(limit())
    return Measurement(ours=tuple(our_values), limit=tuple(limit_values))


@contextmanager
def placed(*, is_pinned: bool) -> Iterator[None]:
    """Keep the threads that are made meanwhile to one processor, where wanted.

    Nothing happens where the system cannot be asked for that.
    """
    if not is_pinned or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
