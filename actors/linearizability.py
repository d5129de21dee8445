"""Whether the asks to one counter can have happened one after another, and as answered.

`add` answers the new count, `read` the count. Wing and Gong, "Testing and
Verifying Concurrent Objects", JPDC 1993, try every operation that may come next
and go back where that fails; Lowe, "Testing for linearizability", CCPE 2017,
remembers the states that have failed. For this object nothing is left to try:

- only the add that was answered n makes n - 1 into n; where there is none, an
  unknown add did, and the one begun first serves wherever another would;
- a read changes nothing: it only says when the count had its answer.

So each state has one successor, whose earliest time follows from the one before:
a step for each count. There is no search, and so no bound on it to run out of.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """An add whose answer, the new count, came at `ended_ns`."""

    request: str
    invoked_ns: int
    ended_ns: int
    answer: int

    def __str__(self) -> str:
        return f"add {self.request}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A read whose answer, the count, came at `ended_ns`."""

    request: str
    invoked_ns: int
    ended_ns: int
    answer: int

    def __str__(self) -> str:
        return f"read {self.request}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownAdd:
    """An add that took effect at any time after it began, or never."""

    request: str
    invoked_ns: int

    def __str__(self) -> str:
        return f"add {self.request} of unknown outcome"


# A read of unknown outcome says nothing, and what was refused has done nothing.
Operation: TypeAlias = Add | Read | UnknownAdd


@dataclass(frozen=True, slots=True)
class Misfit:
    """An operation that has no place in any order, and why, as a sentence."""

    operation: Add | Read
    why: str


def misfit_of(operations: Iterable[Operation]) -> Misfit | None:
    """Find an operation that no order has a place for; None: there is an order.

    The count begins at 0. An operation comes before another where it ended before
    the other began; where it ended at that very time, either may come first.
    """
    adds: dict[int, Add] = {}
    reads: dict[int, list[Read]] = {}
    unknown: list[UnknownAdd] = []
    for operation in operations:
        match operation:
            case Add(answer=answer):
                twin = adds.setdefault(answer, operation)
                if twin is not operation:
                    return _misfit(operation, f"and so was {twin}")
            case Read(answer=answer):
                reads.setdefault(answer, []).append(operation)
            case UnknownAdd():
                unknown.append(operation)
    unknown.sort(key=lambda add: add.invoked_ns)
    return _first_misfit(adds, reads, iter(unknown))


def _first_misfit(
    adds: dict[int, Add], reads: dict[int, list[Read]], unknown: Iterator[UnknownAdd]
) -> Misfit | None:
    """Go from count to count, each as early as those before it allow."""
    answers = sorted({*adds, *reads})
    if not answers:
        return None
    if answers[0] < 0 or 0 in adds:
        lowest = adds.get(answers[0]) or reads[answers[0]][0]
        return _misfit(adds.get(0, lowest), "which is less than it can be")

    latest: Operation | None = None  # of those that must have begun by now
    for count in range(answers[-1] + 1):
        added = adds.get(count)
        step = added or (next(unknown, None) if count else None)
        if step is not None:
            latest = _later(latest, step)
        elif count:
            answer = next(answer for answer in answers if answer >= count)
            wants = adds.get(answer) or reads[answer][0]
            return _misfit(wants, f"but nothing can have made the count {count}")
        for early in (added, *reads.get(count, ())):
            if early and latest and early.ended_ns < latest.invoked_ns:
                return _too_late(latest, early)
        # The count is still this one when the last read of it begins.
        for read in reads.get(count, ()):
            latest = _later(latest, read)
    return None


def _later(one: Operation | None, other: Operation) -> Operation:
    """Whichever began later."""
    return other if one is None or one.invoked_ns < other.invoked_ns else one


def _too_late(late: Operation, early: Add | Read) -> Misfit:
    """`late` had to begin before the answer of `early`, and did not."""
    had = f"began at {late.invoked_ns} ns"
    if isinstance(late, UnknownAdd):
        why = f"and ended at {early.ended_ns} ns, but {late}, which it needs, {had}"
        return _misfit(early, why)
    by = f"though {early} had been answered {early.answer} by {early.ended_ns} ns"
    return _misfit(late, f"and {had}, {by}")


def _misfit(operation: Add | Read, why: str) -> Misfit:
    return Misfit(operation, f"{operation} was answered {operation.answer}, {why}")
