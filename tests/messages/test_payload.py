import enum
from collections import OrderedDict
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import payload
from messages.codec import Codec
from messages.frames import Answer, Deliver, Failure
from messages.payload import (
    BYTES_MAX,
    DEPTH_MAX,
    INT_MAX,
    INT_MIN,
    ITEMS_MAX,
    REQUEST_ID_BYTES_MAX,
    copy,
    pack,
    request_id_of,
    unpack,
)
from placement.errors import TEXT_MAX, BadMessage
from placement.identity import Identity
from tests.messages.test_codec import PLAIN, nested


class Colour(enum.IntEnum):
    RED = 1


class Loud(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "LOUD"


class Half(float):
    pass


class Raw(bytes):
    pass


@given(PLAIN)
def test_every_plain_value_is_copied_and_packed_as_it_is(value: Any) -> None:
    assert copy(value) == value
    assert unpack(pack(value)) == value


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        ((1, (2,)), [1, [2]]),
        (Identity("a", "b"), "a/b"),
        (Loud("quiet"), "quiet"),
        (Colour.RED, 1),
        (Half(0.5), 0.5),
        (Raw(b"x"), b"x"),
        (OrderedDict(a=(1,)), {"a": [1]}),
        ({Identity("a", "b"): 1, Colour.RED: 2}, {"a/b": 1, 1: 2}),
        (INT_MIN, INT_MIN),
        (INT_MAX, INT_MAX),
    ],
)
def test_subclasses_and_tuples_arrive_as_what_is_plain(
    value: Any, arrives: Any
) -> None:
    for found in (copy(value), unpack(pack(value))):
        assert found == arrives
        assert type(found) is type(arrives)


def test_a_copy_shares_nothing_that_can_change() -> None:
    value: dict[str, Any] = {"a": [1, {"b": [2]}]}

    copied = copy(value)
    value["a"][1]["b"].append(3)

    assert copied == {"a": [1, {"b": [2]}]}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [0, {1}]}, "payload['a'][1]: a set cannot be carried"),
        (object(), "payload: a object cannot be carried"),
        (INT_MAX + 1, "does not fit into 64 bits"),
        (INT_MIN - 1, "does not fit into 64 bits"),
        ([INT_MAX + 1], "payload[0]: 9223372036854775808 does not fit"),
        ("\ud800", "payload: the text is not valid UTF-8"),
        ({"\ud800": 1}, "the text is not valid UTF-8"),
        ({1.5: 1}, "payload: key 1.5 is a float, keys are str or int"),
        ({True: 1}, "payload: key True is a bool"),
        ({None: 1}, "payload: key None is a NoneType"),
        ({1 << 70: 1}, "does not fit into 64 bits"),
        (bytearray(b"x"), "payload: a bytearray cannot be carried"),
        (memoryview(b"x"), "payload: a memoryview cannot be carried"),
        (1 + 2j, "payload: a complex cannot be carried"),
        (nested(DEPTH_MAX + 1), f"nested more than {DEPTH_MAX} deep"),
        (b"x" * (BYTES_MAX + 1), f"at most {BYTES_MAX}"),
        (["x" * BYTES_MAX, "x" * BYTES_MAX], f"at most {BYTES_MAX}"),
    ],
)
def test_what_cannot_be_carried_is_named_by_its_place(value: Any, said: str) -> None:
    with pytest.raises(BadMessage) as caught:
        copy(value)
    assert said in str(caught.value)
    with pytest.raises(BadMessage):
        pack(value)


def test_the_depth_and_size_that_just_fit_are_carried() -> None:
    assert copy(nested(DEPTH_MAX)) == nested(DEPTH_MAX)
    text = "x" * (BYTES_MAX - 1)
    assert copy(text) == text


@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb(msgpack.ExtType(1, b""))])
def test_bytes_that_are_no_payload_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        unpack(data)


@given(PLAIN)
def test_the_size_that_is_counted_is_no_smaller_than_the_real_one(value: Any) -> None:
    _, size = payload._copy(value, 0)
    assert size >= len(msgpack.packb(value))


EDGES = [0, -32, -33, 127, 128, 255, 256, 1 << 16, -(1 << 31), (1 << 32) - 1, 1 << 32]
ITEMS: Any = st.one_of(
    st.sampled_from([*EDGES, INT_MIN, INT_MAX, None, 0.5, "", b""]),
    st.integers(0, 40).map(lambda n: "x" * n),
    st.integers(250, 260).map(lambda n: b"x" * n),
)
COUNTS = st.one_of(
    st.sampled_from([ITEMS_MAX - 1, ITEMS_MAX, ITEMS_MAX + 1, 200_000]),
    st.integers(110_000, ITEMS_MAX + 2),
)


@given(item=ITEMS, count=COUNTS, is_dict=st.booleans())
@settings(max_examples=40)
def test_what_is_copied_at_the_edge_arrives_at_another_node(
    item: Any, count: int, *, is_dict: bool
) -> None:
    value: Any = dict.fromkeys(range(count), item) if is_dict else [item] * count
    try:
        copied = copy(value)
    except BadMessage:
        is_fitting = count <= ITEMS_MAX and len(msgpack.packb(value)) * 5 < BYTES_MAX
        assert not is_fitting
        return
    codec = Codec("default")
    for frame in (
        Deliver("a/b", 1, 1, copied, "r" * REQUEST_ID_BYTES_MAX, 1, ("a/c",) * 99),
        Answer(1, copied, 1),
        Failure(1, "Rejected", "t" * TEXT_MAX, "m:E", {"field": copied}),
    ):
        data = codec.encode("a.1", "b.1", 1, frame)
        assert codec.decode(data, receiver="b.1").body == frame


@pytest.mark.parametrize("value", [["x" * (BYTES_MAX - 10)], "x" * (BYTES_MAX - 1)])
def test_the_largest_text_arrives_at_another_node(value: Any) -> None:
    codec = Codec("default")
    data = codec.encode("a.1", "b.1", 1, Answer(1, copy(value), 1))
    assert codec.decode(data, receiver="b.1").body == Answer(1, value, 1)


@pytest.mark.parametrize("count", [ITEMS_MAX + 1, 200_000])
def test_too_many_items_are_refused_by_their_place(count: int) -> None:
    with pytest.raises(BadMessage, match=r"payload\['a'\]: it has \d+ items"):
        copy({"a": [1] * count})
    with pytest.raises(BadMessage, match=r"payload: it has \d+ items"):
        copy(dict.fromkeys(range(count)))


@pytest.mark.parametrize("value", ["é" * 257, 5, b"x", False, ["x"], "\ud800"])
def test_a_request_id_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(BadMessage, match="request_id: "):
        request_id_of(value)


def test_a_request_id_is_a_plain_text() -> None:
    assert request_id_of(None) == request_id_of("") == ""
    assert request_id_of("é" * 256) == "é" * 256
    assert type(request_id_of(Loud("quiet"))) is str


INT_EDGES = [0, -1, -32, -33, 127, 128, 1 << 31, 1 << 32, INT_MAX, INT_MIN]


def outcome(value: Any) -> Any:
    """What a copy is and takes, or what is wrong with the value."""
    try:
        return payload._copy(value, 0)
    except payload._Misfit as misfit:
        return str(misfit.said())


@given(
    st.lists(
        st.one_of(st.integers(-200, 200), st.sampled_from(INT_EDGES), st.integers()),
        min_size=17,
        max_size=60,
    )
)
def test_many_numbers_are_taken_together_as_each_by_itself(numbers: list[int]) -> None:
    together = outcome(numbers)
    # With a text among them each is looked at by itself.
    alone = outcome([*numbers, ""])
    if isinstance(alone, str):
        assert together == alone
    else:
        assert together == (numbers, alone[1] - 1)
