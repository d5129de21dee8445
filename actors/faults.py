"""The faults of a simulated run: what is wrong, where, from when, and for how long.

A plan is drawn from the seed before the run, as a list of episodes; each has a
source of chance of its own, so that the same run without one of them is the
same run without it. All are over before the run ends.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from actors.network import Fate
from actors.simulated_store import Trouble

FAULTS = (
    "drop",
    "duplicate",
    "delay",
    "cut",
    "crash",
    "pause",
    "drift",
    "store-fail",
    "store-lost",
    "store-slow",
    "store-down",
    "churn",
    "grain",
)

#: What no store here does, but one that reads from a replica may: asked for by name.
STALE = "store-stale"

#: A wire, as NATS is one, that tells nobody who has left: what is sent there vanishes.
MUTE = "wire-mute"

#: Clocks within the assumed bound run at most this much faster or slower.
DRIFT_PPM = 50_000
#: Beyond it: a margin of a fifth covers a ninth either way, and no more.
DRIFT_BEYOND_PPM = 300_000

_STORE = {
    "store-fail": ("fail",),
    "store-lost": ("lost", "late"),
    "store-slow": ("slow",),
    STALE: ("stale",),
}


class BadFaults(ValueError):
    """A text that names no faults, and which are known."""


def parse_faults(text: str) -> tuple[str, ...]:
    """Read `none`, or names with commas, of which `all` is the usual ones.

    Raises:
        BadFaults: a name is no fault's.
    """
    if text == "none":
        return ()
    names: list[str] = []
    for part in text.split(","):
        name = part.strip()
        if name == "all":
            names += FAULTS
        elif name in (*FAULTS, "drift-beyond", STALE, MUTE):
            names.append(name)
        else:
            raise BadFaults(
                f"unknown fault {name!r}; known are none, all, "
                f"{', '.join(FAULTS)}, drift-beyond, {STALE}, {MUTE}"
            )
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Episode:
    """One thing that is wrong from `at_s` on, `for_s` seconds long.

    `nodes` are the numbers of the nodes it is about, as a share of those there
    are; `rate` is how often, or how much; `how` which variant.
    """

    number: int
    kind: str
    at_s: float
    for_s: float
    nodes: tuple[float, ...]
    rate: float
    how: str

    def random(self, seed: int) -> Random:
        """This episode's own source of chance."""
        return Random(f"{seed}/episode {self.number}")  # noqa: S311


def plan(
    seed: int, kinds: Sequence[str], *, duration_s: float, ttl_s: float
) -> tuple[Episode, ...]:
    """The episodes of a run: of each kind one to three."""
    found: list[Episode] = []
    for place, kind in enumerate((*FAULTS, STALE)):
        if kind not in kinds or kind == "drift":
            continue
        draw = Random(f"{seed}/plan {kind}")  # noqa: S311
        first = place * 10
        found += (
            _episode(draw, first + index, kind, duration_s, ttl_s)
            for index in range(1 + int(draw.random() * 3))
        )
    return tuple(found)


def _episode(
    draw: Random, number: int, kind: str, duration_s: float, ttl_s: float
) -> Episode:
    share = draw.random()
    match kind:
        case "pause":
            for_s = ttl_s * (0.4 + 2.6 * share)
        case "store-down":
            for_s = ttl_s * (0.7 + 1.3 * share)
        case "crash":
            for_s = ttl_s * 2.0 * share
        case "cut":
            for_s = ttl_s * (0.3 + 2.2 * share)
        case _:
            for_s = ttl_s * (0.5 + 2.5 * share)
    at_s = draw.random() * max(0.1, duration_s - for_s)
    hows = {
        "pause": ("between", "inside", "inside", "answer"),
        "crash": ("restart", "restart", "gone"),
        "cut": ("both", "one-way", "store", "store"),
        "store-lost": ("lost", "late"),
        "churn": ("join", "leave", "drain", "flap"),
    }.get(kind, ("",))
    how = hows[int(draw.random() * len(hows))]
    nodes = tuple(draw.random() for _ in range(3))
    return Episode(number, kind, at_s, for_s, nodes, draw.random(), how)


class WireTrouble:
    """Frames dropped, repeated or delayed while an episode lasts."""

    def __init__(self, episode: Episode, seed: int, counts: Counter[str]) -> None:
        self._kind = episode.kind
        self._rate = 0.02 + 0.28 * episode.rate
        self._draw = episode.random(seed).random
        self._counts = counts

    def fate(self, sender: str, receiver: str) -> Fate | None:
        """What becomes of this frame."""
        if self._draw() >= self._rate:
            return None
        self._counts[self._kind] += 1
        match self._kind:
            case "drop":
                return Fate(copies=0)
            case "duplicate":
                return Fate(copies=2 + int(self._draw() * 2))
            case _:
                # Mostly a little, now and then very late.
                return Fate(delay_ns=int(self._draw() ** 4 * 2e9))


class CutOff:
    """Nothing passes between some nodes, or between one and the store."""

    def __init__(
        self,
        one: frozenset[str],
        other: frozenset[str],
        *,
        how: str,
        counts: Counter[str],
    ) -> None:
        self._one, self._other, self._how = one, other, how
        self._counts = counts

    def fate(self, sender: str, receiver: str) -> Fate | None:
        """Whether the frame crosses the cut."""
        if self._how == "store":
            return None
        crosses = sender in self._one and receiver in self._other
        if self._how == "both" and not crosses:
            crosses = sender in self._other and receiver in self._one
        if not crosses:
            return None
        self._counts["cut"] += 1
        return Fate(copies=0)

    def trouble(self, node: str) -> Trouble | None:
        """Whether the store is beyond the cut."""
        if self._how != "store" or node not in self._one:
            return None
        self._counts["cut"] += 1
        return Trouble("away", 400_000_000)


class StoreTrouble:
    """Calls to the store that go wrong while an episode lasts."""

    def __init__(self, episode: Episode, seed: int, counts: Counter[str]) -> None:
        self._kind = episode.kind
        self._how = episode.how
        self._rate = 0.05 + 0.45 * episode.rate
        self._draw = episode.random(seed).random
        self._counts = counts

    def trouble(self, node: str) -> Trouble | None:
        """What goes wrong with this call."""
        if self._kind == "store-down":
            self._counts[self._kind] += 1
            if self._draw() < 0.5:  # noqa: PLR2004  refused at once, or no answer
                return Trouble("fail")
            return Trouble("away", int(self._draw() * 300_000_000))
        if self._draw() >= self._rate:
            return None
        self._counts[self._kind] += 1
        match self._kind:
            case "store-fail":
                return Trouble("fail")
            case "store-slow":
                return Trouble("slow", int(self._draw() * 600_000_000))
            case "store-stale":
                return Trouble("stale", int(self._draw() * 1e9))
            case _:
                return Trouble(self._how, int(self._draw() ** 2 * 3e9))
