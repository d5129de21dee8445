"""The frames that nodes exchange: frozen, array-like, told apart by an integer tag.

The order of the fields is the contract. A field is only ever added at the end,
with a default; a tag is never used again.
"""

from typing import Annotated, Any, TypeAlias

import msgspec

VERSION = 1
#: The receiver of a `Find`: whichever node gets it.
ANY_NODE = "*"
#: A number of 64 bits that is never negative.
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Resolve(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Where is `identity`, or else start it. To a coordinator.

    `chain` are the identities that wait meanwhile, each for the next.
    """

    request: Number
    identity: str
    epoch: Number
    remaining_ms: Number
    chain: tuple[str, ...] = ()


class Resolved(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """It is at `session`, under `token`."""

    request: Number
    identity: str
    session: str
    token: Number


class Redirect(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Its partition is `session`'s, as of `epoch`."""

    request: Number
    identity: str
    epoch: Number
    session: str


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """It cannot be resolved: the name of the error, and why."""

    request: Number
    identity: str
    reason: str
    message: str


class Start(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Claim it over `revision` under that procedure's lock, and start it.

    `chain` are the identities that wait for it.
    """

    identity: str
    procedure: Number
    coordinator: str
    host: str
    revision: Number
    epoch: Number
    remaining_ms: Number
    chain: tuple[str, ...] = ()


class Started(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """`host` has it, under `token`."""

    identity: str
    procedure: Number
    host: str
    token: Number


class StartRefused(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """`host` does not start it."""

    identity: str
    procedure: Number
    host: str
    reason: str
    message: str


class AskOwner(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The entry names `session`, under `token`: is it there?"""

    identity: str
    session: str
    token: Number
    procedure: Number


class OwnerAnswer(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """`state` is here, pending, gave_up or not_mine."""

    identity: str
    session: str
    procedure: Number
    state: str
    token: Number


class AskHolder(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """The lock names `session` and `holder_procedure`: does that run?"""

    identity: str
    session: str
    holder_procedure: Number
    procedure: Number


class HolderAnswer(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """`state` is running, free or not_mine."""

    identity: str
    session: str
    holder_procedure: Number
    procedure: Number
    state: str


class Deliver(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """A message to the activation with `token`. `message_id` 0 wants no answer.

    `told` is then its number among the sender's messages, by which a bounce is
    put in order again.
    """

    identity: str
    token: Number
    message_id: Number
    payload: Any
    request_id: str
    remaining_ms: Number
    chain: tuple[str, ...]
    told: Number = 0


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """What the handler answered."""

    message_id: Number
    payload: Any
    token: Number


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """The message was refused, or its handler failed or rejected it."""

    message_id: Number
    reason: str
    message: str
    type_name: str
    fields: dict[str, Any]


class Bounce(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """A delivery that found nobody, with all that it said."""

    identity: str
    token: Number
    message_id: Number
    payload: Any
    request_id: str
    remaining_ms: Number
    chain: tuple[str, ...]
    told: Number = 0


class Mark(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """Comes back as `Marked`, after all that may bounce before it."""

    identity: str
    token: Number
    mark: Number


class Marked(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """The mark is back."""

    identity: str
    token: Number
    mark: Number


class LoopBack(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """From a node to itself: it works."""

    nonce: Number


class TopologyHint(msgspec.Struct, frozen=True, array_like=True, tag=19):
    """The membership has `epoch` now: read it."""

    epoch: Number


class Passivate(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """End the activation with `token`."""

    identity: str
    token: Number


class Find(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """Who are the members? From a client, to `ANY_NODE`."""

    request: Number


class Found(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """`sessions` of members that own partitions, as of `epoch`; the first answers."""

    request: Number
    epoch: Number
    sessions: tuple[str, ...]


class FindRefused(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """The node does not know them, or is asked too often."""

    request: Number
    reason: str
    message: str


Frame: TypeAlias = (
    Resolve
    | Resolved
    | Redirect
    | Refused
    | Start
    | Started
    | StartRefused
    | AskOwner
    | OwnerAnswer
    | AskHolder
    | HolderAnswer
    | Deliver
    | Answer
    | Failure
    | Bounce
    | Mark
    | Marked
    | LoopBack
    | TopologyHint
    | Passivate
    | Find
    | Found
    | FindRefused
)

FRAMES: tuple[type[msgspec.Struct], ...] = (
    Resolve,
    Resolved,
    Redirect,
    Refused,
    Start,
    Started,
    StartRefused,
    AskOwner,
    OwnerAnswer,
    AskHolder,
    HolderAnswer,
    Deliver,
    Answer,
    Failure,
    Bounce,
    Mark,
    Marked,
    LoopBack,
    TopologyHint,
    Passivate,
    Find,
    Found,
    FindRefused,
)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A frame and its way: from which incarnation to which, its number there."""

    version: Number
    cluster: str
    sender: str
    receiver: str
    number: Number
    body: Frame
