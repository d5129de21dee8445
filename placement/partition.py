"""The partition table: which member owns each partition, computed once a topology."""

from dataclasses import field

from placement.errors import NoAuthority
from placement.identity import Identity
from placement.rendezvous import RendezvousHasher, partition_of, score_of, seed_of
from placement.topology import Member, SessionId, Topology
from placement.value import value

PARTITIONS_DEFAULT = 4096


@value(sealed=True)
class PartitionTable:
    """The owner of every partition under one topology. Immutable.

    `owners[p]` is the member that owns partition p; empty where nobody may own
    any. `scores[p]` is its winning score, so that a join compares one score a
    partition and a leave computes anew only what the leaver owned.
    """

    topology: Topology
    owners: tuple[Member, ...]
    scores: tuple[float, ...]
    partition_count: int
    #: The epoch of the topology that it is of.
    epoch: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "epoch", self.topology.epoch)

    @classmethod
    def build(
        cls, topology: Topology, partition_count: int = PARTITIONS_DEFAULT
    ) -> "PartitionTable":
        """Compute the table of `topology` from nothing."""
        if partition_count < 1:
            raise ValueError(f"partitions must be at least 1, not {partition_count}")
        empty = cls(Topology(), (), (), partition_count)
        return empty.adopt(topology)

    def adopt(self, topology: Topology) -> "PartitionTable":
        """The table of `topology`, computed from this one where that is less."""
        hosts = topology.owners()
        if not hosts:
            return PartitionTable(topology, (), (), self.partition_count)
        now = {member.session: member for member in hosts}
        before = {member.session: member for member in self.topology.owners()}
        # A changed weight changes scores: leave and join in one.
        lasting = {
            session
            for session, member in now.items()
            if session in before and before[session].weight == member.weight
        }
        joined = [member for member in hosts if member.session not in lasting]
        if not self.owners or not lasting:
            return self._compute(topology, hosts)
        join_seeds = [
            (seed_of(member.session), member.weight, member) for member in joined
        ]
        all_seeds = [
            (seed_of(member.session), member.weight, member) for member in hosts
        ]
        owners: list[Member] = []
        scores: list[float] = []
        for partition, (owner, score) in enumerate(
            zip(self.owners, self.scores, strict=True)
        ):
            if owner.session in lasting:
                best, best_score = now[owner.session], score
                contenders = join_seeds
            else:
                best, best_score = hosts[0], -1.0
                contenders = all_seeds
            if contenders:
                key = key_of(partition)
                for seed, weight, member in contenders:
                    rival = score_of(key, seed, weight)
                    if rival > best_score or (
                        rival == best_score and member.session < best.session
                    ):
                        best, best_score = member, rival
            owners.append(best)
            scores.append(best_score)
        return PartitionTable(
            topology, tuple(owners), tuple(scores), self.partition_count
        )

    def _compute(
        self, topology: Topology, hosts: tuple[Member, ...]
    ) -> "PartitionTable":
        seeds = [(seed_of(member.session), member.weight, member) for member in hosts]
        owners: list[Member] = []
        scores: list[float] = []
        for partition in range(self.partition_count):
            key = key_of(partition)
            best, best_score = hosts[0], -1.0
            for seed, weight, member in seeds:
                score = score_of(key, seed, weight)
                if score > best_score:
                    best, best_score = member, score
            owners.append(best)
            scores.append(best_score)
        return PartitionTable(
            topology, tuple(owners), tuple(scores), self.partition_count
        )

    def partition_of(self, identity: Identity) -> int:
        """The partition of `identity`."""
        return partition_of(identity, self.partition_count)

    def owner_of(self, identity: Identity) -> Member | None:
        """The member that owns the partition of `identity`; none without members."""
        if not self.owners:
            return None
        return self.owners[partition_of(identity, self.partition_count)]

    def host_of(
        self, identity: Identity, *, avoid: frozenset[SessionId] = frozenset()
    ) -> Member:
        """Choose the host of a new activation: the default placement strategy.

        The partition's owner where it is eligible, else the eligible member with
        the highest rendezvous score for the partition.

        Raises:
            NoAuthority: no member knows the kind and does not drain.
        """
        owner = self.owner_of(identity)
        kind = identity.kind
        if owner is not None and owner.hosts(kind) and owner.session not in avoid:
            return owner
        eligible = [
            member
            for member in self.topology.members
            if member.hosts(kind) and member.session not in avoid
        ]
        chosen = RendezvousHasher(eligible).choose(key_of(self.partition_of(identity)))
        if chosen is None:
            raise NoAuthority(
                f"{identity}: no member that knows kind {kind!r} and does not drain"
            )
        return chosen

    def counts(self) -> dict[SessionId, int]:
        """How many partitions each member owns."""
        found = {member.session: 0 for member in self.topology.members}
        for owner in self.owners:
            found[owner.session] += 1
        return found


def key_of(partition: int) -> bytes:
    """The key under which members score `partition`."""
    return partition.to_bytes(4, "big")
