"""The entry to placement: `IdentityLookup`, and its implementation over partitions."""

from dataclasses import field
from typing import Protocol

from actors.engine import Settings
from actors.node import PlacementNode
from placement.entry import Pid
from placement.identity import Identity
from placement.pidcache import PlacementResolution
from placement.topology import SessionId
from placement.value import value


class IdentityLookup(Protocol):
    """Finds the activation of an identity; safe to share between threads."""

    def setup_member(self) -> None:
        """Resolve, and host."""

    def setup_client(self) -> None:
        """Resolve, and never host."""

    def resolve(
        self, identity: Identity, *, timeout: float | None = None
    ) -> PlacementResolution:
        """Where it is; it is started if it is nowhere.

        Raises:
            PlacementError: it cannot be, by the reason's own class.
        """

    def remove_pid(self, pid: Pid) -> bool:
        """Forget a reference that was found wrong; false where it was not kept."""

    def update_topology(self) -> None:
        """Read the members anew, soon."""

    def on_member_left(self, session: SessionId) -> tuple[Identity, ...]:
        """Forget the references to a member; which identities they were of."""

    def passivate_idle(self, idle_for: float) -> None:
        """End the activations here that were not used for `idle_for` seconds."""


@value(kw_only=True, sealed=True)
class PartitionIdentityLookupConfig:
    """What a lookup over partitions is made with."""

    name: str
    engine: str | None = None
    store: str | None = None
    settings: Settings = field(default_factory=Settings)


class PartitionIdentityLookup:
    """An `IdentityLookup` whose identities are shared out by partitions."""

    def __init__(self, node: PlacementNode) -> None:
        self._node = node

    @classmethod
    def of(cls, config: PartitionIdentityLookupConfig) -> "PartitionIdentityLookup":
        """One with a node of its own, which hosts no kinds.

        Raises:
            ValueError: the name, engine, store or a setting makes no sense.
        """
        return cls(
            PlacementNode(
                config.name,
                engine=config.engine,
                store=config.store,
                settings=config.settings,
            )
        )

    @property
    def node(self) -> PlacementNode:
        """The node that it resolves for."""
        return self._node

    def setup_member(self) -> None:
        """Resolve, and host."""
        self._node.start_member()

    def setup_client(self) -> None:
        """Resolve, and never host."""
        self._node.start_client()

    def resolve(
        self, identity: Identity, *, timeout: float | None = None
    ) -> PlacementResolution:
        """Where it is; it is started if it is nowhere."""
        return self._node.resolve(identity, timeout=timeout)

    def remove_pid(self, pid: Pid) -> bool:
        """Forget a reference that was found wrong."""
        return self._node.forget(pid)

    def update_topology(self) -> None:
        """Read the members anew, soon."""
        self._node.refresh()

    def on_member_left(self, session: SessionId) -> tuple[Identity, ...]:
        """Forget the references to a member."""
        return self._node.forget_session(session)

    def passivate_idle(self, idle_for: float) -> None:
        """End the activations here that were not used for `idle_for` seconds."""
        self._node.passivate_idle(idle_for)
