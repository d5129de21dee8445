"""The PartitionCoordinator: decides the claims of the partitions its node owns."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import pykka

from actors.dispatch import Alarm, DispatchedActor, Dispatcher
from actors.store_actor import Perform
from messages.frames import (
    AskHolder,
    AskOwner,
    Frame,
    HolderAnswer,
    OwnerAnswer,
    Redirect,
    Refused,
    Resolve,
    Resolved,
    Start,
    Started,
    StartRefused,
)
from placement.claim import (
    AcquireLock,
    AnswerPid,
    AskHolderSession,
    AskOwnerSession,
    ClaimEffect,
    Claims,
    NeedTopology,
    RedirectTo,
    Refuse,
    ReleaseLock,
    Requester,
    StartAt,
    TellHolderState,
)
from placement.contracts import (
    Acquire,
    Acquired,
    Failed,
    LockHeld,
    LockRefused,
    Release,
    Released,
)
from placement.entry import Acquisition, Pid
from placement.errors import Refusal
from placement.event import Happened
from placement.hosting import TellClaimed, TellStarted, TellStartRefused
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.topology import Address, SessionId, address_of
from placement.value import value

CoordinatorFrame: TypeAlias = (
    Resolve | Started | StartRefused | OwnerAnswer | AskHolder | HolderAnswer
)


@value
class Arrived:
    """A frame has come from `sender`."""

    sender: Address
    body: Frame


@value
class TopologyChanged:
    """The node's session and the table of the newest topology; who is closed."""

    session: SessionId | None
    table: PartitionTable | None
    closed: tuple[SessionId, ...]
    why_not: str = ""


CoordinatorMessage: TypeAlias = (
    Arrived | TopologyChanged | TellClaimed | TellStarted | TellStartRefused
)


class PartitionCoordinator(DispatchedActor):
    """Carries inputs to its claims, and performs what they decide."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        claims: Claims,
        own: Address,
        entries: pykka.ActorRef[Any],
        send: Callable[[Address, Frame], bool],
        start_here: Callable[[StartAt], None],
        need_topology: Callable[[int], None],
        publish: Callable[[Happened], None],
        is_dead: Callable[[], bool],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        super().__init__(dispatcher=dispatcher, on_bug=on_bug)
        self._claims = claims
        self._own = own
        self._entries = entries
        self._send = send
        self._start_here = start_here
        self._need_topology = need_topology
        self._publish = publish
        self._is_dead = is_dead
        self._alarm = Alarm(dispatcher, self._tick)
        # A table, for these are made for every claim: a match asks one class after
        # the other.
        self._performs: dict[type[ClaimEffect], Callable[[Any], None]] = {
            StartAt: self._start_at,
            AnswerPid: self._answer_pid,
            RedirectTo: self._redirect_to,
            Refuse: self._refuse,
            AcquireLock: self._acquire_lock,
            ReleaseLock: self._release_lock,
            AskOwnerSession: self._ask_owner,
            AskHolderSession: self._ask_holder,
            TellHolderState: self._tell_holder_state,
            NeedTopology: self._need_newer,
            Happened: publish,
        }

    def on_stop(self) -> None:
        """Leave no timer behind."""
        self._alarm.cancel()

    def on_receive(self, message: CoordinatorMessage) -> None:
        """Decide on a frame, on an answer of this node's own, or by a topology."""
        if self._is_dead():
            return
        now_ns = self.dispatcher.now_ns()
        match message:
            case Arrived(sender, body):
                effects = self._frame(sender, body, now_ns)
            case TellClaimed(_, identity, procedure):
                effects = self._claims.claim_made(identity, procedure, now_ns=now_ns)
            case TellStarted(_, pid, procedure):
                effects = self._claims.started(pid, procedure, now_ns=now_ns)
            case TopologyChanged(session, table, closed, why_not):
                effects = self._claims.adopt(
                    session, table, closed=closed, why_not=why_not, now_ns=now_ns
                )
            case TellStartRefused(_, identity, procedure, host, refusal):
                effects = self._claims.start_refused(
                    identity, procedure, host, refusal, now_ns=now_ns
                )
        self._perform(effects)

    def _frame(
        self, sender: Address, body: Frame, now_ns: int
    ) -> tuple[ClaimEffect, ...]:
        claims = self._claims
        match body:
            case Resolve(request, identity, epoch, remaining_ms, chain):
                return claims.request(
                    Requester(sender, request, chain),
                    Identity.parse(identity),
                    epoch=epoch,
                    deadline_ns=now_ns + remaining_ms * 1_000_000,
                    now_ns=now_ns,
                )
            case Started(identity, procedure, host, token):
                pid = Pid(Identity.parse(identity), SessionId(host), token)
                return claims.started(pid, procedure, now_ns=now_ns)
            case StartRefused(identity, procedure, host, reason, message):
                return claims.start_refused(
                    Identity.parse(identity),
                    procedure,
                    SessionId(host),
                    Refusal(reason, message),
                    now_ns=now_ns,
                )
            case OwnerAnswer(identity, session, procedure, state, token):
                return claims.owner_answered(
                    Identity.parse(identity),
                    SessionId(session),
                    procedure,
                    state,
                    token,
                    now_ns=now_ns,
                )
            case AskHolder(identity, session, holder_procedure, procedure):
                return claims.holder_asked(
                    sender,
                    Identity.parse(identity),
                    Acquisition(SessionId(session), holder_procedure),
                    procedure,
                )
            case HolderAnswer(identity, session, holder_procedure, procedure, state):
                return claims.holder_answered(
                    Identity.parse(identity),
                    Acquisition(SessionId(session), holder_procedure),
                    procedure,
                    state,
                    now_ns=now_ns,
                )
        raise TypeError(f"no frame for a coordinator: {body!r}")

    def _tick(self) -> None:
        if not self._is_dead():
            self._perform(self._claims.tick(now_ns=self.dispatcher.now_ns()))

    def _acquired(
        self, request: Acquire, outcome: Acquired | LockHeld | LockRefused | Failed
    ) -> None:
        if not self._is_dead():
            now_ns = self.dispatcher.now_ns()
            self._perform(self._claims.acquired(request, outcome, now_ns=now_ns))

    def _released(self, request: Release, outcome: Released | Failed) -> None:
        if not self._is_dead():
            self._perform(
                self._claims.released(
                    request,
                    is_released=isinstance(outcome, Released),
                    now_ns=self.dispatcher.now_ns(),
                )
            )

    def _perform(self, effects: Iterable[ClaimEffect]) -> None:
        performs = self._performs
        for effect in effects:
            performs[type(effect)](effect)
        self._alarm.set(self._claims.due_ns)

    def _start_at(self, effect: StartAt) -> None:
        host = effect.host
        if address_of(host) == self._own:
            self._start_here(effect)
            return
        acquisition = effect.acquisition
        self._send(
            address_of(host),
            Start(
                effect.identity,
                acquisition.procedure,
                acquisition.session,
                host,
                effect.expected_revision,
                effect.epoch,
                effect.remaining_ns // 1_000_000,
                effect.chain,
            ),
        )

    def _answer_pid(self, effect: AnswerPid) -> None:
        to, pid = effect.to, effect.pid
        self._send(
            to.address,
            Resolved(to.request, pid.identity, pid.session, pid.fencing_token),
        )

    def _redirect_to(self, effect: RedirectTo) -> None:
        to = effect.to
        self._send(
            to.address,
            Redirect(to.request, effect.identity, effect.epoch, effect.owner),
        )

    def _refuse(self, effect: Refuse) -> None:
        to, refusal = effect.to, effect.refusal
        self._send(
            to.address,
            Refused(to.request, effect.identity, refusal.reason, refusal.message),
        )

    def _acquire_lock(self, effect: AcquireLock) -> None:
        self._entries.tell(Perform(effect.request, self._acquired, self.dispatcher))

    def _release_lock(self, effect: ReleaseLock) -> None:
        self._entries.tell(Perform(effect.request, self._released, self.dispatcher))

    def _ask_owner(self, effect: AskOwnerSession) -> None:
        session = effect.session
        self._send(
            address_of(session),
            AskOwner(effect.identity, session, effect.fencing_token, effect.procedure),
        )

    def _ask_holder(self, effect: AskHolderSession) -> None:
        holder = effect.holder
        self._send(
            address_of(holder.session),
            AskHolder(
                effect.identity, holder.session, holder.procedure, effect.procedure
            ),
        )

    def _tell_holder_state(self, effect: TellHolderState) -> None:
        holder = effect.holder
        self._send(
            effect.address,
            HolderAnswer(
                effect.identity,
                holder.session,
                holder.procedure,
                effect.procedure,
                effect.state,
            ),
        )

    def _need_newer(self, effect: NeedTopology) -> None:
        self._need_topology(effect.epoch)
