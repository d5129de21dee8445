"""Asks and tells: one after the other, many in flight, awaited, typed, durable."""

import asyncio
import itertools
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from actors import Cluster, Grain, Kind, PlacementNode, handler
from actors.reference import Ref
from actors.store_url import open_store
from messages import payload as payloads
from messages.codec import Codec
from messages.frames import Answer, Deliver
from scripts.benchmarks.measure import Effort, Measurement, Work, pair, placed
from scripts.benchmarks.peers import (
    TOLD,
    WAIT_S,
    BareLoop,
    PooledInbox,
    Waker,
    raw_echo,
)
from scripts.benchmarks.stores import CountedStore, commits

ASKS = 200
TELLS = 5_000
IN_FLIGHT = 1_000
#: How many Grains share them.
GRAINS = 100
#: After how many rounds it is known how large our own commits are.
WARM_UPS = 10


class Echo(Grain):
    """Answers with the message."""

    done = threading.Event()

    def on_receive(self, message: Any) -> Any:
        """Answer; count; set the event that ends a round of tells."""
        if message == "done":
            Echo.done.set()
            return None
        TOLD.count += 1
        return message


#: Its inbox takes whole rounds: what a full one drops would not be measured.
ECHO = Kind(Echo, idle_after=None, inbox_max=10_000_000)


@contextmanager
def node_here(kind: Kind = ECHO, store: str = "memory://") -> Iterator[PlacementNode]:
    """One node that hosts everything itself."""
    with PlacementNode("bench", kinds={"echo": kind}, store=store) as node:
        node.start_member()
        yield node


def asks_of(ref: Any) -> Work:
    """Asks one after the other."""
    message = {"n": 1}

    def perform(count: int) -> None:
        answered = 0
        for _ in range(count):
            answered += ref.ask(message)["n"]
        assert answered == count

    return Work(perform, ASKS)


def ask_pykka(effort: Effort, *, is_pinned: bool) -> Measurement:
    """An ask to a local Grain, and one of raw pykka."""
    with placed(is_pinned=is_pinned), node_here() as node, raw_echo() as raw:
        return pair(asks_of(node.ref("echo/1")), asks_of(raw), effort)


def ask_loop(effort: Effort, *, is_pinned: bool) -> Measurement:
    """An ask to a local Grain, and the two switches of threads that it needs."""
    with placed(is_pinned=is_pinned), node_here() as node, BareLoop() as loop:
        return pair(asks_of(node.ref("echo/1")), asks_of(loop), effort)


def tells_of(ref: Ref) -> Work:
    """Tells, until the last one has been handled."""
    message = {"n": 1}

    def perform(count: int) -> None:
        Echo.done.clear()
        TOLD.count = 0
        for _ in range(count):
            ref.tell(message)
        ref.tell("done")
        assert Echo.done.wait(WAIT_S)
        assert TOLD.count == count

    return Work(perform, TELLS)


def raw_tells_of(ref: Any) -> Work:
    """The same of a peer."""
    message = {"n": 1}

    def perform(count: int) -> None:
        done = threading.Event()
        TOLD.count = 0
        for _ in range(count):
            ref.tell(message)
        ref.tell(done)
        assert done.wait(WAIT_S)
        assert TOLD.count == count

    return Work(perform, TELLS)


def tell_pykka(effort: Effort, *, is_pinned: bool) -> Measurement:
    """A tell to a local Grain, and one of raw pykka."""
    with placed(is_pinned=is_pinned), node_here() as node, raw_echo() as raw:
        return pair(tells_of(node.ref("echo/1")), raw_tells_of(raw), effort)


def tell_inbox(effort: Effort, *, is_pinned: bool) -> Measurement:
    """A tell to a local Grain, and one into a bare inbox on a shared thread."""
    with placed(is_pinned=is_pinned), node_here() as node, PooledInbox() as inbox:
        return pair(tells_of(node.ref("echo/1")), raw_tells_of(inbox), effort)


def remote_refs(cluster: Cluster, count: int) -> list[Ref]:
    """References, as node-1 has them, to what node-2 hosts."""
    node, found = cluster.node("node-1"), list[Ref]()
    for number in itertools.count():
        if len(found) == count:
            return found
        name = f"echo/{number}"
        if node.resolve(name).pid.node == "node-2":
            found.append(node.ref(name))
    raise AssertionError


@contextmanager
def two_nodes(count: int) -> Iterator[list[Ref]]:
    """A cluster of two; references from one to `count` Grains on the other."""
    with Cluster.embedded(nodes=2, kinds={"echo": ECHO}) as cluster:
        yield remote_refs(cluster, count)


def tell_remote(effort: Effort) -> Measurement:
    """A tell to another node as bytes, and one into a bare inbox."""
    with two_nodes(1) as refs, PooledInbox() as inbox:
        return pair(tells_of(refs[0]), raw_tells_of(inbox), effort)


# --- many in flight ---


def flight_of(refs: Sequence[Ref], in_flight: int = IN_FLIGHT) -> Work:
    """Asks of which `in_flight` wait for an answer at once."""

    def perform(count: int) -> None:
        for first in range(0, count, in_flight):
            numbers = range(first, min(count, first + in_flight))
            futures = [
                refs[number % len(refs)].ask({"n": number}, block=False)
                for number in numbers
            ]
            for number, future in zip(numbers, futures, strict=True):
                assert future.get(timeout=WAIT_S) == {"n": number}

    return Work(perform, max(in_flight, 100))


def copies() -> Work:
    """What a message on one node cannot do without: two copies, two queues."""
    inbox, outbox = deque[Any](), deque[Any]()

    def perform(count: int) -> None:
        for number in range(count):
            inbox.append(payloads.copy({"n": number}))
            outbox.append(payloads.copy(inbox.popleft()))
        for number in range(count):
            assert outbox.popleft() == {"n": number}

    return Work(perform, IN_FLIGHT)


def frames() -> Work:
    """What a message to another node cannot do without: two frames, two queues."""
    codec, inbox, outbox = Codec("default"), deque[bytes](), deque[bytes]()
    here, there = "node-1.boot", "node-2.boot"

    def perform(count: int) -> None:
        for number in range(1, count + 1):
            payload = payloads.copy({"n": number})
            asked = Deliver("echo/1", 17, number, payload, "", 10_000, ())
            inbox.append(codec.encode(here, there, number, asked))
        for number in range(1, count + 1):
            arrived = codec.decode(inbox.popleft(), receiver=there).body
            assert isinstance(arrived, Deliver)
            answer = Answer(arrived.message_id, payloads.copy(arrived.payload), 17)
            outbox.append(codec.encode(there, here, number, answer))
        for number in range(1, count + 1):
            answered = codec.decode(outbox.popleft(), receiver=here).body
            assert isinstance(answered, Answer)
            assert answered.payload == {"n": number}

    return Work(perform, IN_FLIGHT)


def flight_local(effort: Effort) -> Measurement:
    """Asks in flight to Grains of the same node."""
    with node_here() as node:
        refs = [node.ref(f"echo/{number}") for number in range(GRAINS)]
        return pair(flight_of(refs), copies(), effort)


def flight_remote(effort: Effort) -> Measurement:
    """Asks in flight to Grains of another node."""
    with two_nodes(GRAINS) as refs:
        return pair(flight_of(refs), frames(), effort)


def awaited(effort: Effort) -> Measurement:
    """Coroutines that await asks, and ones that another thread only wakes."""
    each = 5
    with node_here() as node, Waker() as waker, asyncio.Runner() as runner:
        refs = [node.ref(f"echo/{number}") for number in range(GRAINS)]

        async def ask(ref: Ref) -> int:
            found = 0
            for _ in range(each):
                found += (await ref.ask_async({"n": 1}))["n"]
            return found

        async def wake() -> int:
            found = 0
            for _ in range(each):
                found += await waker.wake()
            return found

        async def asks(count: int) -> int:
            jobs = (ask(refs[n % GRAINS]) for n in range(count // each))
            return sum(await asyncio.gather(*jobs))

        async def wakes(count: int) -> int:
            jobs = (wake() for _ in range(count // each))
            return sum(await asyncio.gather(*jobs))

        def ours(count: int) -> None:
            assert runner.run(asks(count)) == count

        def limit(count: int) -> None:
            assert runner.run(wakes(count)) == count

        batch = IN_FLIGHT * each
        return pair(Work(ours, batch), Work(limit, batch), effort)


# --- typed ---


@dataclass
class Balance:
    """The state of an account."""

    amount: Decimal = Decimal(0)


class Account(Grain[Balance]):
    """What a program's own actors look like."""

    @handler
    async def deposit(self, amount: Decimal) -> Decimal:
        """Add, and say how much there is."""
        self.state.amount += amount
        return self.state.amount


def calls_of(node: PlacementNode) -> Work:
    """Typed calls, as many in flight; each answer is the account's own sum."""
    accounts = [node.proxy(Account, str(number)) for number in range(GRAINS)]
    sums, one = [Decimal(0)] * GRAINS, Decimal("0.01")

    def perform(count: int) -> None:
        waiting = []
        for number in range(count):
            at = number % GRAINS
            call: Any = accounts[at].deposit(one)
            future = call.sender.ask(
                call.identity, call.payload, timeout=WAIT_S, request_id=""
            )
            sums[at] += one
            waiting.append((call, future, sums[at]))
        for call, future, expected in waiting:
            assert call.decode(future.get(timeout=WAIT_S)) == expected

    return Work(perform, IN_FLIGHT)


def typed(effort: Effort) -> Measurement:
    """A proxy's call with a Decimal to a coroutine, and the untyped ask."""
    kinds = {"echo": ECHO, "account": Kind(Account, idle_after=None)}
    with PlacementNode("bench", kinds=kinds) as node:
        node.start_member()
        refs = [node.ref(f"echo/{number}") for number in range(GRAINS)]
        return pair(calls_of(node), flight_of(refs), effort)


# --- durable ---


class Durable(Grain):
    """Counts, and answers when the count is stored."""

    count = 0

    def on_receive(self, message: Any) -> Any:
        """Store what the answer says."""
        self.count += 1
        self.context.save(self.count.to_bytes(8, "big"))
        return self.count


def durable(effort: Effort) -> Measurement:
    """Answers that wait for the disk, against SQLite's commits of as many rows."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/bench.db?synchronous=FULL"
        counted, store = CountedStore.of(open_store(url))
        kinds = {"echo": Kind(Durable, idle_after=None)}
        with (
            Cluster.embedded(nodes=1, kinds=kinds, store=store) as cluster,
            commits(Path(folder)) as raw,
        ):
            node = cluster.node("node-1")
            refs = [node.ref(f"echo/{number}") for number in range(IN_FLIGHT)]
            rounds = itertools.count(1)

            def perform(count: int) -> None:
                number = next(rounds)
                futures = [ref.ask(None, block=False) for ref in refs[:count]]
                assert all(each.get(timeout=WAIT_S) == number for each in futures)

            ours = Work(perform, IN_FLIGHT)
            perform(IN_FLIGHT)
            counted.calls.clear()
            counted.requests.clear()
            for _ in range(WARM_UPS):
                perform(IN_FLIGHT)
            saved = counted.requests["save"] / max(1, counted.calls["save"])
            measured = pair(ours, Work(raw.again, max(1, round(saved))), effort)
    return Measurement(
        ours=measured.ours, limit=measured.limit, note=f"{saved:.0f} saves a commit"
    )
