"""The world of a simulation: virtual time, processes, and what is due next.

One thread runs every turn of every process, in an order that the seed decides.
A turn takes no time unless it says so by `spend`: what it sends after that
leaves later, and its thread or its whole process stands still meanwhile.

The idea of running the real code under one seeded scheduler is that of
FoundationDB's simulation: Zhou et al., "FoundationDB: A Distributed Unbundled
Transactional Key Value Store", SIGMOD 2021, section 4.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Self, TypeAlias

from actors.dispatch import Timer, Turn
from actors.future import Future, running
from actors.log import log
from actors.real_clock import RealClockWatch
from placement.errors import OutcomeUnknown

#: Where the one true clock begins; no process can tell.
_BEGIN_NS = 1_000_000_000_000
#: 2025-01-01: what people's clocks show then.
_WALL_MS = 1_735_689_600_000
_PPM = 1_000_000


class Stalled(RuntimeError):
    """Somebody waits in a world in which nothing is due any more."""


#: When, the number of the asking, and what.
_Due: TypeAlias = tuple[int, int, Turn, tuple[Any, ...]]


class World:
    """What is due, in order of time; of what is due at once, the first asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_ns = _BEGIN_NS
        #: What the turn under way has spent, and the process whose turn it is.
        self.spent_ns = 0
        self.running: ProcessClock | None = None
        self.bugs: list[tuple[str, BaseException]] = []
        self.step_count = 0
        #: On guard wherever turns run.
        self.real_clock = RealClockWatch()
        self._due: list[_Due] = []
        self._number = 0
        self._planned_count = 0
        self._is_driven = False
        self.jitter = self.stream("jitter").random

    def stream(self, name: str) -> Random:
        """A source of chance of its own: others drawing more do not move it."""
        return Random(f"{self.seed}/{name}")  # noqa: S311

    def at(self, at_ns: int, turn: Turn, /, *arguments: Any) -> None:
        """Have `turn` run then."""
        self._number += 1
        heapq.heappush(self._due, (at_ns, self._number, turn, arguments))

    def after(self, seconds: float, turn: Turn, /, *arguments: Any) -> None:
        """Have `turn` run in `seconds`, of the true clock."""
        self.at(self.now_ns + round(seconds * 1e9), turn, *arguments)

    def plan(self, turns: Iterable[tuple[int, Turn, tuple[Any, ...]]]) -> None:
        """Have each run then, as by `at`.

        What is far off does not make dearer what is due before: only the next of a
        plan is among that.
        """
        plan: list[_Due] = []
        for at_ns, turn, arguments in turns:
            self._number += 1
            plan.append((at_ns, self._number, turn, arguments))
        plan.sort(reverse=True)  # no two have the same number
        self._planned_count += len(plan)
        self._go_on_with(plan)

    def _go_on_with(self, plan: list[_Due]) -> None:
        if plan:
            self._planned_count -= 1
            at_ns, number, turn, arguments = plan.pop()
            entry = (at_ns, number, self._take_planned, (plan, turn, arguments))
            heapq.heappush(self._due, entry)

    def _take_planned(
        self, plan: list[_Due], turn: Turn, arguments: tuple[Any, ...]
    ) -> None:
        self._go_on_with(plan)
        turn(*arguments)

    @property
    def waiting_count(self) -> int:
        """How many turns are to come."""
        return len(self._due) + self._planned_count

    def moment_ns(self) -> int:
        """The true time of what the turn under way does now."""
        return self.now_ns + self.spent_ns

    def spend(self, ns: int) -> None:
        """Let the turn under way take so long from here on."""
        self.spent_ns += ns

    # --- running ---

    def step(self) -> None:
        """Run what is due next."""
        at_ns, _, turn, arguments = heapq.heappop(self._due)
        self.now_ns = max(self.now_ns, at_ns)
        self.step_count += 1
        turn(*arguments)

    def run_until(self, until_ns: int) -> None:
        """Run all that is due until then, and be there."""
        due, pop = self._due, heapq.heappop
        with self._driving():
            while due and due[0][0] <= until_ns:
                at_ns, _, turn, arguments = pop(due)
                if at_ns > self.now_ns:  # noqa: PLR1730  max() is called
                    self.now_ns = at_ns
                self.step_count += 1
                turn(*arguments)
        self.now_ns = max(self.now_ns, until_ns)

    def drive(self, fact: Callable[[], bool], timeout_s: float | None) -> bool:
        """Run until `fact` holds, or the time is over; whether it holds.

        Raises:
            Stalled: nothing is due any more, and there is no time to wait for.
        """
        until_ns = None if timeout_s is None else self.now_ns + round(timeout_s * 1e9)
        due = self._due
        with self._driving():
            while not fact():
                if until_ns is not None and (not due or due[0][0] > until_ns):
                    self.now_ns = max(self.now_ns, until_ns)
                    return False
                if not due:
                    raise Stalled("nothing is due any more in this simulation")
                self.step()
        return True

    @contextmanager
    def _driving(self) -> Iterator[None]:
        if self._is_driven:
            raise RuntimeError(
                "a simulation waits for an answer only outside of its own turns: "
                "in a Grain, a timer or a subscriber use await, or block=False"
            )
        self._is_driven = True
        try:
            with self.real_clock:
                yield
        finally:
            self._is_driven = False


class ProcessClock:
    """The clock of one process: its own start and rate, and where it stands still.

    `rate_ppm` is how many of its microseconds pass in a true second.
    """

    def __init__(self, world: World, *, offset_ns: int, rate_ppm: int) -> None:
        self._world = world
        self._offset_ns = offset_ns
        self._rate_ppm = rate_ppm
        self.is_gone = False
        self.resumes_ns = 0
        if rate_ppm == _PPM:
            self.now_ns = self._now_at_true_rate  # type: ignore[method-assign]

    def _now_at_true_rate(self) -> int:
        world = self._world
        if world.running is self:
            return world.now_ns + world.spent_ns + self._offset_ns
        return world.now_ns + self._offset_ns

    def now_ns(self) -> int:
        """Nanoseconds since some start of this process's own."""
        world = self._world
        true_ns = world.now_ns
        if world.running is self:
            true_ns += world.spent_ns
        passed_ns = (true_ns - _BEGIN_NS) * self._rate_ppm // _PPM
        return _BEGIN_NS + passed_ns + self._offset_ns

    def wall_ms(self) -> int:
        """Milliseconds since 1970, for people only."""
        return _WALL_MS + (self._world.now_ns - _BEGIN_NS) // 1_000_000

    def true_ns(self, own_ns: int) -> int:
        """When this clock will show `own_ns`."""
        passed_ns = own_ns - self._offset_ns - _BEGIN_NS
        # Up: a timer never finds its own time not quite come.
        return _BEGIN_NS - (-passed_ns * _PPM // self._rate_ppm)

    def pause(self, until_ns: int) -> None:
        """Stand still until that true time; the clock goes on."""
        self.resumes_ns = max(self.resumes_ns, until_ns)


class SteppedDispatcher:
    """A dispatcher whose turns are steps of a world: one thread of one process."""

    def __init__(
        self,
        world: World,
        process: ProcessClock,
        name: str,
        *,
        lag_ns: int,
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self.name = name
        self.busy_since_ns = 0
        self.now_ns = process.now_ns
        self._world = world
        self._process = process
        self._lag_ns = lag_ns
        self._on_bug = on_bug
        self._turns: deque[tuple[Turn, tuple[Any, ...]]] = deque()
        self._is_scheduled = False
        self._is_stopped = False
        self._free_ns = 0
        #: 0: run all that waits in one step; else at most so many.
        self.turns_at_once = 0

    def post(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` soon."""
        world = self._world
        if world.spent_ns:
            world.at(world.now_ns + world.spent_ns, self._put, turn, arguments)
        else:
            self._put(turn, arguments)

    def post_urgent(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` soon: what comes from a store may come at any time."""
        self.post(turn, *arguments)

    def take_now(self, turn: Turn, /, *arguments: Any) -> bool:
        """Never: each turn is a step of its own."""
        return False

    def defer(self, turn: Turn, /, *arguments: Any) -> bool:
        """Have `turn` run when the turn under way has come so far; false: it has."""
        world = self._world
        if not world.spent_ns:
            return False
        world.at(world.now_ns + world.spent_ns, turn, *arguments)
        return True

    def _put(self, turn: Turn, arguments: tuple[Any, ...]) -> None:
        self._turns.append((turn, arguments))
        if not self._is_scheduled:
            self._is_scheduled = True
            world = self._world
            at_ns = world.now_ns + int(world.jitter() * self._lag_ns)
            if at_ns < self._free_ns:  # noqa: PLR1730  max() is called
                at_ns = self._free_ns
            world.at(at_ns, self._run)

    def call_at(self, when_ns: int, turn: Turn, /, *arguments: Any) -> Timer:
        """Run `turn` once this process's clock shows `when_ns`."""
        timer = Timer(turn, arguments)
        world = self._world
        true_ns, soonest_ns = self._process.true_ns(when_ns), world.moment_ns()
        world.at(max(soonest_ns, true_ns), self._ring, timer)
        return timer

    def _ring(self, timer: Timer) -> None:
        if not timer.is_cancelled and not self._process.is_gone:
            self._put(self._take_timer, (timer,))

    def _take_timer(self, timer: Timer) -> None:
        if not timer.is_cancelled:
            timer.turn(*timer.arguments)

    def is_current(self) -> bool:
        """Whether the caller is a turn of this dispatcher: not asked here."""
        return False

    def stop(self, timeout_s: float) -> bool:
        """Nothing to wait for: the process ends as a whole."""
        return True

    def wake(self) -> None:
        """Its process goes on before its time: run what waits."""
        if self._is_scheduled:
            self._world.at(max(self._world.now_ns, self._free_ns), self._run)

    def kill(self) -> None:
        """Run nothing else."""
        self._is_stopped = True
        self._turns.clear()

    def _run(self) -> None:
        process, world = self._process, self._world
        if process.is_gone or self._is_stopped:
            self._turns.clear()
            return
        # Asked for twice where its process went on before its time.
        if world.now_ns < self._free_ns:
            world.at(self._free_ns, self._run)
            return
        if world.now_ns < process.resumes_ns:
            world.at(process.resumes_ns, self._run)
            return
        turns = self._turns
        left = self.turns_at_once or len(turns)
        world.running = process
        try:
            while turns and left:
                left -= 1
                turn, arguments = turns.popleft()
                try:
                    turn(*arguments)
                except Exception as error:  # a bug of this project's own
                    log.exception("a turn raised")
                    self._on_bug(error)
                if world.spent_ns:
                    self._free_ns = world.now_ns + world.spent_ns
                    world.spent_ns = 0
                    break
                if process.is_gone or world.now_ns < process.resumes_ns:
                    break
        finally:
            world.running = None
        if turns:
            world.at(max(world.now_ns, self._free_ns), self._run)
        else:
            self._is_scheduled = False


class DrivenFuture(Future):
    """An answer for which one waits by running the world."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def get(self, *, timeout: float | None = None) -> Any:
        """Run the world until there is an answer, at most `timeout` seconds of it."""
        if (
            self._get_hook is None
            and not self.is_done
            and not self._world.drive(lambda: self.is_done, timeout)
        ):
            raise OutcomeUnknown(f"no answer within {timeout} s")
        return super().get(timeout=0)

    def __await__(self) -> Generator[Any, Any, Any]:
        """In a Grain as ever; in an event loop the world runs until it is done."""
        if running.activation is not None:
            answer = yield from super().__await__()
            return answer
        return self.get()


class DrivenCondition:
    """Facts for which one waits by running the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nobody else runs meanwhile."""

    def notify_all(self) -> None:
        """Who waits looks after each step."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None) -> bool:
        """Run the world until `predicate` holds, at most `timeout` seconds of it."""
        return self._world.drive(predicate, timeout)
