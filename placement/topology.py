"""Members and topology: who may own partitions and host, as of an epoch."""

from collections.abc import Iterable
from dataclasses import field
from functools import lru_cache
from typing import NewType

from placement.value import value

SessionId = NewType("SessionId", str)
"""One opening of a session: `address#number`, never used again."""

Address = NewType("Address", str)
"""One start of a node: `name.boot`, where messages reach it until it ends."""


def session_of(address: Address, number: int) -> SessionId:
    """Name the `number`-th session that the node at `address` opens."""
    return SessionId(f"{address}#{number}")


# One text for all that names it: every reference to an activation holds its own.
@lru_cache(maxsize=1 << 14)
def address_of(session: SessionId) -> Address:
    """Where the node that opened `session` is reached."""
    return Address(session.rpartition("#")[0])


@lru_cache(maxsize=1 << 14)
def node_of(session: SessionId | Address) -> str:
    """The name of the node that opened `session`, or starts at the address."""
    return session.partition("#")[0].rpartition(".")[0]


@value(kw_only=True, sealed=True)
class Member:
    """One incarnation of a node in the cluster: a session, and what it offers.

    `kinds` are sorted; `weight` is its share of the partitions relative to the
    others'.
    """

    session: SessionId
    kinds: tuple[str, ...] = ()
    weight: float = 1.0
    draining: bool = False

    @property
    def node(self) -> str:
        """The name of its node."""
        return node_of(self.session)

    @property
    def address(self) -> Address:
        """Where its messages go."""
        return address_of(self.session)

    def hosts(self, kind: str) -> bool:
        """Tell whether new activations of `kind` may start there."""
        return not self.draining and kind in self.kinds


@value(kw_only=True, sealed=True)
class Topology:
    """The members known together, sorted by session, and their epoch.

    One epoch means one set of members, on every node.
    """

    epoch: int = 0
    members: tuple[Member, ...] = ()
    _by_session: dict[SessionId, Member] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.members, key=lambda member: member.session))
        object.__setattr__(self, "members", ordered)
        self._by_session.update((member.session, member) for member in ordered)

    def __contains__(self, session: SessionId) -> bool:
        return session in self._by_session

    def member(self, session: SessionId) -> Member | None:
        """The member that opened `session`, where it is one."""
        return self._by_session.get(session)

    def owners(self) -> tuple[Member, ...]:
        """The members that may own partitions: those that do not drain."""
        return tuple(member for member in self.members if not member.draining)

    def with_member(self, member: Member) -> "Topology":
        """The next epoch, in which `member` is one (in place of its former self)."""
        others = (each for each in self.members if each.session != member.session)
        return Topology(epoch=self.epoch + 1, members=(*others, member))

    def without(self, sessions: Iterable[SessionId]) -> "Topology":
        """The next epoch, in which none of `sessions` is a member."""
        gone = frozenset(sessions)
        return Topology(
            epoch=self.epoch + 1,
            members=tuple(each for each in self.members if each.session not in gone),
        )
