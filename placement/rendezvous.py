"""Rendezvous hashing: every node chooses the same member for a key.

Source: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit
Rates", IEEE/ACM Transactions on Networking, 1998; weights as in Schindelhauer
and Schomaker, "Weighted Distributed Hash Tables", SPAA 2005.
"""

import math
from collections.abc import Iterable, Sequence

import xxhash

from placement.identity import Identity
from placement.topology import Member, SessionId

_TWO_64 = float(2**64)


def partition_of(identity: Identity, partition_count: int) -> int:
    """The partition of `identity`: xxh3_64 of its UTF-8, modulo the count."""
    return xxhash.xxh3_64_intdigest(identity.encode()) % partition_count


class RendezvousHasher:
    """Highest-random-weight choice of a member for a key, the same everywhere.

    A member's score for a key is `weight / -ln(h)`, h being xxh3_64 of the key,
    seeded by the member's own hash and scaled into (0, 1): its share is
    proportional to its weight, and a join or leave moves only what it must. Ties
    go to the smaller session.
    """

    __slots__ = ("_members", "_seeds")

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = tuple(sorted(members, key=lambda member: member.session))
        self._seeds = tuple(seed_of(member.session) for member in self._members)

    @property
    def members(self) -> tuple[Member, ...]:
        """Who is chosen from, sorted by session."""
        return self._members

    def choose(self, key: bytes) -> Member | None:
        """The member with the highest score for `key`; none among none."""
        best: Member | None = None
        best_score = -1.0
        for member, seed in zip(self._members, self._seeds, strict=True):
            score = score_of(key, seed, member.weight)
            if score > best_score:
                best, best_score = member, score
        return best

    def ranked(self, key: bytes) -> Sequence[Member]:
        """All members, the best for `key` first."""
        scored = [
            (-score_of(key, seed, member.weight), member.session, member)
            for member, seed in zip(self._members, self._seeds, strict=True)
        ]
        scored.sort(key=lambda each: each[:2])
        return [member for _, _, member in scored]


def seed_of(session: SessionId) -> int:
    """The seed under which `session` scores keys."""
    return xxhash.xxh3_64_intdigest(session.encode())


def score_of(key: bytes, seed: int, weight: float) -> float:
    """The score of one member for `key`; higher wins."""
    digest = xxhash.xxh3_64_intdigest(key, seed)
    # Half a step up keeps h above 0; the few digests that round to 1 win.
    h = (digest + 0.5) / _TWO_64
    return weight / -math.log(h) if h < 1.0 else math.inf
