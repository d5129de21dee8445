"""Many trials: their sums, their violations told, and their faults made fewer."""

import json
import multiprocessing
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import xxhash

from actors.faults import MUTE, Episode
from actors.observer import Violation
from actors.trace import Record
from actors.trial import Result, Scenario, Trial

_TOLD_MAX = 40
_WINDOW_NS = 6_000_000_000


@dataclass(slots=True)
class Sum:
    """What many trials came to, under the names that `--json` prints."""

    runs: int = 0
    messages: int = 0
    answered: int = 0
    refused: int = 0
    unknown: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: int = 0
    first: tuple[int, Violation] | None = None
    seconds: float = 0.0
    _digest: Any = field(default_factory=xxhash.xxh3_128, repr=False)

    def add(self, result: Result) -> None:
        """Take in the next trial, in the order of the seeds."""
        self.runs += 1
        self.messages += result.messages
        self.answered += result.answered
        self.refused += result.refused
        self.unknown += result.unknown
        self.faults.update(result.faults)
        self.violations += len(result.violations)
        if self.first is None and result.violations:
            self.first = result.seed, result.violations[0]
        self._digest.update(bytes.fromhex(result.trace_hash))

    def as_json(self) -> dict[str, Any]:
        """The sum as one object."""
        first = None
        if self.first is not None:
            seed, violation = self.first
            first = {
                "seed": seed,
                "rule": violation.rule,
                "identity": violation.identity,
                "at": violation.at_ns / 1e9,
            }
        return {
            "runs": self.runs,
            "messages": self.messages,
            "answered": self.answered,
            "refused": self.refused,
            "unknown": self.unknown,
            "faults": dict(sorted(self.faults.items())),
            "violations": self.violations,
            "first_violation": first,
            "trace_hash": self._digest.hexdigest(),
            "seconds": round(self.seconds, 3),
        }


def simulate(
    seeds: Sequence[int],
    scenario: Scenario,
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda _runs, _violations: None,
    until_first: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Sum:
    """Perform the trials of `seeds`; the sum is the same however many `jobs`.

    With `until_first` no trial is counted after one that broke a rule, and none
    once `is_stopped` says so: it is asked after each.
    """
    found = Sum()
    began = time.monotonic()
    for result in _results(seeds, scenario, jobs):
        found.add(result)
        progress(found.runs, found.violations)
        if is_stopped() or (until_first and found.violations):
            break
    found.seconds = time.monotonic() - began
    return found


def _results(seeds: Sequence[int], scenario: Scenario, jobs: int) -> Iterator[Result]:
    if jobs == 1 or len(seeds) == 1:
        for seed in seeds:
            yield Trial(seed, scenario).perform()
        return
    # Spawned: a trial must not depend on what its parent has done before.
    context = multiprocessing.get_context("spawn")
    is_over = context.Event()
    with ProcessPoolExecutor(jobs, context, _Job.begin, (scenario, is_over)) as pool:
        waiting: deque[Any] = deque()
        try:
            for seed in seeds:
                waiting.append(pool.submit(_Job.perform, seed))
                if len(waiting) > 4 * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            is_over.set()
            for each in waiting:
                each.cancel()


class _Job:
    """What a process of the pool was told when it began."""

    scenario: Scenario
    is_over: Any

    @classmethod
    def begin(cls, scenario: Scenario, is_over: Any) -> None:
        # Ctrl-C in a terminal is for all its processes; the first one ends this.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cls.scenario, cls.is_over = scenario, is_over

    @classmethod
    def perform(cls, seed: int) -> Result | None:
        if cls.is_over.is_set():
            return None  # nobody waits for it any more
        return Trial(seed, cls.scenario).perform()


# --- one trial, told ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that arrived, as the trace has it."""

    at_ns: int
    sender: str
    receiver: str
    name: str
    fields: tuple[Any, ...]

    def __str__(self) -> str:
        said = " ".join(map(str, self.fields))
        return f"{self.sender} -> {self.receiver}  {self.name} {said}"


class Witnessed:
    """A trial performed again with all its frames kept."""

    def __init__(
        self, seed: int, scenario: Scenario, episodes: Sequence[Episode] | None = None
    ) -> None:
        self.frames: list[Frame] = []
        trial = Trial(seed, scenario, episodes=episodes, tap=self._take)
        self.result = trial.perform()
        self.episodes = trial.episodes
        self.records: list[Record] = sorted(trial.records, key=lambda each: each.at_ns)

    def _take(self, at_ns: int, sender: str, receiver: str, data: bytes) -> None:
        body = msgpack.unpackb(data, strict_map_key=False)[5]
        name = _NAMES.get(body[0], str(body[0]))
        self.frames.append(Frame(at_ns, sender, receiver, name, tuple(body[1:])))

    def concerning(self, violation: Violation) -> Iterator[str]:
        """The last events that concern its identity, as lines."""
        since_ns = violation.at_ns - _WINDOW_NS
        lines: list[tuple[int, str]] = []
        for record in self.records:
            if not since_ns <= record.at_ns <= violation.at_ns:
                continue
            named = getattr(record, "identity", None)
            if named == violation.identity or (
                named is None and type(record).__name__ in _OF_ALL
            ):
                lines.append((record.at_ns, _line_of(record)))
        lines += (
            (frame.at_ns, str(frame))
            for frame in self.frames
            if since_ns <= frame.at_ns <= violation.at_ns
            and violation.identity in frame.fields
        )
        lines.sort(key=lambda each: each[0])
        for at_ns, line in lines[-_TOLD_MAX:]:
            yield f"{at_ns / 1e9:14.6f}  {line}"

    def write(self, path: Path) -> None:
        """Everything as JSON lines, in order of time.

        Raises:
            OSError: it cannot be written.
        """
        rows: list[tuple[int, dict[str, Any]]] = [
            (each.at_ns, {"what": type(each).__name__, **msgspec.structs.asdict(each)})
            for each in self.records
        ]
        rows += [
            (each.at_ns, {"what": "Frame", **asdict(each)}) for each in self.frames
        ]
        rows.sort(key=lambda each: each[0])
        with path.open("w", encoding="utf-8") as file:
            for _, row in rows:
                file.write(json.dumps(row, default=repr) + "\n")


_OF_ALL = {"SessionChanged", "ProcessEnded", "Healed"}


def _names() -> dict[int, str]:
    from messages.frames import FRAMES  # noqa: PLC0415  only where frames are told

    names = {}
    for frame in FRAMES:
        tag = frame.__struct_config__.tag
        assert isinstance(tag, int)
        names[tag] = frame.__name__
    return names


_NAMES = _names()


def _line_of(record: Record) -> str:
    fields = msgspec.structs.asdict(record)
    fields.pop("at_ns")
    said = " ".join(f"{name}={value}" for name, value in fields.items() if value != "")
    return f"{type(record).__name__} {said}"


# --- fewer faults -------------------------------------------------------------


def shrink(
    seed: int,
    scenario: Scenario,
    *,
    progress: Callable[[int, int], None] = lambda _tried, _left: None,
) -> tuple[tuple[Episode, ...], Scenario]:
    """A smaller schedule of faults, and fewer requests, that break the same rule.

    Takes away episodes one after the other, as long as the rule stays broken
    (delta debugging: Zeller and Hildebrandt, "Simplifying and Isolating
    Failure-Inducing Input", TSE 2002, with the pieces one episode each).
    """
    trial = Trial(seed, scenario)
    episodes = trial.episodes
    result = trial.perform()
    assert result.violations, "there is nothing to shrink"
    rule = result.violations[0].rule
    tried = 0

    def breaks(some: tuple[Episode, ...], smaller: Scenario) -> bool:
        nonlocal tried
        tried += 1
        found = Trial(seed, smaller, episodes=some).perform()
        progress(tried, len(some))
        return any(each.rule == rule for each in found.violations)

    is_smaller = True
    while is_smaller:
        is_smaller = False
        for episode in episodes:
            rest = tuple(each for each in episodes if each is not episode)
            if breaks(rest, scenario):
                episodes, is_smaller = rest, True
    # What is wrong all the time.
    for wrong in ({"drift", "drift-beyond"}, {MUTE}):
        calm = tuple(each for each in scenario.faults if each not in wrong)
        if calm != scenario.faults:
            calmer = replace(scenario, faults=calm)
            if breaks(episodes, calmer):
                scenario = calmer
    return episodes, scenario
