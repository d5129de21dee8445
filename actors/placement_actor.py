"""The PlacementActor: keeps its node's session, and hosts its activations."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol, TypeAlias

import pykka

from actors.activation import Activation
from actors.coordinator import Arrived
from actors.dispatch import Alarm, DispatchedActor, Dispatcher
from actors.store_actor import Perform
from messages.frames import (
    AskOwner,
    Frame,
    LoopBack,
    OwnerAnswer,
    Passivate,
    Start,
    Started,
    StartRefused,
    TopologyHint,
)
from placement.claim import StartAt
from placement.contracts import Claim, Claimed, ClaimRefused, Failed, GiveUp
from placement.entry import Acquisition, ActivationRecord, Pid
from placement.errors import Refusal
from placement.event import Happened
from placement.hosting import (
    ClaimEntry,
    GiveUpEntry,
    Hosting,
    HostingEffect,
    SessionSettled,
    StartActivation,
    StopActivation,
    TellClaimed,
    TellOwnerState,
    TellStarted,
    TellStartRefused,
)
from placement.identity import Identity
from placement.lease import Guard
from placement.registry import VirtualActorRegistry
from placement.session import (
    CloseSession,
    Observer,
    OpenSession,
    OwnSession,
    ReadSessions,
    RenewSession,
    SendEcho,
    SessionBegan,
    SessionEffect,
    SessionEnded,
    SessionLapsed,
    TopologyAdopted,
    WriteMembers,
)
from placement.topology import Address, SessionId, Topology
from placement.value import value


@value
class BeginMember:
    """Open a session, and host."""


@value
class BeginClient:
    """Read who the members are."""


@value
class Drain:
    """Own no partitions, start nothing new, end what runs."""

    why: str


@value
class Stop:
    """Drain, then close the session and leave."""


@value
class NeedNewTopology:
    """Somebody speaks of a newer epoch; 0: perhaps."""

    epoch: int


@value
class HasStarted:
    """An activation serves."""

    pid: Pid


@value
class HasFailed:
    """An activation did not start."""

    pid: Pid
    refusal: Refusal


@value
class HasEnded:
    """An activation's last user code has been left."""

    pid: Pid
    version: int
    snapshot: bytes | None


@value
class EndIdle:
    """Passivate all that were not used for so long."""

    idle_for_ns: int


PlacementMessage: TypeAlias = (
    BeginMember
    | BeginClient
    | Drain
    | Stop
    | NeedNewTopology
    | HasStarted
    | HasFailed
    | HasEnded
    | EndIdle
    | StartAt
    | Arrived
)


class Surroundings(Protocol):
    """What the actor tells its node. Called in turns of the system dispatcher."""

    def make(
        self,
        pid: Pid,
        record: ActivationRecord,
        guard: Guard,
        chain: tuple[str, ...],
    ) -> Activation:
        """Make an activation, not started.

        `chain` are the identities that wait for it.
        """

    def adopted(
        self,
        topology: Topology,
        closed: tuple[SessionId, ...],
        left: tuple[SessionId, ...],
    ) -> None:
        """The members have changed; those of the `closed` have `left` in good order."""

    def session_changed(
        self, session: SessionId | None, why: str, guard: Guard | None = None
    ) -> None:
        """The node's session began, guarded so, or is over."""

    def session_ended(self) -> None:
        """The node has left in good order."""

    def look_at_turns(self) -> None:
        """Say so where a turn of a Grain does not come back. Called now and then."""


class PlacementActor(DispatchedActor):
    """Carries inputs to the session and hosting machines, and performs effects."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        own: OwnSession,
        observer: Observer,
        hosting: Hosting,
        registry: VirtualActorRegistry[Activation],
        entries: pykka.ActorRef[Any],
        sessions: pykka.ActorRef[Any],
        own_address: Address,
        send: Callable[[Address, Frame], bool],
        answer_here: Callable[[TellClaimed | TellStarted | TellStartRefused], None],
        send_echo: Callable[[Frame], None],
        publish: Callable[[Happened], None],
        node: Surroundings,
        is_dead: Callable[[], bool],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        super().__init__(dispatcher=dispatcher, on_bug=on_bug)
        self._own = own
        self._observer = observer
        self._hosting = hosting
        self._registry = registry
        self._entries = entries
        self._sessions = sessions
        self._own_address = own_address
        self._send = send
        self._answer_here = answer_here
        self._send_echo = send_echo
        self._publish = publish
        self._node = node
        self._is_dead = is_dead
        self._is_member = False
        self._guards: dict[SessionId, Guard] = {}
        self._alarm = Alarm(dispatcher, self._tick)
        # A table, for these are made for every claim: a match asks one class after
        # the other.
        self._performs: dict[type[HostingEffect], Callable[[Any], None]] = {
            Happened: publish,
            ClaimEntry: self._claim_entry,
            GiveUpEntry: self._give_up_entry,
            StartActivation: self._start,
            StopActivation: self._stop_activation,
            TellClaimed: answer_here,
            TellStarted: self._tell_started,
            TellStartRefused: self._tell_start_refused,
            TellOwnerState: self._tell_owner_state,
            SessionSettled: self._settle,
        }

    def on_stop(self) -> None:
        """Leave no timer behind."""
        self._alarm.cancel()

    def on_receive(self, message: PlacementMessage) -> None:
        """Take one input."""
        if self._is_dead():
            return
        now_ns = self.dispatcher.now_ns()
        match message:
            case HasStarted(pid):
                self._host(self._hosting.started(pid))
            case StartAt(
                host, identity, acquisition, revision, _, _, chain, takes_lock
            ):
                self._host(
                    self._hosting.start(
                        identity,
                        acquisition=acquisition,
                        host=host,
                        expected_revision=revision,
                        chain=chain,
                        takes_lock=takes_lock,
                    )
                )
            case HasEnded(pid, version, snapshot):
                self._registry.remove(pid)
                self._host(self._hosting.ended(pid, version=version, snapshot=snapshot))
            case HasFailed(pid, refusal):
                self._registry.remove(pid)
                self._host(self._hosting.start_failed(pid, refusal))
            case EndIdle(idle_for_ns):
                self._end_idle(idle_for_ns, now_ns)
            case Arrived(sender, body):
                self._frame(sender, body, now_ns)
            case NeedNewTopology(epoch):
                self._keep(self._machine.hint(epoch))
            case BeginMember():
                self._is_member = True
                self._keep(self._own.start(now_ns))
            case BeginClient():
                self._keep(self._observer.start(now_ns))
            case Drain(why):
                self._keep(self._own.drain())
                self._host(self._hosting.drain(why))
            case Stop():
                self._stop_node(now_ns)

    @property
    def _machine(self) -> OwnSession | Observer:
        return self._own if self._is_member else self._observer

    def _stop_node(self, now_ns: int) -> None:
        if not self._is_member:
            self._observer.stop()
            self._node.session_ended()
            return
        self._keep(self._own.stop(now_ns))
        self._host(self._hosting.drain("the node is stopping"))

    def _frame(self, sender: Address, body: Frame, now_ns: int) -> None:
        match body:
            case Start(identity, procedure, coordinator, host, revision, _, _, chain):
                self._host(
                    self._hosting.start(
                        Identity.parse(identity),
                        acquisition=Acquisition(SessionId(coordinator), procedure),
                        host=SessionId(host),
                        expected_revision=revision,
                        chain=chain,
                    )
                )
            case AskOwner(identity, session, token, procedure):
                self._host(
                    self._hosting.asked(
                        sender,
                        Identity.parse(identity),
                        session=SessionId(session),
                        fencing_token=token,
                        procedure=procedure,
                        own=self._own.own_open(),
                    )
                )
            case LoopBack(nonce) if sender == self._own_address:
                self._keep(self._own.echoed(nonce, now_ns))
            case LoopBack():
                pass  # nobody else can say that this node is heard
            case TopologyHint(epoch):
                self._keep(self._machine.hint(epoch))
            case Passivate(identity, token):
                self._host(
                    self._hosting.passivate(
                        Identity.parse(identity), fencing_token=token
                    )
                )
            case _:
                raise TypeError(f"no frame for a placement actor: {body!r}")

    # --- time ---

    def _tick(self) -> None:
        if self._is_dead():
            return
        now_ns = self.dispatcher.now_ns()
        self._node.look_at_turns()
        self._keep(self._machine.tick(now_ns))
        self._host(self._hosting.tick(now_ns=now_ns))
        for pid in self._registry.idle(now_ns):
            self._host(
                self._hosting.passivate(pid.identity, fencing_token=pid.fencing_token)
            )
        self._alarm.set(self._hosting.due_ns)
        self._alarm.set(self._registry.due_ns)

    def _end_idle(self, idle_for_ns: int, now_ns: int) -> None:
        for each in self._registry.all():
            is_idle = now_ns - each.last_used_ns >= idle_for_ns
            if is_idle and not each.is_busy():
                self._host(
                    self._hosting.passivate(
                        each.pid.identity, fencing_token=each.pid.fencing_token
                    )
                )

    # --- effects of hosting ---

    def _claimed(
        self, request: Claim, outcome: Claimed | ClaimRefused | Failed
    ) -> None:
        if not self._is_dead():
            now_ns = self.dispatcher.now_ns()
            self._host(self._hosting.claimed(request, outcome, now_ns=now_ns))
            self._alarm.set(self._hosting.due_ns)

    def _given_up(self, request: GiveUp, outcome: Any) -> None:
        if not self._is_dead():
            now_ns = self.dispatcher.now_ns()
            self._host(self._hosting.given_up(request, outcome, now_ns=now_ns))
            self._alarm.set(self._hosting.due_ns)

    def _host(self, effects: Iterable[HostingEffect]) -> None:
        performs = self._performs
        for effect in effects:
            performs[type(effect)](effect)

    def _claim_entry(self, effect: ClaimEntry) -> None:
        self._entries.tell(Perform(effect.request, self._claimed, self.dispatcher))

    def _give_up_entry(self, effect: GiveUpEntry) -> None:
        self._entries.tell(Perform(effect.request, self._given_up, self.dispatcher))

    def _stop_activation(self, effect: StopActivation) -> None:
        found = self._registry.find(effect.pid.identity)
        if found is not None and found.pid == effect.pid:
            found.stop(lapsed=effect.lapsed)

    def _tell_started(self, effect: TellStarted) -> None:
        if effect.to == self._own_address:
            self._answer_here(effect)
            return
        pid = effect.pid
        self._send(
            effect.to,
            Started(pid.identity, effect.procedure, pid.session, pid.fencing_token),
        )

    def _tell_start_refused(self, effect: TellStartRefused) -> None:
        if effect.to == self._own_address:
            self._answer_here(effect)
            return
        refusal = effect.refusal
        self._send(
            effect.to,
            StartRefused(
                effect.identity,
                effect.procedure,
                effect.host,
                refusal.reason,
                refusal.message,
            ),
        )

    def _tell_owner_state(self, effect: TellOwnerState) -> None:
        self._send(
            effect.to,
            OwnerAnswer(
                effect.identity,
                effect.session,
                effect.procedure,
                effect.state,
                effect.fencing_token,
            ),
        )

    def _settle(self, effect: SessionSettled) -> None:
        self._keep(self._own.settle(effect.session, self.dispatcher.now_ns()))

    def _start(self, start: StartActivation) -> None:
        pid = start.pid
        activation = self._node.make(
            pid, start.record, self._guards[pid.session], start.chain
        )
        self._registry.add(activation, now_ns=self.dispatcher.now_ns())
        self._alarm.set(self._registry.due_ns)
        activation.start()

    # --- effects of the session ---

    def _ask_sessions(
        self, request: Any, take: Callable[[Any, int], Iterable[SessionEffect]]
    ) -> None:
        def reply(_: Any, outcome: Any) -> None:
            if not self._is_dead():
                self._keep(take(outcome, self.dispatcher.now_ns()))

        self._sessions.tell(Perform(request, reply, self.dispatcher))

    def _keep(self, effects: Iterable[SessionEffect]) -> None:
        own = self._own
        for effect in effects:
            match effect:
                case OpenSession(record):
                    session = record.session
                    self._ask_sessions(effect, partial(own.opened, session))
                case RenewSession(session, count):
                    self._ask_sessions(effect, partial(own.renewed, session, count))
                case ReadSessions():
                    self._ask_sessions(effect, self._viewed)
                case CloseSession(session, count):
                    self._ask_sessions(effect, partial(own.closed, session, count))
                case WriteMembers():
                    self._ask_sessions(effect, partial(self._members_written, effect))
                case SendEcho(nonce):
                    self._send_echo(LoopBack(nonce))
                case SessionBegan(session, guard):
                    self._guards[session] = guard
                    self._host(self._hosting.begin(session))
                    self._node.session_changed(session, "", guard)
                case SessionLapsed(session, why):
                    self._node.session_changed(None, why)
                    self._host(self._hosting.lapse(session, why))
                    self._guards.pop(session, None)
                case SessionEnded():
                    self._node.session_ended()
                case TopologyAdopted(topology, closed, left):
                    self._node.adopted(topology, closed, left)
                case Happened():
                    self._publish(effect)
        self._alarm.set(self._machine.due_ns)

    def _viewed(self, outcome: Any, now_ns: int) -> Iterable[SessionEffect]:
        return self._machine.viewed(outcome, now_ns)

    def _members_written(
        self, request: WriteMembers, outcome: Any, now_ns: int
    ) -> Iterable[SessionEffect]:
        effects = self._own.members_written(outcome, now_ns)
        is_ours = (
            isinstance(outcome, Topology)
            and outcome.epoch == request.expected_epoch + 1
            and outcome.members == request.members
        )
        if is_ours:
            # Let the others read it at once, rather than at their next renewal.
            for address in sorted({m.address for m in self._own.topology.members}):
                self._send(address, TopologyHint(outcome.epoch))
        return effects
