"""Builders of a few lines for the core's values."""

from collections.abc import Iterable
from typing import Any, TypeVar

from placement.contracts import Acquired
from placement.entry import ActivationEntry, ActivationRecord, Pid
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.topology import Address, Member, SessionId, Topology

T = TypeVar("T")

CART = Identity("cart", "1")
A, B, C = (SessionId(f"{name}.1#1") for name in "abc")
CLIENT = Address("client.1")
MS = 1_000_000
S = 1_000_000_000


def member(session: SessionId, **fields: Any) -> Member:
    return Member(session=session, **{"kinds": ("cart",), **fields})


def topology(*sessions: SessionId, epoch: int = 1) -> Topology:
    return Topology(epoch=epoch, members=tuple(member(each) for each in sessions))


def table(*sessions: SessionId, epoch: int = 1) -> PartitionTable:
    return PartitionTable.build(topology(*sessions, epoch=epoch), 16)


def owned_by(session: SessionId, of: PartitionTable, count: int = 200) -> Identity:
    """An identity whose partition is that member's."""
    for number in range(count):
        identity = Identity("cart", str(number))
        owner = of.owner_of(identity)
        if owner is not None and owner.session == session:
            return identity
    raise AssertionError("no identity found")


def entry(
    identity: Identity = CART,
    *,
    owner: SessionId | None = None,
    token: int = 0,
    revision: int = 0,
    snapshot: bytes | None = None,
) -> ActivationEntry:
    pid = None if owner is None else Pid(identity, owner, token)
    return ActivationEntry(
        identity=identity,
        owner=owner,
        fencing_token=token,
        revision=revision,
        record=ActivationRecord(pid=pid, snapshot=snapshot),
    )


def acquired(found: ActivationEntry | None = None, *, is_open: bool = True) -> Acquired:
    return Acquired(found if found is not None else entry(), is_open)


def only(effects: Iterable[Any], kind: type[T]) -> T:
    """The one effect of that type."""
    found = [each for each in effects if isinstance(each, kind)]
    assert len(found) == 1, f"{len(found)} of {kind.__name__} in {effects}"
    return found[0]


def none_of(effects: Iterable[Any], kind: type) -> bool:
    return not any(isinstance(each, kind) for each in effects)
