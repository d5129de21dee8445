import enum
from collections import OrderedDict
from typing import Any

import msgpack
import pytest
from hypothesis import given

from messages.payload import BYTES_MAX, DEPTH_MAX, INT_MAX, INT_MIN, copy, pack, unpack
from placement.errors import BadMessage
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
