"""nats-py's client, with what it says and hears on its way at once.

nats-py has a queue and a task for each subscription, and another for what is to be
written: each is one more round of the event loop in the way of every message. Here
what `say` is given is written together, at once where the socket has room, and a
callback made by `at_once` is called while messages are read. Where nothing is so
large that one would have to wait; all else is nats-py's own.

Imported by who connects: nats-py is an extra.
"""

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import nats.aio.client
from nats.aio.msg import Msg
from nats.protocol import parser as protocol

from actors.log import log
from actors.nats_failure import NatsRefused
from actors.nats_url import NatsUrl

Hear: TypeAlias = Callable[[str, bytes, bytes], None]
"""Called with the subject of a message, its data, and its headers as they came."""

#: Read at once, where there is so much.
_READ_BYTES = 64 * 1024
#: Subject, subscription, size; with the subject of the reply before the size.
_MSG_WORDS = (3, 4)
_DIGITS_MAX = 18


def at_once(hear: Hear) -> Any:
    """A callback for `subscribe` that is called while messages are read.

    It returns at once. Nothing waits for it that could be dropped: what it is too slow
    for waits in the sockets.
    """

    async def received(_: Msg) -> None:
        raise AssertionError("nats-py handles messages in another way than it did")

    received.hear = hear  # type: ignore[attr-defined]
    return received


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= _DIGITS_MAX


class _Straight:
    """The socket of a transport, for other threads to write to between its own writes.

    To wake the thread of the loop takes as long as all else of a short message. While
    the transport holds something that the socket had no room for, it alone writes.
    """

    def __init__(self, wire: Any, transport: asyncio.WriteTransport) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._held_size = transport.get_write_buffer_size
        self._write, self._writelines = wire.write, wire.writelines
        #: What is left of one that went out in part; all else waits for it.
        self._rest: list[bytes] = []
        own = transport.get_extra_info("socket")
        # Of its own, so that no number of a socket closed meanwhile is written to.
        self._socket = socket.socket(fileno=os.dup(own.fileno()))
        self._socket.setblocking(False)
        wire.write, wire.writelines = self._write_own, self._writelines_own

    def write(self, data: bytes) -> bool:
        """Write; false where nothing of it was written."""
        with self._lock:
            if self._rest or self._held_size():
                return False
            try:
                written = self._socket.send(data)
            except OSError:  # no room, or closed: whoever reads it hears of that
                return False
            if written < len(data):
                self._rest.append(data[written:])
                # Where the loop has ended, the connection has too.
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._write_rest)
            return True

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            self._socket.close()

    def _write_own(self, data: bytes) -> None:
        self._writelines_own([data])

    def _writelines_own(self, data: list[bytes]) -> None:
        with self._lock:
            if self._rest:
                self._rest += data
            else:
                self._writelines(data)

    def _write_rest(self) -> None:
        with self._lock:
            rest, self._rest = self._rest, []
            self._writelines(rest)


class _Parser(protocol.Parser):
    """nats-py's parser, which knows whether it has had all that was read."""

    def __init__(self, client: nats.aio.client.Client) -> None:
        super().__init__(client)
        #: Whether nats-py's reader may have something that is not here yet.
        self.is_behind = True
        self._left_size = 0

    @property
    def is_through(self) -> bool:
        """Whether all that was read has been dealt with, to the end of a message."""
        return not (
            self.is_behind or self.buf or self.state != protocol.AWAITING_CONTROL_LINE
        )

    def leave(self, size: int) -> None:
        """So much is left to nats-py's reader."""
        self.is_behind = True
        self._left_size += size

    async def parse(self, data: bytes = b"") -> None:
        """Deal with what nats-py's reader gave: of less than it may, that is all."""
        self._left_size = max(0, self._left_size - len(data))
        self.is_behind = (
            self._left_size > 0 or len(data) >= nats.aio.client.DEFAULT_BUFFER_SIZE
        )
        await super().parse(data)


class _Ears(asyncio.Protocol):
    """Has messages heard where they arrive, and leaves all else to nats-py's reader.

    That one is a stream, and a task which is woken to read it: another round of the
    loop, and another question to the system, in the way of each message. What is left
    to it, and all that arrives until it is through with that, goes that way; and so
    does all from the moment at which nats-py takes the connection for closed.
    """

    def __init__(self, client: "NatsClient", transport: asyncio.Transport) -> None:
        self._client, self._parser = client, client.parser
        self._stream: Any = transport.get_protocol()
        # It may have got something since.
        self._parser.is_behind = True
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        """So much has arrived."""
        if self._parser.is_through and self._client.is_connected:
            data = self._client.take(data)
        if data:
            self._parser.leave(len(data))
            self._stream.data_received(data)

    def eof_received(self) -> bool | None:
        """Nothing will arrive any more."""
        is_kept: bool | None = self._stream.eof_received()
        return is_kept

    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        self._stream.connection_lost(error)

    def pause_writing(self) -> None:
        """Have who writes wait."""
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        """Have them go on."""
        self._stream.resume_writing()


class _BufferedEars(_Ears, asyncio.BufferedProtocol):
    """The same with one buffer for all: a new one is mapped and given back each time.

    Not over TLS: there asyncio reads no more at once than the buffer holds, and drops
    what is left when the other side has ended.
    """

    def __init__(self, client: "NatsClient", transport: asyncio.Transport) -> None:
        self._buffer = memoryview(bytearray(_READ_BYTES))
        super().__init__(client, transport)

    def get_buffer(self, _: int) -> memoryview:
        """Where to read to."""
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        """So much has arrived."""
        self.data_received(bytes(self._buffer[:size]))


class NatsClient(nats.aio.client.Client):
    """A client of one connection, which it never makes anew.

    It never says a secret without TLS where the URL says TLS. `heard` is called after
    each message, and whether that was all that has been read.
    """

    def __init__(self, url: NatsUrl, heard: Callable[..., None]) -> None:
        super().__init__()
        self._url = url
        self._heard = heard
        self._is_to_write = False
        self._straight: _Straight | None = None
        self._ps = self.parser = _Parser(self)
        self._is_deaf = False

    # --- out ---

    def say(
        self, subject: str, data: bytes, *, reply: str = "", headers: bytes = b""
    ) -> None:
        """Publish, with all that is said until `write`.

        For what is surely short: look at `pending_data_size` and `max_payload` before.
        `headers` are as on the wire, `subject` and `reply` are not checked.
        """
        size = len(headers) + len(data)
        if headers:
            line = f"HPUB {subject} {reply} {len(headers)} {size}\r\n"
        else:
            line = f"PUB {subject} {reply} {size}\r\n"
        command = b"".join((line.encode(), headers, data, b"\r\n"))
        self._pending.append(command)
        self._pending_data_size += len(command)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += size

    def write_soon(self) -> None:
        """Write what has been said, and will be in this round of the loop."""
        if not self._is_to_write:
            self._is_to_write = True
            asyncio.get_running_loop().call_soon(self.write)

    def write(self) -> None:
        """Write what has been said; where the socket has no room the flusher does."""
        self._is_to_write = False
        held, queue, wire = self._pending, self._flush_queue, self._transport
        if not held or queue is None or wire is None:
            return
        writer = getattr(wire, "_io_writer", None)
        if writer is not None and not writer.transport.get_write_buffer_size():
            # In this order: while it is not written nobody may write past it.
            wire.writelines(held)
            self._pending, self._pending_data_size = [], 0
        elif queue.empty():
            queue.put_nowait(asyncio.get_running_loop().create_future())

    # --- out, from any thread ---

    def open_straight(self) -> None:
        """Once it is connected: let `say_straight` write to its socket, if it can."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and writer.transport.get_extra_info("ssl_object") is None:
            self._straight = _Straight(self._transport, writer.transport)

    def close_straight(self) -> None:
        """Let go of the socket, which stays open as long as this holds it."""
        straight, self._straight = self._straight, None
        if straight is not None:
            straight.close()

    def say_straight(self, subject: str, data: bytes) -> bool:
        """Publish on the caller's thread, which may be any; false: it was not.

        Whoever calls it sees to it that nothing that was said before waits. Not among
        `stats`, which are of the loop's thread.
        """
        straight = self._straight
        if straight is None or self._pending:
            return False
        line = f"PUB {subject}  {len(data)}\r\n".encode()
        return straight.write(b"".join((line, data, b"\r\n")))

    # --- in ---

    def open_ears(self) -> None:
        """Once it is connected: have messages heard where they arrive."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            is_plain = writer.transport.get_extra_info("ssl_object") is None
            (_BufferedEars if is_plain else _Ears)(self, writer.transport)

    def hear_no_more(self) -> None:
        """Drop what arrives: the next connection may have the same subscriptions."""
        self._is_deaf = True

    def take(self, data: bytes) -> bytes:
        """Hear the whole messages with which `data` begins; what is left of it."""
        begin, size = 0, len(data)
        while data.startswith(b"MSG ", begin):
            line_end = data.find(b"\r\n", begin)
            if line_end < 0:
                break
            words = data[begin + 4 : line_end].split()
            if len(words) not in _MSG_WORDS or not (
                _is_number(words[1]) and _is_number(words[-1])
            ):
                break  # nats-py says what is wrong
            hear = self._who_hears(int(words[1]))
            end = line_end + 2 + int(words[-1])
            if hear is None or end + 2 > size:
                break
            begin, message = end + 2, data[line_end + 2 : end]
            self._let_hear(hear, words[0], message, b"", is_all=begin == size)
        return data[begin:]

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        hear = self._who_hears(sid)
        if hear is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            is_all = not self._ps.buf
            self._let_hear(hear, subject, data, headers or b"", is_all=is_all)

    def _who_hears(self, sid: int) -> Hear | None:
        hear: Hear | None = getattr(
            getattr(self._subs.get(sid), "_cb", None), "hear", None
        )
        return hear

    def _let_hear(
        self, hear: Hear, subject: bytes, data: bytes, headers: bytes, *, is_all: bool
    ) -> None:
        if self._is_deaf:
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        try:
            hear(subject.decode(), data, headers)
        except Exception:  # one message must not end the reading of all others
            log.exception("who hears a message of NATS raised")
        self._heard(is_all=is_all)

    # --- being let in ---

    async def _process_info(
        self,
        info: dict[str, Any],
        initial_connection: bool = False,  # noqa: FBT001, FBT002  nats-py's own
    ) -> None:
        # Before a word about who we are: nats-py goes on in plain text.
        if self._url.tls and initial_connection and not info.get("tls_required"):
            raise NatsRefused(
                f"NATS {self._url}: the server does not ask for TLS, the URL does",
                may_have_happened=False,
            )
        await super()._process_info(info, initial_connection)

    async def _process_connect_init(self) -> None:
        # A server that refuses a CONNECT says why and closes: a PING that comes after
        # that is answered with a reset, and the reason is never read. So both go out
        # in one write.
        wire: Any = self._transport
        write, held = wire.write, b""

        def write_together(data: bytes) -> None:
            nonlocal held
            if data.startswith(b"CONNECT "):
                held = data
            else:
                write(held + data)
                held = b""

        wire.write = write_together
        try:
            await super()._process_connect_init()
        finally:
            wire.write = write
