"""The contracts of the outside world: lock, storage, sessions, executor, and lookup.

A store implements the first three. Their methods take and return sequences,
outcome by outcome in the order of the requests, so that all that waits can be
one transaction; each request stands or falls alone. Every request can be
repeated: the same request again has the same outcome and changes nothing more.
A store that cannot perform any of them raises `StoreFailure`; one that fails
alone has `Failed` as its outcome.

All writes of a store draw from one growing revision; a claim's fencing token is
the revision of its own write. A session is *closed* for good once its record says
so. A session without a record counts as closed only from when the store has
created its record, as closed: `try_acquire` and `claim` do that for the sessions
that they find named and absent.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from placement.entry import Acquisition, ActivationEntry, ActivationRecord, Pid
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology
from placement.value import value


class StoreFailure(Exception):
    """The store could not do it: full, locked, gone.

    `may_have_happened` is false only where it is certain that nothing was
    written.
    """

    def __init__(self, message: str, *, may_have_happened: bool = True) -> None:
        super().__init__(message)
        self.may_have_happened = may_have_happened


@value
class Failed:
    """One request failed; whether it may have happened, and why it failed."""

    message: str
    may_have_happened: bool = True


# --- the placement lock ------------------------------------------------------


@value
class Acquire:
    """Take the lock on `identity` for one procedure."""

    identity: Identity
    acquisition: Acquisition


@value
class Acquired:
    """The lock is held by that acquisition; the entry as it was read then.

    `owner_is_open` tells whether the entry's owner is a session not closed.
    """

    entry: ActivationEntry
    owner_is_open: bool


@value
class LockHeld:
    """Another acquisition of an open session holds the lock."""

    holder: Acquisition


@value
class LockRefused:
    """The acquisition's own session is closed: it takes no lock any more.

    Nothing was written, and another member may take it at once. A store need not
    look: a lock of a closed session is free anyway.
    """

    message: str


@value
class Release:
    """Give back the lock, where that acquisition still holds it."""

    identity: Identity
    acquisition: Acquisition


@value
class Released:
    """That acquisition does not hold the lock (any more)."""


@runtime_checkable
class PlacementLock(Protocol):
    """The right to run the activation procedure on an identity (R3.1 to R3.5).

    Held by a session for one procedure; free when released or claimed, or when
    its session is closed. It has no clock.
    """

    def try_acquire(
        self, requests: Sequence[Acquire], /
    ) -> Sequence[Acquired | LockHeld | LockRefused | Failed]:
        """Take each lock that is free, or already held by that acquisition."""
        ...

    def release(self, requests: Sequence[Release], /) -> Sequence[Released | Failed]:
        """Free each lock that its acquisition still holds; else change nothing."""
        ...


# --- the activations ---------------------------------------------------------


@value
class Load:
    """Read the entry of `identity`."""

    identity: Identity


@value
class Loaded:
    """The entry (an empty one where there is none), and whether its owner is open."""

    entry: ActivationEntry
    owner_is_open: bool


@value
class Claim:
    """Make `session` the owner of `identity`, and release the lock.

    Conditional: the lock is held by `acquisition`, the entry's revision is
    `expected_revision`, and it has no owner or one whose session is closed.
    Without an acquisition the claim takes the lock itself, and releases it, in
    its one write: the lock has to be free. `attempt` names this claim among all
    of its session's.
    """

    identity: Identity
    session: SessionId
    attempt: int
    acquisition: Acquisition | None
    expected_revision: int


@value
class Claimed:
    """The claim stands: the entry as it was written, with its new token."""

    entry: ActivationEntry


@value
class ClaimRefused:
    """A condition of the claim did not hold; the entry as it is, and why."""

    entry: ActivationEntry
    message: str


@value
class Save:
    """Store a snapshot under the activation's token, if `version` is greater."""

    identity: Identity
    fencing_token: int
    version: int
    snapshot: bytes


@value
class Saved:
    """The stored version is that of the request or a later one of the same token."""

    version: int


@value
class GiveUp:
    """Clear the owner that claimed `fencing_token`; keep snapshot, version, token.

    Where `snapshot` is given, it is saved first, as `version`.
    """

    identity: Identity
    fencing_token: int
    version: int = 0
    snapshot: bytes | None = None


@value
class GivenUp:
    """That token owns nothing (any more)."""


@value
class Stale:
    """Refused: the entry has a greater token, or no owner, or is gone.

    `current` is the entry's token, 0 where there is no entry.
    """

    current: int


@runtime_checkable
class ActivationStorage(Protocol):
    """The stored owner and state of every identity (R3.3, R3.4)."""

    def load(self, requests: Sequence[Load], /) -> Sequence[Loaded | Failed]:
        """Read entries."""
        ...

    def claim(
        self, requests: Sequence[Claim], /
    ) -> Sequence[Claimed | ClaimRefused | Failed]:
        """Make claims; the same attempt repeated is confirmed, not made again."""
        ...

    def save(self, requests: Sequence[Save], /) -> Sequence[Saved | Stale | Failed]:
        """Store snapshots; a version not greater is confirmed and not written."""
        ...

    def give_up(
        self, requests: Sequence[GiveUp], /
    ) -> Sequence[GivenUp | Stale | Failed]:
        """Clear owners; `Stale` only where a greater token has been claimed."""
        ...


# --- sessions and membership -------------------------------------------------


@value(kw_only=True, sealed=True)
class SessionRecord:
    """The stored record of a session.

    `count` grows with each renewal. `ttl_ms` is what an observer waits, on its
    own clock and with the same count, before it may close it. A closed record
    stays closed and stays.
    """

    session: SessionId
    ttl_ms: int
    count: int = 0
    closed: bool = False


@value(sealed=True)
class SessionView:
    """One reading: the membership, and the records of all open sessions.

    `sessions` also holds the closed records that the membership still names, and
    is sorted by session.
    """

    topology: Topology
    sessions: tuple[SessionRecord, ...]


@runtime_checkable
class SessionStorage(Protocol):
    """Sessions, and the one record of members and epoch (DESIGN: sessions).

    Raises:
        StoreFailure: from every method.
    """

    def open_session(self, record: SessionRecord, /) -> bool:
        """Create `record`; false where that session has another record already.

        True again where the record is there, open, and at count 0.
        """
        ...

    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        """Raise the count to `count` and read all; none where it is not open.

        A count that is not greater than the stored one is confirmed.
        """
        ...

    def read_sessions(self) -> SessionView:
        """Read all, without a session of one's own."""
        ...

    def close_session(self, session: SessionId, count: int, /) -> bool:
        """Close it if its count is still `count`; true if it is closed then.

        A session without a record gets one, closed.
        """
        ...

    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        """Replace the members if the epoch is still that; the topology after it.

        The epoch grows by one with the write. The outcome tells by its epoch and
        members whether the write happened.
        """
        ...


@runtime_checkable
class Store(PlacementLock, ActivationStorage, SessionStorage, Protocol):
    """Lock, activations and sessions in one place.

    Used from one thread at a time. `another` gives an independent connection to
    the same store (a memory store shares its contents), so that a renewal waits
    behind nothing else.

    A store in which one connection writes at a time may have the attribute
    `has_one_writer`, as true: an engine then keeps entries back for a renewal.
    """

    @property
    def url(self) -> str:
        """The URL that names it."""
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """Make the calls inside one transaction, where the store has those.

        Raises:
            StoreFailure: it could not begin or commit; the outcomes of the calls
                inside are void then.
        """
        ...

    def another(self) -> "Store":
        """Open another connection to the same contents."""
        ...

    def close(self) -> None:
        """Free what it holds; the contents stay."""
        ...


# --- execution, membership, lookup -------------------------------------------


class ActivationExecutor(Protocol):
    """Starts and stops the activations of one node (R3).

    `start` is told a claim that the store has confirmed, and reports back, once,
    by a message to the PlacementActor; so does `stop` when the last user code has
    been left. Both return at once.
    """

    def start(self, pid: Pid, record: ActivationRecord) -> None:
        """Start the activation that `pid` names, from `record`'s snapshot."""
        ...

    def stop(self, pid: Pid, *, lapsed: bool) -> None:
        """End it. After a lapse no hook runs, and nothing is saved."""
        ...


class ClusterProvider(Protocol):
    """Who the members are. Changes of it enter the actors as messages."""

    def topology(self) -> Topology:
        """The newest topology known."""
        ...

    def refresh(self) -> None:
        """Ask for a newer one soon."""
        ...
