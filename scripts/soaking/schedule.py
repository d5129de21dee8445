"""What happens to whom and when: the seed decides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeAlias

What: TypeAlias = Literal[
    "kill", "pause", "drain", "server-kill", "server-pause", "store-cut", "store-crash"
]

SERVER, STORE = "server", "store"
#: Those of nodes have no name of their own.
NODE_FAULTS: tuple[What, ...] = ("kill", "pause", "drain")
SERVER_FAULTS: tuple[What, ...] = ("server-kill", "server-pause")
STORE_FAULTS: tuple[What, ...] = ("store-cut", "store-crash")
_PAUSES: tuple[What, ...] = ("pause", "server-pause")
#: In times to live. Between two faults of one target everything may come to rest.
_PAUSE = (0.2, 3.0)
_OFTEN, _SELDOM = (1.0, 5.0), (4.0, 12.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`target` is a node, the server or the store; `at_s` counts from the start."""

    at_s: float
    target: str
    what: What
    lasts_s: float = 0.0


def schedule(
    seed: int, *, seconds: float, ttl_s: float, nodes: Sequence[str], has_store: bool
) -> dict[str, tuple[Fault, ...]]:
    """The faults of each target, in order; those of several targets overlap."""
    found = dict.fromkeys(nodes, (NODE_FAULTS, _OFTEN))
    found[SERVER] = (SERVER_FAULTS, _SELDOM)
    if has_store:
        found[STORE] = (STORE_FAULTS, _SELDOM)
    return {
        target: tuple(
            _faults(
                Random(f"{seed}/{target}"),  # noqa: S311  a schedule is no secret
                target,
                kinds,
                gaps_s=(gaps[0] * ttl_s, gaps[1] * ttl_s),
                ttl_s=ttl_s,
                until_s=seconds,
            )
        )
        for target, (kinds, gaps) in found.items()
    }


def _faults(
    random: Random,
    target: str,
    kinds: Sequence[What],
    *,
    gaps_s: tuple[float, float],
    ttl_s: float,
    until_s: float,
) -> Iterator[Fault]:
    at_s = 0.0
    while True:
        # Each once before any again, so that also a short schedule has all.
        for what in random.sample(kinds, len(kinds)):
            at_s += random.uniform(*gaps_s)
            lasts_s = random.uniform(*_PAUSE) * ttl_s if what in _PAUSES else 0.0
            if at_s + lasts_s > until_s:
                return
            yield Fault(at_s=at_s, target=target, what=what, lasts_s=lasts_s)
            at_s += lasts_s
