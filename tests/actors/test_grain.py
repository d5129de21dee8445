import asyncio
import enum
import threading
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypedDict

import msgspec
import pykka
import pytest

from actors.future import Future
from actors.grain import Grain, Surface, decode_rejected, encode_rejected, handler
from actors.kind import BadKind, Kind, load_kind
from actors.reference import Call, Ref, Verbs, kind_among
from actors.state import BadState, StateTooNew, decode_state, encode_state
from actors.tally import DurableTally, Tally, _add
from placement.errors import BadMessage, OutcomeUnknown, Rejected
from placement.identity import BadIdentity, Identity


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: int = 0


class Size(msgspec.Struct):
    width: int


class Named(TypedDict):
    name: str


class TooFar(Rejected):
    by: Decimal
    at: Point


class Shape(Grain[Point]):
    schema_version = 2

    @handler
    def move(self, to: Point, *, size: Size | None = None, times: int = 1) -> Point:
        return Point(to.x * times, 0 if size is None else size.width)

    @handler
    def tell_all(  # noqa: PLR0917  one of each sort
        self,
        when: datetime,
        who: uuid.UUID,
        colour: Colour,
        named: Named,
        raw: bytes,
        many: dict[str, list[Decimal]],
    ) -> tuple[Any, ...]:
        return (when, who, colour, named, raw, many)

    @handler
    def odd(self) -> int:
        return 1

    @classmethod
    def upgrade(cls, stored: Any, version: int) -> Any:
        return {"x": stored["left"], "y": version}


class Plain(Grain):
    pass


SURFACE = Surface.of(Shape)


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    function, arguments, found = SURFACE.decode_call(
        SURFACE.encode_call(name, args, kwargs)
    )
    assert found == name
    return function(None, **arguments)


def test_arguments_arrive_as_annotated() -> None:
    assert call("move", Point(2), size=Size(5), times=3) == Point(6, 5)
    when, who = datetime.now(UTC), uuid.uuid4()
    sent = (when, who, Colour.RED, {"name": "n"}, b"\x00", {"a": [Decimal("0.10")]})
    assert call("tell_all", *sent) == sent


def test_answers_arrive_as_annotated() -> None:
    plain = SURFACE.encode_answer("move", Point(1, 2))
    assert plain == {"x": 1, "y": 2}
    assert SURFACE.decode_answer("move", plain) == Point(1, 2)
    with pytest.raises(BadMessage, match=r"Shape\.odd answered"):
        SURFACE.decode_answer("odd", "one")
    with pytest.raises(BadMessage, match=r"Shape\.odd answered"):
        SURFACE.encode_answer("odd", object())


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({"": "fly", "args": {}}, "no handler 'fly'; it has: move, odd, tell_all"),
        ({"": 5, "args": {}}, "no handler 5"),
        ({"": "move", "args": []}, "its arguments are not a map"),
        ({"": "move", "args": {}}, "missing ['to']"),
        ({"": "move", "args": {"to": {"x": 1}, "up": 1}}, "unknown arguments ['up']"),
        ({"": "move", "args": {"to": {"x": "1"}}}, "argument 'to'"),
        ({"": "move", "args": {"to": 5}}, "argument 'to'"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_before_user_code(
    payload: Any, said: str
) -> None:
    assert Surface.is_call(payload)
    with pytest.raises(BadMessage) as caught:
        SURFACE.decode_call(payload)
    assert said in str(caught.value)


def test_a_call_that_cannot_be_made_is_refused_to_the_caller() -> None:
    with pytest.raises(BadMessage, match=r"Shape.move: missing a required argument"):
        SURFACE.encode_call("move", (), {})
    with pytest.raises(BadMessage, match="argument 'to'"):
        SURFACE.encode_call("move", (object(),), {})
    assert not Surface.is_call({"": "move"})
    assert not Surface.is_call({"args": {}, "x": 1})


def test_handlers_have_public_names_and_named_parameters() -> None:
    def _hidden(self: Any) -> None: ...
    def many(self: Any, *args: Any) -> None: ...
    def save(self: Any) -> None: ...

    with pytest.raises(TypeError, match="is not public"):
        handler(_hidden)
    with pytest.raises(TypeError, match="has no name of its own"):
        handler(many)
    with pytest.raises(TypeError, match="is no name for a handler"):
        type("Bad", (Grain,), {"save": handler(save)})
    with pytest.raises(TypeError, match="schema_version must be 1 to"):
        type("Bad", (Grain,), {"schema_version": 0})


def test_declared_errors_travel_with_their_fields() -> None:
    sent = TooFar(by=Decimal("1.5"), at=Point(1, 2))

    found = decode_rejected(*encode_rejected(sent))

    assert isinstance(found, TooFar)
    assert (found.by, found.at) == (Decimal("1.5"), Point(1, 2))
    unknown = decode_rejected("elsewhere:Other", "no", {"a": 1})
    assert (type(unknown), unknown.type_name) == (Rejected, "elsewhere:Other")
    assert unknown.fields == {"a": 1}
    changed = decode_rejected(TooFar.declared_name(), "no", {"by": "x"})
    assert type(changed) is Rejected


def test_state_is_stored_with_its_schema_and_older_ones_are_upgraded() -> None:
    shape = Shape()
    SURFACE.load(shape, encode_state(Point(3, 4), 2))
    assert shape.state == Point(3, 4)
    SURFACE.load(shape, encode_state({"left": 7}, 1))
    assert shape.state == Point(7, 1)
    with pytest.raises(StateTooNew, match="of schema 3, this class knows up to 2"):
        SURFACE.load(shape, encode_state(Point(1), 3))
    for damaged in (b"", b"\x09\x00\x01x", b"\x01\x00\x02\xc1"):
        with pytest.raises(BadState):
            SURFACE.load(shape, damaged)
    with pytest.raises(BadState, match="cannot be stored"):
        encode_state(object(), 1)
    with pytest.raises(ValueError, match="Plain cannot read the schema 1"):
        decode_state(encode_state(1, 1), int, 2, Plain.upgrade)


def test_a_grain_without_a_state_type_has_none() -> None:
    plain = Plain()
    Surface.of(Plain).load(plain, b"whatever")
    assert plain.state is None
    assert plain.on_activate() is None
    assert plain.on_passivate() is None


# --- kinds ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"idle_after": 0}, "idle_after must be above 0"),
        ({"idle_after": 1e300}, "idle_after must be above 0 seconds, and 1,000,000,0"),
        ({"idle_after": float("nan")}, "idle_after must be above 0 .* not nan"),
        ({"handler_max": -1}, "handler_max must be above 0"),
        ({"inbox_max": 0}, "inbox_max must be at least 1"),
        ({"on_error": "explode"}, "on_error is 'continue' or 'stop'"),
    ],
)
def test_options_of_a_kind_that_make_no_sense_are_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadKind, match=said):
        Kind(Plain, **options)


def test_a_kind_is_a_grain_or_a_threading_actor_or_makes_one() -> None:
    with pytest.raises(BadKind, match="neither a Grain"):
        Kind(int)
    with pytest.raises(BadKind, match="a class or a function"):
        Kind(5)  # type: ignore[arg-type]
    with pytest.raises(BadKind, match="neither a Grain"):
        Kind(lambda _: None, actor_class=int)
    made = Kind(lambda _: Plain(), actor_class=Plain)
    assert isinstance(made.make(None), Plain)
    with pytest.raises(BadKind, match="made a int"):
        Kind(lambda _: 5).make(None)
    assert Kind.of(made) is made
    assert Kind.of(pykka.ThreadingActor).is_threaded
    with pytest.raises(BadKind, match="above the safety margin"):
        Kind(Plain, handler_max=2.0).check(1.0)
    assert load_kind("actors.tally:Tally").actor_class is Tally


# --- references ---


class FakeSender:
    ask_timeout = 1.0

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.future = Future()

    def ask(self, identity: Identity, payload: Any, **options: Any) -> Future:
        self.sent.append((identity, payload, options))
        return self.future

    def tell(self, identity: Identity, payload: Any, *, request_id: str) -> None:
        self.sent.append((identity, payload, request_id))

    def may_block(self) -> None:
        pass


class FakeVerbs(Verbs):
    def __init__(self) -> None:
        self.sender = self._sender = FakeSender()

    def _kind_of(self, actor_class: type) -> str:
        return kind_among({"shape": Shape, "plain": Plain, "tally": Plain}, actor_class)

    def _class_of(self, kind: str) -> type | None:
        return {"shape": Shape, "plain": Plain, "tally": Plain}.get(kind)


def test_a_proxy_has_the_handlers_and_nothing_else() -> None:
    verbs = FakeVerbs()
    shape = verbs.proxy(Shape, "1")
    verbs.sender.future.set(1)

    assert verbs.ask(shape.odd(), request_id="r") == 1
    verbs.tell(shape.odd())

    assert repr(shape) == "Proxy('shape/1')"
    made: Any = shape.odd()
    assert isinstance(made, Call)
    assert repr(made) == "<call of odd of shape/1, not sent>"
    assert verbs.sender.sent[0][0] == "shape/1"
    with pytest.raises(AttributeError, match="has no handler 'fly'; it has: move"):
        shape.fly  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="it has: none"):
        verbs.proxy(Plain, "plain/1").fly  # type: ignore[attr-defined]  # noqa: B018


def test_a_class_of_several_kinds_is_named_with_its_kind() -> None:
    verbs = FakeVerbs()
    assert repr(verbs.proxy(Plain, "tally/1")) == "Proxy('tally/1')"
    with pytest.raises(BadIdentity, match="of several kinds"):
        verbs.proxy(Plain, "1")
    with pytest.raises(BadIdentity, match="Tally is no kind here"):
        verbs.proxy(Tally, "1")
    assert repr(verbs.ref("shape/1")) == "Ref('shape/1')"
    assert isinstance(verbs.ref("shape/1"), Ref)


# --- futures ---


def test_the_first_answer_decides() -> None:
    future = Future()
    seen: list[Any] = []
    future.on_done(lambda each: seen.append(each.get()))
    future.set(1)
    future.set(2)
    future.set_error(KeyError("late"))
    future.on_done(lambda each: seen.append(each.get()))
    assert seen == [1, 1]
    assert future.is_done
    assert future.map(lambda value: value + 1).get() == 2


def test_waiting_in_vain_is_an_unknown_outcome() -> None:
    with pytest.raises(OutcomeUnknown, match=r"no answer within 0\.01 s"):
        Future().get(timeout=0.01)
    future = Future()
    future.set_exception((KeyError, KeyError("x"), None))
    with pytest.raises(KeyError):
        future.get()
    with pytest.raises(ValueError, match="takes an exc_info"):
        future.set_exception()


def test_a_future_is_awaited_without_blocking_also_when_mapped() -> None:
    async def main() -> Any:
        future = Future()
        waiting = asyncio.create_task(wait(future))
        mapped = asyncio.create_task(wait(future.map(lambda value: value * 2)))
        await asyncio.sleep(0)
        threading.Thread(target=future.set, args=(4,)).start()
        return await waiting, await mapped

    async def wait(future: Any) -> Any:
        return await future

    assert asyncio.run(main()) == (4, 8)


def test_an_answer_after_the_loop_is_closed_harms_nobody() -> None:
    future = Future()

    async def main() -> None:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()

    async def wait() -> Any:
        return await future

    asyncio.run(main())
    future.set(1)
    assert future.get() == 1


# --- the tally ---


def test_ranges_of_lines_join_and_never_count_twice() -> None:
    ranges: list[list[int]] = []
    for line in (5, 7, 6, 1, 2, 9, 3, 8):
        assert _add(ranges, line)
    assert ranges == [[1, 3], [5, 9]]
    for line in (1, 6, 9):
        assert not _add(ranges, line)
    assert _add(ranges, 4)
    assert ranges == [[1, 9]]


class FakeContext:
    def __init__(self, snapshot: bytes | None = None) -> None:
        self.snapshot = snapshot
        self.request_id = ""
        self.saved: list[bytes] = []

    def save(self, snapshot: bytes) -> None:
        self.saved.append(snapshot)


def tally(kind: type[Tally], snapshot: bytes | None = None) -> tuple[Tally, Any]:
    made: Any = kind()
    made.context = FakeContext(snapshot)
    made.on_activate()
    return made, made.context


@pytest.fixture
def stored() -> bytes:
    made, context = tally(DurableTally)
    for line in ("a:1", "a:2", "b:1"):
        context.request_id = line
        made.on_receive(None)
    assert len(context.saved) == 3
    assert made.on_passivate() is None
    return bytes(context.saved[-1])


def test_a_tally_counts_each_input_for_itself_and_goes_on(stored: bytes) -> None:
    made, context = tally(Tally, stored)
    context.request_id = "a:2"
    assert made.on_receive(None) == {"count": 2}
    assert made.on_passivate() is None
    context.request_id = "a:3"
    assert made.on_receive(None) == {"count": 3}
    assert made.on_passivate() is not None
    assert context.saved == []
    for bad in ("", "a", "a:x"):
        context.request_id = bad
        with pytest.raises(BadMessage, match="input:line"):
            made.on_receive(None)


def test_a_tally_refuses_what_it_has_not_stored(stored: bytes) -> None:
    with pytest.raises(BadState, match="not a tally's"):
        tally(Tally, b"other")
    with pytest.raises(BadState, match="damaged"):
        tally(Tally, stored[:-1])
