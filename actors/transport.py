"""Transports: bytes from one incarnation of a node to another."""

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from messages.codec import FRAME_BYTES_MAX
from placement.event import Happened
from placement.topology import Address

#: How long a node that has left answers yet, in renewals, where no wire tells of it:
#: longer than others take to read the members anew.
LINGER = 1.5


class Origin(NamedTuple):
    """Who a frame is surely from: the wire knows it, whatever the frame says.

    `is_node` tells whether it came by a way that is open to nodes only, `to_any`
    whether it was for whichever node gets it.
    """

    address: Address
    is_node: bool
    to_any: bool = False


class Receive(Protocol):
    """Takes a frame; called on any thread, and returns at once."""

    def __call__(self, data: bytes, origin: Origin | None = None, /) -> None:
        """Take it. Without an origin the wire is trusted, as within a process."""


class ReceiveNow(Protocol):
    """Handles a frame where nothing waits before it; called on any thread."""

    def __call__(self, data: bytes, origin: Origin, /) -> bool:
        """Handle it; false: it is not handled, and neither kept."""


class Transport(Protocol):
    """Carries frames. `receive` is called on any thread, and returns at once."""

    def attach(
        self,
        address: Address,
        receive: Receive,
        *,
        is_member: bool,
        publish: Callable[[Happened], None],
        receive_now: ReceiveNow | None = None,
    ) -> None:
        """Deliver what is sent to `address`; an address is attached once.

        A frame alone may be given to `receive_now` first. `publish` is told what
        happens to the wire. A client, which is no member, may send less, and is sent
        to by members only.
        """

    def detach(self, address: Address) -> None:
        """Deliver nothing more; what is sent from now on is refused."""

    def send(self, address: Address, data: bytes, *, sender: Address) -> bool:
        """Send; false only where it is certain that nobody will receive it."""

    def kill(self, address: Address) -> None:
        """Drop what is sent to `address`, and do not say so, as after a crash."""

    @property
    def frame_bytes_max(self) -> int:
        """The largest frame that it carries."""

    def linger_s(self, renew_every_s: float) -> float:
        """How long who has left still answers, so that nothing to it gets lost."""


class InProcessTransport:
    """Between the nodes of one process: a call."""

    frame_bytes_max = FRAME_BYTES_MAX

    def __init__(self) -> None:
        self._receivers: dict[Address, Callable[[bytes], None]] = {}
        self._lock = threading.Lock()

    def attach(
        self,
        address: Address,
        receive: Callable[[bytes], None],
        *,
        is_member: bool = True,
        publish: Callable[[Happened], None] | None = None,
        receive_now: ReceiveNow | None = None,
    ) -> None:
        """Deliver what is sent to `address`."""
        with self._lock:
            assert address not in self._receivers
            self._receivers[address] = receive

    def detach(self, address: Address) -> None:
        """Refuse what is sent to `address` from now on."""
        with self._lock:
            self._receivers.pop(address, None)

    def send(
        self, address: Address, data: bytes, *, sender: Address | None = None
    ) -> bool:
        """Hand over to the receiver, on this thread."""
        receive = self._receivers.get(address)
        if receive is None:
            return False
        receive(data)
        return True

    def kill(self, address: Address) -> None:
        """Drop what is sent to `address` from now on."""
        with self._lock:
            self._receivers[address] = _drop

    def linger_s(self, renew_every_s: float) -> float:
        """Not at all: who has left is known to have."""
        return 0.0


def _drop(data: bytes) -> None:
    """A crashed node receives nothing."""
