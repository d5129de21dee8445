"""Events: what happened on a node, in order, for whoever subscribes.

Core machines return `Happened`; the event stream of the node gives it a number,
a time and the epoch, and so makes it an event. Within a node the numbers alone
order events; the wall time is for people.
"""

from typing import Literal, TypeAlias

from placement.identity import Identity
from placement.topology import SessionId
from placement.value import value


@value(kw_only=True)
class Happened:
    """A transition or failure, not yet numbered.

    `kind` is which family of events it belongs to; `token` 0 means none.
    """

    kind: Literal["placement", "actor", "cache"]
    name: str
    identity: Identity | None = None
    session: SessionId | None = None
    token: int = 0
    reason: str = ""


@value(kw_only=True, sealed=True)
class _Event:
    node: str
    number: int
    at_ms: int
    epoch: int
    name: str
    identity: Identity | None = None
    session: SessionId | None = None
    token: int = 0
    reason: str = ""

    def __str__(self) -> str:
        parts = [f"{self.at_ms} {self.node} #{self.number} epoch {self.epoch}"]
        parts.append(self.name)
        if self.identity is not None:
            parts.append(str(self.identity))
        if self.session is not None:
            parts.append(f"at {self.session}")
        if self.token:
            parts.append(f"token {self.token}")
        if self.reason:
            parts.append(f"({self.reason})")
        return " ".join(parts)


@value(kw_only=True, sealed=True)
class PlacementEvent(_Event):
    """Of the node: sessions, topology, claims, and troubles of store and frames."""

    __str__ = _Event.__str__


@value(kw_only=True, sealed=True)
class VirtualActorEvent(_Event):
    """Of one activation: it began, ended, failed, lapsed, does not come back."""

    __str__ = _Event.__str__


@value(kw_only=True, sealed=True)
class PidCacheEvent(_Event):
    """Of one cached reference: it was kept, or dropped and why."""

    __str__ = _Event.__str__


@value(kw_only=True, sealed=True)
class EventsLost(_Event):
    """A subscriber was too slow: so many events before this one are missing."""

    count: int = 0
    __str__ = _Event.__str__


Event: TypeAlias = PlacementEvent | VirtualActorEvent | PidCacheEvent | EventsLost

_TYPES: dict[str, type[PlacementEvent | VirtualActorEvent | PidCacheEvent]] = {
    "placement": PlacementEvent,
    "actor": VirtualActorEvent,
    "cache": PidCacheEvent,
}


def event_of(
    happened: Happened, *, node: str, number: int, at_ms: int, epoch: int
) -> Event:
    """The event that `happened` is on `node`."""
    return _TYPES[happened.kind](
        node=node,
        number=number,
        at_ms=at_ms,
        epoch=epoch,
        name=happened.name,
        identity=happened.identity,
        session=happened.session,
        token=happened.token,
        reason=happened.reason,
    )
