"""The benchmarks by name: against what, what they have to reach, and what peers do.

Published figures are what others' programs did on a machine with two processors
and Python 3.11, measured with each program's own client and as its documentation
has it: see `PEERS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from scripts.benchmarks import (
    claims,
    hosted,
    messages,
    over_nats,
    processes,
    simulated,
    topology,
)
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
    """One row: `measure` gives both sides' values in `unit`.

    It is left out where no population of `needs` may be made, or NATS is not there
    that it is over. Without a floor is what differs from run to run by more than a
    floor allows.
    """

    name: str
    against: str
    measure: Callable[[Effort], Measurement]
    unit: Unit = "/s"
    goal: Goal | None = None
    published: str = ""
    needs: int = 0
    has_floor: bool = True
    is_over_nats: bool = False


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
    # On a busy machine the kernel moves the threads of one side apart and leaves the
    # other's together, one way or the other: pinned asks have the floors.
    for where, is_pinned in (("pinned", True), ("placed", False)):
        yield Benchmark(
            name=f"ask/pykka/{where}",
            against="raw pykka",
            measure=partial(messages.ask_pykka, is_pinned=is_pinned),
            has_floor=is_pinned,
            goal=ratio(1.0),
            published="pykka 17,900; Ray 1,500; xoscar 2,800",
        )
        yield Benchmark(
            name=f"ask/loop/{where}",
            against="a deque and two locks",
            measure=partial(messages.ask_loop, is_pinned=is_pinned),
            has_floor=is_pinned,
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
            against="an inbox on a shared thread",
            measure=partial(messages.tell_inbox, is_pinned=is_pinned),
            goal=rate(1_000_000),
            published="pykka 290,000",
        )

    yield Benchmark(
        name="tell/remote",
        against="an inbox on a shared thread",
        measure=messages.tell_remote,
        goal=rate(200_000),
    )
    yield Benchmark(
        name="flight/local",
        against="two copies and two queues",
        measure=messages.flight_local,
        goal=rate(300_000),
        published="xoscar 7,900",
    )
    yield Benchmark(
        name="flight/remote",
        against="two frames and two queues",
        measure=messages.flight_remote,
        goal=rate(100_000),
        published="xoscar 7,900",
    )
    yield Benchmark(
        name="flight/await",
        against="asyncio woken by a thread",
        measure=messages.awaited,
        goal=rate(60_000),
    )
    yield Benchmark(
        name="flight/typed",
        against="the untyped ask in flight",
        measure=messages.typed,
        goal=ratio(0.5),
    )
    yield Benchmark(
        name="flight/durable",
        against="SQLite, as many rows a commit",
        measure=messages.durable,
        goal=rate(50_000),
        published="Restate 150",
    )


def _claims() -> Iterable[Benchmark]:
    yield Benchmark(
        name="resolve/warm",
        against="a dict and a clock",
        measure=claims.warm_resolve,
        goal=rate(2_500_000),
        published="Erlang 1,300,000; xoscar 14,000; Ray 26,000",
    )
    yield Benchmark(
        name="claim/memory",
        against="two frames and two queues",
        measure=claims.cold_memory,
        goal=rate(33_000),
        published="Erlang 1,650 (5 nodes 1,220); xoscar 1,400; Ray 4",
    )
    yield Benchmark(
        name="claim/sqlite",
        against="SQLite, as many rows a commit",
        measure=claims.cold_sqlite,
        goal=rate(25_000),
        published="Valkey 14,000, not on disk",
    )


def _hosted() -> Iterable[Benchmark]:
    for how in ("rss", "traced"):
        yield Benchmark(
            name=f"idle/{how}",
            against="name, token, time, a slot",
            measure=partial(hosted.idle, how=how),
            unit="B",
            goal=most(1_024),
            published="pykka 22 KB",
        )
    for count in (1_000, 100_000, 1_000_000):
        for name, what in (("start", "starts"), ("passivation", "ends")):
            yield Benchmark(
                name=f"hosted/{name}/{count}",
                against="a dict of the objects, a queue",
                measure=partial(hosted.churned, hosted=count, what=what),
                goal=rate(100_000),
                published="pykka 6,000 to 11,000" if what == "starts" else "",
                needs=count,
            )


def _topology() -> Iterable[Benchmark]:
    for verb in ("join", "leave"):
        yield Benchmark(
            name=f"topology/{verb}",
            against="the table from nothing",
            measure=partial(topology.change, verb=verb),
            unit="ms",
            goal=most(50),
        )
    yield Benchmark(
        name="topology/moved",
        against="partitions that must move",
        measure=topology.moved,
        unit="x",
        goal=most(1.02),
    )
    yield Benchmark(
        name="membership/operations",
        against="one call of the store a renewal",
        measure=topology.operations,
        unit="x",
        goal=most(1.0),
    )
    yield Benchmark(
        name="membership/traffic",
        against="a frame and a call a renewal",
        measure=topology.traffic,
        unit="x",
        goal=ratio(0.95),
    )


def _processes() -> Iterable[Benchmark]:
    yield Benchmark(
        name="run/sample",
        against="reading the file alone",
        measure=processes.run_sample,
        goal=rate(50_000),
    )
    yield Benchmark(
        name="start/cluster",
        against="as many threads, each waited for",
        measure=processes.start,
        unit="ms",
        goal=most(50),
    )
    yield Benchmark(
        name="start/import",
        against="the imports it needs",
        measure=processes.import_all,
        unit="ms",
        goal=most(80),
    )
    yield Benchmark(
        name="simulation/messages",
        against="a heap and the codec",
        measure=simulated.messages,
        goal=rate(100_000),
    )


def _over_nats() -> Iterable[Benchmark]:
    for ttl_s in (2, 10):
        # A renewal is due at each third of it.
        yield Benchmark(
            name=f"failover/{ttl_s}s",
            against="time to live and a renewal",
            measure=partial(over_nats.failover, ttl_s=ttl_s),
            unit="ms",
            goal=most(round(ttl_s * 4 / 3 * 1.1 * 1e3)),
            has_floor=False,  # where it must not be later it is so by its goal
            is_over_nats=True,
        )
    yield Benchmark(
        name="nats/claim",
        against="creates, 64 in flight",
        measure=over_nats.claims,
        goal=ratio(0.5),
        is_over_nats=True,
    )
    yield Benchmark(
        name="nats/ask",
        against="a request of NATS",
        measure=over_nats.ask,
        goal=ratio(0.7),
        is_over_nats=True,
    )
    yield Benchmark(
        name="nats/flight",
        against="one ask at a time",
        measure=over_nats.flight,
        goal=ratio(5.0),
        is_over_nats=True,
    )


BENCHMARKS: tuple[Benchmark, ...] = (
    *_claims(),
    *_messages(),
    *_hosted(),
    *_topology(),
    *_processes(),
    *_over_nats(),
)
