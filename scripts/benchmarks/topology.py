"""What a change of the members costs, and what being a member does."""

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from actors import PlacementNode
from actors.engine import EmbeddedEngine
from actors.simulation import SimulatedCluster
from actors.store_memory import MemoryStore
from placement.delivery import Deliveries
from placement.entry import Pid
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.pidcache import PidCache
from placement.topology import Address, Member, SessionId, Topology, session_of
from scripts.benchmarks.measure import Effort, Measurement
from scripts.benchmarks.messages import ECHO
from scripts.benchmarks.stores import CountedStore

MEMBERS = 1_000
_HOUR_NS = 3_600_000_000_000
_TTL_S = 0.6
_WATCH_S = 1.2


def member(number: int) -> Member:
    """One of many."""
    session = session_of(Address(f"node-{number}.boot"), 1)
    return Member(session=session, kinds=("echo",))


def topology_of(count: int) -> Topology:
    """So many members, in one epoch."""
    return Topology(epoch=1, members=tuple(member(n) for n in range(count)))


def known(count: int, table: PartitionTable) -> Deliveries:
    """A node's ways to so many identities, each where its partition's owner is."""
    deliveries = Deliveries(PidCache(ttl_ns=_HOUR_NS, size_max=count + 1))
    deliveries.open()
    deliveries.adopt(table, (), now_ns=0)
    for number in range(count):
        identity = Identity("echo", str(number))
        owner = table.owner_of(identity)
        assert owner is not None
        deliveries.cache.put(Pid(identity, owner.session, number + 1), 0)
    return deliveries


def change(effort: Effort, *, verb: str) -> Measurement:
    """A member joins or leaves: until new decisions use that.

    Beside it the table from nothing, which is what it must be equal to.
    """
    identities = effort.at_most(1_000_000)
    topology = topology_of(MEMBERS)
    table = PartitionTable.build(topology)
    deliveries = known(identities, table)
    gc.collect()
    ours, limit = [], []
    for number in range(effort.runs):
        changed = MEMBERS + number if verb == "join" else number
        closed: tuple[SessionId, ...] = ()
        if verb == "join":
            topology = topology.with_member(member(changed))
        else:
            closed = (member(changed).session,)
            topology = topology.without(closed)
        began = time.perf_counter()
        table = table.adopt(topology)
        deliveries.adopt(table, closed, now_ns=1)
        ours.append((time.perf_counter() - began) * 1e3)
        began = time.perf_counter()
        built = PartitionTable.build(topology)
        limit.append((time.perf_counter() - began) * 1e3)
        assert built.owners == table.owners
        left = len(deliveries.cache)
        assert left == identities if verb == "join" else left < identities
    return Measurement(
        ours=tuple(ours), limit=tuple(limit), note=f"{identities:,} identities"
    )


def moved(effort: Effort) -> Measurement:
    """Partitions that change their owner, against those that must."""
    table = PartitionTable.build(topology_of(50))
    ours, limit = [], []
    for number in range(2 * effort.runs):
        is_join = number % 2 == 0
        subject = member(100 + number) if is_join else member(number)
        if is_join:
            after = table.adopt(table.topology.with_member(subject))
        else:
            after = table.adopt(table.topology.without([subject.session]))
        pairs = zip(table.owners, after.owners, strict=True)
        ours.append(sum(a.session != b.session for a, b in pairs))
        # Who joins must get its share; what a leaver had must go elsewhere.
        limit.append((after if is_join else table).counts()[subject.session])
        table = after
    return Measurement(
        ours=tuple(a / b for a, b in zip(ours, limit, strict=True)),
        limit=(1.0,) * len(ours),
        note=f"{sum(ours)} partitions moved in {len(ours)} changes",
    )


@contextmanager
def members(count: int, hosted: int) -> Iterator[CountedStore]:
    """Nodes without any client, whose store is watched."""
    counted, store = CountedStore.of(MemoryStore())
    engine = EmbeddedEngine(store)
    with ExitStack() as stack:
        stack.callback(engine.close)
        nodes = [
            PlacementNode(f"node-{n}", kinds={"echo": ECHO}, engine=engine, ttl=_TTL_S)
            for n in range(1, count + 1)
        ]
        for node in nodes:
            stack.enter_context(node)
            node.start_member()
        for node in nodes:
            node.wait_for(lambda node=node: len(node.topology.members) == count, 10)  # type: ignore[misc]
        futures = [nodes[0].seek(f"echo/{number}") for number in range(hosted)]
        assert len({future.get(timeout=60).identity for future in futures}) == hosted
        time.sleep(_TTL_S)  # what the starts have left is done
        yield counted


def operations(effort: Effort) -> Measurement:
    """Calls of the store for each renewal, while nothing but time passes."""
    hosted, found = effort.at_most(1_000), []
    with members(3, hosted) as counted:
        for _ in range(effort.runs):
            counted.calls.clear()
            time.sleep(_WATCH_S)
            calls = dict(counted.calls)
            renewals = calls.get("renew_session", 0)
            assert renewals > 1
            found.append(sum(calls.values()) / renewals)
    return Measurement(
        ours=tuple(found), limit=(1.0,) * len(found), note=f"{hosted:,} hosted"
    )


def traffic(effort: Effort) -> Measurement:
    """Frames and calls of the store of many idle nodes in virtual time.

    On paper each renewal is one call, and before it one frame to the node itself.
    """
    nodes, seconds, ttl = effort.at_most(1_000_000) // 5_000, 60.0, 5.0
    nodes = max(3, nodes)
    cluster = SimulatedCluster.start(seed=1, nodes=nodes, kinds={"echo": ECHO}, ttl=ttl)
    cluster.advance(ttl)  # what the start has left is done
    shared, found = cluster.shared, []
    for _ in range(effort.runs):
        frames, calls = shared.network.frame_count, shared.calls.session_count
        others = shared.calls.operation_count
        cluster.advance(seconds)
        frames = shared.network.frame_count - frames
        calls = shared.calls.session_count - calls
        assert shared.calls.operation_count == others
        found.append(float(frames + calls))
    assert len(cluster.snapshot().members) == nodes
    renewals = nodes * seconds / (ttl / 3)
    # The entry is no node: it reads who the members are as often as they renew.
    entry = seconds / (ttl / 3)
    return Measurement(
        ours=tuple((each - entry) / renewals for each in found),
        limit=(2.0,) * len(found),
        note=f"{nodes:,} nodes, simulated",
    )
