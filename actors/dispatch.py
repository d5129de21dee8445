"""Dispatchers: who runs the turns of actors, and pykka actors that run on one.

Nothing else in this floor makes a thread for its turns or reads a clock for its
timers: under another dispatcher the same classes run step by step.
"""

import heapq
import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import pykka

from actors.clock import Clock
from actors.log import log

Turn = Callable[..., object]

#: Cancelled timers are swept out where they are so many, and more than the others.
SWEEP_MIN = 64

# No wait of a thread may be arbitrarily long: the platform bounds it.
_WAIT_MAX_S = 3_600.0


class Timer:
    """A turn that is due later; `cancel` takes it back."""

    __slots__ = ("arguments", "is_cancelled", "on_cancel", "turn")

    def __init__(
        self,
        turn: Turn,
        arguments: tuple[Any, ...],
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        self.turn = turn
        self.arguments = arguments
        self.is_cancelled = False
        self.on_cancel = on_cancel

    def cancel(self) -> None:
        """Do not run it, if it has not run yet."""
        if self.is_cancelled:
            return
        self.is_cancelled = True
        # Read once: whoever finds it due takes this away, on another thread.
        on_cancel = self.on_cancel
        if on_cancel is not None:
            on_cancel()


class Dispatcher(Protocol):
    """Runs turns one after the other, in the order in which they were posted."""

    def post(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` soon; from any thread. After a stop nothing happens."""

    def post_urgent(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` before what waits, after what is urgent too; from any thread.

        For what a session lives by: a node that has much to do is not a dead one.
        """

    def call_at(self, when_ns: int, turn: Turn, /, *arguments: Any) -> Timer:
        """Run `turn` once it is `when_ns`; from any thread."""

    def now_ns(self) -> int:
        """The clock that its timers go by."""

    def is_current(self) -> bool:
        """Whether the caller is a turn of this dispatcher."""


class TimedDispatcher:
    """What dispatchers by a real clock share: turns, timers, and how a turn is taken.

    A turn that raises is a bug: it is logged, counted, and told to `on_bug`; the
    others go on. `busy_since_ns` is when the turn under way was begun, 0 between
    turns: whoever reads it on another thread sees a turn that does not come back.
    """

    def __init__(
        self, clock: Clock, on_bug: Callable[[BaseException], None] | None
    ) -> None:
        self.busy_since_ns = 0
        self.bug_count = 0
        self.now_ns = clock.now_ns
        self._on_bug = on_bug
        self._turns: deque[tuple[Turn, tuple[Any, ...]]] = deque()
        self._urgent: deque[tuple[Turn, tuple[Any, ...]]] = deque()
        self._timers: list[tuple[int, int, Timer]] = []
        self._timer_number = itertools.count()
        self._cancelled_count = 0
        self._cancelled_lock = threading.Lock()
        self._is_ending = False

    def post(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` soon; from any thread."""
        raise NotImplementedError

    def post_urgent(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` before what waits, after what is urgent too; from any thread."""
        self._urgent.append((turn, arguments))
        self._rouse()

    def take_now(self, turn: Turn, /, *arguments: Any) -> bool:
        """Run `turn` now, where nothing waits and the caller may; tell whether."""
        return False

    def call_at(self, when_ns: int, turn: Turn, /, *arguments: Any) -> Timer:
        """Run `turn` once it is `when_ns`, before what waits then; from any thread."""
        timer = Timer(turn, arguments, self._timer_cancelled)
        if self.busy_since_ns and self.is_current():
            self._add_timer(when_ns, timer)
        else:
            self.post_urgent(self._add_timer, when_ns, timer)
        return timer

    def is_current(self) -> bool:
        """Whether the caller is a turn of this dispatcher."""
        raise NotImplementedError

    def _rouse(self) -> None:
        """Have it look at what has been posted, where it sleeps."""
        raise NotImplementedError

    def kill(self) -> None:
        """End after the turn under way, as a crash would: run nothing else."""
        self._is_ending = True
        self.post(self._end)

    def _end(self) -> None:
        self._is_ending = True

    def _add_timer(self, when_ns: int, timer: Timer) -> None:
        if timer.is_cancelled:
            self._count_cancelled(-1)
        else:
            heapq.heappush(self._timers, (when_ns, next(self._timer_number), timer))

    def _timer_cancelled(self) -> None:
        if self._count_cancelled(1):
            self.post(self._sweep)

    def _count_cancelled(self, by: int) -> bool:
        """Count; true: it is time to sweep them out."""
        with self._cancelled_lock:
            self._cancelled_count = max(0, self._cancelled_count + by)
            return (
                by > 0
                and self._cancelled_count >= SWEEP_MIN
                and self._cancelled_count * 2 > len(self._timers)
            )

    def _sweep(self) -> None:
        kept = [each for each in self._timers if not each[2].is_cancelled]
        self._count_cancelled(len(kept) - len(self._timers))
        self._timers = kept
        heapq.heapify(kept)

    def _due(self) -> None:
        """Run the timer that is due first."""
        timer = heapq.heappop(self._timers)[2]
        timer.on_cancel = None
        if timer.is_cancelled:
            self._count_cancelled(-1)
        else:
            self._take(timer.turn, timer.arguments)

    def _take(self, turn: Turn, arguments: tuple[Any, ...]) -> None:
        self.busy_since_ns = self.now_ns()
        try:
            turn(*arguments)
        except BaseException as error:  # a bug; one turn must not end the others
            self.bug_count += 1
            log.exception("a turn raised")
            if self._on_bug is not None:
                self._on_bug(error)
        finally:
            self.busy_since_ns = 0


class ThreadDispatcher(TimedDispatcher):
    """A dispatcher with a thread of its own.

    It waits on a lock, not in `SimpleQueue.get(timeout=...)`, which in CPython
    3.11 and 3.12 waits for ever where its time is over before it has begun to
    wait: now and then so with a timer that is due in a microsecond.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        *,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        super().__init__(clock, on_bug)
        self._is_asleep = False
        self._bell = threading.Lock()
        self._bell.acquire()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, turn: Turn, /, *arguments: Any) -> None:
        """Run `turn` soon; from any thread."""
        self._turns.append((turn, arguments))
        if self._is_asleep:
            self._rouse()

    def is_current(self) -> bool:
        """Whether the caller is a turn of this dispatcher."""
        return threading.get_ident() == self._thread.ident

    def stop(self, timeout_s: float) -> bool:
        """Run what has been posted, then end; false: it is still busy."""
        self.post(self._end)
        if self.is_current():
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        turns, urgent, now_ns = self._turns, self._urgent, self.now_ns
        while not self._is_ending:
            if urgent:
                self._take(*urgent.popleft())
                continue
            wait_s = -1.0  # until it is woken
            if self._timers:
                wait_s = (self._timers[0][0] - now_ns()) / 1e9
                if wait_s <= 0:
                    self._due()
                    # What was posted before has its turn too.
                    wait_s = 0.0
            if turns:
                turn, arguments = turns.popleft()
                self._take(turn, arguments)
            elif wait_s:
                self._sleep(min(wait_s, _WAIT_MAX_S))

    def _sleep(self, wait_s: float) -> None:
        # First the flag, then the look: a turn posted in between wakes it, or is
        # seen; the other way round it would wait for the next one.
        self._is_asleep = True
        if not self._turns and not self._urgent:
            self._bell.acquire(timeout=wait_s)
        self._is_asleep = False

    def _rouse(self) -> None:
        if not self._is_asleep:
            return
        self._is_asleep = False
        # Somebody else may have done so just now. Where it had woken by itself it
        # finds the bell rung at its next sleep, and looks once in vain.
        try:  # noqa: SIM105  suppress() costs as much as all the rest of a wake
            self._bell.release()
        except RuntimeError:
            pass


class _Inbox:
    """A pykka inbox that posts a turn to a dispatcher when something is in it."""

    def __init__(self) -> None:
        self.envelopes: deque[Any] = deque()
        self._wake: Callable[[], None] | None = None
        self._defer: Callable[..., bool] | None = None
        self._is_awake = False

    def attach(
        self, wake: Callable[[], None], defer: Callable[..., bool] | None
    ) -> None:
        self._wake, self._defer = wake, defer
        self.awaken()

    def put(self, envelope: Any, /) -> None:
        if self._defer is not None:
            if not self._defer(self._take_in, envelope):
                self._take_in(envelope)
            return
        self.envelopes.append(envelope)
        if not self._is_awake:
            self.awaken()

    def _take_in(self, envelope: Any) -> None:
        self.envelopes.append(envelope)
        if not self._is_awake:
            self.awaken()

    def awaken(self) -> None:
        if not self._is_awake and self._wake is not None and self.envelopes:
            self._is_awake = True
            self._wake()

    def rest(self) -> None:
        # First the flag, then the look: a put in between wakes it once more,
        # which is harmless; the other way round it would be lost.
        self._is_awake = False
        self.awaken()

    def get(self) -> Any:
        return self.envelopes.popleft()

    def empty(self) -> bool:
        return not self.envelopes


#: Messages that pykka handles itself.
_OF_PYKKA = frozenset(
    {
        pykka.messages._ActorStop,  # noqa: SLF001
        pykka.messages.ProxyCall,
        pykka.messages.ProxyGetAttr,
        pykka.messages.ProxySetAttr,
    }
)


class _Told:
    """A message in an inbox, as pykka's own envelope is; nobody waits for an answer."""

    __slots__ = ("message",)
    reply_to = None

    def __init__(self, message: Any) -> None:
        self.message = message


class DispatchedRef(pykka.ActorRef[Any]):
    """The reference to an actor whose messages a dispatcher has handled."""

    def __init__(self, actor: "DispatchedActor") -> None:
        super().__init__(actor)
        #: As `tell`, in a turn of the actor's dispatcher: it is handled in that turn,
        #: where nothing waits before it.
        self.hand: Callable[[Any], None] = actor.take
        #: As `hand`, before what waits.
        self.hand_urgent: Callable[[Any], None] = actor.take_urgent
        self._is_stopped = self.actor_stopped.is_set
        self._put: Callable[[Any], None] = self.actor_inbox.put

    def tell(self, message: Any) -> None:
        """Have `message` handled, in order; as pykka's, in fewer steps.

        Raises:
            ActorDeadError: it has stopped.
        """
        if self._is_stopped():
            raise pykka.ActorDeadError(f"{self} not found")
        self._put(_Told(message))


class DispatchedActor(pykka.Actor):
    """A pykka actor whose messages are handled in turns of a dispatcher.

    All that waits in its inbox when a turn begins is handled in that turn, up to
    `batch_max`: what is left would wait for all turns that are posted meanwhile, and
    what comes by such turns behind it, so that a burst would grow from turn to turn.

    As in pykka, an exception that escapes a told message stops the actor: its state
    is not trusted any more; `on_bug` tells its owner.
    """

    batch_max: ClassVar[int] = sys.maxsize

    @classmethod
    def start(cls, *args: Any, **kwargs: Any) -> DispatchedRef:
        """Start it, unknown to pykka's registry.

        What is registered there is the program's own, and ends when the program
        calls `pykka.ActorRegistry.stop_all()`.
        """
        actor = cls(*args, **kwargs)
        actor._start_actor_loop()
        return actor._dispatched_ref

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self._on_bug = on_bug
        self._is_handling = False
        inbox: Any = self.actor_inbox
        self._envelopes: deque[Any] = inbox.envelopes
        self._actor_ref = self._dispatched_ref = DispatchedRef(self)

    def take(self, message: Any) -> None:
        """Handle `message` in this turn of the dispatcher, or behind what waits.

        Nothing happens once the actor has stopped: nobody needs to know any more. The
        way through the inbox costs more than the handling of most messages.
        """
        if not (self._is_handling or self._envelopes):
            self.take_urgent(message)
        elif not self.actor_stopped.is_set():
            self.actor_ref.tell(message)

    def take_urgent(self, message: Any) -> None:
        """Handle `message` in this turn, which is not one of the actor's own."""
        if self.actor_stopped.is_set():
            return
        self._is_handling = True
        try:
            self.on_receive(message)
        except BaseException as error:  # as one that was told
            self._fail(error)
            self._actor_loop_teardown()
        finally:
            self._is_handling = False

    def _handle_receive(self, message: Any) -> Any:
        # One look where pykka's own takes four: most messages are none of its.
        if type(message) in _OF_PYKKA:
            return super()._handle_receive(message)
        return self.on_receive(message)

    @staticmethod
    def _create_actor_inbox() -> Any:
        return _Inbox()

    @staticmethod
    def _create_future() -> pykka.Future[Any]:
        return pykka.ThreadingFuture()

    def _start_actor_loop(self) -> None:
        self.dispatcher.post(self._actor_loop_setup)
        inbox: Any = self.actor_inbox
        # Where turns take virtual time, a message leaves at the time of its sending.
        defer = getattr(self.dispatcher, "defer", None)
        inbox.attach(lambda: self.dispatcher.post(self._drain), defer)

    def _drain(self) -> None:
        inbox: Any = self.actor_inbox
        if self.actor_stopped.is_set():
            return
        take = inbox.envelopes.popleft
        batch = [take() for _ in range(min(len(inbox.envelopes), self.batch_max))]
        self._is_handling = True
        try:
            self._handle_batch(batch)
        finally:
            self._is_handling = False
            # Without it nothing would ever wake the actor again.
            if self.actor_stopped.is_set():
                self._actor_loop_teardown()
            else:
                inbox.rest()

    def _handle_batch(self, batch: list[Any]) -> None:
        for envelope in batch:
            if self.actor_stopped.is_set():
                # Left for the teardown, which refuses what is asked.
                self.actor_inbox.put(envelope)
                continue
            try:
                answer = self._handle_receive(envelope.message)
            except BaseException as error:  # as pykka: to the asker, or the end
                if envelope.reply_to is not None:
                    envelope.reply_to.set_exception()
                    continue
                self._fail(error)
            else:
                if envelope.reply_to is not None:
                    envelope.reply_to.set(answer)

    def _fail(self, error: BaseException) -> None:
        """What it has raised is the end of it."""
        log.exception("an actor raised", actor=type(self).__name__)
        self._stop()
        if self._on_bug is not None:
            self._on_bug(error)


class Alarm:
    """Has `turn` run at the earliest time that was asked for."""

    def __init__(self, dispatcher: Dispatcher, turn: Callable[[], object]) -> None:
        self._dispatcher = dispatcher
        self._turn = turn
        self._at_ns: int | None = None
        self._timer: Timer | None = None

    def set(self, at_ns: int | None) -> None:
        """Run it then, if not sooner already; none: no wish."""
        # Read once: it may ring meanwhile, on the dispatcher's thread.
        set_to_ns = self._at_ns
        if at_ns is None or (set_to_ns is not None and set_to_ns <= at_ns):
            return
        self.cancel()
        self._at_ns = at_ns
        self._timer = self._dispatcher.call_at(at_ns, self._ring)

    def cancel(self) -> None:
        """Do not run it."""
        timer = self._timer
        if timer is not None:
            timer.cancel()
        self._at_ns = self._timer = None

    def _ring(self) -> None:
        self._at_ns = self._timer = None
        self._turn()
