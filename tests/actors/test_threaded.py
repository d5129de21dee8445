import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pykka
import pytest

from actors import Cluster, Grain, Kind, PlacementNode, handler
from actors.witness import ActivationWitness
from placement.errors import ActivationFailed, HandlerFailed, OutcomeUnknown
from placement.identity import Identity
from tests.actors.actors_under_test import GATES, Echo, Worker
from tests.actors.test_activation import RAISED, token_of
from tests.actors.test_cluster import FAST
from tests.waiting import eventually

GATE = threading.Event()
SEEN: list[Any] = []


class Threaded(pykka.ThreadingActor):
    context: Any

    def __init__(self) -> None:
        super().__init__()
        self.state = {"mine": 1}

    def on_start(self) -> None:
        name = self.context.identity.name
        if name.startswith("start "):
            raise RAISED[name.removeprefix("start ")](name)
        if name == "never starts":
            raise ValueError("no start today")

    def on_stop(self) -> None:
        name = self.context.identity.name
        SEEN.append(("stopped", name, self.context.fencing_token))
        if name.startswith("stop "):
            raise RAISED[name.removeprefix("stop ")](name)

    def on_receive(self, message: Any) -> Any:
        match message:
            case ["raise", name]:
                raise RAISED[name](name)
            case ["tell itself", name]:
                self.actor_ref.tell(["raise", name])
                return "told"
            case ["loop"]:
                return asyncio.run(self.in_a_loop())
            case ["future"]:
                return self.context.ref("echo/1").ask(7, block=False).get()
            case ["passivate"]:
                self.context.passivate()
            case ["await", identity]:
                return self.awaits(identity)
        return self.state

    async def awaits(self, identity: str) -> Any:
        try:
            return await self.context.ref(identity).ask_async("never")
        finally:
            SEEN.append("closed")

    async def in_a_loop(self) -> Any:
        return await self.context.ref("echo/1").ask_async("from a loop")

    @handler
    async def deep(self, text: str) -> Any:
        awaited = await self.context.ref("echo/1").ask_async(text)
        return [awaited, self.context.ref("echo/2").ask(text)]


class Blocking(pykka.ThreadingActor):
    def __init__(self) -> None:
        super().__init__()
        GATE.wait(20)

    def on_receive(self, message: Any) -> Any:
        return message


class Orphan(pykka.ThreadingActor):
    def __init__(self) -> None:  # its parent's is not called
        pass


KINDS: dict[str, Any] = {
    "threaded": Threaded,
    "blocking": Blocking,
    "orphan": Orphan,
    "echo": Echo,
    "made": Kind(lambda _: Threaded()),
    "typed": Kind(lambda _: Threaded(), actor_class=Threaded),
    "wrong": Kind(lambda _: Echo(), actor_class=Threaded),
    "grain": Kind(lambda _: Echo()),
    "other": Kind(lambda _: 5),
    "worker": Worker,
}


@pytest.fixture
def node() -> Iterator[PlacementNode]:
    witness = ActivationWitness()
    with PlacementNode("n", kinds=KINDS, witness=witness, **FAST) as made:
        made.start_member()
        yield made
    assert witness.double_count == 0


@pytest.mark.parametrize("name", sorted(RAISED))
def test_a_threading_actor_survives_what_is_no_exception(
    node: PlacementNode, name: str
) -> None:
    ref, other = node.ref("threaded/1"), node.ref("threaded/other")
    other.ask(1)
    with pytest.raises(HandlerFailed, match=RAISED[name].__name__):
        ref.ask(["raise", name])
    assert ref.ask(1) == {"mine": 1}
    # What it tells itself goes by pykka's own way, and ends it alone.
    first = token_of(node, "threaded/1")
    token = token_of(node, "threaded/other")
    assert ref.ask(["tell itself", name]) == "told"
    eventually(lambda: token_of(node, "threaded/1") != first)
    assert ref.ask(1) == {"mine": 1}
    assert token_of(node, "threaded/other") == token


@pytest.mark.parametrize("name", sorted(RAISED))
def test_a_hook_of_pykka_that_raises_ends_its_own_activation_only(
    node: PlacementNode, name: str
) -> None:
    node.ref("threaded/other").ask(1)
    token = token_of(node, "threaded/other")
    with pytest.raises(ActivationFailed, match=RAISED[name].__name__):
        node.ref(f"threaded/start {name}").ask(1)
    node.ref(f"threaded/stop {name}").ask(["passivate"])
    eventually(lambda: len(node.snapshot().activations) == 1)
    assert token_of(node, "threaded/other") == token


def test_an_actor_that_does_not_come_up_fails_its_activation(
    node: PlacementNode,
) -> None:
    for _ in range(2):
        with pytest.raises(ActivationFailed, match="ValueError: no start today"):
            node.ref("threaded/never starts").ask(1)
        with pytest.raises(ActivationFailed, match="does not call super"):
            node.ref("orphan/1").ask(1)
        with pytest.raises(ActivationFailed, match="made a Echo, not a pykka"):
            node.ref("wrong/1").ask(1)
        with pytest.raises(ActivationFailed, match="made a int, not a Grain or"):
            node.ref("other/1").ask(1)


def test_an_actor_that_blocks_as_it_is_made_blocks_only_its_own_thread(
    node: PlacementNode,
) -> None:
    GATE.clear()
    blocked = node.ref("blocking/1").ask("at last", block=False)
    assert node.ref("echo/1").ask("meanwhile") == "meanwhile"
    assert node.ref("threaded/1").ask(1) == {"mine": 1}
    assert not blocked.is_done
    GATE.set()
    assert blocked.get(timeout=5) == "at last"


def test_a_node_ends_while_an_actor_is_being_made() -> None:
    GATE.clear()
    with PlacementNode("n", kinds=KINDS, **FAST) as node:
        node.start_member()
        node.ref("blocking/1").tell(1)
        eventually(
            lambda: any(
                each.name == "actor-blocking/1" for each in threading.enumerate()
            )
        )
        node.kill()
    GATE.set()


def test_what_a_function_makes_decides_how_it_is_hosted(node: PlacementNode) -> None:
    for kind in ("made", "typed"):
        ref = node.ref(f"{kind}/1")
        assert ref.ask(1) == {"mine": 1}
        assert ref.ask(["future"]) == 7
        ref.ask(["passivate"])
    assert node.ref("grain/1").ask("a Grain") == "a Grain"
    eventually(lambda: len(node.snapshot().activations) == 2)


def test_the_state_of_a_threading_actor_is_its_own(node: PlacementNode) -> None:
    ref = node.ref("threaded/1")
    assert ref.ask(1) == {"mine": 1}
    with pytest.raises(HandlerFailed):
        ref.ask(["raise", "exit"])
    assert ref.ask(1) == {"mine": 1}


def test_a_threading_actor_may_await_and_block_and_run_a_loop(
    node: PlacementNode,
) -> None:
    assert node.ask(node.proxy(Threaded, "threaded/1").deep("x")) == ["x", "x"]
    assert node.ref("threaded/1").ask(["loop"]) == "from a loop"
    assert node.ref("threaded/1").ask(["future"]) == 7
    assert node.ref("worker/1").ask(["ask", "echo/1", 3]) == 3


def test_an_actor_has_ended_only_when_its_last_hook_has_been_left(
    node: PlacementNode,
) -> None:
    SEEN.clear()
    ref = node.ref("threaded/ends")
    ref.ask(1)
    before = token_of(node, "threaded/ends")
    ref.ask(["passivate"])
    eventually(lambda: token_of(node, "threaded/ends") == 0)
    assert [("stopped", "ends", before)] == SEEN


def test_a_program_that_stops_all_its_actors_ends_activations_which_begin_anew(
    node: PlacementNode,
) -> None:
    ref = node.ref("threaded/1")
    ref.ask(1)
    before = token_of(node, "threaded/1")
    assert len(pykka.ActorRegistry.get_by_class(Threaded)) == 1
    pykka.ActorRegistry.stop_all()
    eventually(lambda: token_of(node, "threaded/1") != before)
    assert ref.ask(1) == {"mine": 1}


def test_who_waits_for_an_actor_that_stops_hears_that_the_outcome_is_unknown(
    node: PlacementNode,
) -> None:
    GATE.clear()
    SEEN.clear()
    ref = node.ref("threaded/1")
    ref.ask(1)
    first = token_of(node, "threaded/1")
    asked = ref.ask(["await", "blocking/1"], block=False)
    eventually(lambda: token_of(node, "blocking/1") > 0)
    (actor,) = pykka.ActorRegistry.get_by_class(Threaded)
    actor.stop()
    with pytest.raises(OutcomeUnknown, match="its actor has stopped"):
        asked.get(timeout=5)
    GATE.set()
    eventually(lambda: token_of(node, "threaded/1") != first)
    seen = list(SEEN)
    assert seen == [("stopped", "1", first), "closed"]
    assert ref.ask(1) == {"mine": 1}


def test_idle_time_starts_when_a_blocking_handler_ends() -> None:
    GATES["idle"] = threading.Event()
    kinds = {"worker": Kind(Worker, idle_after=0.5)}
    with Cluster.embedded(nodes=1, kinds=kinds) as cluster:
        worker = cluster.ref("worker/1")
        count = worker.ask("count")
        waiting = worker.ask(["wait", "idle"], block=False)
        threading.Event().wait(0.8)
        cluster.node("node-1").passivate_idle(0.0)
        threading.Event().wait(0.1)
        GATES["idle"].set()

        assert waiting.get(timeout=5) == "back"

        threading.Event().wait(0.1)
        # Another activation would begin anew.
        assert worker.ask("count") == count + 1


def test_what_comes_back_from_user_code_after_the_end_is_not_handled() -> None:
    GATES["late"] = threading.Event()
    witness = ActivationWitness()
    with PlacementNode("n", kinds=KINDS, witness=witness, **FAST) as node:
        node.start_member()
        waiting = node.ref("worker/1").ask(["wait", "late"], block=False)
        eventually(lambda: bool(node.snapshot().activations))
        found = node._registry.find(Identity.parse("worker/1"))
        assert found is not None
        eventually(lambda: found._is_inside)  # type: ignore[attr-defined]
        found.stop(lapsed=True)
        with pytest.raises(OutcomeUnknown, match="lost its lease"):
            waiting.get(timeout=5)
        GATES["late"].set()
        eventually(lambda: not node.snapshot().activations)
    assert witness.of("worker/1").activations == 1
    assert witness.of("worker/1").handled == 0


class Timed(Grain):
    """Its timer awaits a worker that waits."""

    def on_receive(self, message: Any) -> Any:
        if message == "wait":
            self.context.after(0, self.wait)
        return message

    async def wait(self) -> None:
        await self.context.ref("worker/1").ask_async(["wait", "timed"])


def test_what_has_a_message_waiting_is_not_idle() -> None:
    GATES["timed"] = threading.Event()
    with Cluster.embedded(nodes=1, kinds={**KINDS, "timed": Timed}) as cluster:
        node = cluster.node("node-1")
        timed = cluster.ref("timed/1")
        timed.ask("wait")
        eventually(lambda: token_of(node, "worker/1") > 0)
        token = token_of(node, "timed/1")
        waiting = timed.ask("behind it", block=False)
        node.passivate_idle(0.0)
        cluster.ref("echo/1").ask(1)  # started by whoever was told that before
        GATES["timed"].set()

        assert waiting.get(timeout=5) == "behind it"
        assert token_of(node, "timed/1") == token


class Watched(list[Any]):
    """Says whether its activation keeps others from taking while it is copied."""

    activation: Any
    were_kept_out: bool | None = None

    def __iter__(self) -> Iterator[Any]:
        self.were_kept_out = self.activation._taking.locked()
        return super().__iter__()


def test_what_is_put_back_while_another_thread_seals_is_given_back_once() -> None:
    with PlacementNode("n", kinds=KINDS, **FAST) as node:
        node.start_member()
        node.ref("threaded/1").ask(1)
        activation: Any = node._registry.find(Identity.parse("threaded/1"))
        assert activation is not None
        taken = Watched(["later"])
        taken.activation, activation._taken = activation, taken

        activation._put_back("first")

        assert taken.were_kept_out
        assert [activation._take_mail(), activation._take_mail()] == ["first", "later"]
