"""The core's machines together, over a store and a network that misbehave.

Nodes, messages and store calls are steps that hypothesis orders as it likes:
delayed, lost, repeated; nodes crash, pause and start again. User code of an
identity counts as live from its start to its end, while its guard is open.
"""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from actors.store_memory import MemoryStore
from placement.claim import (
    AcquireLock,
    AnswerPid,
    AskHolderSession,
    AskOwnerSession,
    Claims,
    NeedTopology,
    RedirectTo,
    ReleaseLock,
    Requester,
    StartAt,
    TellHolderState,
)
from placement.contracts import Failed, Released
from placement.entry import Acquisition, Pid
from placement.hosting import (
    ClaimEntry,
    GiveUpEntry,
    Hosting,
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
from placement.partition import PartitionTable
from placement.session import (
    CloseSession,
    OpenSession,
    OwnSession,
    ReadSessions,
    RenewSession,
    SendEcho,
    SessionBegan,
    SessionLapsed,
    StoreTrouble,
    TopologyAdopted,
    WriteMembers,
)
from placement.topology import Address, Member, SessionId, Topology, address_of
from tests.placement.builders import MS, S

IDENTITIES = (Identity("cart", "1"), Identity("cart", "2"))
#: Is hosted by the owner of its partition; the other by whoever is the last member.
DEFAULT, _ = IDENTITIES
TTL, EVERY, MARGIN = 5 * S, S, S


def choose_host(identity: Identity, table: PartitionTable) -> Member:
    """The host of each identity."""
    if identity == DEFAULT:
        return table.host_of(identity)
    return table.topology.members[-1]


class Node:
    """One incarnation: its machines, and what runs on it."""

    def __init__(self, world: "World", name: str, boot: int, offset: int) -> None:
        self.world = world
        self.address = Address(f"{name}.{boot}")
        self.offset = offset
        self.is_paused = False
        self.is_dead = False
        self.own = OwnSession(
            self.address,
            kinds=["cart"],
            weight=1.0,
            ttl_ns=TTL,
            renew_every_ns=EVERY,
            margin_ns=MARGIN,
        )
        self.hosting = Hosting(kinds=frozenset({"cart"}))
        self.claims = Claims(
            choose_host=choose_host,
            find_here=self.hosting.serving,
            has_strategy=lambda identity: identity != DEFAULT,
        )
        self.table = PartitionTable.build(Topology(), 8)
        self.is_known = False
        self.session: SessionId | None = None
        self.guards: dict[SessionId, Guard] = {}
        self.live: dict[Pid, None] = {}
        self.answers: list[Pid] = []

    def now(self) -> int:
        return self.world.now + self.offset

    def do(self, effects: Any) -> None:
        for effect in effects:
            self.one(effect)

    def store(
        self,
        call: Callable[[], Any],
        take: Callable[[Any], Any],
        lost: Any = Failed("lost", may_have_happened=True),  # noqa: B008
    ) -> None:
        self.world.calls.append((self, call, take, lost))

    def send(self, to: Address, act: Callable[["Node"], Any]) -> None:
        self.world.messages.append((to, act))

    def one(self, effect: Any) -> None:
        store, own, me = self.world.store, self.own, self.address
        trouble = StoreTrouble("lost")
        match effect:
            case AcquireLock(request):
                self.store(
                    lambda: store.try_acquire([request])[0],
                    lambda o: self.claims.acquired(request, o, now_ns=self.now()),
                )
            case ReleaseLock(release):
                self.store(
                    lambda: store.release([release])[0],
                    lambda o: self.claims.released(
                        release,
                        is_released=isinstance(o, Released),
                        now_ns=self.now(),
                    ),
                )
            case ClaimEntry(claim):
                self.store(
                    lambda: store.claim([claim])[0],
                    lambda o: self.hosting.claimed(claim, o, now_ns=self.now()),
                )
            case GiveUpEntry(give_up):
                self.store(
                    lambda: store.give_up([give_up])[0],
                    lambda o: self.hosting.given_up(give_up, o, now_ns=self.now()),
                )
            case OpenSession(record):
                self.store(
                    lambda: store.open_session(record),
                    lambda o: own.opened(record.session, o, self.now()),
                    trouble,
                )
            case RenewSession(session, count):
                self.store(
                    lambda: store.renew_session(session, count),
                    lambda o: own.renewed(session, count, o, self.now()),
                    trouble,
                )
            case ReadSessions():
                self.store(
                    store.read_sessions, lambda o: own.viewed(o, self.now()), trouble
                )
            case CloseSession(session, count):
                self.store(
                    lambda: store.close_session(session, count),
                    lambda o: own.closed(session, count, o, self.now()),
                    trouble,
                )
            case WriteMembers(members, epoch):
                self.store(
                    lambda: store.write_members(members, epoch),
                    lambda o: own.members_written(o, self.now()),
                    trouble,
                )
            case SendEcho(nonce):
                self.send(me, lambda n: n.own.echoed(nonce, n.now()))
            case SessionBegan(session, guard):
                self.session, self.guards[session] = session, guard
                self.do(self.hosting.begin(session))
                self.adopt(())
            case SessionLapsed(session, why):
                self.session = None
                self.adopt(())
                self.do(self.hosting.lapse(session, why))
            case TopologyAdopted(topology, closed):
                self.is_known = True
                self.table = self.table.adopt(topology)
                self.adopt(closed)
            case SessionSettled(session):
                self.do(own.settle(session, self.now()))
            case StartActivation(pid, _):
                self.world.start(self, pid)
            case StopActivation(pid, _):
                self.send(me, lambda n: n.end(pid))
            case _:
                self.say(effect)

    def say(self, effect: Any) -> None:
        me = self.address
        match effect:
            case AskOwnerSession(session, identity, token, procedure):
                self.send(
                    address_of(session),
                    lambda n: n.hosting.asked(
                        me,
                        identity,
                        session=session,
                        fencing_token=token,
                        procedure=procedure,
                        own=n.own.own_open(),
                    ),
                )
            case TellOwnerState(to, identity, session, procedure, state, token):
                self.send(
                    to,
                    lambda n: n.claims.owner_answered(
                        identity, session, procedure, state, token, now_ns=n.now()
                    ),
                )
            case AskHolderSession(holder, identity, procedure):
                self.send(
                    address_of(holder.session),
                    lambda n: n.claims.holder_asked(me, identity, holder, procedure),
                )
            case TellHolderState(to, identity, holder, procedure, state):
                self.send(
                    to,
                    lambda n: n.claims.holder_answered(
                        identity, holder, procedure, state, now_ns=n.now()
                    ),
                )
            case StartAt(host, identity, acquisition, revision, _, _, _, takes_lock):
                self.send(
                    address_of(host),
                    lambda n: n.hosting.start(
                        identity,
                        acquisition=acquisition,
                        host=host,
                        expected_revision=revision,
                        takes_lock=takes_lock,
                    ),
                )
            case TellClaimed(_, identity, procedure):
                self.do(self.claims.claim_made(identity, procedure, now_ns=self.now()))
            case TellStarted(to, pid, procedure):
                self.send(
                    to,
                    lambda n: n.claims.started(pid, procedure, now_ns=n.now()),
                )
            case TellStartRefused(to, identity, procedure, host, refusal):
                self.send(
                    to,
                    lambda n: n.claims.start_refused(
                        identity, procedure, host, refusal, now_ns=n.now()
                    ),
                )
            case NeedTopology(epoch):
                self.do(self.own.hint(epoch))
            case RedirectTo(to, identity, epoch, owner):
                # To a session of its own that is over: senders wait, and ask again.
                if to.address == me and address_of(owner) != me:
                    self.ask(identity, address_of(owner), epoch)
            case AnswerPid(to, pid):
                self.send(to.address, lambda n: n.answers.append(pid))

    def ask(self, identity: Identity, owner: Address, epoch: int) -> None:
        self.world.last_request += 1
        to = Requester(self.address, self.world.last_request)
        self.send(
            owner,
            lambda n: n.claims.request(
                to, identity, epoch=epoch, deadline_ns=n.now() + 30 * S, now_ns=n.now()
            ),
        )

    def adopt(self, closed: tuple[SessionId, ...]) -> None:
        table = self.table if self.is_known else None
        self.do(
            self.claims.adopt(self.session, table, closed=closed, now_ns=self.now())
        )

    def end(self, pid: Pid) -> Any:
        self.live.pop(pid, None)
        return self.hosting.ended(pid, version=0, snapshot=None)

    def tick(self) -> None:
        now = self.now()
        self.do(self.own.tick(now))
        self.do(self.claims.tick(now_ns=now))
        self.do(self.hosting.tick(now_ns=now))


class World:
    """The store, the network, and time."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.now = 100 * S
        self.messages: list[Any] = []
        self.calls: list[Any] = []
        self.replies: list[Any] = []
        self.nodes: dict[str, Node] = {}
        self.tokens: dict[Identity, int] = {}
        self.boots = 0
        self.last_request = 0

    def boot(self, name: str) -> None:
        self.boots += 1
        node = Node(self, name, self.boots, self.boots * 37 * S)
        self.nodes[name] = node
        node.do(node.own.start(node.now()))

    def at(self, address: Address) -> Node | None:
        for node in self.nodes.values():
            if node.address == address and not node.is_dead:
                return node
        return None

    def start(self, node: Node, pid: Pid) -> None:
        assert pid.fencing_token > self.tokens.get(pid.identity, 0), "a token came back"
        self.tokens[pid.identity] = pid.fencing_token
        node.live[pid] = None
        node.send(node.address, lambda n: n.hosting.started(pid))

    def deliver(self, index: int, *, keep: bool = False) -> None:
        index %= len(self.messages)
        to, act = self.messages[index] if keep else self.messages.pop(index)
        node = self.at(to)
        if node is not None and not node.is_paused:
            node.do(act(node) or ())

    def call(self, index: int, *, lose: bool) -> None:
        node, call, take, lost = self.calls.pop(index % len(self.calls))
        outcome = call()
        self.replies.append((node, take, lost if lose else outcome))

    def reply(self, index: int) -> None:
        node, take, outcome = self.replies.pop(index % len(self.replies))
        if not node.is_dead:
            node.do(take(outcome))

    def living(self, identity: Identity) -> list[Pid]:
        return [
            pid
            for node in self.nodes.values()
            for pid in node.live
            if pid.identity == identity
            and not node.is_dead
            and node.guards[pid.session].is_open(node.now())
        ]

    def run_quietly(self, seconds: int) -> None:
        """Lose nothing any more, and let everything happen in order."""
        for _ in range(seconds * 10):
            self.now += 100 * MS
            for node in self.nodes.values():
                node.is_paused = False
                if not node.is_dead:
                    node.tick()
            while self.messages or self.calls or self.replies:
                if self.messages:
                    self.deliver(0)
                if self.calls:
                    self.call(0, lose=False)
                if self.replies:
                    self.reply(0)


picks = st.integers(0, 999)
names = st.sampled_from(["a", "b", "c"])


class Cluster(RuleBasedStateMachine):
    @initialize(quiet=st.booleans())
    def begin(self, quiet: bool) -> None:  # noqa: FBT001
        self.world = World()
        for name in ("a", "b", "c"):
            self.world.boot(name)
        if quiet:
            self.world.run_quietly(2)

    def node(self, name: str) -> Node:
        return self.world.nodes[name]

    @precondition(lambda self: self.world.messages)
    @rule(which=picks, count=st.integers(1, 6))
    def deliver(self, which: int, count: int) -> None:
        for _ in range(count):
            if self.world.messages:
                self.world.deliver(which)

    @precondition(lambda self: self.world.messages)
    @rule(which=picks)
    def repeat(self, which: int) -> None:
        self.world.deliver(which, keep=True)

    @precondition(lambda self: self.world.messages)
    @rule(which=picks)
    def lose(self, which: int) -> None:
        self.world.messages.pop(which % len(self.world.messages))

    @precondition(lambda self: self.world.calls)
    @rule(which=picks, lose=st.booleans(), count=st.integers(1, 4))
    def call(self, which: int, lose: bool, count: int) -> None:  # noqa: FBT001
        for number in range(count):
            if self.world.calls:
                self.world.call(which, lose=lose and not number)

    @precondition(lambda self: self.world.replies)
    @rule(which=picks, count=st.integers(1, 4))
    def reply(self, which: int, count: int) -> None:
        for _ in range(count):
            if self.world.replies:
                self.world.reply(which)

    @rule(ms=st.sampled_from([1, 50, 500, 1_500, 4_500, 6_000]))
    def wait(self, ms: int) -> None:
        self.world.now += ms * MS
        for node in self.world.nodes.values():
            if not node.is_dead and not node.is_paused:
                node.tick()

    @rule(name=names, which=st.sampled_from(IDENTITIES))
    def ask(self, name: str, which: Identity) -> None:
        node = self.node(name)
        owner = node.table.owner_of(which)
        if owner is not None and not node.is_dead:
            node.ask(which, owner.address, node.table.epoch)

    @rule(name=names, which=st.sampled_from(IDENTITIES))
    def passivate(self, name: str, which: Identity) -> None:
        node = self.node(name)
        if not node.is_dead:
            node.do(node.hosting.passivate(which))

    @rule(name=names)
    def pause(self, name: str) -> None:
        self.node(name).is_paused = not self.node(name).is_paused

    @rule(name=names)
    def crash_and_start(self, name: str) -> None:
        self.node(name).is_dead = True
        self.world.boot(name)

    @rule(seconds=st.integers(1, 4))
    def calm(self, seconds: int) -> None:
        self.world.run_quietly(seconds)

    @invariant()
    def at_most_one(self) -> None:
        for identity in IDENTITIES:
            living = self.world.living(identity)
            assert len(living) <= 1, f"two of one: {living}"

    def teardown(self) -> None:
        """Once all is quiet, every identity is found, and all agree where."""
        world = self.world
        world.run_quietly(40)
        for identity in IDENTITIES:
            for node in world.nodes.values():
                owner = node.table.owner_of(identity)
                assert owner is not None
                node.answers.clear()
                node.ask(identity, owner.address, node.table.epoch)
            world.run_quietly(10)
            found = {pid for node in world.nodes.values() for pid in node.answers}
            assert len(found) == 1, f"{identity} was answered as {found}"
            assert world.living(identity) == list(found)


TestClusterKeepsR25 = Cluster.TestCase
TestClusterKeepsR25.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_r2_5_the_model_sees_a_guard_that_does_not_latch() -> None:
    """The check itself: two live ones are seen as such."""
    world = World()
    for name in ("a", "b"):
        world.boot(name)
    world.run_quietly(3)
    pids = []
    for name, token in (("a", 900), ("b", 901)):
        node = world.nodes[name]
        assert node.session is not None
        pids.append(Pid(IDENTITIES[0], node.session, token))
        world.start(node, pids[-1])

    assert world.living(IDENTITIES[0]) == pids


def test_a_lock_of_a_procedure_that_was_dropped_is_freed() -> None:
    world = World()
    world.boot("a")
    world.run_quietly(3)
    node = world.nodes["a"]
    assert node.session is not None
    forgotten = Acquisition(node.session, 77)
    node.do(node.claims.holder_asked(node.address, IDENTITIES[0], forgotten, 1))
    world.run_quietly(1)
    node.ask(IDENTITIES[0], node.address, 0)
    world.run_quietly(2)
    assert len(node.answers) == 1
