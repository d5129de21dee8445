"""The pytest plugin: simulated clusters for tests, and the seed of one that failed.

    def test_it_survives(placement_simulation: PlacementSimulation) -> None:
        cluster = placement_simulation(nodes=3, kinds={"counter": Counter})

pytest loads this in every run, so that it imports nothing but pytest.
"""

import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from actors.kind import Kind
    from actors.simulation import SimulatedCluster

_HAS_PASSED = pytest.StashKey[bool]()
_SEEDS = pytest.StashKey[list[int]]()


class PlacementSimulation(Protocol):
    """The fixture `placement_simulation`: makes simulated clusters for one test."""

    def __call__(
        self,
        *,
        seed: int | None = None,
        nodes: int | Iterable[str] = 3,
        kinds: "Mapping[str, Kind | type]",
        **settings: Any,
    ) -> "SimulatedCluster":
        """Start one, as `Cluster.simulated` does.

        Without `seed` it is that of `--placement-seed`, or one that the name of
        the test decides.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the seed from the command line."""
    parser.getgroup("placement").addoption(
        "--placement-seed",
        type=int,
        metavar="N",
        help="seed of the simulated clusters (by default from the test's name)",
    )


@pytest.fixture
def placement_simulation(
    request: pytest.FixtureRequest,
) -> Iterator[PlacementSimulation]:
    """Make simulated clusters; they are stopped at the end.

    Where the test has passed they are judged by `check()`, too.
    """
    item = request.node
    clusters: list[SimulatedCluster] = []
    seeds = item.stash[_SEEDS] = []
    usual = request.config.getoption("placement_seed")
    if usual is None:
        usual = zlib.crc32(item.name.encode()) % 1_000_000

    def simulate(*, seed: int | None = None, **settings: Any) -> "SimulatedCluster":
        from actors.cluster import Cluster  # noqa: PLC0415  most runs never need it

        seed = usual if seed is None else seed
        if seed not in seeds:
            seeds.append(seed)
        clusters.append(Cluster.simulated(seed=seed, **settings))
        return clusters[-1]

    yield simulate
    if not item.stash.get(_HAS_PASSED, False):
        for cluster in clusters:
            cluster.abandon()
        return
    for cluster in clusters:
        cluster.stop()
    for cluster in clusters:
        cluster.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the seeds of a test that fails."""
    report = yield
    if call.when == "call":
        item.stash[_HAS_PASSED] = report.passed
    if report.failed:
        report.sections += [
            ("placement", f"placement: seed {seed}; run again with {_option(seed)}")
            for seed in item.stash.get(_SEEDS, [])
        ]
    return report


def _option(seed: int) -> str:
    return f"--placement-seed {seed}"
