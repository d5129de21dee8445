"""The tally: the built-in kind of `placement run`, which counts each request once."""

from bisect import bisect_right
from typing import Any

import msgspec

from actors.grain import Grain
from actors.state import BadState
from placement.errors import BadMessage

_SCHEMA = b"\x01tally\x01"


class Tally(Grain):
    """Counts requests by id (`input:line`): one that comes again counts no more.

    The lines seen are kept as sorted ranges for each input. The answer is
    `{"count": n}`, n being that of the request's own input.
    """

    is_durable = False

    def on_activate(self) -> None:
        """Go on from what is stored.

        Raises:
            BadState: it is not a tally's.
        """
        self._seen: dict[str, list[list[int]]] = {}
        self._is_changed = False
        stored = self.context.snapshot
        if stored is None:
            return
        if not stored.startswith(_SCHEMA):
            raise BadState("the stored state is not a tally's")
        try:
            self._seen = msgspec.msgpack.decode(
                stored[len(_SCHEMA) :], type=dict[str, list[list[int]]]
            )
        except msgspec.MsgspecError as error:
            raise BadState(f"the stored tally is damaged: {error}") from None

    def on_receive(self, message: Any) -> dict[str, int]:
        """Count the request whose id comes with the message."""
        source, colon, line = self.context.request_id.rpartition(":")
        if not colon or not line.isdecimal():
            raise BadMessage("a tally counts requests with an id, input:line")
        ranges = self._seen.setdefault(source, [])
        if _add(ranges, int(line)):
            self._is_changed = True
            if self.is_durable:
                self.context.save(self._stored())
        return {"count": sum(last - first + 1 for first, last in ranges)}

    def on_passivate(self) -> bytes | None:
        """Keep what is not stored yet."""
        return self._stored() if self._is_changed and not self.is_durable else None

    def _stored(self) -> bytes:
        return _SCHEMA + msgspec.msgpack.encode(self._seen)


class DurableTally(Tally):
    """A tally that stores each count before it answers."""

    is_durable = True


def _add(ranges: list[list[int]], line: int) -> bool:
    """Add `line` to sorted ranges; false where it is in them."""
    at = bisect_right(ranges, line, key=lambda each: each[0])
    before = ranges[at - 1] if at else None
    if before is not None and line <= before[1]:
        return False
    after = ranges[at] if at < len(ranges) else None
    joins_before = before is not None and before[1] == line - 1
    joins_after = after is not None and after[0] == line + 1
    if joins_before and joins_after:
        assert before is not None
        assert after is not None
        before[1] = after[1]
        del ranges[at]
    elif joins_before:
        assert before is not None
        before[1] = line
    elif joins_after:
        assert after is not None
        after[0] = line
    else:
        ranges.insert(at, [line, line])
    return True
