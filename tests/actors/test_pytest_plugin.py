"""The pytest plugin, in test runs of its own."""

import subprocess
import sys

import pytest

from actors.pytest_plugin import PlacementSimulation
from tests.actors.actors_under_test import Echo

pytest_plugins = ["pytester"]

GRAIN = """
    import pytest
    from actors import Grain

    class Echo(Grain):
        def on_receive(self, message):
            return message

    KINDS = {"echo": Echo}
"""

#: Appends a record as if user code had been entered without a claim.
BREAK = """
        import msgspec

        entered = next(
            each for each in cluster.shared.records if hasattr(each, "purpose")
        )
        cluster.shared.records.append(
            msgspec.structs.replace(entered, token=99, at_ns=cluster.world.now_ns)
        )
"""


def run(pytester: pytest.Pytester, body: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(GRAIN + body)
    return pytester.runpytest("-p", "no:randomly", *options)


ASKS = """
    def test_asks(placement_simulation):
        cluster = placement_simulation(nodes=2, kinds=KINDS, ttl=2.0)
        assert cluster.ref("echo/1").ask(1) == 1
        print("the seed is", cluster.seed)
"""


def test_the_fixture_makes_a_cluster(placement_simulation: PlacementSimulation) -> None:
    cluster = placement_simulation(nodes=["a", "b"], kinds={"echo": Echo})

    assert cluster.ref("echo/1").ask("said") == "said"
    assert cluster.nodes == ("a", "b")


def test_a_test_that_passes_says_nothing_of_its_seed(
    pytester: pytest.Pytester,
) -> None:
    done = run(pytester, ASKS)

    done.assert_outcomes(passed=1)
    assert "run again" not in done.stdout.str()


def test_the_seed_comes_from_the_name_of_the_test_and_is_the_same_each_time(
    pytester: pytest.Pytester,
) -> None:
    seeds = [
        next(
            line for line in run(pytester, ASKS, "-s").outlines if "the seed is" in line
        )
        for _ in range(2)
    ]

    assert seeds[0] == seeds[1]


def test_the_seed_may_be_given(pytester: pytest.Pytester) -> None:
    done = run(pytester, ASKS, "-s", "--placement-seed", "7")

    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["*the seed is 7*"])
    wrong = run(pytester, ASKS, "--placement-seed", "seven")
    assert wrong.ret == pytest.ExitCode.USAGE_ERROR


def test_a_test_that_fails_prints_its_seed_and_how_to_run_it_again(
    pytester: pytest.Pytester,
) -> None:
    body = """
    def test_fails(placement_simulation):
        cluster = placement_simulation(kinds=KINDS)
        placement_simulation(seed=3, kinds=KINDS)
        cluster.cut({"node-1"}, {"node-2"})
        assert cluster.ref("echo/1").ask(1) == 2
    """
    done = run(pytester, body, "--placement-seed", "7")

    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*placement: seed 7; run again with --placement-seed 7",
            "*placement: seed 3; run again with --placement-seed 3",
        ]
    )


def test_a_test_that_passes_is_judged_at_its_end(pytester: pytest.Pytester) -> None:
    body = f"""
    def test_breaks_a_rule(placement_simulation):
        cluster = placement_simulation(seed=5, kinds=KINDS)
        cluster.ref("echo/1").ask(1)
{BREAK}
    def test_comes_after(placement_simulation):
        placement_simulation(kinds=KINDS).ref("echo/1").ask(1)
    """
    done = run(pytester, body)

    done.assert_outcomes(passed=2, errors=1)
    done.stdout.fnmatch_lines(
        [
            "*Unsafe: seed 5: * violations*",
            "*entry-first: echo/1*",
            "*placement: seed 5; run again with --placement-seed 5",
        ]
    )


def test_a_test_that_fails_is_not_judged_and_its_clusters_end(
    pytester: pytest.Pytester,
) -> None:
    body = f"""
    made = []

    def test_fails(placement_simulation):
        cluster = placement_simulation(kinds=KINDS)
        made.append(cluster)
        cluster.ref("echo/1").ask(1)
{BREAK}
        raise ValueError("otherwise")

    def test_comes_after():
        assert made[0].snapshot().state == "stopped"
        assert made[0].nodes == ()
    """
    done = run(pytester, body)

    done.assert_outcomes(passed=1, failed=1)
    assert "violations" not in done.stdout.str()


def test_a_cluster_may_be_stopped_by_the_test_itself(
    pytester: pytest.Pytester,
) -> None:
    body = """
    def test_stops(placement_simulation):
        with placement_simulation(kinds=KINDS) as cluster:
            cluster.ref("echo/1").ask(1)
    """
    run(pytester, body).assert_outcomes(passed=1)


def test_the_plugin_loads_nothing_heavy() -> None:
    program = (
        "import sys, pytest; before = set(sys.modules); import actors.pytest_plugin\n"
        "print(sorted(name for name in set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "['actors', 'actors.pytest_plugin']"


def test_the_package_needs_no_pytest() -> None:
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'pytest', '_pytest'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import actors\n"
        "from actors import *\n"
        "with Cluster.simulated(kinds={'thing': Grain}) as cluster:\n"
        "    print(cluster.resolve('thing/1').identity)\n"
        "assert set(actors.__all__) <= set(dir(actors))\n"
        "try:\n"
        "    actors.nothing\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines() == [
        "thing/1",
        "module 'actors' has no attribute 'nothing'",
    ]
