"""Transports: bytes from one incarnation of a node to another."""

import threading
from collections.abc import Callable
from typing import Protocol

from placement.topology import Address


class Transport(Protocol):
    """Carries frames. `receive` is called on any thread, and returns at once."""

    def attach(self, address: Address, receive: Callable[[bytes], None]) -> None:
        """Deliver what is sent to `address`; an address is attached once."""

    def detach(self, address: Address) -> None:
        """Deliver nothing more; what is sent from now on is refused."""

    def send(self, address: Address, data: bytes) -> bool:
        """Send; false only where it is certain that nobody will receive it."""

    def kill(self, address: Address) -> None:
        """Drop what is sent to `address`, and do not say so, as after a crash."""


class InProcessTransport:
    """Between the nodes of one process: a call."""

    def __init__(self) -> None:
        self._receivers: dict[Address, Callable[[bytes], None]] = {}
        self._lock = threading.Lock()

    def attach(self, address: Address, receive: Callable[[bytes], None]) -> None:
        """Deliver what is sent to `address`."""
        with self._lock:
            assert address not in self._receivers
            self._receivers[address] = receive

    def detach(self, address: Address) -> None:
        """Refuse what is sent to `address` from now on."""
        with self._lock:
            self._receivers.pop(address, None)

    def send(self, address: Address, data: bytes) -> bool:
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


def _drop(data: bytes) -> None:
    """A crashed node receives nothing."""
