"""What hosting costs: memory of idle Grains, starts and passivations.

Measured in a child process each, so that no benchmark leaves its Grains to others:

    python -m scripts.benchmarks.hosted idle rss|traced COUNT
    python -m scripts.benchmarks.hosted churn HOSTED ROUNDS
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import defaultdict, deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from actors import Grain, Kind, PlacementNode
from actors.activation import Activation, GrainActivation, HandledWitness, Mail
from actors.clock import SystemClock
from actors.dispatch import Dispatcher, Timer, Turn
from actors.engine import EmbeddedEngine
from actors.future import Future
from actors.store_memory import MemoryStore, Row
from placement.contracts import Failed, Save, Saved, Stale
from placement.entry import ActivationRecord, Pid
from placement.errors import Refusal
from placement.event import Happened
from placement.identity import Identity
from placement.lease import Guard
from placement.registry import VirtualActorRegistry
from placement.topology import SessionId
from scripts.benchmarks.measure import Effort, Measurement

#: Starts at once, and how often they are started and ended in one round.
CHURN = 1_000
_TIMES = 10
_WINDOW = 1_000
_WAIT_S = 600.0


class Idle(Grain):
    """A user's object that has nothing of its own."""

    def on_receive(self, message: Any) -> Any:
        """Answer."""
        return message


IDLE = Kind(Idle, idle_after=3_600.0)


# --- memory ---


class ForgetfulStore(MemoryStore):
    """A store elsewhere: what is owned in it takes no memory here.

    Only what the protocol has yet to do is remembered: locks.
    """

    def _keep_row(self, identity: Identity, row: Row) -> None:
        super()._keep_row(identity, Row() if row.owner else row)


def resident() -> int:
    """Bytes of this process that are in memory."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def least_of(count: int) -> float:
    """Bytes without which no Grain can be found: name, token, time, a slot each."""

    class Least:
        __slots__ = ("grain", "identity", "token", "used_ns")

    table: dict[str, Least] = {}
    for number in range(count):
        table[f"idle/{number}"] = Least()
    one_ns = 1 << 60
    each = sys.getsizeof(Least()) + 2 * sys.getsizeof(one_ns)
    return each + sys.getsizeof("idle/123456") + sys.getsizeof(table) / count


def idle_bytes(how: str, count: int) -> dict[str, float]:
    """Bytes for each of `count` idle Grains, over the user's own object."""
    engine = EmbeddedEngine(ForgetfulStore())
    node = PlacementNode("bench", kinds={"idle": IDLE}, engine=engine, ttl=60.0)
    node.start_member()

    def host(first: int, last: int) -> None:
        for start in range(first, last, _WINDOW):
            waiting = [
                node.seek(f"idle/{number}", timeout=_WAIT_S)
                for number in range(start, min(last, start + _WINDOW))
            ]
            for future in waiting:
                future.get(timeout=_WAIT_S)

    warm = min(1_000, count)
    host(0, warm)  # what is made once is made now
    if how == "traced":
        tracemalloc.start()
    before = resident() if how == "rss" else tracemalloc.get_traced_memory()[0]
    host(warm, warm + count)
    after = resident() if how == "rss" else tracemalloc.get_traced_memory()[0]
    assert len(node.snapshot().activations) == warm + count
    assert node.ref(f"idle/{warm}").ask(1) == 1
    own = sys.getsizeof(Idle())
    return {"ours": (after - before) / count - own, "limit": least_of(count)}


def idle(effort: Effort, *, how: str) -> Measurement:
    """Bytes for each idle Grain of a node, over the user's own object."""
    whole = 1_000_000
    # Each has to be claimed first, which a quick run has no time for.
    count = whole if effort.size >= whole else effort.size // 10
    found = _child("idle", how, str(count))
    return Measurement(
        ours=(found["ours"],), limit=(found["limit"],), note=f"{count:,} Grains"
    )


# --- starts and passivations ---


class Turns:
    """A dispatcher without a thread: `run` takes all turns that were posted.

    A busy machine lets a thread wait for its turn, which is no cost of a start.
    """

    def __init__(self) -> None:
        self._turns: deque[tuple[Turn, tuple[Any, ...]]] = deque()
        self.now_ns = SystemClock().now_ns

    def post(self, turn: Turn, /, *arguments: Any) -> None:
        """Run it at the next `run`."""
        self._turns.append((turn, arguments))

    def post_urgent(self, turn: Turn, /, *arguments: Any) -> None:
        """Run it at the next `run`."""
        self.post(turn, *arguments)

    def call_at(self, when_ns: int, turn: Turn, /, *arguments: Any) -> Timer:
        """Nobody sets timers here."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """There is no other thread."""
        return True

    def run(self) -> None:
        """Take all turns, those too that are posted meanwhile."""
        while self._turns:
            turn, arguments = self._turns.popleft()
            turn(*arguments)


class ChurnHost:
    """All that an activation needs of its node: the registry, and a dispatcher.

    What the placement actor does with the reports is not measured here: they are
    counted.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self.dispatcher: Dispatcher = self.turns
        self.random = Random(1)  # noqa: S311
        self.now_ns = self.turns.now_ns
        self.registry: VirtualActorRegistry[Activation] = VirtualActorRegistry()
        self.lock = threading.Lock()
        self.ask_timeout = 10.0
        self.current: Activation | None = None
        self.report_count = 0
        self.witness: HandledWitness | None = None

    def wall_ms(self) -> int:
        """The wall clock."""
        return time.time_ns() // 1_000_000

    def save(
        self, request: Save, reply: Callable[[Save, Saved | Stale | Failed], None]
    ) -> None:
        """Nobody saves here."""
        raise NotImplementedError

    def begun(self, pid: Pid) -> None:
        """No witness."""

    def kind_of(self, actor_class: type) -> str:
        """There is one."""
        return "idle"

    def class_of(self, kind: str) -> type | None:
        """There is one."""
        return Idle

    def started(self, pid: Pid) -> None:
        """One more."""
        self._report()

    def start_failed(self, pid: Pid, refusal: Refusal) -> None:
        """Never here."""
        raise AssertionError(refusal.message)

    def ended(self, pid: Pid, version: int, snapshot: bytes | None) -> None:
        """One less."""
        assert self.registry.remove(pid) is not None
        self._report()

    def seal(self, activation: Activation) -> None:
        """As a node does."""
        with self.lock:
            activation.bounce_all()

    def take_back(self, activation: Activation, mail: Mail) -> bool:
        """As a node does."""
        with self.lock:
            return activation.withdraw(mail)

    def publish(self, happened: Happened) -> None:
        """Nobody listens."""

    def handled(self, pid: Pid) -> None:
        """No witness."""

    def touch(self, pid: Pid, now_ns: int) -> None:
        """Nobody asks here."""

    def use(self, pid: Pid, now_ns: int, *, is_over: bool) -> None:
        """Nobody asks here."""

    def send(
        self,
        identity: Identity,
        payload: Any,
        *,
        future: Future | None,
        timeout: float | None,
        request_id: str,
        chain: tuple[str, ...],
    ) -> None:
        """Nobody sends here."""
        raise NotImplementedError

    def _report(self) -> None:
        self.report_count += 1

    def wait(self, count: int, act: Callable[[], None]) -> float:
        """Seconds of `act` and of the turns that it posts; `count` report that."""
        self.report_count = 0
        began = time.perf_counter()
        act()
        self.turns.run()
        spent = time.perf_counter() - began
        assert self.report_count == count
        return spent


def churn(hosted: int, rounds: int) -> dict[str, list[float]]:
    """Starts and passivations a second while `hosted` are there, beside the least."""
    host = ChurnHost()
    session = SessionId("bench.boot#1")
    guard = Guard(session, until_ns=1 << 62)
    token = 0

    def start(names: range) -> None:
        nonlocal token
        for number in names:
            token += 1
            pid = Pid(Identity("idle", str(number)), session, token)
            record = ActivationRecord(pid=pid)
            made = GrainActivation(pid, record, guard=guard, kind=IDLE, host=host)
            host.registry.add(made, now_ns=host.now_ns())
            made.start()

    def end(names: range) -> None:
        for number in names:
            found = host.registry.find(Identity("idle", str(number)))
            assert found is not None
            found.stop(lapsed=False)

    least = Least()
    for first in range(0, hosted, CHURN):
        names = range(first, min(hosted, first + CHURN))
        host.wait(len(names), lambda names=names: start(names))  # type: ignore[misc]
        least.start(names)
    found: dict[str, list[float]] = {}
    names = range(hosted, hosted + CHURN)
    for _ in range(rounds):
        seconds: dict[str, float] = defaultdict(float)
        for _ in range(_TIMES):
            seconds["starts"] += host.wait(CHURN, lambda: start(names))
            assert len(host.registry) == hosted + CHURN
            seconds["least_starts"] += least.start(names)
            seconds["ends"] += host.wait(CHURN, lambda: end(names))
            assert len(host.registry) == hosted
            seconds["least_ends"] += least.end(names)
        for what, spent in seconds.items():
            found.setdefault(what, []).append(CHURN * _TIMES / spent)
    return found


class Least:
    """A dict of the user's objects and a queue of what to do: nothing less would."""

    def __init__(self) -> None:
        self._grains: dict[Identity, Idle] = {}
        self._turns: deque[Identity] = deque()

    def start(self, names: range) -> float:
        """Seconds of so many starts."""
        began = time.perf_counter()
        for number in names:
            self._turns.append(Identity("idle", str(number)))
        while self._turns:
            self._grains[self._turns.popleft()] = Idle()
        return time.perf_counter() - began

    def end(self, names: range) -> float:
        """Seconds of so many ends."""
        began = time.perf_counter()
        for number in names:
            self._turns.append(Identity("idle", str(number)))
        while self._turns:
            del self._grains[self._turns.popleft()]
        return time.perf_counter() - began


@cache
def _churned(hosted: int, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = _child("churn", str(hosted), str(rounds))
    return found


def churned(effort: Effort, *, hosted: int, what: str) -> Measurement:
    """Starts or passivations, with so many hosted."""
    found = _churned(hosted, effort.rounds)
    return Measurement(ours=tuple(found[what]), limit=tuple(found[f"least_{what}"]))


# --- the child ---


def _child(*arguments: str) -> Any:
    command = [sys.executable, "-m", "scripts.benchmarks.hosted", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _main() -> None:
    match sys.argv[1:]:
        case ["idle", how, count]:
            found: Any = idle_bytes(how, int(count))
        case ["churn", hosted, rounds]:
            found = churn(int(hosted), int(rounds))
        case other:
            raise SystemExit(f"unknown: {other}")
    print(json.dumps(found), flush=True)
    os._exit(0)  # nothing is to be stopped in good order: that would take longer


if __name__ == "__main__":
    _main()
