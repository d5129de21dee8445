"""Scaling: what one operation costs while nodes, identities and requests grow."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from actors import Cluster
from scripts.benchmarks.claims import claims_of, resolves_of
from scripts.benchmarks.measure import Effort, Work, rate_of
from scripts.benchmarks.messages import (
    ECHO,
    GRAINS,
    flight_of,
    node_here,
    two_nodes,
)

NODES = (1, 2, 4, 8, 16, 32)
IDENTITIES = (1_000, 10_000, 100_000, 1_000_000)
FLIGHTS = (1, 10, 100, 1_000, 10_000)


@dataclass(frozen=True, slots=True)
class Point:
    """Microseconds of one operation, at one place of a line."""

    curve: str
    line: str
    x: int
    microseconds: float


def _microseconds(work: Work, effort: Effort) -> float:
    run_in_s, rates = effort.run_in_s, []
    for _ in range(effort.runs):
        rates.append(rate_of(work, run_in_s=run_in_s, round_s=effort.round_s))
        run_in_s = 0.0
    return 1e6 / statistics.median(rates)


def over_nodes(effort: Effort) -> Iterator[Point]:
    """Claims and asks in flight, from outside, to ever more nodes."""
    for count in NODES:
        with Cluster.embedded(nodes=count, kinds={"echo": ECHO}) as cluster:
            nodes = [cluster.node(name) for name in cluster.nodes]
            refs = [cluster.ref(f"echo/ask-{number}") for number in range(GRAINS)]
            yield Point("nodes", "ask", count, _microseconds(flight_of(refs), effort))
            cost = _microseconds(claims_of(nodes), effort)
            yield Point("nodes", "claim", count, cost)


def over_identities(effort: Effort) -> Iterator[Point]:
    """Claims, asks in flight and resolutions, while ever more are hosted."""
    with Cluster.embedded(nodes=3, kinds={"echo": ECHO}) as cluster:
        nodes = [cluster.node(name) for name in cluster.nodes]
        claims = claims_of(nodes)
        names = [f"echo/known-{number}" for number in range(GRAINS)]
        refs = [cluster.ref(name) for name in names]
        hosted = 0
        for count in IDENTITIES:
            if count > effort.size:
                return
            while hosted < count:
                claims.perform(claims.batch)
                hosted += claims.batch
            for line, work in (
                ("claim", claims),
                ("ask", flight_of(refs)),
                ("resolve", resolves_of(cluster, names)),
            ):
                yield Point("identities", line, count, _microseconds(work, effort))


def over_flights(effort: Effort) -> Iterator[Point]:
    """Asks on one node and to another, with ever more in flight."""
    with node_here() as node, two_nodes(GRAINS) as remote:
        local = [node.ref(f"echo/{number}") for number in range(GRAINS)]
        for count in FLIGHTS:
            for line, refs in (("local", local), ("remote", remote)):
                cost = _microseconds(flight_of(refs, count), effort)
                yield Point("in flight", line, count, cost)


CURVES: tuple[Callable[[Effort], Iterator[Point]], ...] = (
    over_nodes,
    over_flights,
    over_identities,
)
