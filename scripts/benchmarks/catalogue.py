"""The benchmarks by name: against what, what they have to reach, and what peers do.

Published figures are what others' programs did on a machine with two processors
and Python 3.11, measured with each program's own client and as its documentation
has it: see `PEERS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from scripts.benchmarks import messages
from scripts.benchmarks.measure import Effort, Measurement, Unit

PEERS = (
    "published: measured for this project on 2 processors. Erlang: `global` on 3 "
    "nodes unless said; Ray: named actors; Valkey: a lock by SET NX; xoscar: actors "
    "in another process; Restate: virtual objects, Python SDK; pykka: 4.5 alone."
)


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be reached: a rate or ratio at least, or a value at most."""

    of: Literal["rate", "ratio", "most"]
    value: float

    def is_reached(self, ours: float, ratio: float) -> bool:
        """Tell whether it is."""
        match self.of:
            case "rate":
                return ours >= self.value
            case "ratio":
                return ratio >= self.value
            case "most":
                return ours <= self.value

    def text(self, unit: Unit) -> str:
        """For the table."""
        match self.of:
            case "rate":
                return f"≥ {self.value:,.0f}/s"
            case "ratio":
                return f"ratio ≥ {self.value:.2f}"
            case "most":
                return f"≤ {self.value:,.6g} {unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One row: `measure` gives both sides' values in `unit`."""

    name: str
    against: str
    measure: Callable[[Effort], Measurement]
    unit: Unit = "/s"
    goal: Goal | None = None
    published: str = ""


def rate(value: float) -> Goal:
    """At least so many a second."""
    return Goal("rate", value)


def ratio(value: float) -> Goal:
    """At least so near to the limit."""
    return Goal("ratio", value)


def most(value: float) -> Goal:
    """At most that."""
    return Goal("most", value)


def _messages() -> Iterable[Benchmark]:
    for where, is_pinned in (("pinned", True), ("placed", False)):
        yield Benchmark(
            name=f"ask/pykka/{where}",
            against="raw pykka",
            measure=partial(messages.ask_pykka, is_pinned=is_pinned),
            goal=ratio(1.0),
            published="pykka 17,900; Ray 1,500; xoscar 2,800",
        )
        yield Benchmark(
            name=f"ask/loop/{where}",
            against="a deque and two locks",
            measure=partial(messages.ask_loop, is_pinned=is_pinned),
            published="pykka 17,900; Ray 1,500; xoscar 2,800",
        )
    for where, is_pinned in (("pinned", True), ("placed", False)):
        yield Benchmark(
            name=f"tell/pykka/{where}",
            against="raw pykka",
            measure=partial(messages.tell_pykka, is_pinned=is_pinned),
            goal=ratio(0.5),
            published="pykka 290,000",
        )
        yield Benchmark(
            name=f"tell/inbox/{where}",
            against="a bare inbox on a shared thread",
            measure=partial(messages.tell_inbox, is_pinned=is_pinned),
            goal=rate(1_000_000),
            published="pykka 290,000",
        )


BENCHMARKS: tuple[Benchmark, ...] = (*_messages(),)
