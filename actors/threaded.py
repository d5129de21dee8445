"""Activations of pykka.ThreadingActor classes: one thread each, which may block.

The turns are those of a Grain, with the actor's own inbox for a dispatcher. The
confirmation of a save comes on another thread, because the actor's own may be
waiting for an answer that the output gate holds back.
"""

import threading
from collections.abc import Callable
from typing import Any

import pykka

from actors.activation import GrainActivation, Mail
from actors.dispatch import Dispatcher, Timer
from actors.kind import Kind
from placement.contracts import Failed, Save, Saved, Stale
from placement.entry import ActivationRecord, Pid
from placement.errors import PlacementError
from placement.lease import Guard


class _Turn:
    """A turn in the inbox of a hosted actor."""

    __slots__ = ("arguments", "turn")

    def __init__(self, turn: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.turn = turn
        self.arguments = arguments


class _InboxDispatcher:
    """Runs turns on the actor's own thread, by its inbox."""

    def __init__(self, timers: Dispatcher) -> None:
        self._timers = timers
        self.now_ns = timers.now_ns
        self.actor: pykka.ActorRef[Any] | None = None

    def post(self, turn: Callable[..., object], /, *arguments: Any) -> None:
        """Run `turn` soon; nothing happens where the actor has stopped."""
        if self.actor is not None:
            try:
                self.actor.tell(_Turn(turn, arguments))
            except pykka.ActorDeadError:
                return

    def call_at(
        self, when_ns: int, turn: Callable[..., object], /, *arguments: Any
    ) -> Timer:
        """Run `turn` once it is `when_ns`."""
        return self._timers.call_at(when_ns, self.post, turn, *arguments)

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


def _host(actor: Any, activation: "ThreadedActivation") -> None:
    """Have turns enter the user's actor, and its end told to `activation`."""
    receive, on_stop = actor._handle_receive, actor.on_stop  # noqa: SLF001

    def handle_receive(message: Any) -> Any:
        if isinstance(message, _Turn):
            return message.turn(*message.arguments)
        return receive(message)

    def stopped() -> None:
        if activation.may_enter():
            on_stop()
        activation.actor_stopped()

    actor.context = activation.context
    actor.use_daemon_thread = True
    actor.on_stop = stopped
    actor._handle_receive = handle_receive  # noqa: SLF001
    for hook in ("on_activate", "on_passivate"):
        if not hasattr(actor, hook):
            setattr(actor, hook, _no_hook)


def _no_hook() -> None:
    """A ThreadingActor need not have the hooks of a Grain."""


class ThreadedActivation(GrainActivation):
    """One ThreadingActor: driven on its own thread."""

    def __init__(
        self,
        pid: Pid,
        record: ActivationRecord,
        *,
        guard: Guard,
        kind: Kind,
        host: Any,
    ) -> None:
        self._lock = threading.RLock()
        self._inbox = _InboxDispatcher(host.dispatcher)
        self._maker: Dispatcher = host.dispatcher
        self._grains_host = host
        self._is_inside = False
        self._is_abandoned = False
        self._owes_end = False
        as_host: Any = _ThreadedHost(host, self._inbox)
        super().__init__(
            pid,
            record,
            guard=guard,
            kind=kind,
            host=as_host,
        )

    # --- from any thread ---

    def start(self) -> None:
        """Make the actor, and begin on its thread."""
        self._maker.post(self._create)

    def _create(self) -> None:
        if self._state != "starting":
            return
        if not self.guard.is_open(self._host.now_ns()):
            self._lapse()
            return
        try:
            factory = self.kind.factory
            actor = factory() if isinstance(factory, type) else factory(self.context)
            _host(actor, self)
        except Exception as error:  # user code may raise anything
            self._activated(error)
            return
        self._grain = actor
        self._inbox.actor = actor.actor_ref
        pykka.ActorRegistry.register(actor.actor_ref)
        actor._start_actor_loop()  # noqa: SLF001
        self._inbox.post(self._start)

    def stop(self, *, lapsed: bool) -> None:
        """End it; after a lapse at once, wherever its thread is."""
        if lapsed:
            self._lapse()
        else:
            self._inbox.post(self._passivate)

    def abandon(self) -> None:
        """The node is gone: let the thread end."""
        self._is_abandoned = True
        self.guard.shut()
        self._over()

    # --- on its thread ---

    def _make(self) -> Any:
        return self._grain

    def _enter(self) -> None:
        self._is_inside = True

    def _leave(self) -> None:
        with self._lock:
            self._is_inside = False
            if self._owes_end:
                self._owes_end = False
                self._host.ended(self.pid, 0, None)

    def _emit(
        self, leave: Callable[[], None], never: Callable[[PlacementError], None]
    ) -> None:
        with self._lock:
            super()._emit(leave, never)

    def save(self, snapshot: bytes) -> None:
        """Store `snapshot`; what is sent from now on waits for it."""
        with self._lock:
            super().save(snapshot)

    def _saved(self, request: Save, outcome: Saved | Stale | Failed) -> None:
        with self._lock:
            super()._saved(request, outcome)

    def _handle(self, mail: Mail) -> None:
        if self._state == "active":
            super()._handle(mail)

    def _lapse(self) -> None:
        with self._lock:
            if self._state == "ended":
                return
            if not self._is_inside:
                super()._lapse()
                return
            # Its thread is inside user code, where nothing can stop it: only
            # when it has left is the activation over.
            self.guard.shut()
            self._state = "ended"
            self._end_timers()
            self._owes_end = True
            turn = self._turn
            unknown = self._unknown()
            if turn is not None and turn.mail is not None:
                turn.mail.origin.failed(turn.mail, unknown)
            self._gate.fail(unknown)
        self._host.seal(self)
        self._over()

    def _finish(self, turn: Any, result: Any, error: Exception | None) -> None:
        if self._state == "ended":
            self._turn = None
            return
        super()._finish(turn, result, error)

    def _over(self) -> None:
        actor = self._inbox.actor
        if actor is not None:
            actor.stop(block=False)

    def may_enter(self) -> bool:
        """Whether the actor's own last hook may run."""
        return not self._is_abandoned and self.guard.is_open(self._host.now_ns())

    def actor_stopped(self) -> None:
        """The actor has stopped, perhaps by its own will."""
        if self._state in {"active", "ending"} and not self._is_abandoned:
            self._turn = None
            self._report(None)

    def may_block(self) -> bool:
        """It has a thread of its own."""
        return True
