"""The cache of resolved references: where activations were, a moment ago.

A reference may be wrong; a delivery that names its token then finds nobody, and
the reference is dropped. So the cache is for speed only.
"""

from collections.abc import Iterable

from placement.entry import Pid
from placement.identity import Identity
from placement.topology import SessionId, Topology
from placement.value import record, value


@value(kw_only=True, sealed=True)
class PlacementResolution:
    """Where an identity is hosted, as of `observed_at_ms` (wall time).

    `locality` is "local" or "remote", as seen from the node that resolved it.
    """

    identity: Identity
    pid: Pid
    owner: SessionId
    locality: str
    fencing_token: int
    epoch: int
    observed_at_ms: int


@record
class _Known:
    """One reference, until when it is good, and what was told of it."""

    until_ns: int
    pid: Pid
    resolution: PlacementResolution | None = None


class PidCache:
    """References by identity, each for `ttl_ns`, at most `size_max` of them.

    The oldest makes room. Not thread-safe; the caller holds a lock, but for
    `resolution`.
    """

    def __init__(self, *, ttl_ns: int, size_max: int) -> None:
        if ttl_ns < 1 or size_max < 1:
            raise ValueError("a PidCache needs a time to live and a size above 0")
        self._ttl_ns = ttl_ns
        # A number takes 32 bytes: references of nearly the same time share theirs.
        self._step_ns = max(1, ttl_ns // 1024)
        self._until_ns = 0
        self._size_max = size_max
        # An Identity is the text that it is: either finds it.
        self._pids: dict[str, _Known] = {}
        # Whose they are, so that a departure costs what it takes away.
        self._of: dict[SessionId, dict[str, None]] = {}
        self._epoch = 0
        self.evicted_count = 0

    def __len__(self) -> int:
        return len(self._pids)

    def get(self, identity: Identity, now_ns: int) -> Pid | None:
        """The reference, unless its time to live is over."""
        found = self._pids.get(identity)
        if found is None:
            return None
        if found.until_ns > now_ns:
            return found.pid
        self._drop(found.pid)
        return None

    def resolution(self, identity: str, now_ns: int) -> PlacementResolution | None:
        """What `keep` was given for the reference, unless its time to live is over.

        For any thread, without a lock: it reads one entry, and changes nothing. What
        was found in another epoch has to be found again.
        """
        found = self._pids.get(identity)
        if found is None or found.until_ns <= now_ns:
            return None
        known = found.resolution
        return known if known is not None and known.epoch == self._epoch else None

    def keep(self, resolution: PlacementResolution) -> None:
        """Have `resolution` found as long as the reference that it tells of."""
        found = self._pids.get(resolution.identity)
        if found is not None and found.pid == resolution.pid:
            found.resolution = resolution

    def peek(self, identity: Identity) -> Pid | None:
        """The reference, however old."""
        found = self._pids.get(identity)
        return None if found is None else found.pid

    def put(self, pid: Pid, now_ns: int) -> None:
        """Keep `pid`, unless a reference with a greater token is known."""
        known = self._pids.get(pid.identity)
        if known is not None:
            if known.pid.fencing_token > pid.fencing_token:
                return
            self._drop(known.pid)
        elif len(self._pids) >= self._size_max:
            self._drop(next(iter(self._pids.values())).pid)
            self.evicted_count += 1
        until_ns = now_ns + self._ttl_ns
        if not 0 <= until_ns - self._until_ns < self._step_ns:
            self._until_ns = until_ns
        self._pids[pid.identity] = _Known(self._until_ns, pid)
        try:
            self._of[pid.session][pid.identity] = None
        except KeyError:
            self._of[pid.session] = {pid.identity: None}

    def remove(self, identity: Identity, *, token: int | None = None) -> bool:
        """Forget the reference, if its token is not above `token`."""
        found = self._pids.get(identity)
        if found is None or (token is not None and found.pid.fencing_token > token):
            return False
        self._drop(found.pid)
        return True

    def forget_sessions(self, sessions: Iterable[SessionId]) -> tuple[Identity, ...]:
        """Drop the references to these sessions; which identities they were of."""
        return tuple(
            self._pids.pop(identity).pid.identity
            for session in sessions
            for identity in self._of.pop(session, ())
        )

    def adopt(self, topology: Topology) -> tuple[Pid, ...]:
        """Drop the references to sessions that are no members of `topology`."""
        self._epoch = topology.epoch
        gone = [session for session in self._of if session not in topology]
        return tuple(
            self._pids.pop(identity).pid
            for session in gone
            for identity in self._of.pop(session)
        )

    def clear(self) -> None:
        """Forget all."""
        self._pids.clear()
        self._of.clear()

    def _drop(self, pid: Pid) -> None:
        del self._pids[pid.identity]
        theirs = self._of[pid.session]
        del theirs[pid.identity]
        if not theirs:
            del self._of[pid.session]
