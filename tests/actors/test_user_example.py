"""An example: a user's own grains, tried in a simulated cluster that crashes."""

from dataclasses import dataclass

import pytest

from actors import Cluster, Grain, handler


@dataclass
class Count:
    value: int = 0


class Counter(Grain[Count]):
    @handler
    def add(self) -> int:
        self.state.value += 1
        self.save()
        return self.state.value


class Forgetful(Counter):
    @handler
    def add(self) -> int:
        self.state.value += 1
        return self.state.value  # answered, and stored nowhere


def survives_crashes(grain: type[Counter], seed: int) -> None:
    with Cluster.simulated(seed=seed, nodes=3, kinds={"counter": grain}) as cluster:
        counter = cluster.proxy(grain, "1")
        for number in range(1, 6):
            assert cluster.ask(counter.add()) == number
            home = cluster.resolve("counter/1").pid.node
            cluster.crash(home)  # and everything that it had in memory
            cluster.advance(6)  # longer than its session lives
            cluster.add_node(home)
        cluster.check()


@pytest.mark.parametrize("seed", range(1, 6))
def test_what_the_counter_has_answered_survives_every_crash(seed: int) -> None:
    survives_crashes(Counter, seed)


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_counter_that_forgets_to_save_is_caught(seed: int) -> None:
    with pytest.raises(AssertionError, match="assert 1 == 2"):
        survives_crashes(Forgetful, seed)
