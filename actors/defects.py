"""Known-broken variants of the cluster, each to show that the observer sees it."""

from dataclasses import dataclass

from actors.node import PlacementNode
from actors.simulation import Process, Shared


class Variant:
    """The cluster as it is; a defect changes some of this."""

    def prepare(self, shared: Shared) -> None:
        """Change what all processes share."""

    def process(self, shared: Shared, name: str, *, rate_ppm: int) -> Process:
        """The engine of a node."""
        return Process(shared, name, rate_ppm=rate_ppm)

    def change(self, node: PlacementNode) -> None:
        """Change a node that has not started."""


@dataclass(frozen=True, slots=True)
class Defect:
    """A known-broken variant: what is wrong, and which rules see it."""

    description: str
    rules: tuple[str, ...]
    variant: type[Variant]


DEFECTS: dict[str, Defect] = {}


def variant_of(name: str) -> Variant:
    """The variant of that name."""
    return DEFECTS[name].variant() if name else Variant()
