"""Asks and tells: one after the other, many in flight, awaited, typed, durable."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actors import Grain, Kind, PlacementNode
from actors.reference import Ref
from scripts.benchmarks.measure import Effort, Measurement, Work, pair, placed
from scripts.benchmarks.peers import WAIT_S, BareLoop, PooledInbox, RawEcho, raw_echo

ASKS = 200
TELLS = 5_000


class Echo(Grain):
    """Answers with the message."""

    told_count = 0
    done = threading.Event()

    def on_receive(self, message: Any) -> Any:
        """Answer; count; set the event that ends a round of tells."""
        if message == "done":
            Echo.done.set()
            return None
        Echo.told_count += 1
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
        Echo.told_count = 0
        for _ in range(count):
            ref.tell(message)
        ref.tell("done")
        assert Echo.done.wait(WAIT_S)
        assert Echo.told_count == count

    return Work(perform, TELLS)


def raw_tells_of(ref: Any, counter: Any) -> Work:
    """The same of a peer that counts in `told_count`."""
    message = {"n": 1}

    def perform(count: int) -> None:
        done = threading.Event()
        counter.told_count = 0
        for _ in range(count):
            ref.tell(message)
        ref.tell(done)
        assert done.wait(WAIT_S)
        assert counter.told_count == count

    return Work(perform, TELLS)


def tell_pykka(effort: Effort, *, is_pinned: bool) -> Measurement:
    """A tell to a local Grain, and one of raw pykka."""
    with placed(is_pinned=is_pinned), node_here() as node, raw_echo() as raw:
        return pair(tells_of(node.ref("echo/1")), raw_tells_of(raw, RawEcho), effort)


def tell_inbox(effort: Effort, *, is_pinned: bool) -> Measurement:
    """A tell to a local Grain, and one into a bare inbox on a shared thread."""
    with placed(is_pinned=is_pinned), node_here() as node, PooledInbox() as inbox:
        return pair(tells_of(node.ref("echo/1")), raw_tells_of(inbox, inbox), effort)
