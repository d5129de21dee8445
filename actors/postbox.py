"""The postbox of a node: frames out, numbered; frames in, checked and sorted."""

import threading
from collections.abc import Callable
from typing import Any

from actors.clients import Clients
from actors.engine import SystemDispatcher
from actors.future import Future
from actors.log import log
from actors.transport import Origin, Transport
from messages.codec import BadFrame, Codec
from messages.frames import (
    ANY_NODE,
    Answer,
    Bounce,
    Deliver,
    Envelope,
    Failure,
    Find,
    FindRefused,
    Found,
    Frame,
    Mark,
    Resolve,
)
from placement.errors import BadMessage
from placement.event import Happened
from placement.topology import Address

DEPARTED_MAX = 1_024
ECHOES_MAX = 64
CLIENTS_MAX = 10_000

#: All that a client has to say to a node.
OF_CLIENTS = (Resolve, Deliver, Mark)


class Postbox:
    """Sends and receives the frames of one incarnation of a node.

    A frame to a receiver bears a number that grows; a frame whose number is not
    above the last of its sender is dropped, so that one which arrives twice is
    handled once.
    """

    def __init__(
        self,
        *,
        cluster: str,
        address: Address,
        transport: Transport,
        dispatcher: SystemDispatcher,
        handle: Callable[[Address, Frame], None],
        publish: Callable[[Happened], None],
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self._codec = Codec(cluster, frame_bytes_max=transport.frame_bytes_max)
        self._address = address
        self._transport = transport
        self._dispatcher = dispatcher
        self._handle = handle
        self._publish = publish
        # One lock for numbering and sending, so that numbers leave in order. One
        # number for all receivers: none has to be remembered.
        self._lock = threading.Lock()
        self._last_sent = 0
        self._last_seen: dict[str, int] = {}
        self._departed: dict[str, None] = {}
        self._last_clients: dict[str, None] = {}
        self._clients = Clients(epoch)
        # Under way: it may be said again before it is back.
        self._echoes: dict[bytes, None] = {}
        self._is_open = False

    def open(self, *, is_member: bool = True) -> None:
        """Receive from now on; a client receives from members only."""
        self._is_open = True
        self._transport.attach(
            self._address,
            self._receive,
            receive_now=self._receive_now,
            is_member=is_member,
            publish=self._publish,
        )

    def close(self) -> None:
        """Send and receive no more."""
        self._is_open = False
        self._transport.detach(self._address)

    def leave(self) -> None:
        """Be sent nothing more; what has arrived already is handled."""
        self._transport.detach(self._address)

    def handled(self, future: Future) -> None:
        """Answer `future` when all that has arrived until now has been handled."""
        self._dispatcher.post(future.set)

    def kill(self) -> None:
        """Go silent, as a crash would: what is sent here vanishes."""
        self._is_open = False
        self._transport.kill(self._address)

    def send(self, to: Address, body: Frame) -> bool:
        """Send; false only where it is certain that nobody will receive it.

        A transport that raises has lost the frame: no actor ends by that. Where a
        frame that carries an answer, or a message back, is too large, the asker is
        told so.

        Raises:
            BadMessage: a message is too large to be delivered.
        """
        if not self._is_open:
            return False
        if to == self._address:
            self._dispatcher.post(self._handle_own, body)
            return True
        self._clients.answered(to, body)
        with self._lock:
            number = self._last_sent = self._last_sent + 1
            try:
                data = self._codec.encode(self._address, to, number, body)
            except BadMessage as error:
                if isinstance(body, Deliver):
                    raise
                refusal = self._too_large(body, error)
                data = self._codec.encode(self._address, to, number, refusal)
            return self._hand_over(to, data)

    def _too_large(self, body: Frame, error: BadMessage) -> Frame:
        """What to send instead of a frame that nobody would take."""
        message_id = 0
        match body:
            case Answer() | Failure() | Bounce():
                message_id = body.message_id
        self._publish(
            Happened(kind="placement", name="FrameTooLarge", reason=str(error))
        )
        return Failure(message_id, "BadMessage", str(error), "", {})

    def send_echo(self, body: Frame) -> None:
        """Send to itself the whole way: encoded, through the transport."""
        with self._lock:
            to = self._address
            number = self._last_sent = self._last_sent + 1
            data = self._codec.encode(to, to, number, body)
            if len(self._echoes) >= ECHOES_MAX:  # lost
                self._echoes.clear()
            self._echoes[data] = None
            self._hand_over(to, data)

    def _hand_over(self, to: Address, data: bytes) -> bool:
        try:
            return self._transport.send(to, data, sender=self._address)
        except Exception as error:  # a transport is another's code
            log.exception("the transport raised", to=to)
            self._publish(
                Happened(
                    kind="placement",
                    name="TransportFailed",
                    reason=f"{type(error).__name__}: {error}",
                )
            )
            return True  # it may have been received

    def forget(self, address: Address) -> None:
        """That incarnation's sessions are over: keep little of it. A system turn.

        It may live, and open another: so the last that departed are remembered,
        and what comes twice from one of them is handled once.
        """
        if address in self._last_seen:
            self._departed.setdefault(address)
        while len(self._departed) > DEPARTED_MAX:
            first = next(iter(self._departed))
            del self._departed[first]
            self._last_seen.pop(first, None)

    def _receive(self, data: bytes, origin: Origin | None = None, /) -> None:
        # A node that has much to do hears itself: its echo says that the way is open.
        post = self._dispatcher.post
        if self._echoes and data in self._echoes:
            self._echoes.pop(data, None)
            post = self._dispatcher.post_urgent
        post(self._arrived, data, origin)

    def _receive_now(self, data: bytes, origin: Origin, /) -> bool:
        return self._dispatcher.take_now(self._arrived, data, origin)

    def _handle_own(self, body: Frame) -> None:
        if self._is_open:
            self._handle(self._address, body)

    def _arrived(self, data: bytes, origin: Origin | None = None) -> None:
        if not self._is_open:
            return
        to_any = origin is not None and origin.to_any
        receiver = ANY_NODE if to_any else self._address
        try:
            envelope: Any = self._codec.decode(data, receiver=receiver)
            if origin is not None:
                _check(origin, envelope)
        except BadFrame as error:
            self._refused(str(error))
            return
        sender = envelope.sender
        # What is for any node has no order among what is for this one.
        if not to_any:
            last = self._last_seen.get(sender, 0)
            if envelope.number <= last:
                if origin is not None:  # no wire that names who speaks repeats
                    self._refused(f"{sender!r}: {envelope.number} is not above {last}")
                return
            self._last_seen[sender] = envelope.number
            self._departed.pop(sender, None)
        body = envelope.body
        if origin is not None and not origin.is_node:
            body = self._of_client(Address(sender), body, len(data))
            if body is None:
                return
        self._handle(Address(sender), body)

    def _refused(self, reason: str) -> None:
        self._publish(Happened(kind="placement", name="FrameRefused", reason=reason))

    def _of_client(self, sender: Address, body: Frame, size: int) -> Frame | None:
        """What to handle of what a client says; none where it is refused."""
        # The last ones only: no session tells when a client ends.
        self._last_clients.pop(sender, None)
        self._last_clients[sender] = None
        if len(self._last_clients) > CLIENTS_MAX:
            first = next(iter(self._last_clients))
            del self._last_clients[first]
            self._last_seen.pop(first, None)
        now_ns = self._dispatcher.now_ns()
        refusal = self._clients.refuse(sender, body, size=size, now_ns=now_ns)
        if refusal is None:
            return self._clients.tame(body, now_ns)
        self.send(sender, refusal)
        self._publish(
            Happened(kind="placement", name="ClientRefused", reason=f"from {sender}")
        )
        return None


def _check(origin: Origin, envelope: Envelope) -> None:
    """Refuse who speaks as another, or as a node and is none.

    Raises:
        BadFrame: it does.
    """
    if envelope.sender != origin.address:
        raise BadFrame(f"{origin.address!r} speaks as {envelope.sender!r}")
    kind = type(envelope.body)
    if origin.to_any != (kind is Find) or kind is Found or kind is FindRefused:
        raise BadFrame(f"{kind.__name__}: {origin.address!r} may not say that here")
    if not (origin.is_node or origin.to_any or kind in OF_CLIENTS):
        said = f"{origin.address!r} is a client, and may not say that"
        raise BadFrame(f"{kind.__name__}: {said}")
