"""The pytest plugin: the fixture `placement_simulation`, and `--placement-seed`.

pytest finds it by its entry point, wherever the package is installed.
"""

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

if TYPE_CHECKING:
    from actors.simulation import SimulatedCluster

_SEEDS = 1_000_000
_SEED = pytest.StashKey[int]()
_HAS_PASSED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take a seed for all simulations of the run."""
    parser.getgroup("placement").addoption(
        "--placement-seed",
        type=int,
        default=None,
        help="seed of simulated clusters; without it, one from each test's name",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, Any, Any]:
    """Say with which seed a failed test can be run again."""
    report: Any = yield
    if report.when == "call":
        item.stash[_HAS_PASSED] = report.passed
    seed = item.stash.get(_SEED, None)
    if report.failed and seed is not None:
        report.sections.append(
            ("placement", f"seed {seed}; run again with --placement-seed {seed}")
        )
    return report


@pytest.fixture
def placement_simulation(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., "SimulatedCluster"]]:
    """Start simulated clusters: `placement_simulation(nodes=3, kinds={...})`.

    The seed is that of `--placement-seed`, else one that the test's name gives.
    At the end of a test that has passed each cluster is checked by the rules of
    the observer.
    """
    # Only who uses it pays for what it needs.
    from actors.cluster import Cluster  # noqa: PLC0415

    seed = request.config.getoption("--placement-seed")
    if seed is None:
        seed = xxhash.xxh3_64_intdigest(request.node.nodeid.encode()) % _SEEDS
    request.node.stash[_SEED] = seed
    started: list[SimulatedCluster] = []

    def start(**options: Any) -> "SimulatedCluster":
        cluster = Cluster.simulated(**{"seed": seed, **options})
        started.append(cluster)
        return cluster

    yield start
    try:
        if request.node.stash.get(_HAS_PASSED, False):
            for cluster in started:
                cluster.check()
    finally:
        for cluster in started:
            cluster.abandon()
