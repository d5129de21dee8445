"""Threads that meet at the worst moment: each test holds one of them just there."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pykka
import pytest

from actors import Cluster, PlacementNode
from actors.dispatch import Timer
from actors.node import _NodeHost
from actors.store_memory import MemoryStore
from actors.threaded import ThreadedActivation
from placement.contracts import Failed, Save
from placement.errors import OutcomeUnknown
from placement.identity import Identity
from placement.topology import Topology
from tests.actors.actors_under_test import Echo
from tests.actors.test_cluster import FAST
from tests.waiting import eventually

WAIT_S = 10.0


class Steps:
    """What was done, in order, and by which thread; gates that tests open."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.gates: dict[str, threading.Event] = {}

    def __call__(self, what: str) -> None:
        self.done.append((what, threading.current_thread().name.partition("/")[0]))

    def gate(self, name: str) -> threading.Event:
        return self.gates.setdefault(name, threading.Event())

    def wait(self, name: str) -> None:
        assert self.gate(name).wait(WAIT_S), name

    @property
    def names(self) -> list[str]:
        return [what for what, _ in self.done]


@pytest.fixture
def steps() -> Iterator[Steps]:
    found = Scripted.steps = Steps()
    yield found
    for gate in found.gates.values():
        gate.set()


class Scripted(pykka.ThreadingActor):
    """Has a thread of its own, and says what it does."""

    steps: Steps
    context: Any

    def on_activate(self) -> None:
        if self.context.identity.name == "one shot":
            self.context.passivate()

    def on_passivate(self) -> None:
        self.steps("on_passivate")
        if self.context.identity.name == "one shot":
            self.steps.gate("passivating").set()
            self.steps.wait("passivate")

    def on_receive(self, message: Any) -> Any:
        match message:
            case "tell itself":
                self.actor_ref.tell("past its node")
                self.steps.gate("told").set()
                self.steps.wait("go on")
            case "past its node":
                self.steps("past its node")
            case "suspend":
                return self.suspended()
            case "await later":
                return self.awaits_later()
            case "save and ask":
                self.context.save(b"x")
                return self.context.ref("echo/1").ask("saved", timeout=WAIT_S / 2)
        return message

    async def suspended(self) -> None:
        try:
            self.steps.gate("suspended").set()
            await self.context.ref("hung/1").ask_async("x")
        finally:
            self.steps("finally")
            self.steps.gate("closing").set()
            self.steps.wait("close")

    async def awaits_later(self) -> None:
        try:
            self.steps.gate("inside").set()
            self.steps.wait("await")
            await self.context.ref("echo/1").ask_async("x")
        finally:
            self.steps("finally")


class Hung(pykka.ThreadingActor):
    def on_receive(self, message: Any) -> None:
        Scripted.steps.wait("hung")


KINDS: dict[str, Any] = {"scripted": Scripted, "hung": Hung, "echo": Echo}


@pytest.fixture
def node(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlacementNode]:
    tell_end = _NodeHost.ended

    def ended(host: Any, *what: Any) -> None:
        steps("ended")
        tell_end(host, *what)

    monkeypatch.setattr(_NodeHost, "ended", ended)
    with PlacementNode("n", kinds=KINDS, **FAST) as made:
        made.start_member()
        yield made
        for gate in steps.gates.values():
            gate.set()
        steps.gate("hung").set()


def activation_of(node: PlacementNode, identity: str) -> Any:
    found = node._registry.find(Identity.parse(identity))
    assert found is not None
    return found


@contextmanager
def meeting(
    monkeypatch: pytest.MonkeyPatch, where: str, meanwhile: Callable[[Any], None]
) -> Iterator[None]:
    """Have `meanwhile` happen, on another thread, once `where` has been entered."""
    enter, armed = ThreadedActivation._enter, [True]

    def entered(activation: ThreadedActivation, now_ns: int) -> bool:
        is_entered = enter(activation, now_ns)
        if is_entered and armed and sys._getframe(1).f_code.co_name == where:
            armed.clear()
            other = threading.Thread(target=meanwhile, args=(activation,))
            other.start()
            other.join(WAIT_S)
        return is_entered

    with monkeypatch.context() as patched:
        patched.setattr(ThreadedActivation, "_enter", entered)
        yield
    assert not armed, f"{where} was not entered"


# --- an actor with a thread of its own ---


def test_r2_5_what_is_told_past_the_node_enters_no_user_code_after_a_lapse(
    node: PlacementNode, steps: Steps
) -> None:
    ref = node.ref("scripted/1")
    ref.tell("tell itself")
    steps.wait("told")

    activation_of(node, "scripted/1").stop(lapsed=True)
    steps.gate("go on").set()

    eventually(lambda: "ended" in steps.names)
    assert "past its node" not in steps.names


def test_what_is_told_past_the_node_is_handled_while_the_lease_is_held(
    node: PlacementNode, steps: Steps
) -> None:
    steps.gate("go on").set()
    node.ref("scripted/1").ask("tell itself")

    eventually(lambda: "past its node" in steps.names)


def test_a_last_hook_that_blocks_holds_up_nobody_else(
    node: PlacementNode, steps: Steps
) -> None:
    node.ref("scripted/one shot").tell("x")
    steps.wait("passivating")
    activation = activation_of(node, "scripted/one shot")

    # What a save, a lapse and a kill need while user code runs.
    assert activation._lock.acquire(timeout=WAIT_S)
    activation._lock.release()
    assert node.ref("echo/1").ask(1, timeout=WAIT_S) == 1
    steps.gate("passivate").set()
    eventually(lambda: steps.names == ["on_passivate", "ended"])


def test_a_lapse_closes_a_coroutine_on_its_own_thread_and_waits_for_nothing(
    node: PlacementNode, steps: Steps
) -> None:
    waiting = node.ref("scripted/1").ask("suspend", block=False)
    steps.wait("suspended")
    activation = activation_of(node, "scripted/1")
    eventually(lambda: activation._turn.awaiting is not None)

    activation.stop(lapsed=True)

    with pytest.raises(OutcomeUnknown, match="lost its lease"):
        waiting.get(timeout=WAIT_S)
    steps.wait("closing")
    assert steps.done == [("finally", "actor-scripted")]
    steps.gate("close").set()
    eventually(lambda: steps.names == ["finally", "ended"])


def test_a_coroutine_that_awaits_after_a_lapse_is_closed_before_the_end_is_told(
    node: PlacementNode, steps: Steps
) -> None:
    waiting = node.ref("scripted/1").ask("await later", block=False)
    steps.wait("inside")

    activation_of(node, "scripted/1").stop(lapsed=True)
    steps.gate("await").set()

    with pytest.raises(OutcomeUnknown):
        waiting.get(timeout=WAIT_S)
    eventually(lambda: steps.names == ["finally", "ended"])
    assert steps.done[0] == ("finally", "actor-scripted")


def test_an_end_that_comes_before_the_last_hook_is_told_once(
    node: PlacementNode, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.ref("scripted/1").ask("x")

    def lapse(activation: Any) -> None:
        activation.stop(lapsed=True)

    with meeting(monkeypatch, "_passivate", lapse):
        node.passivate_idle(0.0)
        eventually(lambda: "ended" in steps.names)
        eventually(lambda: not node.snapshot().activations)

    assert steps.names == ["ended"]


def test_who_asks_just_when_a_save_has_failed_hears_it(
    node: PlacementNode, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = node.ref("scripted/1")
    ref.ask("x")
    lose = OutcomeUnknown("a save was refused")

    with (
        meeting(monkeypatch, "_handle", lambda activation: activation._lose(lose)),
        pytest.raises(OutcomeUnknown, match="lost its lease"),
    ):
        ref.ask("y", block=False).get(timeout=WAIT_S)


def test_a_save_is_tried_again_while_its_own_thread_waits_for_it(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, lost = MemoryStore.save, list[int]()

    def lose_once(store: MemoryStore, requests: Sequence[Save]) -> Any:
        if not lost:
            lost.append(len(requests))
            return [Failed("no answer", may_have_happened=True)] * len(requests)
        return save(store, requests)

    monkeypatch.setattr(MemoryStore, "save", lose_once)
    with Cluster.embedded(nodes=1, kinds=KINDS, **FAST) as cluster:
        ref = cluster.ref("scripted/1")

        # Its own ask waits for the save, whose repetition must not wait for it.
        assert ref.ask("save and ask", timeout=WAIT_S) == "saved"
    assert lost == [1]


# --- whoever sends ---


def test_a_mail_that_is_put_into_a_mailbox_just_sealed_goes_another_way(
    node: PlacementNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SealedMeanwhile(list[Any]):
        def append(self, mail: Any) -> None:
            activation.bounce_all()
            super().append(mail)

    ref = node.ref("echo/1")
    ref.ask("what is held at first")
    ref.ask("what finds it")
    activation = activation_of(node, "echo/1")
    assert activation.is_straight
    mailbox = activation._mailbox = SealedMeanwhile()
    came_back: list[Any] = []
    monkeypatch.setattr(
        node._outbox, "bounced", lambda mail, _: came_back.append(mail.payload)
    )

    ref.tell("late")

    # As one that had come back it would be dropped where others have gone on since.
    assert came_back == []
    assert not mailbox
    assert activation.is_straight is False
    assert Identity.parse("echo/1") in node._outbox.waiting()


def test_r1_2_what_is_bound_to_a_session_that_is_over_is_sent_nothing_more() -> None:
    with Cluster.embedded(nodes=2, kinds={"echo": Echo}, **FAST) as cluster:
        node = cluster.node("node-1")
        name = next(
            name
            for name in (f"echo/{number}" for number in range(100))
            if cluster.resolve(name).owner == node.session
        )
        node.ref(name).ask("what is held at first")
        node.ref(name).ask("what finds it")
        activation = activation_of(node, name)
        assert activation.is_straight
        outbox, table, gone = node._outbox, node._table, node.session
        assert table is not None
        left = tuple(each for each in table.topology.members if each.session != gone)
        topology = Topology(epoch=table.epoch + 1, members=left)

        node._engine.system.post(outbox.adopt, table.adopt(topology), (gone,))

        eventually(lambda: not activation.is_straight)


def test_a_timer_that_is_due_just_now_is_cancelled_without_harm() -> None:
    class DueJustNow(Timer):
        """Another thread takes away what it calls, once it has been looked at."""

        @property
        def on_cancel(self) -> Any:
            return calls.pop() if calls else None

        @on_cancel.setter
        def on_cancel(self, call: Any) -> None:
            """It is as `calls` says."""

    cancelled: list[bool] = []
    calls = [lambda: cancelled.append(True)]

    DueJustNow(print, ()).cancel()

    assert cancelled == [True]


INTERRUPTED = """
import signal, sys, threading
from contextlib import suppress
from actors import Grain, PlacementNode

class Interrupted(BaseException):
    pass

class Echo(Grain):
    def on_receive(self, message):
        return message

is_on = False

def interrupt(*_):
    if is_on:
        raise Interrupted

signal.signal(signal.SIGALRM, interrupt)
node = PlacementNode("n", kinds={"echo": Echo})
node.start_member()
ref = node.ref("echo/1")
ref.ask(0)
lock, held = node._outbox.lock, []

def look():
    if lock.acquire(timeout=5):
        lock.release()
    else:
        held.append(True)

for _ in range(400):
    with suppress(Interrupted):
        is_on = True
        signal.setitimer(signal.ITIMER_REAL, 0.0015)
        while True:
            ref.ask(1, block=False)
    is_on = False
    other = threading.Thread(target=look)
    other.start()
    other.join()
    if held:
        break
print("held" if held else "free", flush=True)
node.kill(timeout=1)
"""


def test_an_interrupt_in_an_ask_leaves_no_lock_held() -> None:
    # Of its own: an interrupt may come in the middle of anything.
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "free\n", done.stderr
