"""A whole cluster in one thread, under virtual time and one seed.

The nodes, their actors, core, codec and store rules are those of real use; only
time, threads and the wire are the simulation's. The same seed gives the same
run, whatever the hash seed and the version of Python.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import msgspec
import pykka

from actors.cluster import Cluster, check_kinds, names_of
from actors.dispatch import Dispatcher
from actors.engine import Engine, GrainDispatcher, Settings, SystemDispatcher
from actors.event_stream import Reader
from actors.future import Future
from actors.kind import BadKind, Kind
from actors.network import Fate, Network
from actors.node import STOP_S, PlacementNode, Witness
from actors.observer import Bounds, Violation, observe
from actors.recorded_node import RecordedNode
from actors.simulated_bucket import BucketContents
from actors.simulated_store import (
    RecordingStore,
    StoreCounter,
    Trouble,
)
from actors.store_actor import StoreActor
from actors.trace import Asked, Ended, ProcessEnded, Record, TopologyTaken
from actors.world import (
    DrivenCondition,
    DrivenFuture,
    ProcessClock,
    SteppedDispatcher,
    World,
)
from placement.event import Event
from placement.partition import PartitionTable
from placement.topology import Address, Topology

#: A simulated cluster is small: fewer partitions make its tables cheap.
PARTITIONS = 64

_LAG_NS = 20_000
#: How many violations an error tells.
_TOLD_MAX = 10
#: How much later than its deadline an ask may end.
_GRACE_NS = 2_500_000_000


class _StepReader:
    """Takes events for a subscriber in steps of the world."""

    def __init__(
        self,
        world: World,
        subscriber: Callable[[Event], Any],
        take: Callable[[], Event | None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._world = world
        self._subscriber = subscriber
        self._take = take
        self._on_bug = on_bug

    def tell(self, message: Any) -> None:
        """Something waits."""
        self._world.at(self._world.moment_ns(), self._read)

    def stop(self, *, block: bool = True, timeout: float | None = None) -> bool:
        """Take what still waits."""
        self._read()
        return True

    def _read(self) -> None:
        while (event := self._take()) is not None:
            try:
                self._subscriber(event)
            except Exception as error:  # the subscriber's own trouble
                self._on_bug(error)


#: What the store of a simulation is like: one of transactions, or one over NATS.
MEMORY, NATS = STORES = ("memory", "nats")


def _contents_of(
    store: str, world: World, records: list[Record]
) -> RecordingStore | BucketContents:
    match store:
        case "memory":
            return RecordingStore.of(world, records)
        case "nats":
            return BucketContents(world, records)
    raise ValueError(f"the store of a simulation is memory or nats, not {store!r}")


class Shared:
    """What all processes of one simulation have in common."""

    def __init__(self, seed: int, partitions: int, store: str = MEMORY) -> None:
        self.world = World(seed)
        self.records: list[Record] = []
        self.network = Network(self.world)
        self.store = _contents_of(store, self.world, self.records)
        self.calls = StoreCounter()
        self.processes: list[Process] = []
        self.turns_at_once: Callable[[], int] = lambda: 0
        self._table = PartitionTable.build(Topology(), partitions)
        self._boot = 0

    def table(self, topology: Topology) -> PartitionTable:
        """The table of `topology`, computed once for all."""
        if self._table.topology != topology:
            self._table = self._table.adopt(topology)
        return self._table

    def digest(self) -> str:
        """A hash over all frames that arrived and all that was recorded until now."""
        digest = self.network.digest().copy()
        digest.update(msgspec.msgpack.encode(self.records))
        return str(digest.hexdigest())

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse the name of a node that never was.

        Raises:
            KeyError: one of `names` is such.
        """
        known = {STORE, *(process.name for process in self.processes)}
        for name in sorted(set(names) - known):
            raise KeyError(f"there is no node {name!r}; there are {sorted(known)}")

    def boot(self) -> int:
        """A number that no start of a node had before."""
        self._boot += 1
        return self._boot


class Process:
    """The engine of one simulated node: a process of its own.

    It stands still, ends or loses its way as a whole.
    """

    def __init__(self, shared: Shared, name: str, *, rate_ppm: int = 1_000_000) -> None:
        world = shared.world
        self.name = name
        self.number = shared.boot()
        self.shared = shared
        self.random = world.stream(f"process {self.number}")
        # No two processes' clocks began at the same time.
        offset_ns = self.random.randrange(1, 10**15)
        self.clock: Any = ProcessClock(world, offset_ns=offset_ns, rate_ppm=rate_ppm)
        self.wire = shared.network.wire(name, self.clock)
        self.transport: Any = self.wire
        self.stepped: list[SteppedDispatcher] = []
        self.system: SystemDispatcher = self._thread("system")
        self.program: Dispatcher = self._thread("program")
        self.node_address: Address | None = None
        store = shared.store.connect(world, name, shared.calls)
        self.entries: pykka.ActorRef[Any] = StoreActor.start(
            store, dispatcher=self._thread("entries"), on_bug=self.bug
        )
        self.sessions: pykka.ActorRef[Any] = StoreActor.start(
            store.another(), dispatcher=self._thread("sessions"), on_bug=self.bug
        )
        shared.processes.append(self)

    def _thread(self, name: str) -> SteppedDispatcher:
        dispatcher = SteppedDispatcher(
            self.shared.world, self.clock, name, lag_ns=_LAG_NS, on_bug=self.bug
        )
        dispatcher.turns_at_once = self.shared.turns_at_once()
        self.stepped.append(dispatcher)
        return dispatcher

    # --- as an engine ---

    def start_reader(
        self, subscriber: Callable[[Event], Any], take: Callable[[], Event | None]
    ) -> Reader:
        """A reader that takes events in steps of the world."""
        return _StepReader(self.shared.world, subscriber, take, self.bug)

    def dispatcher(self, name: str) -> GrainDispatcher:
        """A dispatcher for the node's Grains."""
        return self._thread(name)

    def address(self, name: str) -> Address:
        """The address of this start of the node."""
        self.node_address = Address(f"{name}.{self.number:x}")
        return self.node_address

    def table(self, topology: Topology) -> PartitionTable:
        """The table of `topology`; that it is taken is recorded."""
        table = self.shared.table(topology)
        self.shared.records.append(
            TopologyTaken(
                self.shared.world.now_ns,
                str(self.node_address),
                table.epoch,
                tuple(str(member.session) for member in topology.members),
                tuple(str(each.session) for each in topology.members if each.draining),
                tuple(str(owner.session) for owner in table.owners),
            )
        )
        return table

    def future(self) -> Future:
        """An answer for which a program waits by running the world."""
        return DrivenFuture(self.shared.world)

    def condition(self) -> DrivenCondition:
        """Facts for which a program waits by running the world."""
        return DrivenCondition(self.shared.world)

    def bug(self, error: BaseException) -> None:
        """Keep `error`: a simulation in which one was raised has failed."""
        self.shared.world.bugs.append((self.name, error))

    def close(self) -> None:
        """Stop the actors of the store."""
        for ref in (self.entries, self.sessions):
            if ref.is_alive():
                ref.stop(block=False)

    # --- as a process ---

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return bool(self.clock.is_gone)

    def end(self, how: str) -> None:
        """End it now: nothing of it runs any more."""
        if self.clock.is_gone:
            return
        self.clock.is_gone = True
        self.shared.records.append(
            ProcessEnded(self.shared.world.moment_ns(), str(self.node_address), how)
        )

    def pause(self, seconds: float) -> None:
        """Have it stand still, while its clock goes on."""
        world = self.shared.world
        self.clock.pause(world.moment_ns() + round(seconds * 1e9))

    def resume(self) -> None:
        """Have it go on now, where it stands still."""
        if self.shared.world.now_ns < self.clock.resumes_ns:
            self.clock.resumes_ns = 0
            for dispatcher in self.stepped:
                dispatcher.wake()


class _Cut:
    """No frame from some nodes to others; for `store`, no call either."""

    def __init__(self, senders: Iterable[str], receivers: Iterable[str]) -> None:
        self._senders = frozenset(senders)
        self._receivers = frozenset(receivers)

    def fate(self, sender: str, receiver: str) -> Fate | None:
        """Drop what crosses the cut."""
        if sender in self._senders and receiver in self._receivers:
            return Fate(copies=0)
        return None

    def trouble(self, node: str) -> Trouble | None:
        """A store beyond the cut cannot be reached."""
        if node in self._senders and STORE in self._receivers:
            return Trouble("away", 1_000_000_000)
        return None


#: How a cut names the store.
STORE = "store"


class _Refusing:
    """The store does `what` to the calls of `nodes`, or of all; so often, if told."""

    def __init__(
        self, what: str, nodes: frozenset[str], times: int | None, delay_s: float
    ) -> None:
        self._trouble = Trouble(what, round(delay_s * 1e9))
        self._nodes = nodes
        self._left = times

    def trouble(self, node: str) -> Trouble | None:
        """What goes wrong with this call."""
        if (self._nodes and node not in self._nodes) or self._left == 0:
            return None
        if self._left is not None:
            self._left -= 1
        return self._trouble


class SimulatedStoreControl:
    """Has the store of a simulation fail: `cluster.store`."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def fail(
        self,
        what: str = "fail",
        *,
        nodes: Iterable[str] = (),
        times: int | None = None,
        delay: float = 1.0,
    ) -> None:
        """Have calls go wrong from now on, until `heal`.

        `what` is `fail` (nothing written), `lost` (written, answer lost), `late`
        (answer lost, written `delay` seconds later), `slow` or `away`. Of all
        nodes unless `nodes` are named; `times` calls, or all.

        Raises:
            ValueError: `what` is none of these.
            KeyError: there is no such node.
        """
        nodes = frozenset(nodes)
        self._shared.check_names(nodes)
        if what not in {"fail", "lost", "late", "slow", "away"}:
            raise ValueError(f"the store can fail, lost, late, slow, away; not {what}")
        self._shared.calls.faults.append(_Refusing(what, nodes, times, delay))

    def heal(self) -> None:
        """Have calls go well again."""
        self._shared.calls.faults.clear()


class Unsafe(AssertionError):
    """`check` has found that a rule was broken."""

    def __init__(self, seed: int, violations: tuple[Violation, ...]) -> None:
        lines = [f"seed {seed}: {len(violations)} violations"]
        lines += [
            f"{each.rule}: {each.identity}: {each.what}"
            for each in violations[:_TOLD_MAX]
        ]
        if len(violations) > _TOLD_MAX:
            lines.append(f"and {len(violations) - _TOLD_MAX} more")
        super().__init__("\n  ".join(lines))
        self.violations = violations


class SimulatedCluster(Cluster):
    """A cluster in virtual time: `Cluster.simulated(seed=7, nodes=3, kinds=...)`.

    The verbs of a cluster, which here run the simulation until they are done;
    and verbs that move time and break things. For one thread.
    """

    process_type: ClassVar[type[Process]] = Process
    node_type: ClassVar[type[PlacementNode]] = RecordedNode

    def __init__(
        self,
        shared: Shared,
        settings: Settings,
        kinds: Mapping[str, Kind],
        witness: Witness | None,
    ) -> None:
        self.shared = shared
        self.world = shared.world
        self.store = SimulatedStoreControl(shared)
        self._processes: dict[str, Process] = {}
        self._paused_ns = 0
        super().__init__(self._engine_for("entry"), settings, kinds, witness)

    @classmethod
    def start(
        cls,
        *,
        seed: int = 1,
        nodes: int | Iterable[str] = 3,
        kinds: Mapping[str, Kind | type],
        witness: Witness | None = None,
        store: str = MEMORY,
        **settings: Any,
    ) -> "SimulatedCluster":
        """Start one; it serves when this returns.

        `store` is what its store is like: `memory`, or `nats` (readings may be old,
        and keys change one by one).

        Raises:
            ValueError: a name, setting, store or kind makes no sense.
            BadKind: a kind has threads of its own.
        """
        names = names_of(nodes)
        checked = Settings(**{"partitions": PARTITIONS, **settings})
        by_name = check_kinds(kinds, checked)
        for name, kind in by_name.items():
            if kind.is_threaded is None:
                raise BadKind(
                    f"kind {name!r} is made by a function: say by `actor_class` that "
                    "it makes Grains; a simulation runs nothing else"
                )
            if kind.is_threaded:
                raise BadKind(
                    f"kind {name!r} is a ThreadingActor: its own thread cannot be "
                    "simulated; a simulation runs Grains"
                )
        shared = Shared(seed, checked.partitions, store)
        cluster = cls(shared, checked, by_name, witness)
        cluster._start(names)
        return cluster

    def _engine_for(self, name: str) -> Engine:
        process = self.process_type(self.shared, name)
        self._processes[name] = process
        return process

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    # --- the verbs of a cluster, where they differ ---

    def kill_node(self, name: str) -> None:
        """End a node as a crash would; `add_node` starts it anew.

        Raises:
            KeyError: there is none.
        """
        node = self._nodes.pop(name)
        process = self._processes[name]
        process.end("crashed")
        process.close()
        node.is_dead = True
        node._state = "killed"  # noqa: SLF001
        # Programs there would wait for ever.
        node._outbox.close(f"{name} was killed")  # noqa: SLF001
        self.events.discard(node.events)
        if self._witness is not None:
            self._witness.killed(name)

    crash = kill_node

    def remove_node(self, name: str, *, timeout: float = STOP_S) -> None:
        """Have a node leave in good order.

        Raises:
            KeyError: there is none.
        """
        super().remove_node(name, timeout=timeout)
        self._processes[name].end("stopped")
        self._processes[name].close()

    def stop(self, *, timeout: float = STOP_S) -> None:
        """Stop all nodes in good order."""
        if self._is_stopped:
            return
        self.heal()
        self._is_stopped = True
        for name, node in sorted(self._nodes.items()):
            node.stop(timeout=timeout)
            self._processes[name].end("stopped")
        self._entry.stop(timeout=timeout)
        self.events.close()
        self.abandon()

    def abandon(self) -> None:
        """End all processes at once, and forget them."""
        self._is_stopped = True
        for process in self.shared.processes:
            process.clock.is_gone = True
        self._nodes.clear()

    # --- the verbs of a simulation ---

    @property
    def seed(self) -> int:
        """What this run comes from."""
        return self.world.seed

    def now(self) -> float:
        """Seconds of virtual time since the world began."""
        return (self.world.now_ns - 1_000_000_000_000) / 1e9

    def advance(self, seconds: float) -> None:
        """Let so much virtual time pass.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back, not even by {seconds} s")
        self.world.run_until(self.world.now_ns + round(seconds * 1e9))

    def run_until(self, condition: Callable[[], Any], *, timeout: float = 60.0) -> None:
        """Let time pass until `condition` holds.

        Raises:
            TimeoutError: it did not within `timeout` virtual seconds.
        """
        if not self.world.drive(lambda: bool(condition()), timeout):
            raise TimeoutError(f"seed {self.seed}: not so within {timeout} s")

    def process(self, name: str) -> Process:
        """The newest process of the node of that name.

        Raises:
            KeyError: there never was one.
        """
        return self._processes[name]

    def pause(self, name: str, *, seconds: float) -> None:
        """Have a node's process stand still; it wakes with its inbox full.

        Raises:
            KeyError: there is no such node.
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a process stands still for {seconds} s")
        self.node(name)
        self._processes[name].pause(seconds)
        self._paused_ns += round(seconds * 1e9)

    def cut(
        self, one: Iterable[str], other: Iterable[str], *, both_ways: bool = True
    ) -> None:
        """Let nothing pass between nodes; `"store"` among `other` is the store.

        Programs outside speak through the node `"entry"`.

        Raises:
            KeyError: there is no such node.
        """
        senders, receivers = frozenset(one), frozenset(other)
        self.shared.check_names(senders | receivers)
        cuts = [_Cut(senders, receivers)]
        if both_ways:
            cuts.append(_Cut(receivers, senders))
        self.shared.network.faults += cuts
        self.shared.calls.faults += cuts

    def heal(self) -> None:
        """End all cuts, pauses and faults of the store."""
        self.shared.network.faults.clear()
        self.store.heal()
        for process in self.shared.processes:
            process.resume()

    def digest(self) -> str:
        """A hash over all that happened: equal runs have equal ones."""
        return self.shared.digest()

    def check(self, bounds: Bounds | None = None) -> None:
        """Judge what has happened until now by the rules of the observer.

        Whatever is under way may still end. Call it once more at the end.

        Raises:
            Unsafe: one was broken.
            RealClock: a Grain read the real clock or real chance.
            AssertionError: a part of the cluster raised.
        """
        self._raise_bugs()
        if self.shared.world.real_clock.refused is not None:
            raise self.shared.world.real_clock.refused
        # Who stands still hears of an answer, and of its time, when it goes on.
        bounds = bounds or Bounds(grace_ns=_GRACE_NS + self._paused_ns)
        records = self._judged(bounds.grace_ns)
        violations = observe(records, bounds)
        if violations:
            raise Unsafe(self.seed, violations)

    def _judged(self, grace_ns: int) -> list[Record]:
        """The records in order of time, without the asks that may still end."""
        ended = {e.request for e in self.shared.records if isinstance(e, Ended)}
        until_ns = self.world.now_ns - grace_ns
        return sorted(
            (
                each
                for each in self.shared.records
                if not isinstance(each, Asked)
                or each.request in ended
                or each.deadline_ns < until_ns
            ),
            key=lambda each: each.at_ns,
        )

    def _raise_bugs(self) -> None:
        if self.world.bugs:
            name, error = self.world.bugs[0]
            raise AssertionError(f"seed {self.seed}: a bug on {name}") from error
