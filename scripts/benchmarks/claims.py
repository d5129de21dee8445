"""Resolving what is known, and claiming what nobody has: three nodes, one program."""

import itertools
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors import Cluster, PlacementNode
from actors.future import Future
from actors.store_url import open_store
from messages.codec import Codec
from messages.frames import Frame, Resolve, Resolved
from placement.contracts import Store
from scripts.benchmarks.measure import Effort, Measurement, Work, pair
from scripts.benchmarks.messages import ECHO, IN_FLIGHT, WARM_UPS
from scripts.benchmarks.peers import WAIT_S
from scripts.benchmarks.stores import CountedStore, commits

RESOLVES = 10_000
#: So many are asked for before the oldest answers are waited for.
_CHUNK = 100


@contextmanager
def three_nodes(store: str | Store = "memory://") -> Iterator[Cluster]:
    """A cluster with a kind `echo` that never ends by itself."""
    with Cluster.embedded(nodes=3, kinds={"echo": ECHO}, store=store) as cluster:
        yield cluster


def resolves_of(cluster: Cluster, names: Sequence[str]) -> Work:
    """Resolve known identities in turn; the sum of their tokens is known."""
    tokens = [cluster.resolve(name).fencing_token for name in names]

    def perform(count: int) -> None:
        found, resolve = 0, cluster.resolve
        for name in itertools.islice(itertools.cycle(names), count):
            found += resolve(name).fencing_token
        assert found == sum(itertools.islice(itertools.cycle(tokens), count))

    return Work(perform, RESOLVES)


def look_ups_of(names: Sequence[str]) -> Work:
    """The same by a dict whose values have a time to live."""
    known = {name: (time.monotonic_ns() + (1 << 60), n) for n, name in enumerate(names)}

    def perform(count: int) -> None:
        found, now_ns = 0, time.monotonic_ns
        for name in itertools.islice(itertools.cycle(names), count):
            until_ns, number = known[name]
            if until_ns > now_ns():
                found += number
        assert found == sum(itertools.islice(itertools.cycle(range(len(names))), count))

    return Work(perform, RESOLVES)


def warm_resolve(effort: Effort) -> Measurement:
    """What is known, through the cluster's own entry."""
    names = [f"echo/{number}" for number in range(1_000)]
    with three_nodes() as cluster:
        return pair(resolves_of(cluster, names), look_ups_of(names), effort)


def claims_of(nodes: Sequence[PlacementNode], batch: int = 4 * IN_FLIGHT) -> Work:
    """Resolve identities that nobody has, through all nodes, always many in flight."""
    numbers = itertools.count()

    def perform(count: int) -> None:
        under_way: deque[list[tuple[str, Future]]] = deque()
        tokens: set[int] = set()

        def collect() -> None:
            for name, future in under_way.popleft():
                pid = future.get(timeout=WAIT_S)
                assert pid.identity == name
                tokens.add(pid.fencing_token)

        for first in range(0, count, _CHUNK):
            chunk = itertools.islice(numbers, min(_CHUNK, count - first))
            asked = [(f"echo/{number}", nodes[number % len(nodes)]) for number in chunk]
            under_way.append(
                [(name, node.seek(name, timeout=WAIT_S)) for name, node in asked]
            )
            if len(under_way) * _CHUNK >= IN_FLIGHT:
                collect()
        while under_way:
            collect()
        assert len(tokens) == count

    return Work(perform, batch)


def question_and_answer() -> Work:
    """A question to the partition's owner and its answer: as bytes, by a queue."""
    codec, queue = Codec("default"), deque[bytes]()

    def carried(number: int, body: Frame) -> Frame:
        queue.append(codec.encode("node-1.boot", "node-2.boot", number, body))
        return codec.decode(queue.popleft(), receiver="node-2.boot").body

    def perform(count: int) -> None:
        tokens = 0
        for number in range(1, count + 1):
            name = f"echo/{number}"
            asked = carried(number, Resolve(number, name, 3, 10_000))
            assert isinstance(asked, Resolve)
            answer = Resolved(asked.request, asked.identity, "node-2.boot#1", number)
            found = carried(number, answer)
            assert isinstance(found, Resolved)
            tokens += found.token
        assert tokens == count * (count + 1) // 2

    return Work(perform, IN_FLIGHT)


def cold_memory(effort: Effort) -> Measurement:
    """Claims over the memory store, against codec and queue alone."""
    with three_nodes() as cluster:
        nodes = [cluster.node(name) for name in cluster.nodes]
        ours = claims_of(nodes, effort.at_most(4 * IN_FLIGHT))
        return pair(ours, question_and_answer(), effort)


def cold_sqlite(effort: Effort) -> Measurement:
    """Claims over a file, each synced, against SQLite's own commits.

    Its batches are as large as ours were: rows written in a transaction.
    """
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/bench.db?synchronous=FULL"
        counted, store = CountedStore.of(open_store(url))
        with three_nodes(store) as cluster, commits(Path(folder)) as raw:
            nodes = [cluster.node(name) for name in cluster.nodes]
            ours = claims_of(nodes, effort.at_most(4 * IN_FLIGHT))
            for _ in range(WARM_UPS):
                ours.perform(ours.batch)
            written = counted.requests["claim"] / max(1, counted.calls["claim"])
            limit = Work(raw.fresh, max(1, round(written)))
            measured = pair(ours, limit, effort)
    return Measurement(
        ours=measured.ours, limit=measured.limit, note=f"{written:.0f} claims a commit"
    )
