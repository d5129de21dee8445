"""A whole cluster inside a program: nodes, one store, and an entry to them."""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from actors.engine import EmbeddedEngine, Engine, Settings, StoreInUse
from actors.event_stream import CANCEL_S, EventStream, StartReader, Subscription
from actors.kind import Kind
from actors.node import STOP_S, PlacementNode, Snapshot, Witness, check_name
from actors.reference import TIMEOUT_MAX_S, Verbs
from placement.contracts import Store
from placement.errors import NotReady
from placement.event import Event
from placement.identity import Identity
from placement.pidcache import PlacementResolution
from placement.value import value

if TYPE_CHECKING:
    from actors.simulation import SimulatedCluster

__all__ = ["Cluster", "ClusterEvents", "ClusterSnapshot", "StoreInUse"]

_ENTRY = "entry"


@value(kw_only=True, sealed=True)
class ClusterSnapshot:
    """The cluster as its entry knows it, and each node's own view. Immutable."""

    state: str
    epoch: int
    members: tuple[str, ...]
    partitions: Mapping[str, int]
    activations: Mapping[str, int]
    stuck: tuple[str, ...]
    nodes: Mapping[str, Snapshot]
    observed_at_ms: int


class ClusterEvents:
    """The events of all nodes, of those that join later too."""

    def __init__(self, start_reader: StartReader) -> None:
        self._start_reader = start_reader
        self._streams: list[EventStream] = []
        self._subscriptions: list[Subscription] = []
        self._lock = threading.Lock()

    def subscribe(
        self,
        subscriber: Callable[[Event], Any],
        *,
        names: Collection[str] | None = None,
    ) -> Subscription:
        """Have `subscriber` called with each event, in each node's order.

        Only with those of these `names`, where some are given.
        """
        subscription = Subscription(
            subscriber, self._remove, self._start_reader, names=names
        )
        with self._lock:
            self._subscriptions.append(subscription)
            for stream in self._streams:
                stream.add(subscription)
        return subscription

    def add(self, stream: EventStream) -> None:
        """Take in the events of another node."""
        with self._lock:
            self._streams.append(stream)
            for subscription in self._subscriptions:
                stream.add(subscription)

    def discard(self, stream: EventStream) -> None:
        """A node is gone, with all that it had to say."""
        with self._lock:
            if stream in self._streams:
                self._streams.remove(stream)

    def close(self, left_s: Callable[[], float] = lambda: CANCEL_S) -> None:
        """Deliver what waits, within the time that is left, and end."""
        for subscription in tuple(self._subscriptions):
            subscription.cancel(timeout_s=min(CANCEL_S, left_s()))

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
            for stream in self._streams:
                stream.remove(subscription)


class Cluster(Verbs):
    """Nodes in this process, made by `embedded` or `simulated`, and their entry.

    The entry is a client: it resolves and sends, and hosts nothing. All verbs
    are for any thread.
    """

    #: What its nodes and its entry are. A simulation has others.
    node_type: ClassVar[type[PlacementNode]] = PlacementNode

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        kinds: Mapping[str, Kind],
        witness: Witness | None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._kinds = kinds
        self._witness = witness
        self._lock = threading.RLock()
        self._nodes: dict[str, PlacementNode] = {}
        self._starting: dict[str, PlacementNode] = {}
        self._changed = engine.condition()
        self._is_over = False
        self._is_stopped = False
        self.events = ClusterEvents(engine.start_reader)
        self._entry = self.node_type(
            _ENTRY, kinds=kinds, engine=engine, settings=settings
        )
        self.events.add(self._entry.events)
        self._sender = self._entry._sender  # noqa: SLF001

    @classmethod
    def embedded(
        cls,
        *,
        nodes: int | Iterable[str] = 3,
        kinds: Mapping[str, Kind | type],
        store: str | Store = "memory://",
        witness: Witness | None = None,
        **settings: Any,
    ) -> "Cluster":
        """Start a cluster; it serves when this returns.

        `nodes` is how many (named node-1 and so on) or their names; settings are
        those of `Settings`.

        Raises:
            ValueError: a name, setting, kind or store URL makes no sense.
            StoreInUse: another process has sessions in the store.
            StoreFailure: the store cannot be opened.
        """
        names = names_of(nodes)
        checked = Settings(**settings)
        by_name = check_kinds(kinds, checked)
        engine = EmbeddedEngine(store, partitions=checked.partitions)
        try:
            engine.take_over()
            cluster = cls(engine, checked, by_name, witness)
        except BaseException:
            engine.close()
            raise
        cluster._start(names)
        return cluster

    @classmethod
    def simulated(
        cls,
        *,
        seed: int = 1,
        nodes: int | Iterable[str] = 3,
        kinds: Mapping[str, Kind | type],
        witness: Witness | None = None,
        **settings: Any,
    ) -> "SimulatedCluster":
        """Start a cluster in virtual time, which the same `seed` runs again.

        The same verbs, and more: time is moved by hand, and things break when told.

        Raises:
            ValueError: a name, setting or kind makes no sense.
            BadKind: a kind is a ThreadingActor, whose thread is not simulated.
        """
        from actors.simulation import SimulatedCluster  # noqa: PLC0415  it needs this

        return SimulatedCluster.start(
            seed=seed, nodes=nodes, kinds=kinds, witness=witness, **settings
        )

    def _start(self, names: Iterable[str]) -> None:
        try:
            for name in names:
                self.add_node(name)
            self._entry.start_client()
            self._settle()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        import asyncio  # noqa: PLC0415  only programs that use it pay for it

        await asyncio.get_running_loop().run_in_executor(None, self.stop)

    # --- topology ---

    def _engine_for(self, name: str) -> Engine:
        """What the node `name` is to run on: here all on one."""
        return self._engine

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes that run, sorted."""
        with self._lock:
            return tuple(sorted(self._nodes))

    def node(self, name: str) -> PlacementNode:
        """The node of that name.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            return self._nodes[name]

    def add_node(self, name: str, *, weight: float = 1.0) -> PlacementNode:
        """Start a node and have it join; new activations go there too.

        Raises:
            ValueError: there is such a node, or the name is none.
        """
        with self._lock:
            if self._is_stopped:
                raise NotReady("the cluster has stopped")
            if name in self._nodes or name in self._starting or name == _ENTRY:
                raise ValueError(f"there is a node {name!r} already")
            node = self.node_type(
                name,
                kinds=self._kinds,
                engine=self._engine_for(name),
                settings=self._settings,
                weight=weight,
                witness=self._witness,
            )
            self._starting[name] = node
        # Not under the lock: a start takes as long as the store does.
        self.events.add(node.events)
        try:
            node.start_member()
            self._take_in(name, node)
        except BaseException:
            node.kill()
            self.events.discard(node.events)
            raise
        finally:
            with self._lock:
                del self._starting[name]
        if self._entry.state == "client":
            self._settle()
        return node

    def _take_in(self, name: str, node: PlacementNode) -> None:
        with self._lock:
            if self._is_stopped:
                raise NotReady("the cluster has stopped")
            self._nodes[name] = node

    def remove_node(self, name: str, *, timeout: float = STOP_S) -> None:
        """Have a node leave: its activations end in good order, others take over.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            node = self._nodes.pop(name)
        session = node.session
        node.stop(timeout=timeout)
        self.events.discard(node.events)
        if session is not None:
            # Let no later resolution find it in what the entry remembers.
            self._entry._need_topology(0)  # noqa: SLF001
            self._entry.wait_for(
                lambda: not self._entry.finds(session), self._settings.ttl * 4
            )

    def kill_node(self, name: str) -> None:
        """End a node as a crash would; others take over when its session is over.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            node = self._nodes.pop(name)
        node.kill()
        self.events.discard(node.events)

    def _settle(self) -> None:
        """Wait until every node knows all that run."""
        with self._lock:
            nodes = tuple(self._nodes.values())
        for knower in (self._entry, *nodes):
            for node in nodes:
                knower.wait_for(partial(_knows, knower, node), self._settings.ttl * 4)

    # --- verbs ---

    def resolve(
        self, identity: str, *, timeout: float | None = None
    ) -> PlacementResolution:
        """Where `identity` is hosted; it is started if it is nowhere."""
        return self._entry.resolve(identity, timeout=timeout)

    def snapshot(self) -> ClusterSnapshot:
        """What is known now. Immutable."""
        with self._lock:
            nodes = {name: node.snapshot() for name, node in self._nodes.items()}
        entry = self._entry.snapshot()
        return ClusterSnapshot(
            state="stopped" if self._is_stopped else "running",
            epoch=entry.epoch,
            members=tuple(member.node for member in entry.members),
            partitions=entry.partitions,
            activations=MappingProxyType(
                {name: len(each.activations) for name, each in nodes.items()}
            ),
            stuck=tuple(str(i) for each in nodes.values() for i in each.stuck),
            nodes=MappingProxyType(nodes),
            observed_at_ms=entry.observed_at_ms,
        )

    def stop(self, *, timeout: float = STOP_S) -> None:
        """Stop all nodes in good order, and free what they held, within the time.

        A second call waits, as long, until the first is done.
        """
        clock = self._engine.clock
        seconds = max(0.0, min(timeout, TIMEOUT_MAX_S))
        until_ns = clock.now_ns() + round(seconds * 1e9)

        def left_s() -> float:
            return max(0.0, (until_ns - clock.now_ns()) / 1e9)

        with self._lock:
            is_second, self._is_stopped = self._is_stopped, True
            nodes = [*self._nodes.values(), *self._starting.values()]
            self._nodes.clear()
        if is_second:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over, left_s())
            return
        threads = [
            threading.Thread(target=node.stop, kwargs={"timeout": timeout}, daemon=True)
            for node in nodes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._entry.stop(timeout=left_s())
        self.events.close(left_s)
        self._engine.close()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _kind_of(self, actor_class: type) -> str:
        return self._entry._kind_of(actor_class)  # noqa: SLF001

    def _class_of(self, kind: str) -> type | None:
        return self._entry._class_of(kind)  # noqa: SLF001


def names_of(nodes: int | Iterable[str]) -> list[str]:
    """The names of nodes: as given, or node-1 and so on.

    Raises:
        ValueError: there is none, or they cannot be.
    """
    if isinstance(nodes, int):
        names = [f"node-{number}" for number in range(1, nodes + 1)]
    else:
        names = list(nodes)
    if not names:
        raise ValueError("a cluster has at least one node")
    if len(set(names)) != len(names) or _ENTRY in names:
        raise ValueError(f"node names must differ, and none is {_ENTRY!r}")
    for name in names:
        check_name(name)
    return names


def check_kinds(
    kinds: Mapping[str, Kind | type], settings: Settings
) -> dict[str, Kind]:
    """The kinds, each fit for `settings`.

    Raises:
        BadKind: one is not.
        BadIdentity: the name of one cannot be part of an identity.
    """
    by_name = {kind: Kind.of(each) for kind, each in kinds.items()}
    for kind, each in by_name.items():
        Identity(kind, "x")
        each.check(settings.margin_s)
    return by_name


def _knows(knower: PlacementNode, node: PlacementNode) -> bool:
    """Tell whether `knower` has seen that `node` is a member, if it is one."""
    return node.session is None or knower.finds(node.session)
