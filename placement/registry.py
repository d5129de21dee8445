"""The activations of one node, and which of them are idle."""

import heapq
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from placement.entry import Pid
from placement.identity import Identity


class Hosted(Protocol):
    """What is registered: one activation.

    `last_used_ns` is written by whoever uses it. `is_straight` says that nothing to
    it is held anywhere on its node: a message may be given to it at once. It is the
    sender's, who knows.
    """

    pid: Pid
    last_used_ns: int
    is_straight: bool

    @property
    def idle_after_ns(self) -> int | None:
        """How long it is not used before it is idle; none where it never is."""

    def is_busy(self) -> bool:
        """Whether it handles something, or something waits for it."""


T = TypeVar("T", bound=Hosted)

# What may be idle in some seconds at the soonest waits unsorted, by slots of time.
_SLOT_NS = 1 << 28
_SORTED_SLOTS = 32


class VirtualActorRegistry(Generic[T]):
    """Activations by identity, with idle tracking.

    One thread adds and removes. Others may call `find`, and write `last_used_ns`:
    under the GIL each is one indivisible step. An activation is looked at, and asked
    whether it is busy, when it may be idle: a use costs an assignment only.

    When that is, is kept in order for the next seconds only. What comes later is in a
    list for its slot of time, and is sorted in when that begins, or moves on to another
    where it was used meanwhile; as in a hierarchical timing wheel (Varghese and Lauck,
    SOSP 1987, section 6). So each of a million costs eight bytes.
    """

    def __init__(self) -> None:
        self._registered: dict[Identity, T] = {}
        #: The activation of an identity on this node; none where there is none.
        self.find: Callable[[Identity], T | None] = self._registered.get
        self._due: list[tuple[int, int, Identity]] = []
        self._later: dict[int, list[Pid]] = {}
        self._slots: list[int] = []

    def __len__(self) -> int:
        return len(self._registered)

    @property
    def due_ns(self) -> int | None:
        """When `idle` may find something next."""
        due_ns = self._due[0][0] if self._due else None
        if self._slots:
            begins_ns = self._slots[0] * _SLOT_NS
            due_ns = begins_ns if due_ns is None else min(due_ns, begins_ns)
        return due_ns

    def add(self, activation: T, *, now_ns: int) -> None:
        """Register it, used just now; there is none of its identity."""
        pid = activation.pid
        assert pid.identity not in self._registered
        activation.last_used_ns = now_ns
        self._registered[pid.identity] = activation
        if activation.idle_after_ns is not None:
            self._look_when_unused(pid, now_ns + activation.idle_after_ns, now_ns)

    def remove(self, pid: Pid) -> T | None:
        """Take out the activation that `pid` names, if it is that one."""
        found = self._registered.get(pid.identity)
        if found is None or found.pid != pid:
            return None
        return self._registered.pop(pid.identity)

    def all(self) -> tuple[T, ...]:
        """All activations, sorted by identity."""
        # Copied in one step: others may ask while its thread adds.
        return tuple(each for _, each in sorted(self._registered.copy().items()))

    def idle(self, now_ns: int) -> tuple[Pid, ...]:
        """Those not used for their `idle_after_ns`.

        Each is looked at once more after another such time, if it is still there.
        """
        while self._slots and self._slots[0] * _SLOT_NS <= now_ns:
            for pid in self._later.pop(heapq.heappop(self._slots)):
                activation = self._registered.get(pid.identity)
                if activation is not None and activation.pid is pid:
                    assert activation.idle_after_ns is not None
                    at_ns = activation.last_used_ns + activation.idle_after_ns
                    self._look_when_unused(pid, at_ns, now_ns)
        found = []
        while self._due and self._due[0][0] <= now_ns:
            _, token, identity = heapq.heappop(self._due)
            activation = self._registered.get(identity)
            if activation is None or activation.pid.fencing_token != token:
                continue
            idle_after_ns = activation.idle_after_ns
            assert idle_after_ns is not None
            idle_at_ns = activation.last_used_ns + idle_after_ns
            if activation.is_busy():
                # Not before that, though it is not used.
                heapq.heappush(self._due, (now_ns + idle_after_ns, token, identity))
            elif idle_at_ns <= now_ns:
                found.append(activation.pid)
                heapq.heappush(self._due, (now_ns + idle_after_ns, token, identity))
            else:
                self._look_when_unused(activation.pid, idle_at_ns, now_ns)
        return tuple(found)

    def _look_when_unused(self, pid: Pid, at_ns: int, now_ns: int) -> None:
        """Look at it at `at_ns`, when it has not been used for its time."""
        slot = at_ns // _SLOT_NS
        if slot < now_ns // _SLOT_NS + _SORTED_SLOTS:
            heapq.heappush(self._due, (at_ns, pid.fencing_token, pid.identity))
            return
        later = self._later.get(slot)
        if later is None:
            later = self._later[slot] = []
            heapq.heappush(self._slots, slot)
        later.append(pid)
