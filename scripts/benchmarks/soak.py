"""A soak: very many Grains, of which some always end, start, and change their node.

The identities are the same all the time, so that memory has a plateau to come
back to. Latency is that of single asks to any of them, those that must be started
again among them.
"""

import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from actors import Cluster, Grain, Kind
from placement.errors import PlacementError
from scripts.benchmarks.hosted import resident

WINDOW = 500
MEMORY_SHARE = 0.03
LATENCY_S = 0.050
_EXTRA = "node-4"
_WAIT_S = 60.0
_CHANGE_EVERY_S = 15.0
#: How long after a change its latencies still count as its own.
_AFTER_CHANGE_S = 2.0
#: The plateau is the median of memory in this part of the time: from when the first
#: churn has spread the heap.
_PLATEAU = (0.2, 0.5)


class Soaked(Grain):
    """Answers, or ends."""

    def on_receive(self, message: Any) -> Any:
        """Answer with the message; `end` is the last one."""
        if message == "end":
            self.context.passivate()
        return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What it gave. Times in milliseconds, memory in bytes."""

    grains: int
    seconds: float
    asks: int
    failed: int
    ended: int
    changes: int
    plateau: int
    most: int
    last: int
    memory_off: float
    calm_asks: int
    calm_median_ms: float
    calm_999_ms: float
    changing_999_ms: float

    def broken(self) -> list[str]:
        """What is not as it has to be."""
        found = []
        if self.memory_off > MEMORY_SHARE:
            found.append(
                f"memory ended {self.memory_off:.1%} above its plateau, "
                f"not within {MEMORY_SHARE:.0%}"
            )
        if self.calm_999_ms > LATENCY_S * 1e3:
            found.append(
                f"the 99.9th percentile outside changes was {self.calm_999_ms:.1f} ms, "
                f"not {LATENCY_S * 1e3:.0f} ms"
            )
        if self.failed:
            found.append(f"{self.failed} asks failed outside changes")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "broken": self.broken()}


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all are not above; 0 among none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class _Changes:
    """When the members change: from the first step until some time after the last."""

    def __init__(self) -> None:
        self.count = 0
        self._until_s = 0.0
        self._is_under_way = False

    def touches(self, since_s: float) -> bool:
        """Whether one was under way at any time since then."""
        return self._is_under_way or since_s < self._until_s

    def make(self, change: Callable[[], object]) -> None:
        """Make one."""
        self._is_under_way = True
        change()
        self.count += 1
        self._until_s = time.monotonic() + _AFTER_CHANGE_S
        self._is_under_way = False


class _Soaking:
    """A cluster that is churned by one thread and probed by another."""

    def __init__(
        self, cluster: Cluster, grains: int, say: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._grains = grains
        self._say = say
        self._random = Random(1)  # noqa: S311
        self._is_over = threading.Event()
        self._has_extra = False
        self.changes = _Changes()
        self.calm: list[float] = []
        self.changing: list[float] = []
        self.memory: list[tuple[float, int]] = []
        self.asks = self.ended = self.failed = 0

    def fill(self) -> None:
        """Have every Grain answer, and so be there."""
        cluster, grains = self._cluster, self._grains
        for first in range(0, grains, WINDOW):
            names = [f"soak/{n}" for n in range(first, min(grains, first + WINDOW))]
            futures = [cluster.ref(name).ask("here", block=False) for name in names]
            assert all(future.get(timeout=_WAIT_S) == "here" for future in futures)
            self._say(f"{first + len(names):,} of {grains:,} are there")

    def run(self, seconds: float) -> float:
        """Churn for so long; how long it was."""
        probing = threading.Thread(target=self._probe, daemon=True)
        probing.start()
        began = change_at = time.monotonic()
        change_every = min(_CHANGE_EVERY_S, seconds / 6)
        while (now := time.monotonic()) < began + seconds:
            self.memory.append((now - began, resident()))
            self._say(f"{now - began:.0f} s, {self.memory[-1][1] >> 20:,} MiB")
            if now >= change_at:
                change_at = now + change_every
                self._change()
            self._churn(now)
            self._is_over.wait(0.05)
        if self._has_extra:
            self._change()
        self._is_over.set()
        probing.join(_WAIT_S)
        return time.monotonic() - began

    def _change(self) -> None:
        cluster = self._cluster
        verb = cluster.remove_node if self._has_extra else cluster.add_node
        self.changes.make(lambda: verb(_EXTRA))
        self._has_extra = not self._has_extra

    def _churn(self, now: float) -> None:
        """Some end, then are asked for, and so start again."""
        chosen = (self._random.randrange(self._grains) for _ in range(WINDOW))
        refs = [self._cluster.ref(f"soak/{number}") for number in {*chosen}]
        for message in ("end", "here"):
            futures = [ref.ask(message, block=False) for ref in refs]
            for future in futures:
                try:
                    assert future.get(timeout=_WAIT_S) == message
                except PlacementError:
                    self._fail(now)
        self.asks += 2 * len(refs)
        self.ended += len(refs)

    def _fail(self, since_s: float) -> None:
        # Somebody whose node goes may hear that the outcome is unknown.
        if not self.changes.touches(since_s):
            self.failed += 1

    def _probe(self) -> None:
        random = Random(2)  # noqa: S311
        while not self._is_over.wait(0.002):
            ref = self._cluster.ref(f"soak/{random.randrange(self._grains)}")
            began = time.monotonic()
            try:
                assert ref.ask(1, timeout=_WAIT_S) == 1
            except PlacementError:
                self._fail(began)
                continue
            spent_ms = (time.monotonic() - began) * 1e3
            is_changing = self.changes.touches(began)
            (self.changing if is_changing else self.calm).append(spent_ms)


def soak(
    *, seconds: float, grains: int, say: Callable[[str], None] = lambda _: None
) -> Soak:
    """Run for so long, after all have been started once.

    The garbage collector is left as a program has it: an ended Grain may be part of
    a cycle, which only that one frees.
    """
    kinds = {"soak": Kind(Soaked, idle_after=None)}
    with Cluster.embedded(nodes=3, kinds=kinds) as cluster:
        soaking = _Soaking(cluster, grains, say)
        soaking.fill()
        spent = soaking.run(seconds)
        soaking.fill()  # what has left with a node is back
        assert sum(cluster.snapshot().activations.values()) == grains
        gc.collect()
        last = resident()
    first, end = (share * spent for share in _PLATEAU)
    sizes = [size for at, size in soaking.memory if first <= at <= end]
    plateau = int(statistics.median(sizes or [last]))
    return Soak(
        grains=grains,
        seconds=round(spent, 1),
        asks=soaking.asks + len(soaking.calm) + len(soaking.changing),
        failed=soaking.failed,
        ended=soaking.ended,
        changes=soaking.changes.count,
        plateau=plateau,
        most=max(size for _, size in soaking.memory),
        last=last,
        memory_off=round(max(0.0, last / plateau - 1), 4),
        calm_asks=len(soaking.calm),
        calm_median_ms=round(percentile(soaking.calm, 0.5), 3),
        calm_999_ms=round(percentile(soaking.calm, 0.999), 3),
        changing_999_ms=round(percentile(soaking.changing, 0.999), 3),
    )
