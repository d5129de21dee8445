"""Packs: several frames as one message of a wire that carries messages.

One frame alone is the message. Several are the byte 0xC1, with which no msgpack
begins, then each frame behind its length in four bytes, the highest first.
"""

from collections.abc import Sequence

from messages.codec import BadFrame

FRAMES_MAX = 1_024
_BEGIN = b"\xc1"
_LENGTH = 4


def pack(frames: Sequence[bytes], bytes_max: int) -> list[bytes]:
    """The messages that carry `frames` in order, none larger than `bytes_max`.

    A frame that is larger by itself is a message by itself; the wire refuses it.
    """
    if len(frames) == 1:
        return list(frames)
    messages: list[bytes] = []
    group: list[bytes] = []
    size = 1
    for frame in frames:
        if group and (
            size + _LENGTH + len(frame) > bytes_max or len(group) >= FRAMES_MAX
        ):
            messages.append(_join(group))
            group, size = [], 1
        group.append(frame)
        size += _LENGTH + len(frame)
    if group:
        messages.append(_join(group))
    return messages


def _join(group: Sequence[bytes]) -> bytes:
    if len(group) == 1:
        return group[0]
    parts = [_BEGIN]
    for frame in group:
        parts += (len(frame).to_bytes(_LENGTH, "big"), frame)
    return b"".join(parts)


def unpack(message: bytes) -> list[bytes]:
    """The frames in `message`.

    Raises:
        BadFrame: it is a broken pack: none of it is taken.
    """
    if not message.startswith(_BEGIN):
        return [message]
    frames: list[bytes] = []
    at, end = 1, len(message)
    while at < end:
        begin = at + _LENGTH
        at = begin + int.from_bytes(message[at:begin], "big")
        if begin > end or at > end or at == begin:
            raise BadFrame(f"a pack of {end} bytes is cut off, or has an empty frame")
        frames.append(message[begin:at])
        if len(frames) > FRAMES_MAX:
            raise BadFrame(f"a pack has at most {FRAMES_MAX} frames")
    if len(frames) < 2:  # noqa: PLR2004  one alone is no pack
        raise BadFrame("a pack has two frames at least")
    return frames
