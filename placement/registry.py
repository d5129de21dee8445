"""The activations of one node, and which of them are idle."""

import heapq
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from placement.entry import Pid
from placement.identity import Identity
from placement.value import record


class Hosted(Protocol):
    """What is registered."""

    def is_busy(self) -> bool:
        """Whether it handles something, or something waits for it."""


T = TypeVar("T", bound=Hosted)


@record
class Registered(Generic[T]):
    """One activation; `last_used_ns` is written by whoever uses it.

    `is_straight` says that nothing to it is held anywhere on its node: a message may
    be given to it at once. It is the sender's, who knows.
    """

    pid: Pid
    activation: T
    last_used_ns: int
    idle_after_ns: int | None
    is_straight: bool = False


class VirtualActorRegistry(Generic[T]):
    """Activations by identity, with idle tracking.

    One thread adds and removes. Others may call `find`, and write `last_used_ns`:
    under the GIL each is one indivisible step. An activation is looked at, and asked
    whether it is busy, when it may be idle: a use costs an assignment only.
    """

    def __init__(self) -> None:
        self._registered: dict[Identity, Registered[T]] = {}
        #: The activation of an identity on this node; none where there is none.
        self.find: Callable[[Identity], Registered[T] | None] = self._registered.get
        self._due: list[tuple[int, int, Identity]] = []

    def __len__(self) -> int:
        return len(self._registered)

    @property
    def due_ns(self) -> int | None:
        """When `idle` may find something next."""
        return self._due[0][0] if self._due else None

    def add(
        self, pid: Pid, activation: T, *, now_ns: int, idle_after_ns: int | None
    ) -> Registered[T]:
        """Register the activation of `pid`; there is none of that identity."""
        assert pid.identity not in self._registered
        registered = Registered(pid, activation, now_ns, idle_after_ns)
        self._registered[pid.identity] = registered
        if idle_after_ns is not None:
            self._look_at(registered, now_ns + idle_after_ns)
        return registered

    def remove(self, pid: Pid) -> Registered[T] | None:
        """Take out the activation that `pid` names, if it is that one."""
        registered = self._registered.get(pid.identity)
        if registered is None or registered.pid != pid:
            return None
        return self._registered.pop(pid.identity)

    def all(self) -> tuple[Registered[T], ...]:
        """All activations, sorted by identity."""
        # Copied in one step: others may ask while its thread adds.
        return tuple(each for _, each in sorted(self._registered.copy().items()))

    def idle(self, now_ns: int) -> tuple[Pid, ...]:
        """Those not used for their `idle_after_ns`.

        Each is looked at once more after another such time, if it is still there.
        """
        found = []
        while self._due and self._due[0][0] <= now_ns:
            _, token, identity = heapq.heappop(self._due)
            registered = self._registered.get(identity)
            if registered is None or registered.pid.fencing_token != token:
                continue
            assert registered.idle_after_ns is not None
            idle_at_ns = registered.last_used_ns + registered.idle_after_ns
            if registered.activation.is_busy():
                idle_at_ns = now_ns + registered.idle_after_ns
            elif idle_at_ns <= now_ns:
                found.append(registered.pid)
                idle_at_ns = now_ns + registered.idle_after_ns
            self._look_at(registered, idle_at_ns)
        return tuple(found)

    def _look_at(self, registered: Registered[T], at_ns: int) -> None:
        pid = registered.pid
        heapq.heappush(self._due, (at_ns, pid.fencing_token, pid.identity))
