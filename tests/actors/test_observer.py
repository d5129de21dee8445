import ast
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

import actors.observer
from actors.observer import RULES, Bounds, Violation, observe
from actors.trace import (
    Asked,
    Chosen,
    Emptying,
    Ended,
    Entered,
    EntryClaimed,
    EntryGivenUp,
    EntrySaved,
    FinalState,
    Healed,
    Leaving,
    LeftBehind,
    MembersChanged,
    ProcessEnded,
    Reached,
    Record,
    SessionChanged,
    Sought,
    Told,
    TopologyTaken,
    WorkDone,
)

CART = "cart/1"
BOUNDS = Bounds(liveness_ns=1_000, grace_ns=10, idle_ns=20)


# --- builders: what the tests do not speak of is in order ---


def opened(at_ns: int, session: str = "s1") -> Record:
    return SessionChanged(at_ns, session, "open", 0)


def closed(at_ns: int, session: str = "s1") -> Record:
    return SessionChanged(at_ns, session, "closed", 0)


def claimed(
    at_ns: int, token: int, session: str = "s1", *, former: str = "", of: str = CART
) -> Record:
    return EntryClaimed(at_ns, of, session, token, former, token - 1 if former else 0)


def entered(
    at_ns: int,
    token: int,
    session: str = "s1",
    *,
    address: str = "",
    request: str = "",
    number: int = 0,
    of: str = CART,
) -> Record:
    address = address or f"node of {session}"
    purpose = "handle" if request else "activate"
    return Entered(at_ns, address, of, session, token, purpose, request, number)


def asked(
    at_ns: int, request: str, operation: str = "add", *, of: str = CART
) -> Record:
    return Asked(at_ns, "client", request, of, operation, at_ns + 100)


def told(at_ns: int, request: str, number: int, *, teller: str = "client") -> Record:
    return Told(at_ns, teller, request, CART, number)


def answered(at_ns: int, request: str, value: object = None) -> Record:
    return Ended(at_ns, request, "answered", value, "")


def ended(at_ns: int, request: str, outcome: str) -> Record:
    return Ended(at_ns, request, outcome, None, "NotReady")


def added(at_ns: int, request: str, count: int, *, of: str = CART) -> list[Record]:
    return [asked(at_ns, request, of=of), answered(at_ns + 5, request, count)]


def final(at_ns: int, *requests: str, of: str = CART) -> Record:
    return FinalState(at_ns, of, requests)


def took(
    at_ns: int,
    epoch: int,
    sessions: str,
    owners: str,
    *,
    draining: str = "",
    address: str = "node-1",
) -> Record:
    return TopologyTaken(
        at_ns, address, epoch, tuple(sessions), tuple(draining), tuple(owners)
    )


def members(at_ns: int, epoch: int, sessions: str) -> Record:
    return MembersChanged(at_ns, epoch, tuple(sessions))


def ends(at_ns: int, token: int = 7, session: str = "s1") -> Record:
    return Entered(at_ns, f"node of {session}", CART, session, token, "passivate", "")


def chose(
    at_ns: int, epoch: int, host: str, *, chooser: str = "a", procedure: int = 1
) -> Record:
    return Chosen(at_ns, chooser, procedure, CART, host, epoch)


HOSTED = [opened(0), claimed(1, 7), entered(2, 7)]
TAKEN_OVER = [*HOSTED, closed(3), opened(3, "s2"), claimed(4, 8, "s2", former="s1")]


def tells(*numbers_by_teller: tuple[str, int]) -> list[Record]:
    """Tell in the order of the numbers, handle in the order given."""
    sent = [
        told(10, f"{teller}-{number}", number, teller=teller)
        for teller, number in sorted(numbers_by_teller)
    ]
    handled = [
        entered(20 + place, 7, request=f"{teller}-{number}", number=number)
        for place, (teller, number) in enumerate(numbers_by_teller)
    ]
    return [*HOSTED, *sent, *handled]


# --- histories by the rule that they keep or break ---


GOOD: dict[str, dict[str, list[Record]]] = {
    "one-activation": {
        "the next activation has a greater token": [*TAKEN_OVER, entered(5, 8, "s2")],
        "an identity does not wait for another's token": [
            opened(0),
            claimed(1, 7),
            claimed(2, 9, of="cart/2"),
            entered(3, 9, of="cart/2"),
            entered(4, 7),
        ],
    },
    "closed-session": {
        "the session is closed when its activation has ended": [*HOSTED, closed(3)],
        "a renewal is no opening and no closing": [*HOSTED, opened(3), entered(4, 7)],
    },
    "entry-first": {
        "the entry is given up when its activation has ended": [
            *HOSTED,
            EntryGivenUp(3, CART, "s1", 7),
            claimed(4, 8),
            entered(5, 8),
        ],
    },
    "token-grows": {
        "one token for each claim": [
            opened(0),
            claimed(1, 7),
            claimed(2, 6, of="cart/2"),
            claimed(3, 8, of="cart/2"),
        ],
    },
    "owner-open": {
        "the former owner's session is closed": TAKEN_OVER,
        "the former session is closed that nobody opened": [
            opened(0, "s2"),
            closed(1, "lost"),
            claimed(2, 8, "s2", former="lost"),
        ],
    },
    "stale-write": {
        "each owner saves greater versions": [
            *HOSTED,
            EntrySaved(3, CART, 7, 1),
            EntrySaved(4, CART, 7, 3),
            EntryGivenUp(5, CART, "s1", 7),
            claimed(6, 8),
            EntrySaved(7, CART, 8, 4),
        ],
        "the last snapshot is stored with the giving up": [
            *HOSTED,
            EntrySaved(3, CART, 7, 1),
            EntrySaved(4, CART, 7, 2),
            EntryGivenUp(4, CART, "s1", 7, 2),
        ],
    },
    "unrefused-effect": {
        "a refused ask is not handled": [asked(0, "a"), ended(1, "a", "refused")],
    },
    "handled-once": {
        "one request after another": [
            *HOSTED,
            asked(3, "a", "other"),
            entered(4, 7, request="a"),
            answered(5, "a"),
            asked(6, "b", "other"),
            entered(7, 7, request="b"),
            answered(8, "b"),
        ],
        "messages without a request": [
            *HOSTED,
            Entered(3, "node of s1", CART, "s1", 7, "handle", ""),
            Entered(4, "node of s1", CART, "s1", 7, "handle", ""),
        ],
        "one request is resumed": [
            *HOSTED,
            asked(3, "a", "other"),
            entered(4, 7, request="a"),
            Entered(5, "node of s1", CART, "s1", 7, "resume", "a"),
            answered(6, "a"),
        ],
    },
    "order": {
        "in order, with one lost": tells(("x", 1), ("x", 3)),
        "nobody waits for another teller": tells(("x", 2), ("y", 1), ("x", 3)),
    },
    "saves-kept": {
        "answered and refused, unknown and failed adds": [
            *added(0, "a", 1),
            asked(10, "no"),
            ended(11, "no", "refused"),
            asked(12, "lost"),
            ended(13, "lost", "unknown"),
            asked(14, "raised"),
            ended(15, "raised", "failed"),
            asked(16, "kept"),
            ended(17, "kept", "unknown"),
            final(20, "a", "kept"),
        ],
        "a run that reads no state": added(0, "a", 1),
        "an identity whose add was refused needs no state": [
            asked(0, "no", of="cart/2"),
            ended(1, "no", "refused"),
            *added(2, "a", 1),
            final(20, "a"),
        ],
    },
    "linearizable": {
        "adds and reads, each identity for itself": [
            *added(0, "a", 1),
            *added(10, "b", 1, of="cart/2"),
            asked(20, "r", "read"),
            answered(21, "r", 1),
        ],
        "an add of unknown outcome that is seen later": [
            asked(0, "a"),
            ended(5, "a", "unknown"),
            asked(10, "r0", "read"),
            answered(11, "r0", 0),
            asked(20, "r1", "read"),
            answered(21, "r1", 1),
        ],
        "a failed read, a refused add and what is neither add nor read": [
            asked(0, "r", "read"),
            ended(1, "r", "failed"),
            asked(2, "no"),
            ended(3, "no", "refused"),
            asked(4, "e", "echo"),
            answered(5, "e", "e"),
            *added(6, "a", 1),
        ],
    },
    "ends": {
        "within the grace": [asked(0, "a"), ended(110, "a", "unknown")],
        "whose process has ended": [
            asked(0, "a"),
            ProcessEnded(110, "client", "crashed"),
        ],
    },
    "idle": {
        "not used for so long": [
            *HOSTED,
            entered(5, 7, request="a"),
            ends(25),
            EntryGivenUp(26, CART, "s1", 7),
        ],
        "by its own wish": [*HOSTED, Leaving(3, CART, 7), ends(4)],
        "its node empties": [*HOSTED, Emptying(3, "node of s1"), ends(4)],
        "used while its end was under way": [
            *HOSTED,
            entered(5, 7, request="a"),
            entered(25, 7, request="b"),
            Entered(27, "node of s1", CART, "s1", 7, "resume", ""),
            ends(27),
        ],
        "a timer is no use": [
            *HOSTED,
            Entered(15, "node of s1", CART, "s1", 7, "timer", ""),
            ends(21),
        ],
    },
    "reachable": {
        "within the time, before and after": [
            Reached(1, "node-1", CART, ""),
            Healed(2),
            Reached(1_002, "node-1", CART, ""),
        ],
        "from the last healing on": [
            Healed(2),
            Healed(500),
            Reached(1_500, "node-1", CART, ""),
        ],
    },
    "left-behind": {"nothing": []},
    "topology": {
        "by one, and skipped by a node": [
            members(0, 4, "ab"),
            took(1, 4, "ab", "aabb"),
            took(2, 4, "ab", "aabb", address="node-2"),
            members(3, 5, "abc"),
            members(4, 6, "cab"),
            took(5, 6, "abc", "aabb"),
            took(6, 6, "abc", "aabb"),
            took(7, 4, "ab", "aabb", address="node-3"),
        ],
    },
    "moves-least": {
        "a join, a drain, its end and a leave": [
            took(1, 1, "ab", "aabb"),
            took(2, 2, "abc", "acbb"),
            took(3, 3, "abc", "acca", draining="b"),
            took(4, 4, "abc", "abcb"),
            took(5, 5, "bc", "bbcb"),
            took(6, 6, "bc", "", draining="bc"),
            took(7, 7, "bc", "cbcb"),
        ],
        "compared by epoch, whoever is first": [
            took(1, 1, "ab", "aabb"),
            took(2, 3, "b", "bbbb"),
            took(3, 2, "ab", "aabb", address="node-2"),
        ],
    },
    "chosen": {
        "by each epoch one, and sent again": [
            took(1, 1, "abc", "aabb"),
            chose(2, 1, "b"),
            chose(3, 1, "b", chooser="c"),
            took(4, 2, "abc", "aacc", draining="b"),
            chose(5, 2, "b"),
            chose(6, 2, "c", procedure=2),
        ],
        "by a topology that only the store has": [
            members(0, 1, "ab"),
            chose(1, 1, "b"),
        ],
    },
    "bounded-work": {
        "at the bounds": [WorkDone(0, 10, 200, 80, 3_010)],
        "a run without requests": [WorkDone(0, 0, 30, 12, 0)],
        "sought as often as may be": [Sought(0, "node-1.1", "counter/1", 30)],
    },
}

BAD: dict[str, dict[str, list[Record]]] = {
    "one-activation": {
        "an older token is entered after a newer one": [
            opened(0),
            opened(0, "s2"),
            claimed(1, 7),
            claimed(2, 8, "s2"),
            entered(3, 8, "s2"),
            entered(4, 7),
        ],
        "two activations take turns": [
            opened(0),
            opened(0, "s2"),
            claimed(1, 7),
            claimed(2, 8, "s2"),
            entered(3, 7),
            entered(4, 8, "s2"),
            entered(5, 7),
        ],
        "one token at two addresses": [*HOSTED, entered(3, 7, address="elsewhere")],
    },
    "closed-session": {
        "entered after the closing": [*HOSTED, closed(3), entered(4, 7)],
        "closed before it is entered at the same time": [
            *HOSTED,
            closed(3),
            entered(3, 7),
        ],
        "a closed session is opened again": [
            *HOSTED,
            closed(3),
            opened(4),
            entered(5, 7),
        ],
        "never opened": [claimed(1, 7), entered(2, 7)],
        "opened too late": [claimed(1, 7), entered(2, 7), opened(3)],
    },
    "entry-first": {
        "entered without a claim": [opened(0), entered(1, 7)],
        "claimed too late": [opened(0), entered(1, 7), claimed(2, 7)],
        "another identity's claim": [
            opened(0),
            claimed(1, 7, of="cart/2"),
            entered(2, 7),
        ],
        "another session's claim": [
            opened(0),
            opened(0, "s2"),
            claimed(1, 7),
            entered(2, 7, "s2"),
        ],
        "entered after it was given up": [
            *HOSTED,
            EntryGivenUp(3, CART, "s1", 7),
            entered(4, 7),
        ],
    },
    "token-grows": {
        "a claim goes back": [opened(0), claimed(1, 7), claimed(2, 6)],
        "a claim repeats the token": [opened(0), claimed(1, 7), claimed(2, 7)],
        "two identities have one token": [
            opened(0),
            claimed(1, 7),
            claimed(2, 7, of="cart/2"),
        ],
    },
    "owner-open": {
        "the former owner's session is open": [
            *HOSTED,
            opened(3, "s2"),
            claimed(4, 8, "s2", former="s1"),
        ],
        "the former session is absent": [
            opened(0, "s2"),
            claimed(1, 8, "s2", former="s1"),
        ],
        "it is closed too late": [
            *HOSTED,
            opened(3, "s2"),
            claimed(4, 8, "s2", former="s1"),
            closed(4),
        ],
    },
    "stale-write": {
        "an older token saves": [*TAKEN_OVER, EntrySaved(5, CART, 7, 1)],
        "an older token gives up": [*TAKEN_OVER, EntryGivenUp(5, CART, "s1", 7)],
        "another session gives up": [*HOSTED, EntryGivenUp(5, CART, "s2", 7)],
        "a save after giving up": [
            *HOSTED,
            EntryGivenUp(3, CART, "s1", 7),
            EntrySaved(4, CART, 7, 1),
        ],
        "a version is repeated": [
            *HOSTED,
            EntrySaved(3, CART, 7, 1),
            EntrySaved(4, CART, 7, 1),
        ],
        "a version goes back with the next owner": [
            *TAKEN_OVER[:3],
            EntrySaved(3, CART, 7, 5),
            *TAKEN_OVER[3:],
            EntrySaved(5, CART, 8, 4),
        ],
        "the last snapshot is not stored": [
            *HOSTED,
            EntrySaved(3, CART, 7, 1),
            EntryGivenUp(4, CART, "s1", 7, 2),
        ],
        "the last snapshot is not stored, and none was before": [
            *HOSTED,
            EntryGivenUp(4, CART, "s1", 7, 0),
        ],
        "the last snapshot bears a version that was stored before": [
            *HOSTED,
            EntrySaved(3, CART, 7, 2),
            EntryGivenUp(4, CART, "s1", 7, 1),
        ],
        "nobody has claimed it": [EntrySaved(3, CART, 7, 1)],
        "nobody has claimed what is given up": [EntryGivenUp(3, CART, "s1", 7)],
    },
    "unrefused-effect": {
        "handled, then refused": [
            *HOSTED,
            asked(3, "a"),
            entered(4, 7, request="a"),
            ended(5, "a", "refused"),
        ],
        "refused, then handled": [
            *HOSTED,
            asked(3, "a"),
            ended(4, "a", "refused"),
            entered(50, 7, request="a"),
        ],
    },
    "handled-once": {
        "a repeated ask": [
            *HOSTED,
            asked(3, "a", "other"),
            entered(4, 7, request="a"),
            entered(5, 7, request="a"),
            answered(6, "a"),
        ],
        "a repeated ask, in the next activation": [
            *HOSTED,
            asked(3, "a", "other"),
            entered(3, 7, request="a"),
            *TAKEN_OVER[3:],
            entered(6, 8, "s2", request="a"),
            answered(7, "a"),
        ],
    },
    "order": {
        "a tell overtakes another": tells(("x", 2), ("x", 1)),
        "a tell comes late among others": tells(("x", 1), ("x", 3), ("y", 1), ("x", 2)),
        "a number is used for two": [
            *HOSTED,
            told(3, "m1", 1),
            told(3, "m2", 1),
            entered(4, 7, request="m1", number=1),
            entered(5, 7, request="m2", number=1),
        ],
        "in the next activation": [
            *HOSTED,
            told(2, "m1", 1),
            told(2, "m2", 2),
            entered(3, 7, request="m2", number=2),
            *TAKEN_OVER[3:],
            entered(6, 8, "s2", request="m1", number=1),
        ],
    },
    "saves-kept": {
        "an answered add is replaced by one that is unknown": [
            *added(0, "a", 1),
            asked(10, "u"),
            ended(11, "u", "unknown"),
            final(20, "u"),
        ],
        "a refused add is kept": [
            asked(0, "no"),
            ended(1, "no", "refused"),
            asked(10, "u"),
            ended(11, "u", "unknown"),
            final(20, "no"),
        ],
        "an unknown add is there twice": [
            asked(0, "u"),
            ended(1, "u", "unknown"),
            asked(2, "v"),
            ended(3, "v", "failed"),
            final(20, "u", "u"),
        ],
        "what nobody asked": [
            asked(0, "u"),
            ended(1, "u", "unknown"),
            final(20, "ghost"),
        ],
        "what asked another identity": [
            asked(0, "u"),
            ended(1, "u", "unknown"),
            *added(2, "a", 1, of="cart/2"),
            final(20, "a"),
            final(20, "a", of="cart/2"),
        ],
        "a read is in the state": [
            asked(0, "u"),
            ended(1, "u", "unknown"),
            asked(2, "r", "read"),
            answered(3, "r", 0),
            final(20, "r"),
        ],
        "an identity has no state": [
            *added(0, "a", 1),
            *added(10, "b", 1, of="cart/2"),
            final(20, "a"),
        ],
    },
    "linearizable": {
        "an update is lost": [*added(0, "a", 1), *added(10, "b", 1)],
        "a read is stale": [
            *added(0, "a", 1),
            asked(10, "r", "read"),
            answered(11, "r", 0),
        ],
        "a failed add is seen twice": [
            asked(0, "a"),
            ended(1, "a", "failed"),
            asked(10, "r", "read"),
            answered(11, "r", 2),
        ],
        "a refused add is seen": [
            asked(0, "a"),
            ended(1, "a", "refused"),
            asked(10, "r", "read"),
            answered(11, "r", 1),
        ],
        "a read of unknown outcome adds nothing": [
            asked(0, "u", "read"),
            ended(1, "u", "unknown"),
            asked(10, "r", "read"),
            answered(11, "r", 1),
        ],
        "an answer is no count": [asked(0, "a"), answered(1, "a", "1")],
        "an answer is true": [asked(0, "a"), answered(1, "a", True)],
        "what was seen of an unknown add is lost at the end": [
            asked(0, "a"),
            ended(5, "a", "unknown"),
            asked(10, "r", "read"),
            answered(11, "r", 1),
            final(20),
        ],
    },
    "ends": {
        "never": [asked(0, "a", "read"), Healed(500)],
        "too late": [asked(0, "a", "read"), ended(111, "a", "unknown")],
        "twice": [asked(0, "a"), answered(1, "a", 1), ended(2, "a", "unknown")],
        "never, and its process ends later": [
            asked(0, "a", "read"),
            ProcessEnded(111, "client", "stopped"),
        ],
        "never, and another process ends": [
            asked(0, "a", "read"),
            ProcessEnded(1, "node-1", "crashed"),
        ],
        "what nobody asked": [ended(1, "ghost", "unknown")],
    },
    "idle": {
        "in use just before": [
            *HOSTED,
            entered(10, 7, request="a"),
            entered(15, 7, request="b"),
            ends(29),
        ],
        "its turn went on just before": [
            *HOSTED,
            entered(3, 7, request="a"),
            Entered(10, "node of s1", CART, "s1", 7, "resume", ""),
            entered(15, 7, request="b"),
            ends(29),
        ],
        "claimed just before": [*HOSTED, ends(3)],
        "another node empties": [*HOSTED, Emptying(3, "node of s2"), ends(4)],
        "its node empties later": [*HOSTED, ends(4), Emptying(5, "node of s1")],
        "another activation has wished so": [
            *HOSTED,
            Leaving(3, CART, 6),
            ends(4),
        ],
    },
    "reachable": {
        "it is not reached": [Healed(0), Reached(1, "node-1", CART, "Pending")],
        "it is not reached, and nothing was healed": [
            Reached(1, "node-1", CART, "Pending")
        ],
        "it is reached too late": [Healed(5), Reached(1_006, "node-1", CART, "")],
    },
    "left-behind": {"a lock": [LeftBehind(0, "the store", "a lock", CART)]},
    "topology": {
        "the store skips an epoch": [members(0, 4, "ab"), members(1, 6, "abc")],
        "the store repeats an epoch": [members(0, 4, "ab"), members(1, 4, "ab")],
        "a node's epoch goes back": [
            took(0, 5, "ab", "ab"),
            took(1, 4, "ab", "ab"),
        ],
        "a node has other members than the store": [
            members(0, 4, "ab"),
            took(1, 4, "abc", "ab"),
        ],
        "two nodes have other members": [
            took(0, 4, "ab", "ab"),
            took(1, 4, "abc", "ab", address="node-2"),
        ],
        "two nodes have others that drain": [
            took(0, 4, "abc", "ab"),
            took(1, 4, "abc", "ab", draining="c", address="node-2"),
        ],
        "two nodes have other owners": [
            took(0, 4, "ab", "ab"),
            took(1, 4, "ab", "ba", address="node-2"),
        ],
    },
    "moves-least": {
        "between two that stay": [
            took(0, 1, "abc", "aabb"),
            took(1, 2, "ab", "abab"),
        ],
        "a join moves more than it takes": [
            took(0, 1, "ab", "aabb"),
            took(1, 2, "abc", "cbbb"),
        ],
        "to one that drains": [
            took(0, 1, "ab", "aabb"),
            took(1, 2, "abc", "acbb", draining="c"),
        ],
        "from one that no longer drains to another": [
            took(0, 1, "abc", "aaaa", draining="c"),
            took(1, 2, "abc", "aaba"),
        ],
        "over an epoch that nobody took": [
            took(0, 1, "ab", "ab"),
            took(1, 5, "ab", "aa"),
        ],
        "the number of partitions changes": [
            took(0, 1, "ab", "ab"),
            took(1, 2, "ab", "aba"),
        ],
        "known on another node first": [
            took(0, 2, "ab", "ba"),
            took(1, 1, "ab", "ab", address="node-2"),
        ],
    },
    "chosen": {
        "one that has left": [
            took(1, 1, "abc", "aabb"),
            took(2, 2, "ac", "aacc"),
            chose(3, 2, "b"),
        ],
        "one that has left is asked again": [
            took(1, 1, "abc", "aabb"),
            chose(2, 1, "b"),
            took(3, 2, "ac", "aacc"),
            chose(4, 2, "b"),
        ],
        "one that drains": [
            took(1, 2, "abc", "aacc", draining="b"),
            chose(2, 2, "b"),
        ],
        "by one epoch two": [
            took(1, 1, "abc", "aabb"),
            chose(2, 1, "b"),
            chose(3, 1, "c", chooser="c"),
        ],
        "in an epoch that nobody knows": [chose(1, 9, "b")],
    },
    "bounded-work": {
        "frames": [WorkDone(0, 10, 201, 80, 0)],
        "store operations": [WorkDone(0, 10, 200, 81, 0)],
        "things kept": [WorkDone(0, 10, 200, 80, 3_011)],
        "sought in circles": [Sought(0, "node-1.1", "counter/1", 31)],
    },
}


class History(NamedTuple):
    rule: str
    name: str
    records: list[Record]


def listed(histories: dict[str, dict[str, list[Record]]]) -> Iterable[object]:
    return [
        pytest.param(History(rule, name, records), id=f"{rule}: {name}")
        for rule, by_name in histories.items()
        for name, records in by_name.items()
    ]


def test_every_rule_is_shown_a_good_and_a_bad_history() -> None:
    assert set(GOOD) == set(BAD) == set(RULES)
    assert all(BAD.values())


@pytest.mark.parametrize("history", listed(GOOD))
def test_a_good_history_passes_every_rule(history: History) -> None:
    assert observe(history.records, BOUNDS) == ()


@pytest.mark.parametrize("history", listed(BAD))
def test_a_bad_history_breaks_its_rule_and_no_other(history: History) -> None:
    violations = observe(history.records, BOUNDS)

    assert {violation.rule for violation in violations} == {history.rule}


# --- what a violation says ---


def only(records: Iterable[Record], bounds: Bounds = BOUNDS) -> Violation:
    (violation,) = observe(list(records), bounds)
    return violation


def test_a_violation_names_the_rule_the_identity_the_time_and_what_it_saw() -> None:
    assert only(
        BAD["one-activation"]["an older token is entered after a newer one"]
    ) == (
        Violation(
            "one-activation",
            CART,
            4,
            "token 7 of session s1 at node of s1 was entered"
            " after token 8 of session s2 at node of s2",
        )
    )


@pytest.mark.parametrize(
    ("rule", "name", "at_ns", "words"),
    [
        (
            "closed-session",
            "entered after the closing",
            4,
            "session was closed at 3 ns",
        ),
        ("entry-first", "entered after it was given up", 4, "given up at 3 ns"),
        ("token-grows", "a claim repeats the token", 2, "token 7 of session s1"),
        ("owner-open", "the former owner's session is open", 4, "session s1, which"),
        ("stale-write", "an older token saves", 5, "saved under token 7"),
        ("stale-write", "nobody has claimed it", 3, "where the entry was nobody's"),
        ("stale-write", "a version is repeated", 4, "over 1, where the entry was that"),
        ("unrefused-effect", "handled, then refused", 5, "at 5 ns (NotReady)"),
        ("unrefused-effect", "refused, then handled", 50, "handled at 50 ns"),
        ("handled-once", "a repeated ask", 5, "and at 4 ns by token 7 of session s1"),
        ("order", "a tell overtakes another", 21, "x-1, number 1 of x, was handled"),
        ("saves-kept", "what nobody asked", 20, "has ghost"),
        ("saves-kept", "an unknown add is there twice", 20, "has add u 2 times"),
        ("linearizable", "a read is stale", 11, "read r was answered 0"),
        ("linearizable", "an answer is no count", 1, "a was answered '1'"),
        ("ends", "never", 110, "a by client had to end by 100 ns and never did"),
        ("ends", "too late", 111, "ended at 111 ns"),
        ("ends", "twice", 2, "a ended unknown after answered"),
        ("reachable", "it is not reached", 1, "did not reach it: Pending"),
        ("reachable", "it is reached too late", 1_006, "only 1001 ns after"),
        ("left-behind", "a lock", 0, "a lock was left at the store"),
        ("topology", "the store skips an epoch", 1, "epoch 6 at the store follows"),
        ("topology", "a node has other members than the store", 1, "seen: c"),
        ("moves-least", "to one that drains", 1, "1 to 2, first 1 from a to c"),
        ("moves-least", "between two that stay", 1, "2 partitions moved needlessly"),
        ("bounded-work", "frames", 0, "201 frames for 10 requests, above 20.0"),
    ],
)
def test_a_violation_says_what_and_when(
    rule: str, name: str, at_ns: int, words: str
) -> None:
    violation = only(BAD[rule][name])

    assert violation.at_ns == at_ns
    assert words in violation.what


def test_violations_come_in_order_of_time_and_then_of_the_rules() -> None:
    violations = observe(
        [
            opened(0),
            entered(1, 7),
            closed(2),
            entered(3, 7),
            LeftBehind(3, "the store", "a lock", CART),
        ],
        BOUNDS,
    )

    assert [(violation.at_ns, violation.rule) for violation in violations] == [
        (1, "entry-first"),
        (3, "closed-session"),
        (3, "entry-first"),
        (3, "left-behind"),
    ]


def test_the_bounds_are_the_callers() -> None:
    work: list[Record] = [WorkDone(0, 10, 150, 70, 3_000)]

    assert observe(work, Bounds()) == ()
    assert "frames" in only(work, Bounds(frames_per_request=14.9)).what
    assert (
        "store operations" in only(work, Bounds(store_operations_per_request=6.9)).what
    )
    assert "kept" in only(work, Bounds(kept_for_the_cluster=2_989)).what
    assert observe(work, Bounds(kept_for_the_cluster=0, kept_per_request=300)) == ()


def test_a_bound_of_nothing_is_a_bound() -> None:
    work: list[Record] = [WorkDone(0, 10, 1, 0, 0)]

    assert "above 0.0" in only(work, Bounds(frames_per_request=0.0)).what


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([Healed(2), Healed(1)], id="out of order"),
        pytest.param([asked(0, "a"), asked(0, "a")], id="asked twice"),
        pytest.param([asked(0, "a"), told(0, "a", 1)], id="asked and told"),
        pytest.param([told(0, "a", 1), told(0, "a", 2)], id="told twice"),
        pytest.param([told(0, "a", 1), asked(0, "a")], id="told and asked"),
        pytest.param([ended(0, "a", "lost")], id="no outcome"),
        pytest.param([SessionChanged(0, "s1", "opened", 0)], id="no state"),
        pytest.param([Entered(0, "n", CART, "s1", 7, "handled", "a")], id="no purpose"),
    ],
)
def test_records_that_no_rule_would_see_are_a_bug(records: list[Record]) -> None:
    with pytest.raises(AssertionError):
        observe(records, BOUNDS)


# --- a whole run ---


def a_run(requests: int, identities: int) -> list[Record]:
    """A long run without a fault: every identity moves on now and then."""
    chance = random.Random(1)
    records: list[Record] = [opened(0, f"s{n}") for n in range(5)]
    token = 0
    tokens: dict[str, tuple[int, str]] = {}
    kept: dict[str, list[str]] = {}
    for number in range(requests):
        at_ns = 10 * number
        request, of = f"q{number}", f"cart/{chance.randrange(identities)}"
        records.append(asked(at_ns, request, of=of))
        if of not in tokens or chance.random() < 0.1:
            if of in tokens:
                old_token, old_session = tokens[of]
                records.append(EntryGivenUp(at_ns, of, old_session, old_token))
            token += 1
            session = f"s{chance.randrange(5)}"
            tokens[of] = (token, session)
            records.append(claimed(at_ns, token, session, of=of))
        own_token, own_session = tokens[of]
        kept.setdefault(of, []).append(request)
        count = len(kept[of])
        records += [
            entered(at_ns + 1, own_token, own_session, request=request, of=of),
            *(opened(at_ns + 1, f"s{n}") for n in range(5)),
            *(
                Entered(
                    at_ns + 1,
                    f"node of {own_session}",
                    of,
                    own_session,
                    own_token,
                    p,
                    "",
                )
                for p in ("timer", "resume")
            ),
            EntrySaved(at_ns + 1, of, own_token, count),
            answered(at_ns + 2, request, count),
        ]
    end_ns = 10 * requests
    records += [final(end_ns, *kept[of], of=of) for of in sorted(kept)]
    records.append(WorkDone(end_ns, requests, 4 * requests, 2 * requests, 0))
    return records


def test_a_long_run_without_a_fault_has_no_violation() -> None:
    assert observe(a_run(requests=1_000, identities=40), BOUNDS) == ()


def without(kind: type, which: int) -> Callable[[list[Record]], list[Record]]:
    def changed(records: list[Record]) -> list[Record]:
        place = [n for n, each in enumerate(records) if isinstance(each, kind)][which]
        return [*records[:place], *records[place + 1 :]]

    return changed


@pytest.mark.parametrize(
    ("kind", "which", "rule"),
    [
        (EntryClaimed, 50, "entry-first"),
        (Ended, 500, "ends"),
        (FinalState, 3, "saves-kept"),
    ],
)
def test_one_record_missing_in_a_long_run_is_found(
    kind: type, which: int, rule: str
) -> None:
    records = without(kind, which)(a_run(requests=1_000, identities=40))

    assert rule in {violation.rule for violation in observe(records, BOUNDS)}


# --- what it shares with what it judges ---


@pytest.mark.parametrize("module", ["observer", "linearizability", "trace"])
def test_the_observer_shares_no_code_with_what_it_judges(module: str) -> None:
    path = Path(actors.observer.__file__).with_name(f"{module}.py")
    allowed = {"actors.trace", "actors.linearizability", "msgspec"}  # plain records
    imported: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                imported += [name.name for name in names]
            case ast.ImportFrom(module=name, level=level):
                imported.append("." * level + (name or ""))

    strangers = [
        name
        for name in imported
        if name not in allowed and name.partition(".")[0] not in sys.stdlib_module_names
    ]

    assert imported
    assert strangers == []
