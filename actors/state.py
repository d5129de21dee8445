"""Stored state: a codec byte, the schema's version, and the value as msgpack."""

from collections.abc import Callable
from typing import Any

import msgspec

CODEC = 1
_HEADER = 3
SCHEMA_MAX = 65_535


class BadState(ValueError):
    """Stored bytes that this class cannot read; they are left as they are."""


class StateTooNew(BadState):
    """A newer schema than this class knows wrote the state."""


def encode_state(state: Any, schema_version: int) -> bytes:
    """The bytes to store.

    Raises:
        BadState: the value, or something in it, cannot be stored.
    """
    try:
        body = msgspec.msgpack.encode(state)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadState(f"the state cannot be stored: {error}") from None
    return bytes((CODEC,)) + schema_version.to_bytes(2, "big") + body


def decode_state(
    stored: bytes,
    state_type: Any,
    schema_version: int,
    upgrade: Callable[[Any, int], Any],
) -> Any:
    """The state in `stored`; `upgrade` turns the plain value of an older schema.

    Raises:
        BadState: it cannot be read.
        StateTooNew: a newer schema wrote it.
    """
    if len(stored) < _HEADER or stored[0] != CODEC:
        raise BadState(f"the stored state is of no known codec ({stored[:1].hex()})")
    version = int.from_bytes(stored[1:_HEADER], "big")
    if version > schema_version:
        raise StateTooNew(
            f"the stored state is of schema {version}, this class knows up to "
            f"{schema_version}"
        )
    try:
        if version == schema_version:
            return msgspec.msgpack.decode(stored[_HEADER:], type=state_type)
        plain = msgspec.msgpack.decode(stored[_HEADER:])
        return msgspec.convert(upgrade(plain, version), state_type)
    except msgspec.MsgspecError as error:
        raise BadState(f"the stored state is not readable: {error}") from None
