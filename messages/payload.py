"""Payloads: what a message and an answer may be made of, checked and copied.

None, bool, int of 64 bits, float, str, bytes, list (a tuple arrives as one), and
dict with str or int keys. A value of a subclass of these arrives as the base.
"""

from typing import Any

import msgpack

from placement.errors import BadMessage

BYTES_MAX = 1 << 20
DEPTH_MAX = 32
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1

_SCALARS = frozenset({type(None), bool, float})


def copy(value: Any) -> Any:
    """A copy of `value` as the other side would have it.

    Raises:
        BadMessage: it cannot be carried; the message names the place.
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is int and INT_MIN <= value <= INT_MAX:
        return value
    copied, size = _copy(value, "payload", 0)
    if size > BYTES_MAX:
        raise BadMessage(f"payload has {size} bytes, at most {BYTES_MAX}")
    return copied


def pack(value: Any) -> bytes:
    """The bytes of `value`.

    Raises:
        BadMessage: it cannot be carried; the message names the place.
    """
    packed: bytes = msgpack.packb(copy(value))
    return packed


def unpack(data: bytes) -> Any:
    """The value of `data`, which `pack` has made.

    Raises:
        BadMessage: `pack` has not made it.
    """
    try:
        value = msgpack.unpackb(data, strict_map_key=False, ext_hook=_refuse_extension)
    except Exception as error:  # noqa: BLE001  msgpack raises many kinds
        raise BadMessage(f"payload bytes are damaged: {error}") from None
    return copy(value)


def check(value: Any) -> None:
    """Refuse what `copy` would not carry.

    Raises:
        BadMessage: it cannot be carried; the message names the place.
    """
    copy(value)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise BadMessage(f"extension type {code} of {len(data)} bytes")


def _copy(value: Any, path: str, depth: int) -> tuple[Any, int]:
    """Copy `value`, and bound from below how many bytes it takes."""
    kind = type(value)
    if kind is str:
        try:
            return value, 1 + len(value.encode())
        except UnicodeEncodeError:
            raise BadMessage(f"{path}: the text is not valid UTF-8") from None
    if kind in _SCALARS:
        return value, 1
    if kind is int:
        if INT_MIN <= value <= INT_MAX:
            return value, 1
        raise BadMessage(f"{path}: {value} does not fit into 64 bits")
    if kind is bytes:
        return value, 1 + len(value)
    if depth >= DEPTH_MAX:
        raise BadMessage(f"{path}: nested more than {DEPTH_MAX} deep")
    if kind is dict:
        return _copy_dict(value, path, depth)
    if kind is list or kind is tuple:
        size = 1
        items = []
        for index, item in enumerate(value):
            copied, item_size = _copy(item, f"{path}[{index}]", depth + 1)
            items.append(copied)
            size += item_size
        return items, size
    for base in (str, int, float, bytes, dict, list, tuple):
        if isinstance(value, base):
            # Not value.__str__() and the like: those may be overridden.
            plain: Any = base.__str__(value) if base is str else _plain(base, value)
            return _copy(plain, path, depth)
    raise BadMessage(f"{path}: a {kind.__name__} cannot be carried")


def _plain(base: type, value: Any) -> Any:
    if base is int:
        return int.__int__(value)
    if base is float:
        return float.__float__(value)
    return base(value)


def _copy_dict(value: dict[Any, Any], path: str, depth: int) -> tuple[Any, int]:
    size = 1
    items: dict[Any, Any] = {}
    for key, item in value.items():
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise BadMessage(
                f"{path}: key {key!r} is a {type(key).__name__}, keys are str or int"
            )
        plain_key, key_size = _copy(key, f"{path} key {key!r}", depth + 1)
        copied, item_size = _copy(item, f"{path}[{key!r}]", depth + 1)
        items[plain_key] = copied
        size += key_size + item_size
    return items, size
