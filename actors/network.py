"""The wire of a simulation: frames between processes, late, lost or twice.

In order for each pair of processes, as the real transports promise; between
pairs in any order. What happens to a frame is drawn when it is sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from actors.transport import LINGER, ReceiveNow
from actors.world import ProcessClock, World
from messages.codec import FRAME_BYTES_MAX
from placement.event import Happened
from placement.topology import Address

#: How long a frame is under way when nothing is wrong.
_LEAST_NS = 100_000
_SPREAD_NS = 300_000


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one frame: how often it arrives, and how much later."""

    copies: int = 1
    delay_ns: int = 0


class WireFault(Protocol):
    """Something that is wrong with the wire for a while."""

    def fate(self, sender: str, receiver: str) -> Fate | None:
        """What becomes of a frame between these nodes; none: nothing special."""


@dataclass(slots=True, eq=False)
class _End:
    """Where frames to one address arrive."""

    node: str
    number: int
    process: ProcessClock
    receive: Callable[[bytes], None]
    is_silent: bool = False


class Network:
    """All frames of a simulated cluster."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.faults: list[WireFault] = []
        #: Whether nobody is told who has left: what is sent there vanishes.
        self.is_mute = False
        self.vanished_count = 0
        self.frame_count = 0
        self.dropped_count = 0
        #: Called with each frame that arrives: sender, receiver, bytes.
        self.tap: Callable[[str, str, bytes], None] | None = None
        #: Called with the bytes of each frame that is sent, whatever becomes of it.
        self.sent: Callable[[bytes], None] | None = None
        self._digest = xxhash.xxh3_128()
        self._ends: dict[Address, _End] = {}
        self._last_ns: dict[tuple[int, int], int] = {}
        self._number = 0

    def digest(self) -> Any:
        """The running hash over all frames that arrived, in order, with their time."""
        return self._digest

    def wire(self, node: str, process: ProcessClock) -> "Wire":
        """The transport of one process."""
        self._number += 1
        return Wire(self, node, self._number, process)

    def attach(self, address: Address, end: _End) -> None:
        """Deliver what is sent to `address`."""
        assert address not in self._ends
        self._ends[address] = end

    def detach(self, address: Address) -> None:
        """Refuse what is sent to `address` from now on."""
        self._ends.pop(address, None)

    def silence(self, address: Address) -> None:
        """Drop what is sent to `address` from now on."""
        end = self._ends.get(address)
        if end is not None:
            end.is_silent = True

    def send(self, sender: "Wire", address: Address, data: bytes) -> bool:
        """Put a frame on its way."""
        if self.sent is not None:
            self.sent(data)
        end = self._ends.get(address)
        if end is None:
            self.vanished_count += self.is_mute
            return self.is_mute
        world = self.world
        at_ns = (
            world.now_ns + world.spent_ns + _LEAST_NS + int(world.jitter() * _SPREAD_NS)
        )
        copies = 1
        for fault in self.faults:
            fate = fault.fate(sender.node, end.node)
            if fate is not None:
                copies = min(copies, fate.copies) if fate.copies == 0 else fate.copies
                at_ns += fate.delay_ns
        if copies == 0:
            self.dropped_count += 1
            return True
        pair = (sender.number, end.number)
        last_ns = self._last_ns.get(pair, 0)
        if at_ns <= last_ns:
            at_ns = last_ns + 1
        self._last_ns[pair] = at_ns
        world.at(at_ns, self._arrive, sender, end, data)
        for copy in range(1, copies):
            again_ns = at_ns + copy * int(world.jitter() * 50_000_000)
            world.at(again_ns, self._arrive, sender, end, data)
        return True

    def _arrive(self, sender: "Wire", end: _End, data: bytes) -> None:
        if end.process.is_gone or end.is_silent:
            self.dropped_count += 1
            return
        self.frame_count += 1
        self._digest.update(self.world.now_ns.to_bytes(8, "big"))
        self._digest.update(data)
        if self.tap is not None:
            self.tap(sender.node, end.node, data)
        end.receive(data)


class Wire:
    """A transport: the network as one process has it."""

    frame_bytes_max = FRAME_BYTES_MAX

    def __init__(
        self, network: Network, node: str, number: int, process: ProcessClock
    ) -> None:
        self.node = node
        self.number = number
        self._network = network
        self._process = process

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
        end = _End(self.node, self.number, self._process, receive)
        self._network.attach(address, end)

    def detach(self, address: Address) -> None:
        """Refuse what is sent to `address` from now on."""
        self._network.detach(address)

    def send(
        self, address: Address, data: bytes, *, sender: Address | None = None
    ) -> bool:
        """Put a frame on its way; false only where nobody will ever receive it."""
        return self._network.send(self, address, data)

    def kill(self, address: Address) -> None:
        """Drop what is sent to `address`, and do not say so."""
        self._network.silence(address)

    def linger_s(self, renew_every_s: float) -> float:
        """Not at all where who has left is known to have, else until others read it."""
        return renew_every_s * LINGER if self._network.is_mute else 0.0
