"""What a simulated run leaves behind to be judged: plain records, in order of time.

The records say what was asked for, what user code was entered, what the store
wrote, and how it ended; nothing in them is taken from the machines that decide.
Times are virtual nanoseconds of the one true clock, which no node can read. A run
keeps all of them, so that the collector is not to walk them: they are in no cycle.
"""

from typing import Any, TypeAlias

import msgspec


class _Record(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """As a message it is a list: its name, then its fields."""


class Asked(_Record, frozen=True):
    """A program on `asker` (an incarnation of a node) asks `identity`.

    `operation` is `add` (changes the state, once for each `request`), `read`, or
    another name that only has to end. `request` is unique in the run.
    """

    at_ns: int
    asker: str
    request: str
    identity: str
    operation: str
    deadline_ns: int


class Told(_Record, frozen=True):
    """A program on `teller` tells `identity`; `number` grows for the two of them."""

    at_ns: int
    teller: str
    request: str
    identity: str
    number: int


class Ended(_Record, frozen=True):
    """An ask has ended for its asker.

    `outcome` is `answered` (`value` is the answer), `refused` (`reason` says why;
    it is certain that it was not handled), `failed` (user code raised: it may
    have been handled), or `unknown`.
    """

    at_ns: int
    request: str
    outcome: str
    value: Any
    reason: str


class Entered(_Record, frozen=True):
    """User code of an activation is entered: the record is made by that code.

    `purpose` is `activate`, `handle`, `resume`, `timer` or `passivate`; `request`
    is empty where there is none, `number` that of a `Told`, else 0.
    """

    at_ns: int
    address: str
    identity: str
    session: str
    token: int
    purpose: str
    request: str
    number: int = 0


class EntryClaimed(_Record, frozen=True):
    """The store has made `session` the owner of `identity`, under `token`.

    `former` owned it until this very write, under `former_token`; empty: nobody.
    """

    at_ns: int
    identity: str
    session: str
    token: int
    former: str
    former_token: int


class EntrySaved(_Record, frozen=True):
    """The store has replaced the snapshot of `identity`."""

    at_ns: int
    identity: str
    token: int
    version: int


class EntryGivenUp(_Record, frozen=True):
    """The store has cleared the owner that claimed `token`.

    `brought` is the version of the snapshot that came with it, to be stored; -1
    where none did.
    """

    at_ns: int
    identity: str
    session: str
    token: int
    brought: int = -1


class Leaving(_Record, frozen=True):
    """User code of `token` has asked for the end of its own activation."""

    at_ns: int
    identity: str
    token: int


class Emptying(_Record, frozen=True):
    """The incarnation `address` was told to drain or to stop: all there is to end."""

    at_ns: int
    address: str


class Chosen(_Record, frozen=True):
    """`chooser` has `host` start `identity`, by the topology of `epoch`.

    `procedure` is the chooser's number for what it is doing: one that is sent again
    bears the same.
    """

    at_ns: int
    chooser: str
    procedure: int
    identity: str
    host: str
    epoch: int


class SessionChanged(_Record, frozen=True):
    """The store's record of `session` is now `open` or `closed`."""

    at_ns: int
    session: str
    state: str
    renewals: int


class MembersChanged(_Record, frozen=True):
    """The store's membership record was replaced."""

    at_ns: int
    epoch: int
    sessions: tuple[str, ...]


class TopologyTaken(_Record, frozen=True):
    """The incarnation `address` decides by this topology from now on.

    `sessions` are its members, sorted; `draining` those of them that drain;
    `owners` is the owning session of each partition.
    """

    at_ns: int
    address: str
    epoch: int
    sessions: tuple[str, ...]
    draining: tuple[str, ...]
    owners: tuple[str, ...]


class ProcessEnded(_Record, frozen=True):
    """The process at `address` is gone: `how` is `crashed` or `stopped`."""

    at_ns: int
    address: str
    how: str


class Healed(_Record, frozen=True):
    """The last fault is over; what follows must go well."""

    at_ns: int


class Reached(_Record, frozen=True):
    """After the healing, `asker` sought `identity`: `reason` is empty where found."""

    at_ns: int
    asker: str
    identity: str
    reason: str


class FinalState(_Record, frozen=True):
    """What the store held at the end: the requests that `identity`'s state contains."""

    at_ns: int
    identity: str
    requests: tuple[str, ...]


class LeftBehind(_Record, frozen=True):
    """At the end something was held that nobody will ever clear."""

    at_ns: int
    where: str
    what: str
    identity: str


class WorkDone(_Record, frozen=True):
    """How much was done for `requests` requests in all.

    `kept_peak` is how much was kept at once because it was not done yet: turns and
    timers to come, frames under way, asks and claims without an answer.
    """

    at_ns: int
    requests: int
    frames: int
    store_operations: int
    kept_peak: int


class Sought(_Record, frozen=True):
    """How often `asker` asked where `identity` is, for one need, within a second.

    That second of the run in which one was asked for most often.
    """

    at_ns: int
    asker: str
    identity: str
    times: int


Record: TypeAlias = (
    Asked
    | Told
    | Ended
    | Entered
    | EntryClaimed
    | EntrySaved
    | EntryGivenUp
    | Leaving
    | Emptying
    | Chosen
    | SessionChanged
    | MembersChanged
    | TopologyTaken
    | ProcessEnded
    | Healed
    | Reached
    | FinalState
    | LeftBehind
    | WorkDone
    | Sought
)
