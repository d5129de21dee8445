"""Where the time goes: what each step on the way of a message takes.

Processor time of one thread kept to one processor, the best of several rounds: what
a step costs where nothing disturbs it. What a whole way costs beyond its steps is the
calls between them, and the switches between threads.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from rich.table import Table

from actors.activation import Mail, _Turn
from actors.future import Future
from actors.node import PlacementNode
from messages import payload as payloads
from messages.codec import Codec
from messages.frames import Deliver
from placement.identity import Identity
from scripts.benchmarks.claims import claims_of, resolves_of, three_nodes
from scripts.benchmarks.measure import Work, placed
from scripts.benchmarks.messages import (
    GRAINS,
    asks_of,
    flight_of,
    node_here,
    tells_of,
    two_nodes,
)

_ROUNDS = 7
_TIMES = 20_000
_WAYS = 4_000


class Step(NamedTuple):
    """A step of `way`, and its nanoseconds; the whole way is named so."""

    way: str
    name: str
    ns: float


WHOLE = "the whole way"


def _best(perform: Callable[[int], object], count: int, rounds: int) -> float:
    """Nanoseconds of processor time of one of `count`, in the best round."""
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time_ns()
        perform(count)
        best = min(best, (time.process_time_ns() - began) / count)
    return best


def _each(call: Callable[[], object]) -> float:
    """What a call takes, without that of a call that does nothing."""

    def repeat(count: int, call: Callable[[], object] = call) -> None:
        for _ in range(count):
            call()

    nothing = _best(lambda count: repeat(count, lambda: None), _TIMES, _ROUNDS)
    return max(0.0, _best(repeat, _TIMES, _ROUNDS) - nothing)


def _whole(work: Work, count: int = _WAYS) -> float:
    return _best(work.perform, count, _ROUNDS)


def steps() -> Iterator[Step]:
    """All that are measured, each way after its steps."""
    with placed(is_pinned=True):
        yield from _resolve()
        with node_here() as node:
            yield from _local(node)
        yield from _remote()
        yield from _claim()


def _resolve() -> Iterator[Step]:
    with three_nodes() as cluster:
        names = [f"echo/{number}" for number in range(1_000)]
        work = resolves_of(cluster, names)
        node = cluster._entry  # noqa: SLF001  whose cache it is
        known, now_ns = node._known, node._now_ns  # noqa: SLF001
        work.perform(1_000)
        yield Step("resolve, warm", "read the clock", _each(now_ns))
        yield Step(
            "resolve, warm",
            "find it, look at time and epoch",
            _each(lambda: known(names[0], 0)),
        )
        yield Step("resolve, warm", WHOLE, _whole(work))


def _local(node: PlacementNode) -> Iterator[Step]:
    ref, message = node.ref("echo/1"), {"n": 1}
    for _ in range(2):
        ref.ask(message)
    outbox: Any = node._outbox  # noqa: SLF001  its steps are measured
    registered: Any = outbox._find(ref.identity)  # noqa: SLF001
    activation = registered.activation
    mail = Mail(message, "", (), 0, False, outbox, 1, ref.identity)
    asked = Mail(message, "", (), 0, True, outbox, 1, ref.identity)
    mailbox: list[Mail] = []

    def put_and_take() -> None:
        mailbox.append(mail)
        mailbox.pop()

    way = "tell, this node"
    yield Step(way, "check and copy the payload", _each(lambda: payloads.copy(message)))
    yield Step(
        way,
        "make the mail",
        _each(lambda: Mail(message, "", (), 0, False, outbox, 1, ref.identity)),
    )
    yield Step(way, "take a number", _each(outbox._take_number))  # noqa: SLF001
    yield Step(
        way,
        "find the activation",
        _each(lambda: outbox._find(ref.identity)),  # noqa: SLF001
    )
    yield Step(way, "put it into the mailbox, take it", _each(put_and_take))
    yield Step(way, "read the clock", _each(activation._host.now_ns))  # noqa: SLF001
    yield Step(way, "ask the guard", _each(lambda: activation.guard.is_open(0)))
    yield Step(
        way,
        "enter and leave user code",
        _each(lambda: (activation._enter(0), activation._leave())),  # noqa: SLF001
    )
    yield Step(way, "make the turn", _each(lambda: _Turn("handle", mail)))
    yield Step(
        way,
        "handle it, with the four before",
        _each(lambda: activation._handle(mail)),  # noqa: SLF001
    )
    yield Step(way, WHOLE, _whole(tells_of(ref), 20_000))
    way = "ask in flight, this node"
    yield Step(way, "make the future", _each(Future))
    yield Step(
        way,
        "handle it, check and copy the answer, ask the guard",
        _each(lambda: activation._handle(asked)),  # noqa: SLF001
    )
    refs = [node.ref(f"echo/{number}") for number in range(GRAINS)]
    yield Step(way, WHOLE, _whole(flight_of(refs)))
    yield Step("ask, one after the other", WHOLE, _whole(asks_of(ref), 1_000))


def _remote() -> Iterator[Step]:
    codec, way = Codec("default"), "ask in flight, another node"
    frame = Deliver("echo/1", 17, 5, {"n": 5}, "", 10_000, ())
    data = codec.encode("a.1", "b.1", 5, frame)
    yield Step(
        way, "encode a frame (two)", _each(lambda: codec.encode("a.1", "b.1", 5, frame))
    )
    yield Step(
        way,
        "decode and check a frame (two)",
        _each(lambda: codec.decode(data, receiver="b.1")),
    )
    yield Step(way, "parse an identity", _each(lambda: Identity.parse("echo/1")))
    with two_nodes(GRAINS) as refs:
        yield Step(way, WHOLE, _whole(flight_of(refs)))


def _claim() -> Iterator[Step]:
    with three_nodes() as cluster:
        nodes = [cluster.node(name) for name in cluster.nodes]
        yield Step("claim, memory", WHOLE, _whole(claims_of(nodes), 1_000))


def table_of_steps(found: Iterable[Step]) -> Table:
    """For a terminal."""
    table = Table("way", "step")
    table.add_column("ns", justify="right")
    for step in found:
        table.add_row(
            step.way, step.name, f"{step.ns:,.0f}", end_section=step.name == WHOLE
        )
    return table
