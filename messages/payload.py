"""Payloads: what a message and an answer may be made of, checked and copied.

None, bool, int of 64 bits, float, str, bytes, list (a tuple arrives as one), and
dict with str or int keys. A value of a subclass of these arrives as the base.
"""

import reprlib
from bisect import bisect_left
from typing import Any

import msgpack

from placement.errors import BadMessage

BYTES_MAX = 1 << 20
ITEMS_MAX = 1 << 17
DEPTH_MAX = 32
REQUEST_ID_BYTES_MAX = 512
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1
# What msgpack writes as one byte, and as five at most.
_SMALL_INT_MIN, _SMALL_INT_END, _HALF = -32, 128, 1 << 31
_SMALL_TEXT = 32
# A dict with so few items, each a scalar, a text of this length at most, or such a dict
# without another in it, is below every bound.
_FLAT_ITEMS, _FLAT_TEXT = 16, 1_024

_SCALARS = frozenset({type(None), bool, float})
_SIZES = {type(None): 1, bool: 1, float: 9}
# Before the bytes of a text, or the items of a list: at most so many.
_HEADER = 5
# A text alone may have all of BYTES_MAX but one.
_SIZE_MAX = BYTES_MAX - 1 + _HEADER


def copy(value: Any) -> Any:
    """A copy of `value` as the other side would have it.

    Raises:
        BadMessage: it cannot be carried; the message names the place.
    """
    kind = type(value)
    if kind is dict:
        if len(value) <= _FLAT_ITEMS:
            flat = _flat_copy(value)
            if flat is not None:
                return flat
    elif kind is str:
        if len(value) <= _FLAT_TEXT and value.isascii():
            return value
    elif kind in _SCALARS or (kind is int and INT_MIN <= value <= INT_MAX):
        return value
    try:
        copied, size = _copy(value, 0)
    except _Misfit as misfit:
        raise misfit.said() from None
    if size > _SIZE_MAX:
        raise BadMessage(f"payload has {size} bytes, at most {BYTES_MAX}")
    return copied


def _flatness(value: dict[Any, Any], *, is_inner: bool = False) -> int:
    """1: a small dict of scalars; 2: of such dicts too; 0: not so simple.

    The usual message, in one call.
    """
    found = 1
    for key, item in value.items():
        if type(key) is not str or len(key) > _FLAT_TEXT or not key.isascii():
            return 0
        kind = type(item)
        if kind is int:
            if not INT_MIN <= item <= INT_MAX:
                return 0
        elif kind is str:
            if len(item) > _FLAT_TEXT or not item.isascii():
                return 0
        elif kind is dict and len(item) <= _FLAT_ITEMS and not is_inner:
            if not _flatness(item, is_inner=True):
                return 0
            found = 2
        elif kind not in _SCALARS:
            return 0
    return found


def _flat_copy(value: dict[Any, Any]) -> dict[Any, Any] | None:
    """A copy of what is flat, or none."""
    match _flatness(value):
        case 0:
            return None
        case 1:
            return value.copy()
        case _:
            return {
                key: item.copy() if type(item) is dict else item
                for key, item in value.items()
            }


def request_id_of(value: Any) -> str:
    """`value`, which names a request and travels with it; none is empty.

    Raises:
        BadMessage: it is no text, or too long.
    """
    if not value and (value is None or type(value) is str):
        return ""
    if not isinstance(value, str):
        raise BadMessage(f"request_id: a text, not a {type(value).__name__}")
    plain = str.__str__(value)
    try:
        size = len(plain.encode())
    except UnicodeEncodeError:
        raise BadMessage("request_id: the text is not valid UTF-8") from None
    if size > REQUEST_ID_BYTES_MAX:
        raise BadMessage(
            f"request_id: it has {size} bytes, at most {REQUEST_ID_BYTES_MAX}"
        )
    return plain


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


def shown(value: Any) -> str:
    """What a value is, for an error: neither long nor deep, whatever it is."""
    return reprlib.repr(value)


def check(value: Any) -> None:
    """Refuse what `copy` would not carry.

    Raises:
        BadMessage: it cannot be carried; the message names the place.
    """
    if type(value) is dict and len(value) <= _FLAT_ITEMS and _flatness(value):
        return
    copy(value)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise BadMessage(f"extension type {code} of {len(data)} bytes")


class _Misfit(Exception):
    """Something in a payload that cannot be carried; its place is found on the way up.

    A place costs nothing where nothing is wrong.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.steps: list[str] = []

    def said(self) -> BadMessage:
        """The error, with the place."""
        return BadMessage(f"payload{''.join(reversed(self.steps))}: {self}")


def _copy(value: Any, depth: int) -> tuple[Any, int]:
    """Copy `value`, and bound from above how many bytes it takes."""
    kind = type(value)
    if kind is str:
        try:
            size = len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:
            raise _Misfit("the text is not valid UTF-8") from None
        return value, size + (1 if size < _SMALL_TEXT else _HEADER)
    if kind in _SCALARS:
        return value, _SIZES[kind]
    if kind is int:
        if _SMALL_INT_MIN <= value < _SMALL_INT_END:
            return value, 1
        if -_HALF <= value < 2 * _HALF:
            return value, 5
        if INT_MIN <= value <= INT_MAX:
            return value, 9
        raise _Misfit(f"{value} does not fit into 64 bits")
    if kind is bytes:
        return value, _HEADER + len(value)
    if depth >= DEPTH_MAX:
        raise _Misfit(f"nested more than {DEPTH_MAX} deep")
    if kind is dict:
        return _copy_dict(value, depth)
    if kind is list or kind is tuple:
        return _copy_list(value, depth)
    for base in (str, int, float, bytes, dict, list, tuple):
        if isinstance(value, base):
            # Not value.__str__() and the like: those may be overridden.
            plain: Any = base.__str__(value) if base is str else _plain(base, value)
            return _copy(plain, depth)
    raise _Misfit(f"a {kind.__name__} cannot be carried")


def _plain(base: type, value: Any) -> Any:
    if base is int:
        return int.__int__(value)
    if base is float:
        return float.__float__(value)
    return base(value)


def _check_count(value: Any) -> None:
    if len(value) > ITEMS_MAX:
        raise _Misfit(f"it has {len(value)} items, at most {ITEMS_MAX}")


def _size_of_ints(value: Any) -> int | None:
    """The bytes of many ints; none: one does not fit into 64 bits."""
    ordered = sorted(value)
    if ordered[0] < INT_MIN or ordered[-1] > INT_MAX:
        return None
    small = bisect_left(ordered, _SMALL_INT_END) - bisect_left(ordered, _SMALL_INT_MIN)
    half = bisect_left(ordered, 2 * _HALF) - bisect_left(ordered, -_HALF)
    return small + 5 * (half - small) + 9 * (len(ordered) - half)


def _copy_list(value: Any, depth: int) -> tuple[list[Any], int]:
    _check_count(value)
    if len(value) > _FLAT_ITEMS and set(map(type, value)) == {int}:
        # Numbers by the thousand: each by itself would take fifty times as long.
        ints = _size_of_ints(value)
        if ints is not None:
            return list(value), _HEADER + ints
    size = _HEADER
    items: list[Any] = []
    try:
        for item in value:
            copied, item_size = _copy(item, depth + 1)
            items.append(copied)
            size += item_size
    except _Misfit as misfit:
        misfit.steps.append(f"[{len(items)}]")
        raise
    return items, size


def _copy_dict(value: dict[Any, Any], depth: int) -> tuple[dict[Any, Any], int]:
    _check_count(value)
    size = _HEADER
    items: dict[Any, Any] = {}
    for key, item in value.items():
        if type(key) is str and key.isascii():
            plain_key: Any = key
            size += len(key) + _HEADER
        else:
            plain_key, key_size = _copy_key(key, depth)
            size += key_size
        try:
            copied, item_size = _copy(item, depth + 1)
        except _Misfit as misfit:
            misfit.steps.append(f"[{key!r}]")
            raise
        items[plain_key] = copied
        size += item_size
    return items, size


def _copy_key(key: Any, depth: int) -> tuple[Any, int]:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise _Misfit(
            f"key {shown(key)} is a {type(key).__name__}, keys are str or int"
        )
    try:
        return _copy(key, depth + 1)
    except _Misfit as misfit:
        raise _Misfit(f"key {key!r}: {misfit}") from None
