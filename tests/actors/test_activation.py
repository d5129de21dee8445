import asyncio
import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pykka
import pytest

from actors import Grain, Kind, PlacementNode, Rejected, handler
from actors.engine import EmbeddedEngine
from actors.grain import Surface
from actors.store_memory import MemoryStore
from placement.contracts import StoreFailure
from placement.errors import (
    TEXT_MAX,
    ActivationFailed,
    BadMessage,
    Deadlock,
    HandlerFailed,
    PlacementError,
    StoreFailed,
    describe,
)
from placement.identity import Identity
from tests.actors.test_cluster import FAST
from tests.waiting import eventually

RAISED: dict[str, type[BaseException]] = {
    "exit": SystemExit,
    "interrupt": KeyboardInterrupt,
    "cancelled": asyncio.CancelledError,
    "generator": GeneratorExit,
}


class Unsayable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Fussy(Rejected):
    what: Any


class Touchy(Rejected):
    at: Decimal


@dataclass
class Grumpy:
    x: int

    def __post_init__(self) -> None:
        raise LookupError("not today")


@dataclass
class Fragile:
    x: int = 0

    def __post_init__(self) -> None:
        if self.x > 1:
            raise SystemExit("never so much")


class Wild(Grain):
    """Raises what it is told to, where it is told to."""

    def on_activate(self) -> None:
        name = self.context.identity.name
        if name in RAISED:
            raise RAISED[name](name)
        if name == "unsayable":
            raise Unsayable
        if name == "brief":
            self.context.passivate()

    async def on_receive(self, message: Any) -> Any:
        match message:
            case ["raise", name]:
                raise RAISED[name](name)
            case ["ask and raise", name]:
                await self.context.ref("wild/other").ask_async(1)
                raise RAISED[name](name)
            case ["timer", name]:
                self.context.after(0, lambda: _raise(RAISED[name]))
            case ["unsayable"]:
                raise Unsayable
            case ["long"]:
                raise ValueError("\ud800" + "x" * 1_000_000)
            case ["reject", "unfit"]:
                raise Fussy(what=object())
            case ["reject", "large"]:
                raise Fussy(what=["x" * 700_000, "y" * 700_000])
            case ["reject", list() as what]:
                raise Fussy(what=what)
            case ["reject badly"]:
                raise Touchy(at="soon")  # type: ignore[arg-type]
            case ["cycle"]:
                cycle: list[Any] = []
                cycle.append(cycle)
                return cycle
            case ["save", size]:
                self.context.save(b"x" * size)
                return "saved"
            case ["stop, then", inner]:
                self.context.passivate()
                return inner
            case ["ask", identity]:
                return await self.context.ref(identity).ask_async("hello")
            case ["get now"]:
                return self.context.ref("wild/other").ask(1, block=False).get()
            case ["get later"]:
                asked = self.context.ref("wild/other").ask(1, block=False)
                return [await asked, asked.get()]
            case ["after", seconds]:
                self.context.after(seconds, lambda: None)
            case ["after and cancel"]:
                for _ in range(100):
                    self.context.after(3_600, lambda: None).cancel()
                return len(self.context._around._timers or ())  # type: ignore[attr-defined]
        return message

    @handler
    def grumpy(self, it: Grumpy) -> None: ...

    @handler
    def nowhere(self, it: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    @handler
    def around(self) -> Any:
        cycle: list[Any] = []
        cycle.append(cycle)
        return cycle

    def on_passivate(self) -> Any:
        name = self.context.identity.name
        if name.startswith("ends "):
            raise RAISED[name.removeprefix("ends ")](name)
        if name == "unsayable end":
            raise Unsayable


class Stateful(Grain[Fragile]):
    @handler
    def store(self, x: int) -> str:
        self.state.x = x
        self.save()
        return "stored"

    @handler
    def spoil(self) -> None:
        raise ValueError("spoilt")


class Keeper(Grain):
    """Keeps something of its own in what a Grain with a type would have."""

    def __init__(self) -> None:
        self.state = [1]  # type: ignore[assignment]

    def on_receive(self, message: Any) -> Any:
        if message == "raise":
            raise ValueError("as told")
        return self.state


class Asking(Grain):
    """Asks as it begins the one that its name says."""

    async def on_activate(self) -> None:
        identity = self.context.identity.name
        await self.context.ref(identity).ask_async("who is there?")

    def on_receive(self, message: Any) -> Any:
        return message


def _raise(error: type[BaseException]) -> None:
    raise error


class Store(MemoryStore):
    """Refuses what is too large."""

    def save(self, requests: Any, /) -> Any:
        if any(len(each.snapshot) > 100 for each in requests):
            raise StoreFailure("too large", may_have_happened=False)
        return super().save(requests)

    def another(self) -> "Store":
        return self

    def close(self) -> None:
        pass


KINDS: dict[str, Any] = {
    "wild": Wild,
    "stopping": Kind(Wild, on_error="stop"),
    "bad": Kind(lambda _: _raise(SystemExit)),
    "stateful": Stateful,
    "keeper": Keeper,
    "asking": Asking,
    "made": Kind(lambda _: Keeper()),
}


@pytest.fixture
def node() -> Iterator[PlacementNode]:
    engine = EmbeddedEngine(Store(), partitions=64)
    with PlacementNode("n", kinds=KINDS, engine=engine, **FAST) as made:
        made.start_member()
        yield made
    engine.close()


def token_of(node: PlacementNode, identity: str) -> int:
    """The token of the activation that runs on the node; 0 while none does."""
    return next(
        (
            each.fencing_token
            for each in node.snapshot().activations
            if each.identity == identity
        ),
        0,
    )


# --- one activation's trouble is its own ---


def test_a_save_that_fails_ends_only_its_own_activation(node: PlacementNode) -> None:
    other, ref = node.ref("wild/other"), node.ref("wild/1")
    other.ask("hello")
    ref.ask("hello")
    before = token_of(node, "wild/other")
    first = token_of(node, "wild/1")

    with pytest.raises(StoreFailed, match="too large"):
        ref.ask(["save", 1_000])

    assert other.ask("still here") == "still here"
    assert token_of(node, "wild/other") == before
    assert node.session is not None
    assert ref.ask(["save", 10]) == "saved"
    assert token_of(node, "wild/1") > first
    assert node.events.counts["SaveFailed"] == 1
    assert node.events.counts["SessionLapsed"] == 0


def test_an_activation_whose_first_save_fails_tells_why_it_did_not_start(
    node: PlacementNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Keeper, "on_activate", lambda self: self.context.save(b"x" * 1_000)
    )
    with pytest.raises(ActivationFailed, match="a save failed: too large"):
        node.ref("keeper/1").ask(1)
    monkeypatch.undo()
    assert node.ref("keeper/1").ask(1) == [1]


# --- whatever user code raises ---


@pytest.mark.parametrize("name", sorted(RAISED))
def test_what_is_no_exception_fails_the_handler_and_nothing_else(
    node: PlacementNode, name: str
) -> None:
    ref = node.ref("wild/1")
    for message in (["raise", name], ["ask and raise", name]):
        with pytest.raises(HandlerFailed) as caught:
            ref.ask(message)
        assert caught.value.type_name == RAISED[name].__name__
    ref.ask(["timer", name])
    eventually(lambda: node.events.counts["HandlerFailed"] == 3)
    assert ref.ask("hello") == "hello"


@pytest.mark.parametrize("name", sorted(RAISED))
def test_what_is_no_exception_fails_the_activation_and_nothing_else(
    node: PlacementNode, name: str
) -> None:
    with pytest.raises(ActivationFailed, match=RAISED[name].__name__):
        node.ref(f"wild/{name}").ask(1)
    with pytest.raises(ActivationFailed, match="SystemExit"):
        node.ref("bad/1").ask(1)
    ref = node.ref(f"wild/ends {name}")
    assert ref.ask(["stop, then", 1]) == 1
    eventually(lambda: not node.snapshot().activations)
    assert ref.ask(1) == 1


def test_an_error_that_cannot_say_itself_is_told_all_the_same(
    node: PlacementNode,
) -> None:
    ref = node.ref("wild/1")
    with pytest.raises(HandlerFailed, match="Unsayable: its text cannot be had"):
        ref.ask(["unsayable"])
    with pytest.raises(HandlerFailed) as caught:
        ref.ask(["long"])
    assert caught.value.text.startswith("\\ud800xxx")
    assert len(caught.value.text) <= TEXT_MAX
    with pytest.raises(ActivationFailed, match="Unsayable"):
        node.ref("wild/unsayable").ask(1)
    ending = node.ref("wild/unsayable end")
    ending.ask(["stop, then", 1])
    eventually(lambda: token_of(node, "wild/unsayable end") == 0)
    assert ending.ask(1) == 1
    assert ref.ask("hello") == "hello"


def test_texts_of_errors_are_valid_and_bounded() -> None:
    assert describe(ValueError("a\ud800b")) == ("ValueError", "a\\ud800b")
    assert len(describe(ValueError("x" * 10_000))[1]) == 4_096
    assert describe(Unsayable())[0] == "Unsayable"


def test_a_rejection_that_cannot_travel_is_a_failed_handler(
    node: PlacementNode,
) -> None:
    ref = node.ref("wild/1")
    with pytest.raises(HandlerFailed, match="Fussy: rejected: field 'what'"):
        ref.ask(["reject", "unfit"])
    with pytest.raises(HandlerFailed, match="Fussy: rejected: payload has"):
        ref.ask(["reject", "large"])
    assert ref.ask("hello") == "hello"


def test_a_rejection_reaches_a_caller_on_the_same_node_as_from_another(
    node: PlacementNode,
) -> None:
    sent: list[Any] = [1, (2, 3)]
    with pytest.raises(Fussy) as caught:
        node.ref("wild/1").ask(["reject", sent])
    assert caught.value.what == [1, [2, 3]]
    assert caught.value.what is not sent
    # Its fields do not fit its own declaration: then as one that is not known.
    with pytest.raises(Rejected) as other:
        node.ref("wild/1").ask(["reject badly"])
    assert type(other.value) is Rejected
    assert other.value.fields == {"at": "soon"}


def test_arguments_and_answers_that_break_their_types_are_refused(
    node: PlacementNode,
) -> None:
    ref = node.ref("wild/1")
    with pytest.raises(BadMessage, match="argument 'it': LookupError: not today"):
        ref.ask({"": "grumpy", "args": {"it": {"x": 1}}})
    with pytest.raises(BadMessage, match="its annotations cannot be read: NameError"):
        ref.ask({"": "nowhere", "args": {"it": 1}})
    with pytest.raises(HandlerFailed, match="its answer"):
        ref.ask(["cycle"])
    with pytest.raises(HandlerFailed, match=r"its answer.*RecursionError"):
        ref.ask({"": "around", "args": {}})
    assert ref.ask("hello") == "hello"


def test_a_state_that_cannot_be_put_back_ends_the_activation(
    node: PlacementNode,
) -> None:
    stateful = node.proxy(Stateful, "1")
    node.ask(stateful.store(2))
    with pytest.raises(HandlerFailed, match="ValueError: spoilt"):
        node.ask(stateful.spoil())
    eventually(lambda: node.events.counts["StateLost"] == 1)
    with pytest.raises(ActivationFailed, match="SystemExit: never so much"):
        node.ask(stateful.spoil())


def test_a_bug_between_user_code_and_answer_leaves_nobody_waiting(
    node: PlacementNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = node.ref("wild/1")
    ref.ask(1)

    def broken(*_: Any) -> Any:
        raise AssertionError("a bug")

    monkeypatch.setattr(node._outbox, "answered", broken)
    futures = [ref.ask(n, block=False) for n in range(3)]
    for future in futures:
        with pytest.raises(HandlerFailed, match="AssertionError: a bug"):
            future.get(timeout=5)
    monkeypatch.undo()
    assert ref.ask("hello") == "hello"
    monkeypatch.setattr(Surface, "of", broken)
    with pytest.raises(ActivationFailed, match="a bug"):
        node.ref("wild/2").ask(1)


def test_a_chain_that_comes_back_through_a_first_hook_is_refused_at_once(
    node: PlacementNode,
) -> None:
    ref = node.ref("wild/1")
    with pytest.raises(Deadlock, match="wild/1 -> asking/wild/1 -> wild/1"):
        ref.ask(["ask", "asking/wild/1"], timeout=5)
    # On its own the same hook is no deadlock.
    node.ref("asking/wild/1").tell("begin")
    eventually(lambda: token_of(node, "asking/wild/1") > 0)
    assert ref.ask(["ask", "asking/wild/2"]) == "hello"


# --- ends, waits, timers ---


def test_passivate_ends_the_activation_after_the_turn_and_what_waits_bounces(
    node: PlacementNode,
) -> None:
    ref = node.ref("wild/1")
    ref.ask(1)
    first = token_of(node, "wild/1")
    futures = [
        ref.ask(message, block=False)
        for message in (["stop, then", "last"], "first of the next")
    ]
    assert [future.get(timeout=5) for future in futures] == [
        "last",
        "first of the next",
    ]
    assert token_of(node, "wild/1") > first
    assert node.events.counts["Activated"] == 2


def test_an_activation_may_end_itself_as_it_begins(node: PlacementNode) -> None:
    with pytest.raises(PlacementError):
        node.ref("wild/brief").ask(1, timeout=0.3)
    eventually(lambda: node.events.counts["Passivated"] >= 1)


def test_on_error_stop_ends_the_activation_before_the_next_message(
    node: PlacementNode,
) -> None:
    ref = node.ref("stopping/1")
    ref.ask(1)
    first = token_of(node, "stopping/1")
    failing = ref.ask(["raise", "exit"], block=False)
    after = ref.ask("next", block=False)
    with pytest.raises(HandlerFailed):
        failing.get(timeout=5)
    assert after.get(timeout=5) == "next"
    assert token_of(node, "stopping/1") > first


def test_a_grain_that_waits_for_a_future_is_refused(node: PlacementNode) -> None:
    ref = node.ref("wild/1")
    with pytest.raises(HandlerFailed, match="BlockingInGrain"):
        ref.ask(["get now"])
    assert ref.ask(["get later"]) == [1, 1]


def test_a_timer_that_is_taken_back_is_forgotten(node: PlacementNode) -> None:
    assert node.ref("wild/1").ask(["after and cancel"]) == 0


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 1e12])
def test_a_timer_has_a_time_that_makes_sense(
    node: PlacementNode, seconds: float
) -> None:
    ref = node.ref("wild/1")
    with pytest.raises(HandlerFailed, match="from 0 on"):
        ref.ask(["after", seconds])
    assert ref.ask(["after", 10 * 365 * 24 * 3_600]) == ["after", 315_360_000]


def test_a_state_without_a_type_is_left_alone(node: PlacementNode) -> None:
    for kind in ("keeper", "made"):
        ref = node.ref(f"{kind}/1")
        assert ref.ask(1) == [1]
        with pytest.raises(HandlerFailed):
            ref.ask("raise")
        assert ref.ask(1) == [1]


def test_a_program_that_stops_all_its_actors_stops_no_node(
    node: PlacementNode,
) -> None:
    seen: list[Any] = []
    ref = node.ref("wild/1")
    with node.events.subscribe(seen.append):
        assert ref.ask(1) == 1
        assert pykka.ActorRegistry.get_all() == []
        pykka.ActorRegistry.stop_all()
        assert ref.ask(2) == 2
        assert node.ref("wild/2").ask(3) == 3
        eventually(lambda: any(each.identity == "wild/2" for each in seen))


def test_a_subscriber_that_raises_what_is_no_exception_goes_on(
    node: PlacementNode,
) -> None:
    seen: list[Any] = []

    def exits(event: Any) -> None:
        seen.append(event)
        raise SystemExit

    with node.events.subscribe(exits):
        node.ref("wild/1").ask(1)
        node.ref("wild/2").ask(1)
        eventually(lambda: sum(each.name == "Activated" for each in seen) == 2)
    assert node.ref("wild/3").ask(1) == 1


@pytest.mark.parametrize("how", ["passivates", "lapses"])
def test_what_has_ended_is_freed_without_the_collector(how: str) -> None:
    class Freed(Grain):
        def on_activate(self) -> None:
            alive.append(weakref.ref(self))

        def on_receive(self, message: Any) -> Any:
            if how == "passivates":
                self.context.passivate()
            return message

    alive: list[weakref.ref[Freed]] = []
    with PlacementNode("n", kinds={"freed": Freed}, **FAST) as node:
        node.start_member()
        gc.collect()
        gc.disable()
        try:
            assert node.ref("freed/1").ask(1) == 1
            if how == "lapses":
                found = node._registry.find(Identity("freed", "1"))
                assert found is not None
                found.stop(lapsed=True)
                del found
            eventually(lambda: alive[0]() is None)
        finally:
            gc.enable()
