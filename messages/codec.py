"""The codec: frames to bytes and back, refusing whatever is not one.

Bytes come from strangers. Sizes and nesting are bounded before objects are
built, and every field is checked before anybody sees the frame. A short frame, in
which nothing can be out of bounds, is read and checked in one go.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeAlias

import msgpack
import msgspec
from msgspec.structs import astuple

from messages.frames import FRAMES, VERSION, Envelope, Frame
from messages.payload import BYTES_MAX, ITEMS_MAX, check, shown
from placement.errors import BadMessage
from placement.identity import BadIdentity, Identity

FRAME_BYTES_MAX = 4 << 20
STRING_BYTES_MAX = BYTES_MAX
_INT_MAX = (1 << 63) - 1
_FIELDS = 6


_DEEP = 512
#: All bytes but those with which msgpack begins a list or a map.
_NO_BEGINNINGS = bytes({*range(256)} - {*range(0x80, 0xA0), *range(0xDC, 0xE0)})
_Get: TypeAlias = Callable[[Any], Any]


class BadFrame(ValueError):
    """Bytes that are no frame for this node, and why."""


def _tag_of(frame: type[msgspec.Struct]) -> int:
    tag = frame.__struct_config__.tag
    assert isinstance(tag, int)
    return tag


_BY_TAG = {_tag_of(frame): frame for frame in FRAMES}
_TAGS = {frame: tag for tag, frame in _BY_TAG.items()}
_PLAIN_AT = {
    tag: 1 + frame.__struct_fields__.index(name)
    for tag, frame in _BY_TAG.items()
    for name in ("payload", "fields")
    if name in frame.__struct_fields__
}
_IDENTITY_AT = {
    tag: 1 + frame.__struct_fields__.index("identity")
    for tag, frame in _BY_TAG.items()
    if "identity" in frame.__struct_fields__
}
#: What no bound on a text or a list could be broken in: each item is a byte at least.
_SHORT_BYTES = min(STRING_BYTES_MAX, ITEMS_MAX)
#: Of each frame: the identity that it names, and what of it a program has said.
_LOOKS: dict[type[msgspec.Struct], tuple[_Get | None, _Get | None]] = {
    _BY_TAG[tag]: (
        attrgetter("identity") if tag in _IDENTITY_AT else None,
        attrgetter(_BY_TAG[tag].__struct_fields__[_PLAIN_AT[tag] - 1])
        if tag in _PLAIN_AT
        else None,
    )
    for tag in _BY_TAG
}


class Codec:
    """Encodes and decodes for the nodes of one cluster; from any thread."""

    def __init__(self, cluster: str, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._cluster = cluster
        self._frame_bytes_max = frame_bytes_max
        self._short_bytes = min(_SHORT_BYTES, frame_bytes_max)
        self._encode = msgspec.msgpack.Encoder(enc_hook=_text_of).encode
        self._read = msgspec.msgpack.Decoder(Envelope).decode

    def encode(self, sender: str, receiver: str, number: int, body: Frame) -> bytes:
        """The bytes of `body` on its way. Its payload has been checked before.

        Texts that say why are the callers' own; one that is not valid UTF-8 does
        not keep a frame from leaving.

        Raises:
            BadMessage: the frame is larger than a receiver takes.
        """
        frame = (VERSION, self._cluster, sender, receiver, number, body)
        try:
            data = self._encode(frame)
        except UnicodeEncodeError:
            # Not the usual packer: to look for such texts in each is slower.
            lenient = msgpack.Packer(default=_tuple_of, unicode_errors="replace")
            data = lenient.pack(frame)
        if len(data) > self._frame_bytes_max:
            name = type(body).__name__
            raise BadMessage(
                f"{name}: {len(data)} bytes, at most {self._frame_bytes_max}"
            )
        return data

    def decode(self, data: bytes, *, receiver: str) -> Envelope:
        """The frame in `data`, for `receiver`.

        Raises:
            BadFrame: it is none, or not for this cluster and node.
        """
        try:
            if len(data) > self._short_bytes or _may_be_deep(data):
                return self._decode_in_full(data, receiver)
            return self._decode_short(data, receiver)
        except RecursionError:
            # Of what is wrong, too deep for its own error to be written.
            raise BadFrame("nested too deep") from None

    def _decode_short(self, data: bytes, receiver: str) -> Envelope:
        try:
            found = self._read(data)
        except (msgspec.MsgspecError, RecursionError, OverflowError, ValueError):
            return self._decode_in_full(data, receiver)  # which says what is wrong
        if (
            found.version != VERSION
            or found.cluster != self._cluster
            or found.receiver != receiver
            or not found.sender
            or not found.number
        ):
            return self._decode_in_full(data, receiver)
        frame: Any = found.body
        identity_of, plain_of = _LOOKS[type(frame)]
        try:
            if identity_of is not None:
                Identity.parse(identity_of(frame))
            if plain_of is not None:
                check(plain_of(frame))
        except (BadIdentity, BadMessage) as error:
            raise BadFrame(f"{type(frame).__name__}: {error}") from None
        return found

    def _decode_in_full(self, data: bytes, receiver: str) -> Envelope:
        """The same with each bound looked at before anything is made, and reasons."""
        parts = self._unpack(data)
        if type(parts) is not list or len(parts) < _FIELDS:
            raise BadFrame("an envelope is an array of 6")
        version, cluster, sender, to, number, body = parts[:_FIELDS]
        if type(version) is not int or version != VERSION:
            raise BadFrame(f"protocol version {shown(version)}, not {VERSION}")
        if cluster != self._cluster:
            raise BadFrame(f"cluster {shown(cluster)}, not {self._cluster!r}")
        if to != receiver:
            raise BadFrame(f"it is for {shown(to)}, not {receiver!r}")
        if type(sender) is not str or not sender:
            raise BadFrame("the sender is not an address")
        if type(number) is not int or not 0 < number <= _INT_MAX:
            raise BadFrame("the number is not one from 1 on")
        if type(body) is not list or not body or type(body[0]) is not int:
            raise BadFrame("the body is not an array that begins with a tag")
        frame_type = _BY_TAG.get(body[0])
        if frame_type is None:
            raise BadFrame(f"unknown tag {body[0]}")
        name = frame_type.__name__
        try:
            frame: Any = msgspec.convert(body, frame_type)
        except (msgspec.ValidationError, OverflowError, RecursionError) as error:
            raise BadFrame(f"{name}: {error}") from None
        at = _IDENTITY_AT.get(body[0])
        if at is not None:
            try:
                Identity.parse(body[at])
            except BadIdentity as error:
                raise BadFrame(f"{name}: {error}") from None
        at = _PLAIN_AT.get(body[0])
        if at is not None:
            try:
                check(body[at])
            except BadMessage as error:
                raise BadFrame(f"{name}: {error}") from None
        return Envelope(version, cluster, sender, to, number, frame)

    def _unpack(self, data: bytes) -> Any:
        if len(data) > self._frame_bytes_max:
            raise BadFrame(f"{len(data)} bytes, at most {self._frame_bytes_max}")
        # No more than there are bytes for: each list is made as long as it says.
        items_max = min(ITEMS_MAX, len(data))
        try:
            return msgpack.unpackb(
                data,
                strict_map_key=False,
                ext_hook=_refuse_extension,
                max_str_len=STRING_BYTES_MAX,
                max_bin_len=STRING_BYTES_MAX,
                max_array_len=items_max,
                max_map_len=items_max,
                max_ext_len=0,
            )
        except BadFrame:
            raise
        except Exception as error:  # noqa: BLE001  msgpack raises many kinds
            raise BadFrame(f"not msgpack: {type(error).__name__}: {error}") from None


def _may_be_deep(data: bytes) -> bool:
    """Whether as many lists and maps begin in it as a thread's stack may not bear.

    msgspec goes as deep as the interpreter lets C code go, which is 10,000 levels on
    Python 3.13, and those take more than 2 MiB.
    """
    return len(data) > _DEEP and len(data.translate(None, _NO_BEGINNINGS)) > _DEEP


def _refuse_extension(code: int, data: bytes) -> Any:
    raise BadFrame(f"extension type {code} of {len(data)} bytes")


def _text_of(value: Any) -> str:
    if isinstance(value, str):  # an Identity, say
        return str.__str__(value)
    raise TypeError(f"a {type(value).__name__} cannot be carried")


def _tuple_of(value: msgspec.Struct) -> Any:
    return (_TAGS[type(value)], *astuple(value))
