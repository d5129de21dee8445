import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages.codec import BadFrame
from messages.pack import FRAMES_MAX, pack, unpack

frames = st.binary(min_size=1, max_size=40).filter(lambda each: each[0] != 0xC1)


@given(st.lists(frames, min_size=1, max_size=30), st.integers(8, 200))
def test_what_was_packed_is_unpacked_in_order(each: list[bytes], limit: int) -> None:
    messages = pack(each, limit)

    assert [frame for message in messages for frame in unpack(message)] == each
    assert all(len(message) <= limit or message in each for message in messages)


def test_a_frame_alone_is_the_message() -> None:
    assert pack([b"\x96abc"], 10) == [b"\x96abc"]
    assert unpack(b"\x96abc") == [b"\x96abc"]


def test_a_pack_has_at_most_so_many_frames() -> None:
    many = [b"x"] * (FRAMES_MAX + 1)
    assert len(pack(many, 1 << 20)) == 2
    broken = b"\xc1" + b"\0\0\0\1x" * (FRAMES_MAX + 1)
    with pytest.raises(BadFrame, match="at most 1024 frames"):
        unpack(broken)


@pytest.mark.parametrize(
    "broken",
    [
        b"\xc1",
        b"\xc1\0\0\0\1a",
        b"\xc1\0\0\0\1a\0\0\0\0",
        b"\xc1\0\0\0\1a\0\0",
        b"\xc1\0\0\0\1a\0\0\0\2b",
        b"\xc1\xff\xff\xff\xffab",
    ],
)
def test_a_broken_pack_is_refused_whole(broken: bytes) -> None:
    with pytest.raises(BadFrame):
        unpack(broken)


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    try:
        found = unpack(data)
    except BadFrame:
        return
    assert b"".join(found) == data or pack(found, 1 << 20) == [data]
