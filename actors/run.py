"""`placement run`: deliver every request of an input to its identity, and sum up."""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from actors.future import Future
from actors.kind import Kind
from actors.node import PlacementNode
from actors.requests import Request, Requests
from actors.tally import DurableTally, Tally
from actors.witness import ActivationWitness
from placement.entry import Pid
from placement.errors import OutcomeUnknown, PlacementError, SaveFailed

WINDOW = 400
#: Once the window is full, sending goes on when it is this empty: a burst costs
#: two switches of threads, where one request for each answer costs two a request.
_ROOM_AT = 320
_AGAIN_FOR_S = 60.0


class BadRun(ValueError):
    """Options that do not fit each other or the input, and why."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the topology: `verb` is kill, join or leave, after request `at`."""

    verb: str
    node: str
    at: int


def parse_change(verb: str, text: str) -> Change:
    """Read `NODE@N`.

    Raises:
        BadRun: it is not of that form.
    """
    node, at, number = text.rpartition("@")
    if not at or not node or not number.isdecimal():
        raise BadRun(f"--{verb} {text!r} is not NODE@N")
    return Change(verb, node, int(number))


def check_changes(
    changes: Sequence[Change], nodes: Sequence[str], request_count: int
) -> tuple[Change, ...]:
    """The changes in order of N, where each is possible when its turn comes.

    Raises:
        BadRun: a number beyond the input, a node that is not there then, or is.
    """
    there = set(nodes)
    ordered = sorted(changes, key=lambda each: each.at)
    for change in ordered:
        what = f"--{change.verb} {change.node}@{change.at}"
        if not 1 <= change.at <= request_count:
            raise BadRun(f"{what}: the input has requests 1 to {request_count}")
        if change.verb == "join":
            if change.node in there:
                raise BadRun(f"{what}: there is a node of that name then")
            there.add(change.node)
        else:
            if change.node not in there:
                raise BadRun(f"{what}: there is no node of that name then")
            there.remove(change.node)
            if not there:
                raise BadRun(f"{what}: no node would be left")
    return tuple(ordered)


def kinds_for(
    requests: Requests, given: Mapping[str, Kind], *, is_durable: bool
) -> dict[str, Kind]:
    """The kind of every request: as given, else the tally."""
    tally = Kind(DurableTally if is_durable else Tally)
    names = sorted({request.identity.kind for request in requests})
    return {**given, **{name: given.get(name, tally) for name in names}}


def check_kinds(requests: Requests, given: Mapping[str, Kind]) -> None:
    """Refuse a kind that no request has: somebody has mistyped its name.

    Raises:
        BadRun: there is one.
    """
    there = {request.identity.kind for request in requests}
    for name in sorted(set(given) - there):
        raise BadRun(
            f"--kind {name}=...: no request in {requests.name} has that kind; "
            f"they have {', '.join(sorted(there)[:5])}"
        )


class Target(Protocol):
    """The cluster as the run uses it."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that run."""

    def ref(self, identity: str) -> Any:
        """A reference."""

    def add_node(self, name: str) -> Any:
        """Start one more."""

    def remove_node(self, name: str) -> None:
        """Have one leave."""

    def kill_node(self, name: str) -> None:
        """End one as a crash would."""


class RunningNodes:
    """Nodes of other processes, which come and go without the run."""

    def __init__(self, entry: PlacementNode) -> None:
        self._entry = entry

    @property
    def nodes(self) -> tuple[str, ...]:
        """The members that are known now."""
        return tuple(member.node for member in self._entry.topology.members)

    def ref(self, identity: str) -> Any:
        """A reference."""
        return self._entry.ref(identity)

    def add_node(self, name: str) -> Any:
        """Refuse it."""
        raise BadRun(f"{name}: nodes that run already start by `placement node`")

    def remove_node(self, name: str) -> None:
        """Refuse it."""
        raise BadRun(f"{name}: nodes that run already are stopped by a signal")

    def kill_node(self, name: str) -> None:
        """Refuse it."""
        raise BadRun(f"{name}: nodes that run already are killed by a signal")


@dataclass(slots=True)
class Outcome:
    """What became of the requests."""

    requests: int = 0
    answered: int = 0
    failed: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Delivery:
    """Sends requests in order for each identity, a window of them at once.

    What ended without a known outcome is asked again under its id where the
    kind counts an id once; what follows for that identity waits meanwhile. So is
    what a target of many machines could not save: the next owner may reach the store.
    """

    def __init__(
        self,
        cluster: Target,
        requests: Requests,
        *,
        repeatable: Callable[[str], bool],
        progress: Callable[[int, int], None] = lambda _done, _failed: None,
    ) -> None:
        self._cluster = cluster
        self._unknown: tuple[type[PlacementError], ...] = (OutcomeUnknown,)
        if isinstance(cluster, RunningNodes):
            self._unknown = (OutcomeUnknown, SaveFailed)
        self._requests = requests
        self._repeatable = repeatable
        self._progress = progress
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._under_way = 0
        self._is_waiting = False
        self._again: dict[str, deque[tuple[Request, float]]] = {}
        self._due: deque[tuple[float, str]] = deque()
        self._stop = threading.Event()
        self.outcome = Outcome()

    def run(self, changes: Sequence[Change], *, began: float | None = None) -> Outcome:
        """Deliver all; make each change when its number has been delivered.

        `began` is when the first request was read, by `time.monotonic()`.
        """
        waiting = deque(changes)
        began = time.monotonic() if began is None else began
        for index, request in enumerate(self._requests, start=1):
            self._take_room()
            if self._stop.is_set():
                break
            self._send(request, time.monotonic() + _AGAIN_FOR_S)
            self.outcome.requests += 1
            while waiting and waiting[0].at <= index:
                self._change(waiting.popleft())
        with self._lock:
            while self._under_way:
                self._idle.wait(0.05)
                self._repeat_due()
        self.outcome.seconds = time.monotonic() - began
        self._progress(self.outcome.answered, self.outcome.failed)
        return self.outcome

    def stop(self) -> None:
        """Send no more, nor ask again; what is under way is waited for."""
        self._stop.set()

    def _take_room(self) -> None:
        if self._under_way < WINDOW:
            return
        with self._lock:
            while self._under_way > _ROOM_AT and not self._stop.is_set():
                self._is_waiting = True
                self._idle.wait(0.05)
                self._repeat_due()
        self._progress(self.outcome.answered, self.outcome.failed)

    def _change(self, change: Change) -> None:
        match change.verb:
            case "kill":
                self._cluster.kill_node(change.node)
            case "join":
                self._cluster.add_node(change.node)
            case _:
                self._cluster.remove_node(change.node)

    def _send(self, request: Request, until: float) -> None:
        with self._lock:
            self._under_way += 1
            held = self._again.get(request.identity)
            if held is not None:
                held.append((request, until))
                return
        self._ask(request, until)

    def _ask(self, request: Request, until: float) -> None:
        try:
            future: Future = self._cluster.ref(request.identity).ask(
                request.payload,
                block=False,
                request_id=self._requests.id_of(request),
            )
        except PlacementError as error:
            self._done(request, None, error)
            return
        future.on_done(lambda each: self._arrived(request, until, each))

    def _arrived(self, request: Request, until: float, future: Any) -> None:
        try:
            answer = future.get(timeout=0)
        except self._unknown as error:
            now = time.monotonic()
            is_wanted = now < until and not self._stop.is_set()
            if is_wanted and self._repeatable(request.identity.kind):
                with self._lock:
                    # Those after it wait; those before it are answered or here.
                    held = self._again.setdefault(request.identity, deque())
                    held.append((request, until))
                    self._due.append((now + 0.05, request.identity))
                return
            self._done(request, None, error)
        except PlacementError as error:
            self._done(request, None, error)
        else:
            self._done(request, answer, None)

    def _repeat_due(self) -> None:
        """Ask again what is due; the lock is held, and given up meanwhile."""
        now = time.monotonic()
        ready: list[tuple[Request, float]] = []
        while self._due and self._due[0][0] <= now:
            _, identity = self._due.popleft()
            held = self._again.pop(identity, deque())
            ready += sorted(held, key=lambda each: each[0].number)
        if ready:
            self._lock.release()
            try:
                for request, until in ready:
                    self._ask(request, until)
            finally:
                self._lock.acquire()

    def _done(
        self, request: Request, answer: Any, error: PlacementError | None
    ) -> None:
        outcome = self.outcome
        with self._lock:
            if error is None:
                outcome.answered += 1
                count = answer.get("count") if isinstance(answer, dict) else None
                if isinstance(count, int) and self._repeatable(request.identity.kind):
                    known = outcome.counts.get(request.identity, 0)
                    outcome.counts[request.identity] = max(known, count)
                else:
                    known = outcome.counts.get(request.identity, 0)
                    outcome.counts[request.identity] = known + 1
            else:
                reason = type(error).__name__
                outcome.failed += 1
                outcome.reasons[reason] += 1
                outcome.examples.setdefault(
                    reason, f"line {request.number}, {request.identity}: {error}"
                )
            self._under_way -= 1
            if not self._under_way or (
                self._is_waiting and self._under_way <= _ROOM_AT
            ):
                self._is_waiting = False
                self._idle.notify_all()


def summary(
    outcome: Outcome, witness: ActivationWitness, nodes: Sequence[str]
) -> dict[str, Any]:
    """The sum of a run, under the names that `--json` prints."""
    return {
        "nodes": len(nodes),
        "requests": outcome.requests,
        "answered": outcome.answered,
        "failed": outcome.failed,
        "identities": witness.identity_count,
        "activations": witness.activation_count,
        "double_activations": witness.double_count,
        "seconds": round(outcome.seconds, 3),
        "requests_per_s": round(outcome.answered / outcome.seconds)
        if outcome.seconds
        else 0,
        "per_node": {
            name: {
                "activations": witness.activations[name],
                "requests": witness.handled_by[name],
            }
            for name in sorted({*nodes, *witness.activations})
        },
    }


def summary_of_running(
    outcome: Outcome,
    requests: Requests,
    witness: ActivationWitness | None,
    nodes: Sequence[str],
) -> dict[str, Any]:
    """As `summary`, of what other processes did; null where nobody has written it."""
    if witness is not None:
        found = summary(outcome, witness, nodes)
    else:
        found = summary(outcome, ActivationWitness(), nodes)
        found["activations"] = found["double_activations"] = None
        found["per_node"] = {}
    found["identities"] = len({request.identity for request in requests})
    return found


def write_report(
    path: Path,
    requests: Requests,
    outcome: Outcome,
    witness: ActivationWitness | None,
    *,
    where: Callable[[str], Pid | None] = lambda _: None,
) -> None:
    """One line an identity, sorted; written aside and moved into place whole.

    Without a witness `where` tells who owns an identity now.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for identity in sorted({request.identity for request in requests}):
            seen = None if witness is None else witness.of(identity)
            last = where(identity) if seen is None else seen.last
            line = {
                "identity": identity,
                "count": outcome.counts.get(identity, 0),
                "owner": None if last is None else last.node,
                "fencing_token": None if last is None else last.fencing_token,
                "activations": None if seen is None else seen.activations,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    part.replace(path)
