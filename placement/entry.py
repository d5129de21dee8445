"""What is stored of an identity: its owner, its state, its fencing token, its lock."""

from dataclasses import field

from placement.identity import Identity
from placement.topology import Address, SessionId, address_of, node_of
from placement.value import value


@value(sealed=True)
class Pid:
    """The reference to one activation: identity, hosting session, fencing token.

    A delivery names the token, and reaches only the activation that has it.
    """

    identity: Identity
    session: SessionId
    fencing_token: int
    address: Address = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", address_of(self.session))

    @property
    def node(self) -> str:
        """The name of the node that hosts it."""
        return node_of(self.session)

    def __str__(self) -> str:
        return f"{self.identity}@{self.session}/{self.fencing_token}"


@value
class Acquisition:
    """One writing of a placement lock: by which session, for which procedure."""

    session: SessionId
    procedure: int


@value(kw_only=True)
class ActivationRecord:
    """What is known of an activation: where it is, its last snapshot, its version.

    `pid` is none while nobody owns the identity. `version` grows with each save;
    0 means never saved.
    """

    pid: Pid | None = None
    snapshot: bytes | None = None
    version: int = 0


@value(kw_only=True)
class ActivationEntry:
    """The stored entry of an identity.

    `revision` is that of its last write, against which a claim is conditional;
    `attempt` names the claim that made `owner` the owner; `observed_at_ms` is
    the reader's clock, for people. Invariant: `fencing_token` is the revision of
    the last claim's write, so that it only grows.
    """

    identity: Identity
    owner: SessionId | None = None
    attempt: int = 0
    fencing_token: int = 0
    record: ActivationRecord = ActivationRecord()
    revision: int = 0
    observed_at_ms: int = 0
