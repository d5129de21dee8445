"""Where the time goes: what each step on the way of a message takes.

Processor time of one thread kept to one processor, the best of several rounds: what
a step costs where nothing disturbs it. What a whole way costs beyond its steps is the
calls between them, and the switches between threads.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from rich.table import Table

from actors.activation import Mail, _Turn
from actors.future import Future
from actors.node import PlacementNode
from actors.store_memory import MemoryStore
from messages import payload as payloads
from messages.codec import Codec
from messages.frames import Deliver
from placement.claim import Claims, Requester, StartAt
from placement.contracts import SessionRecord
from placement.delivery import Deliveries, Outgoing, ResolvePid
from placement.entry import Pid
from placement.hosting import Hosting, StartActivation
from placement.identity import Identity
from placement.lease import Guard
from placement.partition import PartitionTable
from placement.pidcache import PidCache
from placement.registry import VirtualActorRegistry
from placement.topology import Member, SessionId, Topology
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
    """A step of `way`, and its nanoseconds; the whole way is named so.

    A whole way has no limit here: its row in the benchmarks does.
    """

    way: str
    name: str
    ns: float
    #: The least that does the same in plain Python, and its nanoseconds.
    limit: str = ""
    limit_ns: float = 0.0


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


class _Bare(msgspec.Struct, gc=False):
    """An object of our usual size, made as cheaply as any can be."""

    a: int
    b: int
    c: int
    d: int
    e: int


def _made() -> object:
    return _Bare(1, 2, 3, 4, 5)


def _limits() -> dict[str, Callable[[], object]]:
    """What a step cannot do without, by what it is called."""
    known, message, queue = {"echo/1": 1}, {"n": 1}, deque[object]()
    lists = ["a.1", "b.1", 5, [2, "echo/1", 17, 5, {"n": 5}, "", 10_000, []]]
    pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode
    packed, now_ns = pack(lists), time.monotonic_ns()

    def through_a_queue() -> None:
        queue.append(message)
        queue.popleft()

    def kept() -> None:
        known["echo/1"] = _made()  # type: ignore[assignment]

    def kept_twice() -> None:
        kept()
        kept()

    return {
        "": lambda: None,
        "a clock": time.monotonic_ns,
        "a look-up in a dict": lambda: known.get("echo/1"),
        "a copy of a dict": lambda: dict(message),
        "an object": _made,
        "a comparison": lambda: now_ns > 1,
        "a count": itertools.count().__next__,
        "an append and a pop": through_a_queue,
        "an object and a lock": lambda: (_made(), threading.Lock()),
        "packing alone": lambda: pack(lists),
        "unpacking alone": lambda: unpack(packed),
        "an object in a dict": kept,
        "two objects in dicts": kept_twice,
    }


#: What each step is measured against.
_AGAINST = {
    "read the clock": "a clock",
    "find it, look at time and epoch": "a look-up in a dict",
    "check and copy the payload": "a copy of a dict",
    "make the mail": "an object",
    "take a number": "a count",
    "find the activation": "a look-up in a dict",
    "put it into the mailbox, take it": "an append and a pop",
    "ask the guard": "a comparison",
    "enter and leave user code": "a comparison",
    "make the turn": "an object",
    "make the future": "an object and a lock",
    "handle it, check and copy the answer, ask the guard": "a copy of a dict",
    "encode a frame (two)": "packing alone",
    "decode and check a frame (two)": "unpacking alone",
    "parse an identity": "a look-up in a dict",
    "parse the identity": "a look-up in a dict",
    "sender: hold the message, ask where it is": "two objects in dicts",
    "coordinator: begin a procedure": "two objects in dicts",
    "host: what to write": "two objects in dicts",
    "store: write it, a hundred at once": "an object in a dict",
    "host: it is ours, start it": "two objects in dicts",
    "coordinator: the claim is made": "a look-up in a dict",
    "host: make the activation": "two objects in dicts",
    "host: it serves": "two objects in dicts",
    "coordinator: answer who waits": "two objects in dicts",
    "sender: remember it, send what waited": "two objects in dicts",
}


def steps() -> Iterator[Step]:
    """All that are measured, each way after its steps."""
    with placed(is_pinned=True):
        limits = {name: _each(call) for name, call in _limits().items()}
        for step in _all_steps():
            limit = _AGAINST.get(step.name, "")
            yield step._replace(limit=limit, limit_ns=limits[limit])


def _all_steps() -> Iterator[Step]:
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
    activation: Any = outbox._find(ref.identity)  # noqa: SLF001
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


class _Timed:
    """What each step takes over rounds of many, of which the best counts.

    A step of a claim changes what the next one finds: so each is taken for all the
    identities of a round before the next step is.
    """

    def __init__(self) -> None:
        self.best: dict[str, float] = {}

    def __call__(
        self,
        name: str,
        call: Callable[[Any], Any],
        arguments: Sequence[Any],
        each_of: int = 1,
    ) -> list[Any]:
        """What `call` gives for each argument, which is for so many identities."""
        began = time.process_time_ns()
        found = [call(each) for each in arguments]
        ns = (time.process_time_ns() - began) / (len(arguments) * each_of)
        self.best[name] = min(ns, self.best.get(name, float("inf")))
        return found


def _claim() -> Iterator[Step]:
    """A claim where the coordinator's own node hosts, as most are.

    What the whole way has besides are inboxes, threads that wake each other, and for
    two thirds of the identities a question and its answer between nodes.
    """
    timed = _Timed()
    with node_here() as node:
        for number in range(_ROUNDS):
            _claims_apart(timed, [f"echo/{number}-{each}" for each in range(500)], node)
    for name, ns in timed.best.items():
        yield Step("claim, memory", name, ns)
    with three_nodes() as cluster:
        nodes = [cluster.node(name) for name in cluster.nodes]
        yield Step("claim, memory", WHOLE, _whole(claims_of(nodes), 1_000))


def _claims_apart(timed: _Timed, names: list[str], node: PlacementNode) -> None:
    """Some claims, step by step: what the actors of a node do, without the actors."""
    member = Member(session=SessionId("node-1.boot#1"), kinds=("echo",))
    session, here, far_ns = member.session, member.address, 10_000_000_000
    table = PartitionTable.build(Topology(epoch=1, members=(member,)))
    sender = Deliveries(PidCache(ttl_ns=far_ns, size_max=100_000))
    sender.open()
    sender.adopt(table, (), now_ns=0)
    claims = Claims(
        choose_host=lambda identity, of: of.host_of(identity),
        find_here=lambda _: None,
    )
    claims.adopt(session, table, now_ns=0)
    hosting = Hosting(kinds=frozenset({"echo"}))
    hosting.begin(session)
    store = MemoryStore()
    store.open_session(SessionRecord(session=session, ttl_ms=5_000))
    registry: VirtualActorRegistry[Any] = VirtualActorRegistry()

    def parsed(name: str) -> Identity:
        return Identity.parse(name)

    def held(identity: Identity) -> Any:
        return sender.hold(Outgoing(1, identity, far_ns, None), now_ns=0)[-1]

    def requested(question: ResolvePid) -> Any:
        return claims.request(
            Requester(here, question.request),
            question.identity,
            epoch=1,
            deadline_ns=far_ns,
            now_ns=0,
        )[-1]

    def hosted(start: StartAt) -> Any:
        return hosting.start(
            start.identity,
            acquisition=start.acquisition,
            host=start.host,
            expected_revision=start.expected_revision,
            takes_lock=start.takes_lock,
        )[-1]

    def made(start: StartActivation) -> Pid:
        registry.add(node.make(start.pid, start.record, guard, ()), now_ns=0)
        return start.pid

    guard = Guard(session, until_ns=far_ns)
    identities = timed("parse the identity", parsed, names)
    questions = timed("sender: hold the message, ask where it is", held, identities)
    starts = timed("coordinator: begin a procedure", requested, questions)
    entries = timed("host: what to write", hosted, starts)
    requests = [each.request for each in entries]
    outcomes = timed(
        "store: write it, a hundred at once",
        lambda first: store.claim(requests[first : first + 100]),
        range(0, len(requests), 100),
        each_of=100,
    )
    claimed = [each for some in outcomes for each in some]
    told = timed(
        "host: it is ours, start it",
        lambda pair: hosting.claimed(*pair, now_ns=0),
        list(zip(requests, claimed, strict=True)),
    )
    timed(
        "coordinator: the claim is made",
        lambda each: claims.claim_made(each.identity, each.procedure, now_ns=0),
        [effects[-1] for effects in told],
    )
    pids = timed("host: make the activation", made, [effects[1] for effects in told])
    served = timed("host: it serves", hosting.started, pids)
    answers = timed(
        "coordinator: answer who waits",
        lambda each: claims.started(each.pid, each.procedure, now_ns=0)[-1],
        [effects[-1] for effects in served],
    )
    sent = timed(
        "sender: remember it, send what waited",
        lambda answer: sender.resolved(answer.to.request, answer.pid, now_ns=0)[-1],
        answers,
    )
    assert [each.pid.identity for each in sent] == names


def _cells(step: Step) -> tuple[str, ...]:
    limit_ns = f"{step.limit_ns:,.0f}" if step.limit else ""
    return step.way, step.name, f"{step.ns:,.0f}", step.limit, limit_ns


_HEADINGS = {
    "way": "---",
    "step": "---",
    "ns": "---:",
    "at least": "---",
    "its ns": "---:",
}


def table_of_steps(found: Iterable[Step]) -> Table:
    """For a terminal."""
    table = Table()
    for heading, line in _HEADINGS.items():
        table.add_column(heading, justify="right" if line.endswith(":") else "left")
    for step in found:
        table.add_row(*_cells(step), end_section=step.name == WHOLE)
    return table


def markdown_of_steps(found: Iterable[Step]) -> str:
    """For ARCHITECTURE.md."""
    lines = [_HEADINGS, _HEADINGS.values(), *map(_cells, found)]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)
