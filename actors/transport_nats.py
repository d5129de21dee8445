"""The transport over NATS: subjects that say who speaks, and as what.

    placement.CLUSTER.node.TO.BOOT.FROM.BOOT      said by a node
    placement.CLUSTER.client.TO.BOOT.FROM.BOOT    said by a client
    placement.CLUSTER.find.FROM.BOOT              said by a client, to any node

TO and FROM are names of nodes, BOOT is the rest of an address; what a subject
cannot hold is written =XX. So the permissions of a server can bind a user to one
FROM, and to `node` or `client`; what a frame says of its sender must be the same.
Members listen to both, and as one queue to `find`: one of them gets each. A client
listens to what nodes say to it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from actors.dispatch import Dispatcher
from actors.nats_connection import ConnectionEvent, NatsConnection, Subscription
from actors.nats_token import text_of_token, token_of
from actors.transport import LINGER, Origin, Receive, ReceiveNow
from messages.codec import FRAME_BYTES_MAX, BadFrame
from messages.pack import unpack
from placement.event import Happened
from placement.topology import Address, node_of

__all__ = [
    "NatsTransport",
    "find_subject_of",
    "subject_of",
    "text_of_token",
    "token_of",
]

#: What waits for the dispatcher, in bytes of frames; more is dropped and counted.
INBOUND_BYTES_MAX = 64 << 20
#: And of one client, in frames: no flood of its own keeps a node from renewing. Of the
#: bytes one client may have a quarter, and all of them a half: the rest is for nodes.
CLIENT_FRAMES_MAX = 8_192
_REMEMBERED_MAX = 10_000
_TOKENS, _FIND_TOKENS = 7, 5
_QUEUE = "nodes"


def subject_of(cluster: str, to: Address, sender: Address, *, is_node: bool) -> str:
    """Where `sender` publishes what is for `to`."""
    side = "node" if is_node else "client"
    return f"placement.{token_of(cluster)}.{side}.{_tokens_of(to)}.{_tokens_of(sender)}"


def find_subject_of(cluster: str, sender: Address) -> str:
    """Where the client `sender` asks any node who the members are."""
    return f"placement.{token_of(cluster)}.find.{_tokens_of(sender)}"


def _tokens_of(address: Address) -> str:
    name, _, boot = address.rpartition(".")
    return f"{token_of(name)}.{token_of(boot)}"


@dataclass(slots=True)
class _Waiting:
    """What of one client waits for the dispatcher."""

    count: int = 0
    size: int = 0


@dataclass(slots=True, eq=False)
class _Attached:
    """A node of this process on the wire."""

    receive: Receive
    publish: Callable[[Happened], None]
    is_member: bool
    receive_now: ReceiveNow | None = None
    subscriptions: list[Subscription] = field(default_factory=list)
    is_silent: bool = False


class NatsTransport:
    """Frames of the nodes of one process, over one connection.

    What cannot be sent now, without a connection or since too much waits, surely
    reaches nobody, and is said so to whoever sends. What was sent and got lost with
    a connection is never sent again.
    """

    def __init__(
        self,
        connection: NatsConnection,
        cluster: str,
        dispatcher: Dispatcher,
        *,
        inbound_bytes_max: int = INBOUND_BYTES_MAX,
    ) -> None:
        self._connection = connection
        self._cluster = cluster
        self._dispatcher = dispatcher
        self._inbound_bytes_max = inbound_bytes_max
        self._attached: dict[Address, _Attached] = {}
        self._subjects: dict[tuple[Address, Address], str] = {}
        self._origins: dict[str, Origin] = {}
        self._lock = threading.Lock()
        self._inbound_bytes = 0
        self._client_bytes = 0
        self._of_clients: dict[str, _Waiting] = {}
        connection.listen(self._noticed)

    @property
    def frame_bytes_max(self) -> int:
        """The largest frame: that of the codec, or less where the server takes less."""
        return min(FRAME_BYTES_MAX, self._connection.max_payload)

    def attach(
        self,
        address: Address,
        receive: Receive,
        *,
        is_member: bool,
        publish: Callable[[Happened], None],
        receive_now: ReceiveNow | None = None,
    ) -> None:
        """Deliver what is sent to `address`.

        Raises:
            NatsFailure: the server does not permit it, or does not answer.
        """
        place = f"placement.{token_of(self._cluster)}"
        sides = ("node", "client") if is_member else ("node",)
        wanted = [(f"{place}.{side}.{_tokens_of(address)}.*.*", "") for side in sides]
        if is_member:
            wanted.append((f"{place}.find.*.*", _QUEUE))
        attached = _Attached(receive, publish, is_member, receive_now)
        with self._lock:
            assert address not in self._attached
            self._attached[address] = attached
        try:
            for subject, queue in wanted:
                attached.subscriptions.append(
                    self._connection.subscribe(
                        subject, partial(self._arrived, attached), queue=queue
                    )
                )
        except BaseException:
            self.detach(address)
            raise

    def detach(self, address: Address) -> None:
        """Deliver nothing more to `address`."""
        with self._lock:
            attached = self._attached.pop(address, None)
        if attached is not None:
            attached.is_silent = True
            for subscription in attached.subscriptions:
                self._connection.unsubscribe(subscription)

    def kill(self, address: Address) -> None:
        """Go silent: nobody hears anything of that, as after a crash."""
        self.detach(address)

    def send(self, address: Address, data: bytes, *, sender: Address) -> bool:
        """Publish soon; false where it surely will not be."""
        subject = self._subjects.get((address, sender))
        if subject is None:
            subject = self._subject(address, sender)
        return self._connection.publish(subject, data)

    def linger_s(self, renew_every_s: float) -> float:
        """Longer than others take to read the members anew."""
        return renew_every_s * LINGER

    def _subject(self, address: Address, sender: Address) -> str:
        attached = self._attached.get(sender)
        is_node = attached is not None and attached.is_member
        subject = subject_of(self._cluster, address, sender, is_node=is_node)
        if attached is not None:
            if len(self._subjects) >= _REMEMBERED_MAX:
                self._subjects.clear()
            self._subjects[address, sender] = subject
        return subject

    # --- in (the connection's thread) ---

    def _arrived(self, attached: _Attached, subject: str, data: bytes) -> None:
        if attached.is_silent:
            return
        try:
            origin = self._origins.get(subject) or self._origin(subject)
            frames = unpack(data)
        except BadFrame as error:
            self._refuse(attached, "FrameRefused", str(error))
            return
        is_echo = origin.is_node and self._attached.get(origin.address) is attached
        if (
            len(frames) == 1
            and not is_echo
            and attached.receive_now is not None
            and attached.receive_now(frames[0], origin)
        ):
            return  # it has not waited: there is nothing to count
        why = self._take_in(origin, len(data), len(frames))
        if why:
            self._refuse(attached, "FramesDropped", why)
            return
        # What a node says to itself over the wire is urgent: see `Postbox`.
        post = self._dispatcher.post_urgent if is_echo else self._dispatcher.post
        post(self._hand_over, attached, frames, origin, len(data))

    def _take_in(self, origin: Origin, size: int, count: int) -> str:
        """Count what waits; or say why that is too much."""
        with self._lock:
            limit = self._inbound_bytes_max
            if self._inbound_bytes + size > limit:
                return f"{limit} bytes of frames wait already"
            if not origin.is_node:
                client = node_of(origin.address)
                waiting = self._of_clients.get(client) or _Waiting()
                if waiting.count + count > CLIENT_FRAMES_MAX:
                    return f"{CLIENT_FRAMES_MAX} frames of {client} wait already"
                if waiting.size + size > limit // 4:
                    return f"{limit // 4} bytes of frames of {client} wait already"
                if self._client_bytes + size > limit // 2:
                    return f"{limit // 2} bytes of frames of clients wait already"
                waiting.count += count
                waiting.size += size
                self._of_clients[client] = waiting
                self._client_bytes += size
            self._inbound_bytes += size
        return ""

    def _refuse(self, attached: _Attached, name: str, reason: str) -> None:
        attached.publish(Happened(kind="placement", name=name, reason=reason))

    def _hand_over(
        self, attached: _Attached, frames: list[bytes], origin: Origin, size: int
    ) -> None:
        """Deliver; a turn of the dispatcher, which then has its turn for each."""
        for frame in frames:
            attached.receive(frame, origin)
        # Behind them: only then do they wait no more.
        self._dispatcher.post(self._handed_over, origin, size, len(frames))

    def _handed_over(self, origin: Origin, size: int, count: int) -> None:
        with self._lock:
            self._inbound_bytes -= size
            if not origin.is_node:
                client = node_of(origin.address)
                waiting = self._of_clients[client]
                waiting.count -= count
                waiting.size -= size
                if not waiting.count:
                    del self._of_clients[client]
                self._client_bytes -= size

    def _origin(self, subject: str) -> Origin:
        tokens = subject.split(".")
        to_any = len(tokens) == _FIND_TOKENS and tokens[2] == "find"
        is_direct = len(tokens) == _TOKENS and tokens[2] in ("node", "client")
        if not (to_any or is_direct):
            raise BadFrame(f"{subject!r} is no subject of a frame")
        address = Address(f"{text_of_token(tokens[-2])}.{text_of_token(tokens[-1])}")
        origin = Origin(address, is_node=tokens[2] == "node", to_any=to_any)
        if len(self._origins) >= _REMEMBERED_MAX:
            self._origins.clear()
        self._origins[subject] = origin
        return origin

    def _noticed(self, event: ConnectionEvent) -> None:
        """Something happened to the connection: an event of every node on it."""
        happened = Happened(
            kind="placement", name=f"Nats{event.name}", reason=event.reason
        )
        for attached in tuple(self._attached.values()):
            attached.publish(happened)
