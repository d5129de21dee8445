"""A node: one member or client of a cluster, inside a program."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Protocol, Self

import pykka
from msgspec.structs import astuple

from actors.activation import Activation, GrainActivation, Mail
from actors.coordinator import Arrived, PartitionCoordinator, TopologyChanged
from actors.dispatch import DispatchedRef
from actors.engine import EmbeddedEngine, Engine, Settings, ThreadEngine
from actors.engine_url import open_engine
from actors.event_stream import EventStream
from actors.future import BlockingInGrain, Future, must_not_block
from actors.grain import encode_rejected
from actors.kind import Kind
from actors.log import log
from actors.outbox import Outbox, dropped
from actors.placement_actor import (
    BeginClient,
    BeginMember,
    Drain,
    EndIdle,
    HasEnded,
    HasFailed,
    HasStarted,
    NeedNewTopology,
    PlacementActor,
    Stop,
)
from actors.postbox import Postbox
from actors.reference import TIMEOUT_MAX_S, Verbs, kind_among, timeout_of
from actors.store_actor import Perform
from actors.threaded import ThreadedActivation
from messages import payload as payloads
from messages.frames import (
    Answer,
    AskHolder,
    Bounce,
    Deliver,
    Failure,
    Find,
    FindRefused,
    Found,
    Frame,
    HolderAnswer,
    LoopBack,
    Mark,
    Marked,
    OwnerAnswer,
    Redirect,
    Refused,
    Resolve,
    Resolved,
    Started,
    StartRefused,
)
from placement.claim import Claims
from placement.contracts import Failed, Save, Saved, Stale
from placement.delivery import Deliveries
from placement.entry import ActivationRecord, Pid
from placement.errors import (
    HandlerFailed,
    NotReady,
    OutcomeUnknown,
    PlacementError,
    Refusal,
    Rejected,
    text_of,
)
from placement.event import Happened
from placement.hosting import Hosting
from placement.identity import Identity
from placement.lease import Guard
from placement.partition import PartitionTable
from placement.pidcache import PidCache, PlacementResolution
from placement.registry import VirtualActorRegistry
from placement.session import Observer, OwnSession
from placement.topology import Address, Member, SessionId, Topology, address_of
from placement.value import value

#: So many members are named to a client that asks: the others it hears of by
#: redirects.
FOUND_MAX = 64
STOP_S = 10.0
START_S = 30.0


class Witness(Protocol):
    """Sees every start, handled message and stop; for tests and the command."""

    def started(self, pid: Pid) -> None:
        """User code of `pid` is about to be entered for the first time."""

    def handled(self, pid: Pid) -> None:
        """`pid` has handled a message."""

    def stopped(self, pid: Pid) -> None:
        """User code of `pid` has been left for the last time."""

    def killed(self, node: str) -> None:
        """All activations on `node` ended with it."""


@value(kw_only=True, sealed=True)
class ActivationSnapshot:
    """One activation of a node, when the snapshot was taken."""

    identity: Identity
    fencing_token: int
    session: SessionId


@value(kw_only=True, sealed=True)
class Snapshot:
    """A node's state as it was when asked for; it does not change.

    `partitions` is how many each member owns; `stuck` names the Grain whose
    turn has not come back for longer than the margin.
    """

    node: str
    state: str
    epoch: int
    members: tuple[Member, ...]
    partitions: Mapping[str, int]
    activations: tuple[ActivationSnapshot, ...]
    stuck: tuple[Identity, ...]
    observed_at_ms: int


class _Remote:
    """The origin of mails that came from another node, each in a `Deliver`."""

    __slots__ = ("_publish", "_send", "address")

    def __init__(
        self,
        send: Callable[..., bool],
        publish: Callable[[Happened], None],
        address: Any,
    ) -> None:
        self._send = send
        self._publish = publish
        self.address = address

    def answered(self, mail: Mail, value: Any, pid: Pid) -> None:
        carried = mail.carried
        self._send(self.address, Answer(carried.message_id, value, carried.token))

    def failed(self, mail: Mail, error: PlacementError) -> None:
        message_id = mail.carried.message_id
        if message_id:
            self._send(self.address, failure_of(message_id, error))
        elif not error.may_have_happened:
            identity = Identity.parse(mail.carried.identity)
            self._publish(dropped(identity, Refusal.of(error)))

    def bounced(self, mail: Mail, pid: Pid) -> None:
        self._send(self.address, _bounce_of(mail.carried))


def _bounce_of(frame: Deliver) -> Bounce:
    """It goes back with all that it said."""
    return Bounce(*astuple(frame))


def failure_of(message_id: int, error: PlacementError) -> Failure:
    """The frame under which `error` travels."""
    if isinstance(error, Rejected):
        try:
            type_name, text, fields = encode_rejected(error)
            fields = payloads.copy(fields)
        except Exception as bad:
            error = HandlerFailed(error.type_name, f"its fields: {bad}")
        else:
            return Failure(
                message_id, "Rejected", text_of(text), text_of(type_name), fields
            )
    type_name = error.type_name if isinstance(error, HandlerFailed) else ""
    text = text_of(error.message)
    return Failure(message_id, type(error).__name__, text, type_name, {})


def check_name(name: str) -> None:
    """Refuse what cannot name a node.

    Raises:
        BadIdentity: it could not name an actor either.
        ValueError: it would not tell its sessions from another node's.
    """
    Identity("node", name)
    if "#" in name or "." in name:
        raise ValueError(f"node name {name!r} must be without # and .")


def check_weight(weight: float) -> None:
    """Refuse a share of the partitions that is none.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"weight is a number, not a {type(weight).__name__}")  # noqa: TRY004
    if not 0 < weight < math.inf:
        raise ValueError(f"weight must be finite and above 0, not {weight}")


class _NodeSender:
    """Sends on behalf of the program around the node."""

    def __init__(self, outbox: Outbox, make_future: Callable[[], Future]) -> None:
        self._outbox = outbox
        self._make_future = make_future
        self.ask_timeout = outbox.ask_timeout

    def ask(
        self,
        identity: Identity,
        payload: Any,
        *,
        timeout: float | None,
        request_id: str,
    ) -> Future:
        copy = payloads.copy(payload)
        future = self._make_future()
        self._outbox.send(
            identity,
            copy,
            future=future,
            timeout=timeout,
            request_id=request_id or "",
            chain=(),
        )
        return future

    def tell(self, identity: Identity, payload: Any, *, request_id: str) -> None:
        self._outbox.tell(identity, payloads.copy(payload), request_id)

    def may_block(self) -> None:
        if must_not_block():
            raise BlockingInGrain


class _LivingWitness:
    """Sees what a node's activations handle, while the node lives."""

    def __init__(self, node: "PlacementNode", witness: Witness) -> None:
        self._node = node
        self._witness = witness

    def handled(self, pid: Pid) -> None:
        if not self._node.is_dead:
            self._witness.handled(pid)


class _NodeHost:
    """What a node offers its activations."""

    def __init__(self, node: "PlacementNode") -> None:
        self._node = node
        self.current: Activation | None = None
        self.dispatcher = node._grains  # noqa: SLF001
        self.random = node._engine.random  # noqa: SLF001
        self.now_ns = node._engine.clock.now_ns  # noqa: SLF001
        self.wall_ms = node._engine.clock.wall_ms  # noqa: SLF001
        self.publish = node._publish  # noqa: SLF001
        self.send = node._outbox.send  # noqa: SLF001
        self.ask_timeout = node._outbox.ask_timeout  # noqa: SLF001
        self.kind_of = node._kind_of  # noqa: SLF001
        self.class_of = node._class_of  # noqa: SLF001
        self._witness = node._witness  # noqa: SLF001
        self.witness = (
            None if self._witness is None else _LivingWitness(node, self._witness)
        )

    def _tell(self, message: Any) -> None:
        self._node._tell_placement(message)  # noqa: SLF001

    def save(
        self, request: Save, reply: Callable[[Save, Saved | Stale | Failed], None]
    ) -> None:
        self._node._engine.entries.tell(  # noqa: SLF001
            Perform(request, reply, self.dispatcher)
        )

    def begun(self, pid: Pid) -> None:
        if self._witness is not None:
            self._witness.started(pid)

    def started(self, pid: Pid) -> None:
        self._tell(HasStarted(pid))

    def start_failed(self, pid: Pid, refusal: Refusal) -> None:
        if self._witness is not None:
            self._witness.stopped(pid)
        self._tell(HasFailed(pid, refusal))

    def ended(self, pid: Pid, version: int, snapshot: bytes | None) -> None:
        if self._witness is not None and not self._node.is_dead:
            self._witness.stopped(pid)
        self._tell(HasEnded(pid, version, snapshot))

    def seal(self, activation: Activation) -> None:
        with self._node._outbox.lock:  # noqa: SLF001
            activation.bounce_all()

    def take_back(self, activation: Activation, mail: Mail) -> bool:
        with self._node._outbox.lock:  # noqa: SLF001
            return activation.withdraw(mail)


class PlacementNode(Verbs):
    """One node: `start_member` hosts and resolves, `start_client` only resolves.

    `kinds` maps the name of a kind to a class or `Kind`. `engine` is a URL such as
    nats://host:4222, by which nodes of many processes are one cluster; without one
    the node is alone, over `store` (the memory unless given). Settings are those of
    `Settings`.

    Raises:
        BadKind: a kind is none, or its `handler_max` is above the margin.
        ValueError: a setting makes no sense, or is another than the cluster's; the
            engine or store cannot be.
        NatsFailure: the engine cannot be reached, or does not let us in.
        StoreFailure: the store cannot be opened now.
    """

    #: What it is made of. A simulation puts variants in the place of these.
    hosting_type: type[Hosting] = Hosting
    claims_type: type[Claims] = Claims
    session_type: type[OwnSession] = OwnSession
    deliveries_type: type[Deliveries] = Deliveries
    cache_type: type[PidCache] = PidCache
    outbox_type: type[Outbox] = Outbox
    postbox_type: type[Postbox] = Postbox
    coordinator_type: type[PartitionCoordinator] = PartitionCoordinator
    placement_type: type[PlacementActor] = PlacementActor
    activation_type: type[GrainActivation] = GrainActivation

    def __init__(
        self,
        name: str,
        *,
        kinds: Mapping[str, Kind | type] | None = None,
        engine: Engine | str | None = None,
        store: str | None = None,
        weight: float = 1.0,
        witness: Witness | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        check_name(name)
        check_weight(weight)
        self.name = name
        self.settings = settings = settings or Settings(**options)
        self._kinds = {kind: Kind.of(each) for kind, each in (kinds or {}).items()}
        for kind, each in self._kinds.items():
            Identity(kind, "x")
            each.check(settings.margin_s)
        self._strategies = {
            kind: each.strategy
            for kind, each in self._kinds.items()
            if each.strategy is not None
        }
        self._own_engine: ThreadEngine | None = None
        if isinstance(engine, str):
            engine = self._own_engine = open_engine(engine, store, settings)
        elif engine is None:
            engine = self._own_engine = EmbeddedEngine(
                store or "memory://", partitions=settings.partitions
            )
        self._engine: Engine = engine
        self._witness = witness
        self.is_dead = False
        self._state = "new"
        self._changed = self._engine.condition()
        self._session: SessionId | None = None
        self._table: PartitionTable | None = None
        # That by which messages are sent already: who waits for it sends at once.
        self._adopted: PartitionTable | None = None
        self._has_left = False
        self._is_member = False
        self._is_ending = False
        self._is_over = False
        self._stuck_since_ns = 0
        self._why_not = "the node has not started"
        clock = self._engine.clock
        self.events = EventStream(
            name, clock.wall_ms, lambda: self.epoch, self._engine.start_reader
        )
        self._publish = self.events.publish
        self.address = self._engine.address(name)
        self._grains = self._engine.dispatcher(f"grains-{name}")
        self._registry: VirtualActorRegistry[Activation] = VirtualActorRegistry()
        self._postbox = self.postbox_type(
            cluster=settings.cluster,
            address=self.address,
            transport=self._engine.transport,
            dispatcher=self._engine.system,
            handle=self._frame,
            publish=self._publish,
            epoch=lambda: self.epoch,
        )
        self._linger_ns = round(
            self._engine.transport.linger_s(settings.renew_every_s) * 1e9
        )
        self._outbox = self.outbox_type(
            own=self.address,
            dispatcher=self._engine.system,
            deliveries=self.deliveries_type(
                self.cache_type(
                    ttl_ns=round(settings.cache_ttl * 1e9), size_max=settings.cache_size
                )
            ),
            registry=self._registry,
            send=self._postbox.send,
            need_topology=self._need_topology,
            publish=self._publish,
            ask_timeout=settings.ask_timeout,
            linger_ns=self._linger_ns,
        )
        self._known, self._now_ns = self._outbox.known, clock.now_ns
        self._sender = _NodeSender(self._outbox, self._engine.future)
        self._host = _NodeHost(self)
        self._hosting = hosting = self.hosting_type(kinds=frozenset(self._kinds))
        self._claims = self.claims_type(
            choose_host=self._choose_host,
            find_here=hosting.serving,
            has_strategy=lambda identity: identity.kind in self._strategies,
        )
        self._coordinator: DispatchedRef = self.coordinator_type.start(
            dispatcher=self._engine.system,
            claims=self._claims,
            own=self.address,
            entries=self._engine.entries,
            send=self._postbox.send,
            start_here=lambda start: self._placement.hand(start),  # noqa: PLW0108  made below
            need_topology=self._need_topology,
            publish=self._publish,
            is_dead=lambda: self.is_dead,
            on_bug=self._break,
        )
        renew_ns = round(settings.renew_every_s * 1e9)
        self._placement: DispatchedRef = self.placement_type.start(
            dispatcher=self._engine.system,
            own=self.session_type(
                self.address,
                kinds=self._kinds,
                weight=weight,
                ttl_ns=round(settings.ttl * 1e9),
                renew_every_ns=renew_ns,
                margin_ns=round(settings.margin_s * 1e9),
            ),
            observer=Observer(renew_every_ns=renew_ns),
            hosting=hosting,
            registry=self._registry,
            entries=self._engine.entries,
            sessions=self._engine.sessions,
            own_address=self.address,
            send=self._postbox.send,
            answer_here=self._coordinator.hand,
            send_echo=self._postbox.send_echo,
            publish=self._publish,
            node=self,
            is_dead=lambda: self.is_dead,
            on_bug=self._break,
        )
        self._guards: dict[SessionId, Guard] = {}
        #: Who takes a frame; the placement actor what is not here.
        self._takes: dict[type[Frame], Callable[[Address, Any], None]] = {
            Deliver: self._deliver,
            Answer: self._answered,
            Failure: self._failed,
            Resolved: self._to_outbox,
            Redirect: self._to_outbox,
            Refused: self._to_outbox,
            Bounce: self._outbox.on_bounce,
            LoopBack: self._echoed,
            Mark: self._mark,
            Marked: self._marked,
            Find: self._find,
            Resolve: self._to_coordinator,
            Started: self._to_coordinator,
            StartRefused: self._to_coordinator,
            OwnerAnswer: self._to_coordinator,
            AskHolder: self._to_coordinator,
            HolderAnswer: self._to_coordinator,
        }

    # --- life ----------------------------------------------------------------

    @property
    def state(self) -> str:
        """One of new, starting, member, client, draining, stopping, or how it ended.

        It ends as stopped, killed or, by a bug, broken.
        """
        return self._state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_member(self, *, timeout: float = START_S) -> None:
        """Open a session, join, and host; returns when this node is a member.

        Raises:
            NotReady: it was started before, or did not become one in time.
            StoreInUse: another process lives in the store of this node's own.
        """
        self.begin_member(timeout=timeout)
        self._await_start(lambda: self.finds(self._session), "member", timeout)

    def begin_member(self, *, timeout: float = START_S) -> None:
        """Begin to start as a member, without waiting until it is one.

        Raises:
            NotReady: it was started before.
            StoreInUse: another process lives in the store of this node's own.
        """
        self._start(BeginMember(), timeout)

    def start_client(self, *, timeout: float = START_S) -> None:
        """Resolve and send, and never host; returns when members are known.

        Raises:
            NotReady: it was started before, or the store did not answer in time.
            StoreInUse: another process lives in the store of this node's own.
        """
        self._start(BeginClient(), timeout)
        self._await_start(lambda: self._adopted is not None, "client", timeout)

    def _start(self, message: Any, timeout: float) -> None:
        if self._state != "new":
            raise NotReady(f"{self.name} is {self._state}, a node starts once")
        if self._own_engine is not None:
            self._own_engine.take_over(timeout_s=timeout)
        self._is_member = isinstance(message, BeginMember)
        self._postbox.open(is_member=self._is_member)
        self._state = "starting"
        self._outbox.open()
        self._tell_placement(message)

    def begin_client(self, *, timeout: float = START_S) -> None:
        """Begin to start as a client, without waiting until members are known.

        Raises:
            NotReady: it was started before.
        """
        self._start(BeginClient(), timeout)

    def _await_start(
        self, fact: Callable[[], bool], state: str, timeout: float
    ) -> None:
        self.wait_for(lambda: self._is_ending or self.is_dead or fact(), timeout)
        with self._changed:
            if self._is_ending or self.is_dead:
                raise NotReady(f"{self.name} was ended before it had started")
            if self._state == "starting":
                self._state = state

    def begin_stop(self) -> None:
        """Begin to stop: `has_left` says when it has left in good order."""
        with self._changed:
            self._state = "stopping"
        self._tell_placement(Stop())

    @property
    def has_left(self) -> bool:
        """Whether nothing of it is held any more, after `begin_stop`."""
        return self._has_left

    def leave_wire(self) -> None:
        """Be sent nothing more; what has arrived already is handled."""
        self._postbox.leave()

    def hosted(self) -> tuple[Pid, ...]:
        """What it has claimed and not given up, whatever goes on with it."""
        return tuple(pid for _, _, pid in self._hosting.states() if pid is not None)

    def waiting(self) -> tuple[tuple[str, Identity], ...]:
        """What is under way here: where nothing is asked for it comes to an end."""
        return (
            *(
                (state, identity)
                for identity, state, _ in self._hosting.states()
                if state != "active"
            ),
            *(("claim", each) for each in self._claims.waiting()),
            *(("message", each) for each in self._outbox.waiting()),
        )

    def wait_for(self, fact: Callable[[], bool], timeout: float) -> None:
        """Wait until `fact` holds of what this node knows of the cluster.

        Raises:
            NotReady: it did not within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(fact, min(timeout, TIMEOUT_MAX_S)):
                raise NotReady(f"{self.name}: {self._why_not} after {timeout} s")

    def finds(self, session: SessionId | None) -> bool:
        """Whether what is sent from here may go to `session`, as to a member."""
        table = self._adopted
        return session is not None and table is not None and session in table.topology

    def drain(self) -> None:
        """Own no partitions, start nothing new and end what runs; stay a member."""
        with self._changed:
            self._state = "draining"
        self._publish(Happened(kind="placement", name="Draining"))
        self._tell_placement(Drain(f"{self.name} is draining"))

    def stop(self, *, timeout: float = STOP_S) -> None:
        """Passivate, give back, leave; bounded by `timeout` seconds, then as killed.

        A second call waits, as long, until the first is done.

        Raises:
            BlockingInGrain: a Grain asks for it, whose own turn it would wait for.
        """
        self._sender.may_block()
        if not self._begins_to_end(timeout):
            return
        until_ns = self._until_ns(timeout)
        if self.is_dead:
            self._end_killed(until_ns)
            return
        was_started = self._state != "new"
        if was_started:
            self._leave(until_ns)
        self._state, self._why_not = "stopped", f"{self.name} has stopped"
        self._close(until_ns)

    def kill(self, *, timeout: float = STOP_S) -> None:
        """End as a crash would: no goodbye, no release, nothing more is sent.

        Threads are waited for, at most `timeout` seconds in all. A stop that is
        under way is cut short.
        """
        if self._state in {"stopped", "killed"}:
            return
        self._silence()
        if self._begins_to_end(timeout):
            self._end_killed(self._until_ns(timeout))

    def _begins_to_end(self, timeout: float) -> bool:
        """Whether this call ends the node; where another does, wait for that."""
        with self._changed:
            if not self._is_ending:
                self._is_ending = True
                self._changed.notify_all()
                return True
            if not (self._engine.system.is_current() or self._grains.is_current()):
                limit = max(0.0, min(timeout, TIMEOUT_MAX_S))
                self._changed.wait_for(lambda: self._is_over, limit)
            return False

    def _until_ns(self, timeout: float) -> int:
        seconds = max(0.0, min(timeout, TIMEOUT_MAX_S))
        return self._engine.clock.now_ns() + round(seconds * 1e9)

    def _left_s(self, until_ns: int) -> float:
        return max(0.0, (until_ns - self._engine.clock.now_ns()) / 1e9)

    def _leave(self, until_ns: int) -> None:
        """End the session in good order, if there is time."""
        self.begin_stop()
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_left or self.is_dead, self._left_s(until_ns)
            )
        if not self._has_left:
            self._publish(Happened(kind="placement", name="StopTimedOut"))
            self._die(until_ns)
        is_awaited = self._has_left and self._is_member
        if is_awaited and not self._engine.system.is_current():
            self._linger(until_ns)
        # What has arrived already bounces; nothing else arrives.
        self._postbox.leave()
        if self._engine.system.is_current():
            return
        handled = self._engine.future()
        self._postbox.handled(handled)
        with suppress(OutcomeUnknown):
            handled.get(timeout=self._left_s(until_ns))

    def _linger(self, until_ns: int) -> None:
        """Give back what is still sent here, until others know that it has left."""
        wanted_s = self._engine.transport.linger_s(self.settings.renew_every_s)
        with self._changed:
            self._changed.wait_for(
                lambda: self.is_dead, min(wanted_s, self._left_s(until_ns))
            )

    def _end_killed(self, until_ns: int) -> None:
        self._die(until_ns)
        self._state, self._why_not = "killed", f"{self.name} was killed"
        self._close(until_ns)

    def _silence(self) -> None:
        """From now on nothing leaves, and no user code is entered. Waits for nobody."""
        self.is_dead = True
        self._postbox.kill()
        for guard in tuple(self._guards.values()):
            guard.shut()
        self._grains.kill()
        with self._changed:
            self._changed.notify_all()

    def _die(self, until_ns: int) -> None:
        self._silence()
        self._grains.stop(self._left_s(until_ns))
        if self._witness is not None:
            self._witness.killed(self.name)

    def _break(self, error: BaseException) -> None:
        """A part of this node has failed by a bug: end as a crash would.

        Others take over when its session is over; whoever asks here hears why.
        """
        if self.is_dead:
            return
        self._publish(
            Happened(
                kind="placement",
                name="Broken",
                reason=f"a bug: {type(error).__name__}: {error}",
            )
        )
        self._state, self._why_not = "broken", f"{self.name} is broken by a bug"
        self._silence()
        self._outbox.close(self._why_not)
        if self._witness is not None:
            self._witness.killed(self.name)
        self._engine.bug(error)

    def _close(self, until_ns: int) -> None:
        self._outbox.close(self._why_not)
        self._postbox.close()
        # Told, not waited for: the system dispatcher outlives the node.
        self._coordinator.stop(block=False)
        self._placement.stop(block=False)
        self._grains.stop(self._left_s(until_ns))
        for each in self._registry.all():
            each.abandon()
        self._publish(Happened(kind="placement", name="Stopped"))
        self.events.close(lambda: self._left_s(until_ns))
        if self._own_engine is not None:
            self._own_engine.close(timeout_s=self._left_s(until_ns))
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    # --- verbs ---------------------------------------------------------------

    def resolve(
        self, identity: str, *, timeout: float | None = None
    ) -> PlacementResolution:
        """Where `identity` is hosted; it is started if it is nowhere.

        Raises:
            BadIdentity: it is none.
            ValueError: `timeout` is none.
            PlacementError: it cannot be, by the reason's own class.
        """
        if timeout is None:
            try:
                known = self._known(identity, self._now_ns())
            except TypeError:  # no text at all: what is below says so
                known = None
            if known is not None:
                return known
        self._sender.may_block()
        timeout = timeout_of(timeout)
        limit = self.settings.ask_timeout if timeout is None else timeout
        future = self.seek(identity, timeout=timeout)
        pid = future.get(timeout=limit + 2)
        resolution = PlacementResolution(
            identity=pid.identity,
            pid=pid,
            owner=pid.session,
            locality="local" if pid.address == self.address else "remote",
            fencing_token=pid.fencing_token,
            epoch=self.epoch,
            observed_at_ms=self._engine.clock.wall_ms(),
        )
        self._outbox.keep(resolution)
        return resolution

    def seek(self, identity: str, *, timeout: float | None = None) -> Future:
        """A future of the `Pid` of `identity`, which is started if it is nowhere.

        Raises:
            BadIdentity: it is none.
            ValueError: `timeout` is none.
        """
        timeout = timeout_of(timeout)
        future = self._engine.future()
        self._outbox.seek(Identity.parse(identity), timeout, future)
        return future

    def peek(self, identity: str) -> Pid | None:
        """Where messages to `identity` went last; nothing is asked, and none started.

        Raises:
            BadIdentity: it is none.
        """
        return self._outbox.peek(Identity.parse(identity))

    def forget(self, pid: Pid) -> bool:
        """Drop the reference from the cache; false where it was not kept."""
        return self._outbox.forget(pid)

    def forget_session(self, session: SessionId) -> tuple[Identity, ...]:
        """Drop the references to a session; which identities they were of."""
        return self._outbox.forget_session(session)

    def refresh(self) -> None:
        """Read the members anew, soon."""
        self._need_topology(0)

    def passivate_idle(self, idle_for: float) -> None:
        """End the activations here that were not used for `idle_for` seconds."""
        self._tell_placement(EndIdle(round(idle_for * 1e9)))

    @property
    def epoch(self) -> int:
        """That of the newest topology known; 0 while none is."""
        return 0 if self._table is None else self._table.epoch

    @property
    def topology(self) -> Topology:
        """The newest known."""
        return Topology() if self._table is None else self._table.topology

    @property
    def session(self) -> SessionId | None:
        """This node's session; none while it has none."""
        return self._session

    def snapshot(self) -> Snapshot:
        """What this node knows now. Immutable."""
        table = self._table
        stuck, _ = self._stuck()
        counts = {} if table is None else table.counts()
        return Snapshot(
            node=self.name,
            state=self._state,
            epoch=self.epoch,
            members=() if table is None else table.topology.members,
            partitions=MappingProxyType({str(s): count for s, count in counts.items()}),
            activations=tuple(
                ActivationSnapshot(
                    identity=each.pid.identity,
                    fencing_token=each.pid.fencing_token,
                    session=each.pid.session,
                )
                for each in self._registry.all()
            ),
            stuck=() if stuck is None else (stuck.identity,),
            observed_at_ms=self._engine.clock.wall_ms(),
        )

    def _stuck(self) -> tuple[Pid | None, int]:
        """Whose turn has not come back for longer than the margin, and since when."""
        busy_ns, current = self._grains.busy_since_ns, self._host.current
        if not busy_ns or current is None:
            return None, 0
        if self._engine.clock.now_ns() - busy_ns <= self.settings.margin_s * 1e9:
            return None, 0
        return current.pid, busy_ns

    def _kind_of(self, actor_class: type) -> str:
        return kind_among(
            {kind: each.actor_class for kind, each in self._kinds.items()}, actor_class
        )

    def _class_of(self, kind: str) -> type | None:
        found = self._kinds.get(kind)
        return None if found is None else found.actor_class

    # --- what its parts call -------------------------------------------------

    def _tell_placement(self, message: Any) -> None:
        try:
            self._placement.tell(message)
        except pykka.ActorDeadError:
            return  # it has stopped: nobody needs to know any more

    def _need_topology(self, epoch: int) -> None:
        self._tell_placement(NeedNewTopology(epoch))

    def _choose_host(self, identity: Identity, table: PartitionTable) -> Member:
        default = table.host_of(identity)
        strategy = self._strategies.get(identity.kind) if self._strategies else None
        if strategy is None:
            return default
        eligible = tuple(
            member for member in table.topology.members if member.hosts(identity.kind)
        )
        try:
            chosen = strategy(identity, eligible, table.owner_of(identity))
            if chosen in eligible:
                return chosen
            reason = f"it chose {chosen!r}, which is not eligible"
        except Exception as error:  # user code may raise anything
            log.error("a strategy raised", identity=str(identity), exc_info=error)
            reason = f"{type(error).__name__}: {error}"
        self._publish(
            Happened(
                kind="placement",
                name="StrategyFailed",
                identity=identity,
                reason=reason,
            )
        )
        return default

    def _frame(self, sender: Any, body: Frame) -> None:
        if self.is_dead:
            return
        self._takes.get(type(body), self._to_placement)(sender, body)

    def _to_outbox(self, _: Address, body: Resolved | Redirect | Refused) -> None:
        self._outbox.on_resolution(body)

    def _to_coordinator(self, sender: Address, body: Frame) -> None:
        self._coordinator.hand(Arrived(sender, body))

    def _to_placement(self, sender: Address, body: Frame) -> None:
        self._placement.hand(Arrived(sender, body))

    def _echoed(self, sender: Address, body: LoopBack) -> None:
        # A turn of its own, urgent where the echo is this node's.
        self._placement.hand_urgent(Arrived(sender, body))

    def _answered(self, _: Address, body: Answer) -> None:
        self._outbox.on_answer(body)

    def _failed(self, _: Address, body: Failure) -> None:
        self._outbox.on_failure(body)

    def _marked(self, _: Address, body: Marked) -> None:
        self._outbox.on_marked(Identity.parse(body.identity), body.mark)

    def _mark(self, sender: Address, body: Mark) -> None:
        # All that came before it on this way has been handled.
        self._postbox.send(sender, Marked(body.identity, body.token, body.mark))

    def _find(self, sender: Address, body: Find) -> None:
        self._postbox.send(sender, self._members_for(body.request))

    def _members_for(self, request: int) -> Found | FindRefused:
        """Members that a client may begin with, this one first if it can be."""
        table, session = self._adopted, self._session
        if table is None or not self.finds(session):
            return FindRefused(request, "NotReady", f"{self.name}: {self._why_not}")
        owners = [member.session for member in table.topology.owners()]
        if not owners:
            return FindRefused(request, "NotReady", "every member is draining")
        # Each begins elsewhere, so that clients do too.
        at = bisect_left(owners, session or "")
        ordered = (*owners[at:], *owners[:at])
        return Found(request, table.epoch, ordered[:FOUND_MAX])

    def _tell(self, actor: pykka.ActorRef[Any], message: Any) -> None:
        try:
            actor.tell(message)
        except pykka.ActorDeadError:
            return

    def _deliver(self, sender: Any, frame: Deliver) -> None:
        is_ask = frame.message_id != 0
        # Nobody waits for a tell: it may be in the mailbox as long as it takes.
        handle_by_ns = 0
        if is_ask:
            handle_by_ns = self._now_ns() + frame.remaining_ms * 1_000_000
        origin = _Remote(self._postbox.send, self._publish, sender)
        mail = Mail(
            frame.payload,
            frame.request_id,
            frame.chain,
            handle_by_ns,
            is_ask,
            origin,
            carried=frame,
        )
        # Under the lock: whoever seals the mailbox has given all back before a mark
        # that was sent after it is.
        with self._outbox.lock:
            # An identity is the text that it is.
            found = self._registry.find(frame.identity)  # type: ignore[arg-type]
            if (
                found is None
                or found.pid.fencing_token != frame.token
                or not found.deliver(mail)
            ):
                self._postbox.send(sender, _bounce_of(frame))

    # --- what the placement actor tells (system dispatcher) -------------------

    def make(
        self,
        pid: Pid,
        record: ActivationRecord,
        guard: Guard,
        chain: tuple[str, ...],
    ) -> Activation:
        """An activation of `pid`, not started."""
        kind = self._kinds[pid.identity.kind]
        activation_class: Any = (
            self.activation_type if kind.is_threaded is False else ThreadedActivation
        )
        made: Activation = activation_class(
            pid, record, guard=guard, kind=kind, host=self._host, chain=chain
        )
        return made

    def session_changed(
        self, session: SessionId | None, why: str, guard: Guard | None = None
    ) -> None:
        """The session began, or is over."""
        # That of a session that is over has been shut, for good.
        self._guards.clear()
        if session is not None and guard is not None:
            self._guards[session] = guard
        with self._changed:
            self._session = session
            self._why_not = why or "it is not a member yet"
            self._changed.notify_all()
        self._tell(
            self._coordinator, TopologyChanged(session, self._table, (), self._why_not)
        )

    def adopted(
        self,
        topology: Topology,
        closed: tuple[SessionId, ...],
        left: tuple[SessionId, ...],
    ) -> None:
        """The members have changed, or sessions have closed."""
        table = self._engine.table(topology)
        is_new = self._table is None or self._table.epoch != table.epoch
        self._table = table
        if is_new:
            self._publish(
                Happened(
                    kind="placement",
                    name="TopologyAdopted",
                    reason=f"{len(topology.members)} members",
                )
            )
        addresses = {member.address for member in topology.members}
        for over in closed:
            if address_of(over) not in addresses:
                self._postbox.forget(address_of(over))
                if self._linger_ns:
                    # Again when it surely says nothing more.
                    at_ns = self._engine.clock.now_ns() + 2 * self._linger_ns
                    self._engine.system.call_at(at_ns, self._forget, address_of(over))
        self._outbox.adopt(table, closed, left)
        with self._changed:
            self._adopted = table
            if self._state == "starting" and self.finds(self._session):
                self._state = "member"
            self._changed.notify_all()
        self._tell(
            self._coordinator,
            TopologyChanged(self._session, table, closed, self._why_not),
        )

    def _forget(self, address: Address) -> None:
        table = self._adopted
        members = () if table is None else table.topology.members
        if all(member.address != address for member in members):
            self._postbox.forget(address)

    def look_at_turns(self) -> None:
        """Say once of each turn that it does not come back."""
        pid, since_ns = self._stuck()
        if pid is not None and since_ns != self._stuck_since_ns:
            self._stuck_since_ns = since_ns
            self._publish(
                Happened(
                    kind="actor",
                    name="Stuck",
                    identity=pid.identity,
                    session=pid.session,
                    token=pid.fencing_token,
                    reason="its turn has not come back for longer than the margin",
                )
            )

    def session_ended(self) -> None:
        """The node has left in good order."""
        with self._changed:
            self._has_left = True
            self._changed.notify_all()
