import datetime as dt
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages.codec import (
    FRAME_BYTES_MAX,
    STRING_BYTES_MAX,
    BadFrame,
    Codec,
)
from messages.frames import (
    ANY_NODE,
    FRAMES,
    Answer,
    AskHolder,
    AskOwner,
    Bounce,
    Deliver,
    Failure,
    Find,
    FindRefused,
    Found,
    Frame,
    HolderAnswer,
    LoopBack,
    Mark,
    Marked,
    OwnerAnswer,
    Passivate,
    Redirect,
    Refused,
    Resolve,
    Resolved,
    Start,
    Started,
    StartRefused,
    TopologyHint,
)
from messages.payload import BYTES_MAX, DEPTH_MAX, ITEMS_MAX

GOLDEN = Path(__file__).parents[1] / "data" / "frames"
ID, S1, S2 = "account/42", "a.1#1", "b.1#2"
CODEC = Codec("default")

SAMPLES: tuple[Frame, ...] = (
    Resolve(1, ID, 3, 9_000),
    Resolved(1, ID, S1, 77),
    Redirect(1, ID, 4, S2),
    Refused(1, ID, "NoAuthority", "nobody knows it"),
    Start(ID, 5, S1, S2, 70, 4, 8_000),
    Started(ID, 5, S2, 78),
    StartRefused(ID, 5, S2, "Pending", "it is ending here"),
    AskOwner(ID, S2, 78, 6),
    OwnerAnswer(ID, S2, 6, "here", 78),
    AskHolder(ID, S1, 5, 6),
    HolderAnswer(ID, S1, 5, 6, "free"),
    Deliver(ID, 78, 9, {"n": 1, "b": b"\x00"}, "pay-17", 7_000, ("account/1",)),
    Answer(9, ["1.5", None, -3], 78),
    Failure(9, "Rejected", "have=5", "m:InsufficientFunds", {"have": "5"}),
    Bounce(ID, 78, 0, None, "", 6_000, ()),
    Mark(ID, 78, 2),
    Marked(ID, 78, 2),
    LoopBack(12),
    TopologyHint(5),
    Passivate(ID, 78),
    Find(1),
    Found(1, 3, (S1, S2)),
    FindRefused(1, "NotReady", "b: it is not a member yet"),
)


def encode(body: Frame) -> bytes:
    return CODEC.encode("a.1", receiver_of(body), 7, body)


def receiver_of(body: Frame) -> str:
    return ANY_NODE if isinstance(body, Find) else "b.1"


def raw(**changed: Any) -> bytes:
    parts = {
        "version": 1,
        "cluster": "default",
        "sender": "a.1",
        "receiver": "b.1",
        "number": 7,
        "body": [1, 1, ID, 3, 9_000],
        **changed,
    }
    packed: bytes = msgpack.packb(list(parts.values()))
    return packed


def refusal(data: bytes, codec: Codec = CODEC) -> str:
    with pytest.raises(BadFrame) as caught:
        codec.decode(data, receiver="b.1")
    return str(caught.value)


def test_there_is_a_sample_and_a_golden_frame_of_every_type() -> None:
    assert [type(sample) for sample in SAMPLES] == list(FRAMES)
    names = sorted(path.stem for path in GOLDEN.glob("*.hex"))
    assert names == sorted(frame.__name__ for frame in FRAMES)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda each: type(each).__name__)
def test_old_bytes_stay_readable_and_the_same(sample: Frame) -> None:
    golden = bytes.fromhex((GOLDEN / f"{type(sample).__name__}.hex").read_text())

    envelope = CODEC.decode(golden, receiver=receiver_of(sample))

    assert envelope.body == sample
    assert (envelope.sender, envelope.number) == ("a.1", 7)
    assert encode(sample) == golden


@pytest.mark.parametrize(
    "frame",
    [
        Resolve(1, ID, 3, 9_000, ("account/1", "account/2")),
        Start(ID, 5, S1, S2, 70, 4, 8_000, ("account/1",)),
    ],
)
def test_what_was_added_at_the_end_travels(frame: Frame) -> None:
    assert CODEC.decode(encode(frame), receiver="b.1").body == frame


@pytest.mark.parametrize(
    "whole", [frame for frame in SAMPLES if frame.__struct_defaults__]
)
def test_bytes_from_before_something_was_added_are_read(whole: Frame) -> None:
    fields = msgspec.structs.astuple(whole)[: -len(whole.__struct_defaults__)]
    tag = whole.__struct_config__.tag

    assert CODEC.decode(raw(body=[tag, *fields]), receiver="b.1").body == whole


def test_what_is_added_at_the_end_later_is_ignored_now() -> None:
    assert CODEC.decode(raw(body=[19, 5, "later"]), receiver="b.1").body == (
        TopologyHint(5)
    )
    assert CODEC.decode(raw(later=1), receiver="b.1").number == 7


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 2}, "protocol version 2, not 1"),
        ({"version": True}, "protocol version True"),
        ({"cluster": "other"}, "cluster 'other', not 'default'"),
        ({"receiver": "c.1"}, "it is for 'c.1', not 'b.1'"),
        ({"sender": ""}, "the sender is not an address"),
        ({"sender": 5}, "the sender is not an address"),
        ({"number": 0}, "the number is not one"),
        ({"number": 1 << 63}, "the number is not one"),
        ({"number": "7"}, "the number is not one"),
        ({"body": None}, "the body is not an array"),
        ({"body": []}, "the body is not an array"),
        ({"body": ["1"]}, "the body is not an array"),
        ({"body": [0]}, "unknown tag 0"),
        ({"body": [24, 1]}, "unknown tag 24"),
        ({"body": [1, 1, ID, 3]}, "Resolve: "),
        ({"body": [1, "1", ID, 3, 9]}, "Resolve: "),
        ({"body": [1, 1, 5, 3, 9]}, "Resolve: "),
        ({"body": [1, 1, "account", 3, 9]}, "Resolve: identity 'account'"),
        ({"body": [1, 1, "a/\x00", 3, 9]}, "control character"),
        ({"body": [1, -1, ID, 3, 9]}, "Resolve: Expected `int` >= 0 - at `$[1]`"),
        ({"body": [1, 1 << 63, ID, 3, 9]}, "Resolve: "),
        ({"body": [13, 1, 1 << 63, 3]}, "does not fit into 64 bits"),
        ({"body": [12, ID, 1, 1, None, "", 1, [5]]}, "Deliver: "),
        ({"body": [14, 1, "a", "b", "c", {1: 2}]}, "Failure: "),
    ],
)
def test_what_is_no_frame_is_refused_with_the_reason(
    changed: dict[str, Any], said: str
) -> None:
    assert said in refusal(raw(**changed))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def deliver(payload: Any) -> bytes:
    return raw(body=[13, 1, payload, 3])


@pytest.mark.parametrize(
    ("fits", "too_much", "said"),
    [
        (
            deliver("x" * (BYTES_MAX - 1)),
            deliver("x" * (STRING_BYTES_MAX + 1)),
            "max_str_len",
        ),
        (
            deliver(b"x" * (BYTES_MAX - 1)),
            deliver(b"x" * (STRING_BYTES_MAX + 1)),
            "max_bin_len",
        ),
        (
            deliver([0] * ITEMS_MAX),
            deliver([0] * (ITEMS_MAX + 1)),
            "max_array_len",
        ),
        (
            deliver(dict.fromkeys(range(ITEMS_MAX), 0)),
            deliver(dict.fromkeys(range(ITEMS_MAX + 1), 0)),
            "max_map_len",
        ),
        (
            deliver(nested(DEPTH_MAX)),
            deliver(nested(DEPTH_MAX + 1)),
            "nested more than",
        ),
        (deliver("x" * (BYTES_MAX - 1)), deliver("x" * BYTES_MAX), "at most"),
    ],
    ids=["string", "bytes", "array", "map", "nesting", "payload"],
)
def test_each_limit_holds_at_its_edge(fits: bytes, too_much: bytes, said: str) -> None:
    assert CODEC.decode(fits, receiver="b.1").number == 7

    assert said in refusal(too_much)


def test_a_frame_may_be_so_large_and_no_larger() -> None:
    data = encode(LoopBack(1))
    exact = Codec("default", frame_bytes_max=len(data))
    assert exact.decode(data, receiver="b.1").body == LoopBack(1)

    small = Codec("default", frame_bytes_max=len(data) - 1)
    assert f"at most {len(data) - 1}" in refusal(data, small)
    assert len(data) < FRAME_BYTES_MAX


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        encode(LoopBack(1)) + b"\x00",
        encode(LoopBack(1))[:-1],
        msgpack.packb(5),
        msgpack.packb({"a": 1}),
        msgpack.packb([1, "default"]),
        deliver(msgpack.ExtType(5, b"")),
        deliver(msgpack.ExtType(5, b"xyz")),
        deliver(msgpack.Timestamp(1, 2)),
        deliver({b"raw": 1}),
        deliver({1.5: 1}),
        deliver({None: 1}),
        msgpack.packb(
            [1, "default", "a.1", "b.1", 7, [13, 1, dt.datetime.now(dt.UTC), 3]],
            datetime=True,
        ),
        b"\x96\x01\xa7default\xa3a.1\xa3b.1\x07\x92\x13\xa1\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    assert refusal(data)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_and_nothing_else_escapes(data: bytes) -> None:
    with pytest.raises(BadFrame):
        CODEC.decode(data, receiver="b.1")


@given(st.data())
def test_mutated_frames_are_read_or_refused_and_nothing_else_escapes(
    data: st.DataObject,
) -> None:
    frame = bytearray(encode(data.draw(st.sampled_from(SAMPLES))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at] = data.draw(st.integers(0, 255))

    try:
        envelope = CODEC.decode(bytes(frame), receiver="b.1")
    except BadFrame:
        return
    assert type(envelope.body) in FRAMES


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 99), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_a_payload_arrives_as_it_was_sent(payload: Any) -> None:
    sent = Deliver(ID, 1, 2, payload, "", 5, ())

    assert CODEC.decode(encode(sent), receiver="b.1").body == sent


@given(PLAIN)
def test_the_two_packers_give_the_same_bytes(payload: Any) -> None:
    body = [12, ID, 1, 2, payload, "", 5, [], 0]

    assert encode(Deliver(ID, 1, 2, payload, "", 5, ())) == raw(body=body)


def test_only_frames_are_encoded() -> None:
    with pytest.raises(TypeError, match="object cannot be carried"):
        encode(Answer(1, object(), 2))


def test_a_text_that_is_no_utf_8_keeps_no_frame_from_leaving() -> None:
    spoiled = Refused(1, ID, "ActivationFailed", "file x\udcff")

    envelope = CODEC.decode(encode(spoiled), receiver="b.1")

    assert envelope.body == Refused(1, ID, "ActivationFailed", "file x?")
    # The packer is as it was.
    assert encode(SAMPLES[0]) == encode(SAMPLES[0])
    assert CODEC.decode(encode(SAMPLES[0]), receiver="b.1").body == SAMPLES[0]


# --- the short way and the long one -------------------------------------------


def deep(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = [value]
    return value


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([ID, S1, "a.1", "b.1", "default", "kind/", "/name", "a/b\x00"]),
    st.binary(max_size=5),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(
        st.one_of(st.text(max_size=2), st.integers(-5, 5), st.binary()), st.none()
    ),
    st.just(msgpack.ExtType(4, b"x")),
    st.just(msgpack.Timestamp(1)),
    st.integers(1, 2 * DEPTH_MAX).map(deep),
)


def outcome(decode: Any, data: bytes) -> str:
    try:
        return repr(decode(data))  # of NaN too
    except BadFrame:
        return "refused"


def both(data: bytes) -> tuple[str, str]:
    short = outcome(lambda it: CODEC.decode(it, receiver="b.1"), data)
    return short, outcome(lambda it: CODEC._decode_in_full(it, "b.1"), data)


@given(st.data())
def test_what_is_read_in_one_go_is_what_is_read_step_by_step(
    data: st.DataObject,
) -> None:
    parts: list[Any] = msgpack.unpackb(encode(data.draw(st.sampled_from(SAMPLES))))
    for _ in range(data.draw(st.integers(0, 3))):
        some = parts if data.draw(st.booleans()) or not parts[-1:] else parts[-1]
        if type(some) is not list or not some:
            continue
        at = data.draw(st.integers(0, len(some) - 1))
        match data.draw(st.integers(0, 5)):
            case 0:
                del some[at]
            case 1:
                some.append(data.draw(st.integers(0, 5)))
            case _:
                some[at] = data.draw(WRONG)
    short, full = both(msgpack.packb(parts))
    assert short == full


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3),
    st.binary(max_size=3),
)
def test_damaged_bytes_are_read_in_one_go_only_where_they_are_step_by_step(
    body: Frame, flips: list[tuple[int, int]], more: bytes
) -> None:
    damaged = bytearray(encode(body))
    for at, to in flips:
        damaged[at % len(damaged)] = to
    short, full = both(bytes(damaged) + more)
    if short != full:
        # The fields of a later version are not looked at.
        found = CODEC.decode(bytes(damaged) + more, receiver="b.1")
        assert full == "refused"
        assert len(encode(found.body)) < len(damaged) + len(more)


def with_payload(packed: bytes) -> bytes:
    """An answer with these bytes as its payload."""
    head = msgpack.packb([1, "default", "a.1", "b.1", 7])
    return b"\x96" + head[1:] + b"\x94" + bytes([13, 1]) + packed + b"\x01"


DEEP: dict[str, Callable[[int], bytes]] = {
    "lists": lambda depth: with_payload(b"\x91" * depth + b"\x01"),
    "maps": lambda depth: with_payload(b"\x81\xa1a" * depth + b"\x01"),
    "keys": lambda depth: with_payload(b"\x81" + b"\x91" * depth + b"\x01\x01"),
    "version": lambda depth: b"\x96" + b"\x91" * depth + b"\x01" + raw()[2:],
    "cluster": lambda depth: b"\x96\x01" + b"\x91" * depth + b"\x01" + raw()[10:],
}


@pytest.mark.parametrize("where", DEEP)
def test_what_is_nested_however_deep_is_refused_in_a_small_stack_too(
    where: str,
) -> None:
    depths = [33, 100, 500, 5_000, 9_990, 100_000, *range(900, 1_100, 3)]
    refused: list[int] = []

    def decode() -> None:
        for depth in depths:
            with pytest.raises(BadFrame):
                CODEC.decode(DEEP[where](depth), receiver="b.1")
            refused.append(depth)

    before = threading.stack_size(512 << 10)
    try:
        small = threading.Thread(target=decode)
        small.start()
    finally:
        threading.stack_size(before)
    small.join()
    assert refused == depths


def test_lists_that_say_they_are_long_cost_no_more_than_their_bytes() -> None:
    tracemalloc.start()
    try:
        refusal(with_payload(b"\xdc\xff\xff" * 1_000))
        refusal(with_payload(b"\xdd\x00\x00\x0b\xb8" * 600))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000
