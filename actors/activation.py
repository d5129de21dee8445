"""Activations of Grains: a mailbox, the user's object, and a guard before each entry.

All user code of a Grain runs on its node's grain dispatcher, one turn at a time.
A turn that awaits holds the mailbox. What a turn sends after a save leaves only
when the store has confirmed that save (the output gate).
"""

from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from random import Random
from types import CoroutineType
from typing import Any, Protocol

import msgspec

from actors.context import Context, Timer
from actors.dispatch import Dispatcher
from actors.dispatch import Timer as DueTurn
from actors.future import Future, running
from actors.grain import Surface, decode_rejected, encode_rejected
from actors.kind import Kind
from actors.log import log
from messages import payload as payloads
from placement.contracts import Failed, Save, Saved, Stale
from placement.entry import ActivationRecord, Pid
from placement.errors import (
    BadMessage,
    Deadlock,
    HandlerFailed,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    Pending,
    PlacementError,
    Refusal,
    Rejected,
    SaveFailed,
    describe,
    text_of,
)
from placement.event import Happened
from placement.identity import Identity
from placement.lease import Guard
from placement.registry import Hosted
from placement.topology import SessionId
from placement.value import record

TURNS_AT_ONCE = 64
_SAVE_AGAIN_NS = 50_000_000
_SAVES_MAX = 6

FOREIGN = (
    "a Grain awaits only what its context gives: await self.context.proxy(...).m() "
    "or await self.context.ref(...).ask_async(...)"
)


class Origin(Protocol):
    """Where a mail came from, and what becomes of it is told. Returns at once."""

    def answered(self, mail: "Mail", value: Any, pid: Pid) -> None:
        """It was handled; `value` is the answer."""

    def failed(self, mail: "Mail", error: PlacementError) -> None:
        """It was refused, or ended without an answer."""

    def bounced(self, mail: "Mail", pid: Pid) -> None:
        """It reached no user code; it may be sent elsewhere."""


class Mail(msgspec.Struct, eq=False):
    """One message in a mailbox. `number` is the sender's; 0 deadline is none.

    What its origin needs to know of it is the origin's: `carried` is the message
    that it stands for, `future` who waits for the answer, `session` where it is.
    """

    payload: Any
    request_id: str
    chain: tuple[str, ...]
    deadline_ns: int
    is_ask: bool
    origin: Origin
    number: int = 0
    carried: Any = None
    future: Future | None = None
    session: SessionId | None = None


class HandledWitness(Protocol):
    """Sees what is handled."""

    def handled(self, pid: Pid) -> None:
        """`pid` has handled a message."""


class Host(Protocol):
    """What an activation needs of its node; each returns at once."""

    dispatcher: Dispatcher
    random: Random

    def now_ns(self) -> int:
        """The node's clock."""

    def wall_ms(self) -> int:
        """The wall clock."""

    def save(
        self, request: Save, reply: Callable[[Save, Saved | Stale | Failed], None]
    ) -> None:
        """Store; the reply runs on the grain dispatcher."""

    ask_timeout: float
    current: "Activation | None"
    #: Sees each handled message; none is the usual.
    witness: "HandledWitness | None"

    def begun(self, pid: Pid) -> None:
        """User code is about to be entered for the first time."""

    def kind_of(self, actor_class: type) -> str:
        """The kind under which the node knows the class."""

    def class_of(self, kind: str) -> type | None:
        """The class of that kind, where the node knows it."""

    def started(self, pid: Pid) -> None:
        """The activation serves."""

    def start_failed(self, pid: Pid, refusal: Refusal) -> None:
        """It does not."""

    def ended(self, pid: Pid, version: int, snapshot: bytes | None) -> None:
        """Its last user code has been left, and its mailbox is sealed."""

    def seal(self, activation: "Activation") -> None:
        """Call `activation.bounce_all` so that no later mail overtakes those."""

    def take_back(self, activation: "Activation", mail: "Mail") -> bool:
        """Call `activation.withdraw`, so that `mail` may go elsewhere, in its order."""

    def publish(self, happened: Happened) -> None:
        """Tell the subscribers."""

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
        """Send a message, as of the moment of the call."""


class Activation(Hosted, Protocol):
    """One live instance of an identity on this node, however it is hosted."""

    guard: Guard

    def start(self) -> None:
        """Run its first hook, then report."""

    def deliver(self, mail: Mail) -> bool:
        """Queue; false where nothing is queued any more (the mail is not here).

        From any thread. A full inbox is told to the origin.
        """

    def stop(self, *, lapsed: bool) -> None:
        """End it, from any thread; `Host.ended` follows."""

    def bounce_all(self) -> None:
        """Seal the mailbox and give back what is in it; the node's lock is held."""

    def withdraw(self, mail: Mail) -> bool:
        """Take `mail` out of a sealed mailbox; false: it is not there any more."""

    def abandon(self) -> None:
        """The node is gone: end what threads it has, without any hook."""


class _Turn(msgspec.Struct, eq=False):
    """User code under way: what for, and the coroutine if it has awaited."""

    purpose: str
    mail: Mail | None = None
    name: str = ""
    coroutine: Coroutine[Any, Any, Any] | None = None
    awaiting: Future | None = None


@record
class _TimerMail:
    """A timer that has fired, waiting for its turn."""

    timer: Timer


@record
class OutputGate:
    """What may not leave before the store has confirmed a save.

    Outputs are pairs: what to do when it is confirmed, and when it never will be.
    """

    confirmed: int
    saves_failed: int = 0
    # None where nothing has ever waited: an empty deque takes 760 bytes.
    waiting: (
        deque[tuple[int, Callable[[], None], Callable[[PlacementError], None]]] | None
    ) = None

    def is_open(self, version: int) -> bool:
        """Whether what leaves after `version` was saved may leave now."""
        return self.confirmed >= version and not self.waiting

    def put(
        self,
        version: int,
        leave: Callable[[], None],
        never: Callable[[PlacementError], None],
    ) -> bool:
        """Keep it if that save is not confirmed; false: it may leave now."""
        if self.is_open(version):
            return False
        if self.waiting is None:
            self.waiting = deque()
        self.waiting.append((version, leave, never))
        return True

    def confirm(self, version: int) -> Iterator[Callable[[], None]]:
        """The store has confirmed `version`: what may leave now, in order."""
        self.confirmed = max(self.confirmed, version)
        while self.waiting and self.waiting[0][0] <= self.confirmed:
            yield self.waiting.popleft()[1]

    def fail(self, error: PlacementError) -> None:
        """Nothing that waits will ever leave."""
        while self.waiting:
            self.waiting.popleft()[2](error)


def _as_it_travels(error: BaseException) -> PlacementError:
    """What the caller has of what user code raised: the same from every node."""
    match error:
        case Rejected():
            try:
                return decode_rejected(*encode_rejected(error))
            except BaseException as bad:  # its fields are user code too
                _, text = describe(bad)
                return HandlerFailed(type(error).__name__, text_of(f"rejected: {text}"))
        case Deadlock():
            return Deadlock(describe(error)[1])
        case HandlerFailed():
            return HandlerFailed(text_of(error.type_name), text_of(error.text))
    return HandlerFailed(*describe(error))


#: What has taken nothing; never changed.
_NOTHING: list[Any] = []


class GrainActivation:
    """One Grain: driven on its node's grain dispatcher."""

    #: Whether a handler may take long without awaiting anything.
    _may_block = False

    # There may be a million of them.
    __slots__ = (
        "_gate",
        "_grain",
        "_has_begun",
        "_host",
        "_is_passivating",
        "_is_reported",
        "_is_scheduled",
        "_is_sealed",
        "_is_shut",
        "_last_saved",
        "_mailbox",
        "_start_chain",
        "_state",
        "_surface",
        "_taken",
        "_timers",
        "_turn",
        "_version",
        "context",
        "guard",
        "is_straight",
        "kind",
        "last_used_ns",
        "pid",
    )

    def __init__(
        self,
        pid: Pid,
        record: ActivationRecord,
        *,
        guard: Guard,
        kind: Kind,
        host: Host,
        chain: tuple[str, ...] = (),
    ) -> None:
        self.pid = pid
        # The session's guard is that of all its activations: one that ends shuts
        # itself only.
        self.guard = guard
        self._is_shut = False
        self.kind = kind
        self._host = host
        self._start_chain = chain
        # Whoever delivers appends to the first; turns take from the end of the second,
        # which is the whole of the first, turned round. A deque takes 624 bytes.
        self._mailbox: list[Mail | _TimerMail] = []
        self._taken: list[Mail | _TimerMail] = _NOTHING
        self._is_scheduled = False
        self._state = "starting"
        self._is_sealed = False
        self._turn: _Turn | None = None
        # The last that was saved; the gate is made at the first save.
        self._version = record.version
        self._gate: OutputGate | None = None
        self._last_saved = record.snapshot
        self._timers: dict[Timer, None] | None = None
        self._grain: Any = None
        self._surface: Surface | None = None
        self._is_passivating = False
        self._has_begun = False
        self._is_reported = False
        self.last_used_ns = 0
        self.is_straight = False
        self.context = Context(self, record.snapshot)

    # --- from any thread -----------------------------------------------------

    @property
    def idle_after_ns(self) -> int | None:
        """How long it is not used before it is idle; none where it never is."""
        return self.kind.idle_after_ns

    def start(self) -> None:
        """Run its first hook, then report."""
        self._post(self._start)

    def deliver(self, mail: Mail) -> bool:
        """Queue, from any thread."""
        if self._is_sealed:
            return False
        mailbox = self._mailbox
        if len(mailbox) + len(self._taken) >= self.kind.inbox_max:
            mail.origin.failed(
                mail, Overloaded(f"{self.pid.identity}: its inbox is full")
            )
            return True
        mailbox.append(mail)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._post(self._run)
        # By another thread just now, which may have given back all before it.
        return not self._is_sealed or not self._host.take_back(self, mail)

    def stop(self, *, lapsed: bool) -> None:
        """End it; `Host.ended` follows."""
        self._post(self._lapse if lapsed else self._passivate)

    def bounce_all(self) -> None:
        """Seal the mailbox and give back what is in it; the node's lock is held."""
        self._is_sealed = True
        while (mail := self._take_mail()) is not None:
            if isinstance(mail, Mail):
                mail.origin.bounced(mail, self.pid)

    def withdraw(self, mail: Mail) -> bool:
        """Take `mail` out again, if it still waits; the node's lock is held."""
        try:
            self._mailbox.remove(mail)
        except ValueError:
            return False
        return True

    def is_busy(self) -> bool:
        """Whether it has a turn under way, or a mail waits for one."""
        return self._turn is not None or bool(self._mailbox or self._taken)

    def abandon(self) -> None:
        """A Grain has no thread of its own."""

    # --- turns ---------------------------------------------------------------

    def _post(self, turn: Callable[..., object], /, *arguments: Any) -> None:
        self._host.dispatcher.post(self._take, turn, *arguments)

    def _take(self, turn: Callable[..., object], /, *arguments: Any) -> None:
        """Run `turn`; a bug in it must leave no caller and no mailbox waiting."""
        try:
            turn(*arguments)
        except BaseException as error:
            self._stumble(error)
            raise

    def _stumble(self, error: BaseException) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and turn.mail is not None:
            turn.mail.origin.failed(turn.mail, HandlerFailed(*describe(error)))
            self._used()
        match self._state:
            case "starting":
                self._activated(error)
            case "active":
                try:
                    if turn is not None:
                        self._close(turn)
                        self._troubled(error)
                finally:
                    self._go_on()
            case "ending":
                self._report(None)

    def _make(self) -> Any:
        grain = self.kind.make(self.context)
        grain.context = self.context
        return grain

    def _surface_of(self, grain: Any) -> Surface:
        return Surface.of(type(grain))

    def _enter(self, now_ns: int) -> bool:
        """Go into user code; false: the guard says no. The clock was read just now."""
        if self._is_shut or not self.guard.is_open(now_ns):
            return False
        running.activation = self
        self._host.current = self
        return True

    def _leave(self) -> None:
        running.activation = None
        self._host.current = None

    def _over(self) -> None:
        """It has ended; nothing of it is needed any more.

        What leads back to itself is let go, or all that ever ended would wait for
        the collector, which is slow where a million live.
        """
        self._grain = self._surface = None
        del self.context

    def _begin(self) -> None:
        """Say once that user code is about to be entered."""
        if not self._has_begun:
            self._has_begun = True
            self._host.begun(self.pid)

    def _start(self) -> None:
        if self._state != "starting":
            return
        if not self._enter(self._host.now_ns()):
            self._lapse()
            return
        self._turn = turn = _Turn("activate")
        result: Any = None
        failure: BaseException | None = None
        try:
            self._begin()
            self._grain = grain = self._make()
            self._surface = self._surface_of(grain)
            self._surface.load(grain, self._last_saved)
            result = grain.on_activate()
        except BaseException as error:  # user code may raise anything
            failure = error
        finally:
            self._leave()
        self._returned(turn, result, failure)

    def _run(self) -> None:
        """Handle what is in the mailbox, a bounded number at once."""
        self._is_scheduled = False
        for _ in range(TURNS_AT_ONCE):
            if self._turn is not None or self._state != "active":
                return
            mail = self._take_mail()
            if mail is None:
                return
            if isinstance(mail, Mail):
                self._handle(mail)
            else:
                self._fire(mail.timer)
        self._schedule()

    def _take_mail(self) -> Mail | _TimerMail | None:
        """Take what was delivered first of all that is there; one thread at a time."""
        while True:
            try:
                return self._taken.pop()
            except IndexError:  # also where another thread has sealed it just now
                mailbox = self._mailbox
                taken = mailbox[:]
                if not taken:
                    self._taken = _NOTHING
                    return None
                # What is appended meanwhile, by other threads, stays.
                del mailbox[: len(taken)]
                taken.reverse()
                self._taken = taken

    def _put_back(self, mail: Mail) -> None:
        """Have it be what is taken next; by whoever has taken it."""
        self._taken = [*self._taken, mail]

    def _schedule(self) -> None:
        if (self._mailbox or self._taken) and not self._is_scheduled:
            self._is_scheduled = True
            self._post(self._run)

    def _go_on(self) -> None:
        """A turn is over: end, where that is wanted, or take the next mail."""
        if self._is_passivating:
            self._passivate()
        else:
            self._schedule()

    def _handle(self, mail: Mail) -> None:
        host = self._host
        now_ns = host.now_ns()
        if mail.deadline_ns and mail.deadline_ns <= now_ns:
            mail.origin.failed(mail, Pending("its time was over before it was handled"))
            return
        if not self._enter(now_ns):
            self._put_back(mail)
            self._lapse()
            if self._is_sealed:
                host.seal(self)
            return
        turn = self._turn = _Turn("handle", mail)
        grain, surface = self._grain, self._surface
        assert surface is not None
        payload = mail.payload
        is_call = type(payload) is dict and surface.is_call(payload)
        result: Any = None
        failure: BaseException | None = None
        try:
            self.last_used_ns = now_ns
            if is_call:
                call, arguments, turn.name = surface.decode_call(payload)
                result = call(grain, **arguments)
            else:
                result = grain.on_receive(payload)
        except BaseException as error:  # user code may raise anything
            failure = error
        finally:
            self._leave()
        if isinstance(failure, BadMessage) and is_call and not turn.name:
            # It was refused before its handler was entered.
            self._turn = None
            self._used()
            mail.origin.failed(mail, BadMessage(text_of(failure.message)))
        elif (
            failure is None
            and not isinstance(result, CoroutineType)
            and not self._may_block
        ):
            # The usual end of a turn; whoever called this takes the next mail.
            if host.witness is not None:
                host.witness.handled(self.pid)
            if mail.is_ask:
                self._answer(turn, mail, result, None)
            self._turn = None
            if self._is_passivating:
                self._passivate()
        else:
            self._returned(turn, result, failure)

    def _fire(self, timer: Timer) -> None:
        timers = self._timers
        if timers is None or timers.pop(timer, 0) == 0 or timer.is_cancelled:
            return
        if not self._enter(self._host.now_ns()):
            self._lapse()
            return
        self._turn = turn = _Turn("timer")
        result: Any = None
        failure: BaseException | None = None
        try:
            result = timer.call()
        except BaseException as error:  # user code may raise anything
            failure = error
        finally:
            self._leave()
        self._returned(turn, result, failure)

    def _used(self) -> None:
        """The handling of a message is over: idle time starts now."""
        self.last_used_ns = self._host.now_ns()

    def _returned(self, turn: _Turn, result: Any, error: BaseException | None) -> None:
        """User code came back: with a result, an error, or a coroutine to drive."""
        if error is None and isinstance(result, CoroutineType):
            turn.coroutine = result
            self._step(turn, None, None)
        else:
            self._finish(turn, result, error)

    def _step(self, turn: _Turn, value: Any, error: BaseException | None) -> None:
        """Enter the coroutine once more."""
        coroutine = turn.coroutine
        assert coroutine is not None
        while True:
            if not self._enter(self._host.now_ns()):
                self._lapse()
                self._close(turn)
                return
            try:
                if error is None:
                    token = coroutine.send(value)
                else:
                    token = coroutine.throw(error)
                if self._state == "ended":  # by another thread, meanwhile
                    self._turn = None
                    coroutine.close()
                    return
            except StopIteration as stop:
                value, error = stop.value, None
                break
            except BaseException as raised:  # user code may raise anything
                value, error = None, raised
                break
            finally:
                self._leave()
            if isinstance(token, Future) and token.owner is self:
                turn.awaiting = token
                token.on_done(self._awaited)
                return
            value, error = None, RuntimeError(FOREIGN)
        turn.coroutine = None
        self._finish(turn, value, error)

    def _awaited(self, token: Future) -> None:
        self._post(self._resume, token)

    def _resume(self, token: Future) -> None:
        turn = self._turn
        if turn is None or turn.awaiting is not token:
            return  # the coroutine has been closed meanwhile
        turn.awaiting = None
        try:
            value, error = token.get(timeout=0), None
        except BaseException as raised:  # what the awaited call failed with
            value, error = None, raised
        self._step(turn, value, error)

    def _finish(self, turn: _Turn, result: Any, error: BaseException | None) -> None:
        """The turn is over."""
        match turn.purpose:
            case "handle":
                assert turn.mail is not None
                if self._host.witness is not None:
                    self._host.witness.handled(self.pid)
                self._used()
                self._answer(turn, turn.mail, result, error)
            case "activate":
                self._turn = None
                self._activated(error)
                return
            case "passivate":
                self._turn = None
                self._passivated(result, error)
                return
            case _:
                if error is not None:
                    self._troubled(error)
        self._turn = None
        self._go_on()

    def _answer(
        self, turn: _Turn, mail: Mail, result: Any, error: BaseException | None
    ) -> None:
        if error is None and mail.is_ask:
            assert self._surface is not None
            try:
                if turn.name:
                    result = self._surface.encode_answer(turn.name, result)
                result = payloads.copy(result)
            except BaseException as bad:  # its types are user code too
                type_name, text = describe(bad)
                error = HandlerFailed(type_name, text_of(f"its answer: {text}"))
        if error is None:
            if not mail.is_ask:
                return
            gate = self._gate
            if (gate is None or gate.is_open(self._version)) and not self._may_block:
                # As _emit would, without making what may have to wait.
                if not self._is_shut and self.guard.is_open(self._host.now_ns()):
                    mail.origin.answered(mail, result, self.pid)
                else:
                    mail.origin.failed(mail, self._unknown())
            else:
                self._emit(
                    lambda: mail.origin.answered(mail, result, self.pid),
                    lambda unknown: mail.origin.failed(mail, unknown),
                )
            return
        # First the answer: nothing that user code has spoilt may hold it up.
        failure = _as_it_travels(error)
        self._emit(
            lambda: mail.origin.failed(mail, failure),
            lambda unknown: mail.origin.failed(mail, unknown),
        )
        if not isinstance(error, Rejected) or not isinstance(failure, Rejected):
            self._troubled(error)

    def _troubled(self, error: BaseException) -> None:
        """User code raised: say so, and put the state back to the last save."""
        self._say("HandlerFailed", "handler failed", error)
        assert self._surface is not None
        assert self._grain is not None
        try:
            self._surface.load(self._grain, self._last_saved)
        except BaseException as worse:  # the types of its state are user code too
            # Nobody knows what its state is now: no user code may see it again.
            self._say("StateLost", "the state was not put back", worse)
            self._end_without_hook()
            return
        if self.kind.on_error == "stop":
            self._is_passivating = True

    def _say(self, name: str, event: str, error: BaseException) -> None:
        """Publish and log what user code has raised."""
        self._host.publish(
            Happened(
                kind="actor",
                name=name,
                identity=self.pid.identity,
                session=self.pid.session,
                token=self.pid.fencing_token,
                reason=": ".join(describe(error)),
            )
        )
        try:
            log.error(event, identity=str(self.pid.identity), exc_info=error)
        except BaseException as raised:  # a traceback shows what user code says
            log.error(event, identity=str(self.pid.identity), why=describe(raised))

    # --- beginning and ending ------------------------------------------------

    def _activated(self, error: BaseException | None) -> None:
        if error is None:
            self._state = "active"
            self._emit(self._tell_started, lambda _: None)
            self._go_on()
            return
        self._state = "ended"
        self._end_timers()
        self._host.seal(self)
        why = text_of(f"{self.pid.identity}: {': '.join(describe(error))}")
        is_deadlock = isinstance(error, Deadlock)
        self._tell_end(Refusal("Deadlock" if is_deadlock else "ActivationFailed", why))
        self._over()
        try:
            log.error(
                "activation failed", identity=str(self.pid.identity), exc_info=error
            )
        except BaseException as raised:  # a traceback shows what user code says
            log.error("activation failed", why=describe(raised))

    def _tell_started(self) -> None:
        self._is_reported = True
        self._host.started(self.pid)

    def _tell_end(
        self, refusal: Refusal, version: int = 0, snapshot: bytes | None = None
    ) -> None:
        """Its last user code has been left; `refusal` is why, where it never served."""
        if self._is_reported:
            self._host.ended(self.pid, version, snapshot)
        else:
            self._host.start_failed(self.pid, refusal)

    def _passivate(self) -> None:
        """Run the last hook, once the turn under way is over."""
        self._is_passivating = True
        if self._turn is not None or self._state != "active":
            return
        if not self._enter(self._host.now_ns()):
            self._lapse()
            return
        if not self._ending():
            self._leave()
            return
        self._turn = turn = _Turn("passivate")
        result: Any = None
        failure: BaseException | None = None
        try:
            result = self._grain.on_passivate()
        except BaseException as error:  # user code may raise anything
            failure = error
        finally:
            self._leave()
        self._returned(turn, result, failure)

    def _ending(self) -> bool:
        """Begin to end; false: it has ended meanwhile."""
        self._state = "ending"
        self._end_timers()
        return True

    def _passivated(self, result: Any, error: BaseException | None) -> None:
        if error is None and not (result is None or isinstance(result, bytes)):
            error = TypeError(
                f"on_passivate returns bytes or None, not {type(result).__name__}"
            )
        snapshot = result if error is None else None
        # The end is an output too: it waits for the saves before it.
        self._emit(lambda: self._report(snapshot), lambda _: self._report(None))
        if error is not None:
            self._say("HandlerFailed", "on_passivate failed", error)

    def _end_without_hook(self) -> None:
        """End; what has been answered leaves as soon as it may."""
        if self._state != "active" or not self._ending():
            return
        self._emit(lambda: self._report(None), lambda _: self._report(None))

    def _report(self, snapshot: bytes | None) -> None:
        if self._state == "ended":
            return
        self._state = "ended"
        self._host.seal(self)
        version = self._version + (snapshot is not None)
        refusal = Refusal("Pending", f"{self.pid.identity} ended before it served")
        self._tell_end(refusal, version, snapshot)
        self._over()

    def _lapse(self) -> None:
        """The lease is over: enter no user code, let nothing leave."""
        unknown = self._unknown()
        self._end_now(unknown, Refusal("NotReady", unknown.message))

    def _end_now(self, why: PlacementError, refusal: Refusal) -> None:
        """End without a hook: who waits for an answer hears `why`."""
        if self._state == "ended":
            return
        self._is_shut = True
        self._state = "ended"
        self._end_timers()
        turn, self._turn = self._turn, None
        if turn is not None:
            self._close(turn)
            if turn.mail is not None:
                turn.mail.origin.failed(turn.mail, why)
        if self._gate is not None:
            self._gate.fail(why)
        self._host.seal(self)
        self._tell_end(refusal)
        self._over()

    def _close(self, turn: _Turn) -> None:
        """Have a coroutine that has awaited run what it does in the end."""
        coroutine, turn.coroutine = turn.coroutine, None
        if coroutine is None:
            return
        running.activation = self
        self._host.current = self
        try:
            coroutine.close()
        except BaseException as error:  # a finally of user code may raise
            self._say("HandlerFailed", "a coroutine did not close", error)
        finally:
            self._leave()

    def _end_timers(self) -> None:
        for timer in tuple(self._timers or ()):
            timer.cancel()
        self._timers = None

    # --- output and saves ----------------------------------------------------

    def _emit(
        self, leave: Callable[[], None], never: Callable[[PlacementError], None]
    ) -> bool:
        """Let an output leave, or say that it never will; true: it has to wait."""
        gate = self._gate
        if gate is not None and gate.put(self._version, leave, never):
            return True
        if not self._is_shut and self.guard.is_open(self._host.now_ns()):
            leave()
        else:
            never(self._unknown())
        return False

    def _call_at(self, when_ns: int, turn: Callable[[], object]) -> DueTurn:
        return self._host.dispatcher.call_at(when_ns, turn)

    def _unknown(self) -> PlacementError:
        return OutcomeUnknown(f"{self.pid.identity}: its host lost its lease")

    def save(self, snapshot: bytes) -> None:
        """Store `snapshot`; what is sent from now on waits for it."""
        if self._state == "ended":
            return
        if not isinstance(snapshot, bytes):
            raise TypeError(f"save takes bytes, not {type(snapshot).__name__}")
        if self._gate is None:
            self._gate = OutputGate(self._version)
        self._version += 1
        self._last_saved = snapshot
        request = Save(
            self.pid.identity, self.pid.fencing_token, self._version, snapshot
        )
        self._host.save(request, self._saved)

    def _saved(self, request: Save, outcome: Saved | Stale | Failed) -> None:
        gate = self._gate
        assert gate is not None
        if self._state == "ended" and not gate.waiting:
            return
        match outcome:
            case Saved():
                gate.saves_failed = 0
                if self._is_shut or not self.guard.is_open(self._host.now_ns()):
                    self._lapse()
                    return
                for leave in gate.confirm(request.version):
                    leave()
            case Failed(_, may_have_happened=True) if gate.saves_failed < _SAVES_MAX:
                gate.saves_failed += 1
                self._save_again(_SAVE_AGAIN_NS << gate.saves_failed, request)
            case Failed(message, may_have_happened):
                error: PlacementError = (
                    OutcomeUnknown(f"the store failed: {message}")
                    if may_have_happened
                    else SaveFailed(message)
                )
                self._lose(error)
            case Stale(current):
                self._lose(
                    OutcomeUnknown(
                        f"{self.pid.identity}: a save was refused, "
                        f"token {self.pid.fencing_token} is older than {current}"
                    )
                )

    def _save_again(self, after_ns: int, request: Save) -> None:
        host = self._host
        due_ns = host.now_ns() + after_ns
        host.dispatcher.call_at(due_ns, host.save, request, self._saved)

    def _lose(self, error: PlacementError) -> None:
        """A save has failed for good: what it holds back never leaves."""
        self._host.publish(
            Happened(
                kind="actor",
                name="SaveFailed",
                identity=self.pid.identity,
                session=self.pid.session,
                token=self.pid.fencing_token,
                reason=str(error),
            )
        )
        if self._gate is not None:
            self._gate.fail(error)
        unknown = OutcomeUnknown(f"{self.pid.identity}: a save failed: {error.message}")
        why = f"{self.pid.identity}: a save failed: {error.message}"
        self._end_now(unknown, Refusal("ActivationFailed", text_of(why)))

    # --- what the context asks for -------------------------------------------

    def ask(
        self,
        identity: Identity,
        payload: Any,
        *,
        timeout: float | None,
        request_id: str,
    ) -> Future:
        """Ask another identity; the future is for this activation to await."""
        future = Future()
        future.owner = self
        chain = (*self._chain(), str(self.pid.identity))
        if self._state == "ended":
            future.set_error(NotReady(f"{self.pid.identity} has ended"))
        elif identity in chain:
            future.set_error(Deadlock(" -> ".join((*chain, identity))))
        else:
            copy = payloads.copy(payload)
            host = self._host
            seconds = host.ask_timeout if timeout is None else timeout
            due_ns = host.now_ns() + max(0, round(seconds * 1e9))
            # Whoever takes this away decides: it is sent, or its time is over.
            unsent = [future]

            def leave() -> None:
                try:
                    asked = unsent.pop()
                except IndexError:
                    return
                host.send(
                    identity,
                    copy,
                    future=asked,
                    timeout=max(0, due_ns - host.now_ns()) / 1e9,
                    request_id=request_id,
                    chain=chain,
                )

            def be_late() -> None:
                with suppress(IndexError):
                    why = "a save before it is not confirmed yet"
                    unsent.pop().set_error(Pending(f"{identity}: not asked: {why}"))

            if self._emit(leave, future.set_error):
                timer = self._call_at(due_ns, be_late)
                future.on_done(lambda _: timer.cancel())
        return future

    def _chain(self) -> tuple[str, ...]:
        """Who waits for the turn under way, each for the next."""
        if self._turn is not None and self._turn.mail is not None:
            return self._turn.mail.chain
        # Whoever waits for the activation waits for its first hook.
        return self._start_chain if self._state == "starting" else ()

    def tell(self, identity: Identity, payload: Any, *, request_id: str) -> None:
        """Tell another identity."""
        if self._state == "ended":
            return
        copy = payloads.copy(payload)
        self._emit(
            lambda: self._host.send(
                identity,
                copy,
                future=None,
                timeout=None,
                request_id=request_id,
                chain=(),
            ),
            lambda _: None,
        )

    def after(self, seconds: float, timer: Timer) -> None:
        """Run `timer` as a turn of its own, in `seconds`."""
        if self._state in {"ending", "ended"}:
            return
        if self._timers is None:
            self._timers = {}
        self._timers[timer] = None
        timer.among = self._timers
        host = self._host
        timer.scheduled = host.dispatcher.call_at(
            host.now_ns() + round(seconds * 1e9), self._timer_due, timer
        )

    def _timer_due(self, timer: Timer) -> None:
        if self._timers is not None and timer in self._timers:
            self._mailbox.append(_TimerMail(timer))
            self._schedule()

    def passivate_soon(self) -> None:
        """End after this turn: what waits behind it bounces."""
        self._is_passivating = True
        self._post(self._passivate)

    @property
    def request_id(self) -> str:
        """That of the message being handled."""
        turn = self._turn
        return "" if turn is None or turn.mail is None else turn.mail.request_id

    def now_s(self) -> float:
        """The wall clock, in seconds."""
        return self._host.wall_ms() / 1000

    @property
    def random(self) -> Random:
        """The node's source of chance."""
        return self._host.random

    @property
    def ask_timeout(self) -> float:
        """Seconds that an ask waits unless it says otherwise."""
        return self._host.ask_timeout

    def may_block(self) -> bool:
        """A Grain must not."""
        return False

    def kind_of(self, actor_class: type) -> str:
        """The kind under which the node knows the class."""
        return self._host.kind_of(actor_class)

    def class_of(self, kind: str) -> type | None:
        """The class of that kind, where the node knows it."""
        return self._host.class_of(kind)
