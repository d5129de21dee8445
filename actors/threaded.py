"""Activations of pykka.ThreadingActor classes: one thread each, which may block.

The turns are those of a Grain, with the actor's own inbox for a dispatcher. The
confirmation of a save comes on another thread, because the actor's own may be
waiting for an answer that the output gate holds back. The actor is made on its
thread too, so that nothing of the user's runs on any other.
"""

import threading
from collections.abc import Callable
from typing import Any

import pykka

from actors.activation import GrainActivation, Mail
from actors.dispatch import Dispatcher, Timer
from actors.future import running
from actors.kind import Kind
from actors.log import log
from placement.contracts import Failed, Save, Saved, Stale
from placement.entry import ActivationRecord, Pid
from placement.errors import OutcomeUnknown, PlacementError, Refusal, describe
from placement.lease import Guard


class ActorEnded(RuntimeError):
    """What user code of a ThreadingActor raised that was no `Exception`.

    Under its own type pykka would stop every actor of the program.
    """


class _Turn:
    """A turn in the inbox of a hosted actor."""

    __slots__ = ("arguments", "turn")

    def __init__(self, turn: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.turn = turn
        self.arguments = arguments


class _InboxDispatcher:
    """Runs turns on the actor's own thread, by its inbox.

    While it is not known whether there will be a thread, and where there is none,
    they run on the dispatcher of the node's Grains.
    """

    def __init__(self, grains: Dispatcher) -> None:
        self._grains = grains
        self.now_ns = grains.now_ns
        self._lock = threading.Lock()
        self._early: list[_Turn] | None = None
        self._actor: pykka.ActorRef[Any] | None = None

    def expect_actor(self) -> None:
        """Keep what is posted from now on for the actor that is being made."""
        with self._lock:
            self._early = []

    def attach(self, actor: pykka.ActorRef[Any]) -> None:
        """Run turns by the inbox of `actor`, those first that were kept for it."""
        with self._lock:
            self._actor = actor
            for turn in self._early or ():
                actor.tell(turn)
            self._early = None

    def post(self, turn: Callable[..., object], /, *arguments: Any) -> None:
        """Run `turn` soon; nothing happens where the actor has stopped."""
        with self._lock:
            if self._early is not None:
                self._early.append(_Turn(turn, arguments))
                return
        if self._actor is None:
            self._grains.post(turn, *arguments)
            return
        try:
            self._actor.tell(_Turn(turn, arguments))
        except pykka.ActorDeadError:
            return

    def post_urgent(self, turn: Callable[..., object], /, *arguments: Any) -> None:
        """Run `turn` soon: nothing of an actor is urgent."""
        self.post(turn, *arguments)

    def call_at(
        self, when_ns: int, turn: Callable[..., object], /, *arguments: Any
    ) -> Timer:
        """Run `turn` once it is `when_ns`."""
        return self._grains.call_at(when_ns, self.post, turn, *arguments)

    def is_current(self) -> bool:
        """Not asked of an actor's own thread."""
        return False


class _ThreadedHost:
    """The node as an actor with a thread of its own sees it."""

    def __init__(self, host: Any, dispatcher: _InboxDispatcher) -> None:
        self._host = host
        self.dispatcher = dispatcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def _no_hook() -> None:
    """A ThreadingActor need not have the hooks of a Grain."""


class ThreadedActivation(GrainActivation):
    """One ThreadingActor, driven on its own thread; or what only its making tells.

    The function of a kind without an `actor_class` runs on the dispatcher of the
    node's Grains. What it makes decides: a ThreadingActor goes on with a thread
    of its own, a Grain as any other.
    """

    _may_block = True

    def __init__(
        self,
        pid: Pid,
        record: ActivationRecord,
        *,
        guard: Guard,
        kind: Kind,
        host: Any,
        chain: tuple[str, ...] = (),
    ) -> None:
        self._lock = threading.RLock()
        self._taking = threading.Lock()
        self._inbox = _InboxDispatcher(host.dispatcher)
        self._grains_host = host
        self._has_thread = False
        self._actor: Any = None
        self._made: Any = None
        self._last_snapshot: bytes | None = None
        self._why_stopped: BaseException | None = None
        self._is_inside = False
        self._is_abandoned = False
        self._owed: Refusal | None = None
        self._thread_id = 0
        self._suspended: Any = None
        as_host: Any = _ThreadedHost(host, self._inbox)
        super().__init__(
            pid,
            record,
            guard=guard,
            kind=kind,
            host=as_host,
            chain=chain,
        )

    # --- from any thread ---

    def start(self) -> None:
        """Make the actor on its thread, where it is known to have one, and begin."""
        if self.kind.is_threaded:
            self._start_thread()
        else:
            self._post(self._decide)

    def stop(self, *, lapsed: bool) -> None:
        """End it; after a lapse at once, wherever its thread is."""
        if lapsed and self._has_thread:
            self._lapse()
        else:
            super().stop(lapsed=lapsed)

    def abandon(self) -> None:
        """The node is gone: let the thread end."""
        with self._lock:
            self._is_abandoned = True
            self._is_shut = True
            self._over()

    def may_block(self) -> bool:
        """Whether it has a thread of its own."""
        return self._has_thread

    def _decide(self) -> None:
        """Have the function make what tells how it is hosted."""
        if self._state != "starting":
            return
        if not self._enter(self._host.now_ns()):
            self._lapse()
            return
        failure: BaseException | None = None
        try:
            self._begin()
            self._made = self.kind.make(self.context)
        except BaseException as error:  # user code may raise anything
            failure = error
        finally:
            self._leave()
        if failure is not None:
            self._activated(failure)
        elif isinstance(self._made, pykka.ThreadingActor):
            self._start_thread()
        else:
            self._start()

    def _start_thread(self) -> None:
        self._has_thread = True
        self._inbox.expect_actor()
        thread = threading.Thread(
            target=self._live, name=f"actor-{self.pid.identity}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more of them
            self._activated(error)

    # --- on its thread ---

    def _live(self) -> None:
        """The life of the thread: make the actor, let it run, tell that it ended."""
        self._thread_id = threading.get_ident()
        try:
            if not self._create():
                return
            self._actor._actor_loop()  # noqa: SLF001
        except BaseException as error:  # what pykka lets through, of a failing hook
            self._why_stopped = error
            log.exception("an actor ended", identity=str(self.pid.identity))
        if self._actor is not None:
            pykka.ActorRegistry.unregister(self._actor.actor_ref)
            self._actor.actor_stopped.set()
        self._actor_stopped()

    def _create(self) -> bool:
        """Make the actor; false: it has ended before it began."""
        if not self._enter(self._host.now_ns()):
            self._lapse()
            return False
        actor, failure = self._made, None
        try:
            self._begin()
            if actor is None:
                actor = self.kind.make(self.context)
            self._host_actor(actor)
        except BaseException as error:  # user code may raise anything
            failure = error
        finally:
            self._leave()
        with self._lock:
            if self._state == "ended" or self._is_abandoned:
                return False
            if failure is not None:
                self._activated(failure)
                return False
            self._actor = self._grain = actor
            pykka.ActorRegistry.register(actor.actor_ref)
            self._inbox.attach(actor.actor_ref)
        self._post(self._start)
        return True

    def _host_actor(self, actor: Any) -> None:
        """Have turns enter the user's actor, and its hooks ask the guard."""
        if not hasattr(actor, "actor_ref"):
            raise TypeError(
                f"{type(actor).__name__}.__init__ does not call super().__init__()"
            )
        receive, on_start, on_stop, on_failure = (
            actor._handle_receive,  # noqa: SLF001
            actor.on_start,
            actor.on_stop,
            actor.on_failure,
        )

        def handle_receive(message: Any) -> Any:
            if isinstance(message, pykka.messages._ActorStop):  # noqa: SLF001
                return receive(message)
            if not isinstance(message, _Turn):
                # Told or asked past its node: it is user code all the same.
                if not self._enter(self._host.now_ns()):
                    raise pykka.ActorDeadError(f"{self.pid} is no owner any more")
                try:
                    return _tamed(receive, message)
                finally:
                    self._leave()
            try:
                message.turn(*message.arguments)
            except BaseException:  # a bug, by which no other turn may suffer
                log.exception("a turn raised")
            return None

        def start() -> None:
            if self._enter(self._host.now_ns()):
                try:
                    _tamed(on_start)
                except Exception as error:
                    self._why_stopped = error
                    raise
                finally:
                    self._leave()

        def stop() -> None:
            if self._enter(self._host.now_ns()):
                try:
                    _tamed(on_stop)
                finally:
                    self._leave()

        def failure(*what: Any) -> None:
            if self._enter(self._host.now_ns()):
                try:
                    _tamed(on_failure, *what)
                finally:
                    self._leave()

        actor.context = self.context
        actor.on_start = start
        actor.on_stop = stop
        actor.on_failure = failure
        actor._handle_receive = handle_receive  # noqa: SLF001
        for hook in ("on_activate", "on_passivate"):
            if not hasattr(actor, hook):
                setattr(actor, hook, _no_hook)

    def _make(self) -> Any:
        if self._has_thread:
            return self._actor
        self._made.context = self.context
        return self._made

    def _enter(self, now_ns: int) -> bool:
        with self._lock:
            # Under the lock: whoever ends it knows whether its thread is inside. The
            # clock is read anew: to have the lock may have taken time.
            now_ns = self._host.now_ns()
            if self._state == "ended" or not super()._enter(now_ns):
                return False
            self._is_inside = True
            if not self._has_thread:
                self._grains_host.current = self
            return True

    def _leave(self) -> None:
        running.activation = None
        with self._lock:
            if not self._has_thread:
                self._grains_host.current = None
            self._is_inside = False
            owed, self._owed = self._owed, None
            if owed is not None:
                self._tell_end(owed)

    def _emit(
        self, leave: Callable[[], None], never: Callable[[PlacementError], None]
    ) -> bool:
        with self._lock:
            return super()._emit(leave, never)

    def _call_at(self, when_ns: int, turn: Callable[[], object]) -> Timer:
        # Its own thread may be waiting for the answer.
        timer: Timer = self._grains_host.dispatcher.call_at(when_ns, turn)
        return timer

    def save(self, snapshot: bytes) -> None:
        """Store `snapshot`; what is sent from now on waits for it."""
        with self._lock:
            super().save(snapshot)

    def _saved(self, request: Save, outcome: Saved | Stale | Failed) -> None:
        with self._lock:
            super()._saved(request, outcome)

    def _save_again(self, after_ns: int, request: Save) -> None:
        # Its own thread may be waiting for what this save holds back.
        host = self._grains_host
        due_ns = host.now_ns() + after_ns
        host.dispatcher.call_at(due_ns, host.save, request, self._saved)

    def _take_mail(self) -> Any:
        # Its own thread takes to handle, whoever seals it to give back.
        with self._taking:
            return super()._take_mail()

    def _put_back(self, mail: Mail) -> None:
        # Whoever seals it just now must not give back what is copied here.
        with self._taking:
            super()._put_back(mail)

    def withdraw(self, mail: Mail) -> bool:
        """As that of a Grain."""
        with self._taking:
            return super().withdraw(mail)

    # --- ending ---

    def _go_on(self) -> None:
        # Its last hook never runs here, where the caller may hold the lock.
        if self._is_passivating:
            self._post(self._passivate)
        else:
            super()._go_on()

    def _passivate(self) -> None:
        if self._has_thread and threading.get_ident() != self._thread_id:
            # It was not known yet that there would be a thread.
            self._post(self._passivate)
        else:
            super()._passivate()

    def _ending(self) -> bool:
        with self._lock:
            return self._state != "ended" and super()._ending()

    def _activated(self, error: BaseException | None) -> None:
        with self._lock:
            if self._state == "starting":
                super()._activated(error)

    def _end_now(self, why: PlacementError, refusal: Refusal) -> None:
        with self._lock:
            if self._state == "ended":
                return
            turn = self._turn
            is_suspended = turn is not None and turn.coroutine is not None
            if not self._is_inside and not (self._has_thread and is_suspended):
                super()._end_now(why, refusal)
                return
            # Its thread is inside user code, where nothing can stop it, or has to run
            # what a coroutine does in the end: only then is the activation over.
            self._is_shut = True
            self._state = "ended"
            self._end_timers()
            self._owed = refusal
            if turn is not None and turn.mail is not None:
                turn.mail.origin.failed(turn.mail, why)
                turn.mail = None
            if self._gate is not None:
                self._gate.fail(why)
            self._host.seal(self)
            if not self._is_inside:
                self._turn, self._suspended = None, turn
                self._post(self._close_suspended)
            self._over()

    def _close(self, turn: Any) -> None:
        if turn.coroutine is not None:
            with self._lock:
                self._is_inside = True
            super()._close(turn)

    def _close_suspended(self) -> None:
        """Let a coroutine end on its own thread; then the end is told."""
        turn, self._suspended = self._suspended, None
        if turn is not None:
            self._close(turn)

    def _finish(self, turn: Any, result: Any, error: BaseException | None) -> None:
        if self._state == "ended":
            self._turn = None
            if turn.mail is not None:
                # It ended when the turn had begun, and was not known yet.
                turn.mail.origin.failed(turn.mail, self._unknown())
            return
        super()._finish(turn, result, error)

    def _report(self, snapshot: bytes | None) -> None:
        with self._lock:
            if self._actor is None:
                super()._report(snapshot)
            elif self._state != "ended":
                # Its own last hook is user code too: it has ended after that.
                self._state = "ending"
                self._last_snapshot = snapshot
                self._over()

    def _over(self) -> None:
        if self._actor is not None:
            self._actor.actor_ref.stop(block=False)

    def _actor_stopped(self) -> None:
        """The actor has stopped, perhaps by its own will or failure."""
        turn: Any = None
        with self._lock:
            is_over = self._state == "ended" or self._is_abandoned
            if not is_over:
                if self._state == "starting":
                    self._activated(
                        self._why_stopped or ActorEnded("it stopped before it served")
                    )
                    return
                turn, self._turn = self._turn, None
        # What was posted to close it may have found no actor any more.
        self._close_suspended()
        if is_over:
            return
        if turn is not None:
            self._close(turn)
            if turn.mail is not None:
                turn.mail.origin.failed(
                    turn.mail,
                    OutcomeUnknown(f"{self.pid.identity}: its actor has stopped"),
                )
        with self._lock:
            super()._report(self._last_snapshot)


def _tamed(call: Callable[..., Any], /, *arguments: Any) -> Any:
    """Call; what is raised is an `Exception`."""
    try:
        return call(*arguments)
    except Exception:
        raise
    except BaseException as error:
        raise ActorEnded(": ".join(describe(error))) from error
