"""What our client of NATS writes and reads beside nats-py: whole, and in order."""

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import pytest
from nats.aio.client import DEFAULT_BUFFER_SIZE

from actors.loop_thread import LoopThread
from actors.nats_client import NatsClient, _Parser, _Straight, at_once
from actors.nats_url import parse_nats_url
from tests.waiting import eventually

MESSAGE_BYTES = 5_000


class Wire:
    """A transport as nats-py has it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.write = writer.write
        self.writelines = writer.writelines


class Ends:
    """A socket that a loop writes to, the way past the loop, and who reads."""

    def __init__(
        self, thread: LoopThread, wire: Wire, straight: _Straight, far: socket.socket
    ) -> None:
        self.thread, self.wire, self.straight, self.far = thread, wire, straight, far

    def write_own(self, data: bytes) -> None:
        """As nats-py does, on the thread of the loop."""
        assert self.thread.soon(lambda: self.wire.write(data))

    def read(self, size: int) -> bytes:
        """So many bytes, from the other end."""
        got = bytearray()
        while len(got) < size:
            part = self.far.recv(1 << 20)
            assert part, f"it ended after {len(got)} of {size} bytes"
            got += part
        return bytes(got)


@contextmanager
def ends() -> Iterator[Ends]:
    """Both ends of a connection with little room in it."""
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    near.setblocking(False)
    far.settimeout(20)
    thread = LoopThread("straight")

    async def open_near() -> tuple[Wire, _Straight, asyncio.StreamWriter]:
        _, writer = await asyncio.open_connection(sock=near)
        wire = Wire(writer)
        return wire, _Straight(wire, writer.transport), writer

    opened = asyncio.run_coroutine_threadsafe(open_near(), thread.loop)
    wire, straight, writer = opened.result(10)
    try:
        yield Ends(thread, wire, straight, far)
    finally:
        straight.close()
        thread.soon(writer.transport.abort)
        thread.soon(thread.stop)
        thread.join(10)
        far.close()


def test_what_goes_past_the_loop_is_whole_and_in_order_whoever_writes_besides() -> None:
    """Each line is of one writer, and a number of it; some go out in parts only."""
    count = 400
    with ends() as both:
        both.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)

        def line(writer: int, number: int) -> bytes:
            start = b"%d %d " % (writer, number)
            return start + b"x" * (MESSAGE_BYTES - len(start) - 1) + b"\n"

        def write(writer: int) -> None:
            for number in range(count):
                data = line(writer, number)
                eventually(lambda data=data: both.straight.write(data))  # type: ignore[misc]

        def write_own() -> None:
            for number in range(count):
                both.write_own(line(0, number))

        writers = [threading.Thread(target=write, args=(each,)) for each in (1, 2)]
        writers.append(threading.Thread(target=write_own))
        for each in writers:
            each.start()
        got = both.read(3 * count * MESSAGE_BYTES)
        for each in writers:
            each.join()
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for each_line in got.splitlines():
        assert len(each_line) == MESSAGE_BYTES - 1
        writer, number, rest = each_line.split(b" ", 2)
        assert rest == b"x" * len(rest)
        seen[int(writer)].append(int(number))
    assert all(numbers == list(range(count)) for numbers in seen.values())


def test_a_message_that_goes_out_in_part_has_nothing_before_its_rest() -> None:
    with ends() as both:
        large = bytes(range(256)) * 8_192
        entered, hold = threading.Event(), threading.Event()

        def busy() -> None:
            entered.set()
            hold.wait(20)
            both.wire.write(b"own")

        both.thread.soon(busy)
        assert entered.wait(20)
        assert both.straight.write(large)
        # The socket has taken some of it: neither of these may come in between.
        assert not both.straight.write(b"never")
        hold.set()
        assert both.read(len(large) + 3) == large + b"own"
        eventually(lambda: both.straight.write(b"again"))
        assert both.read(5) == b"again"


def test_while_the_loop_has_something_to_write_nobody_else_writes() -> None:
    with ends() as both:
        large = b"x" * 2_000_000
        done = threading.Event()
        both.write_own(large)
        both.thread.soon(done.set)
        assert done.wait(10)
        assert not both.straight.write(b"never")
        assert both.read(len(large)) == large
        eventually(lambda: both.straight.write(b"now"))
        assert both.read(3) == b"now"


def test_after_its_end_nothing_is_written_and_the_socket_is_let_go() -> None:
    with ends() as both:
        both.straight.close()
        assert not both.straight.write(b"never")
        both.write_own(b"own")
        assert both.read(3) == b"own"
    with ends() as both:
        both.far.close()

        def is_refused() -> bool:
            return not both.straight.write(b"never")

        eventually(is_refused)


@pytest.mark.parametrize("is_closed_first", [True, False])
def test_its_reader_hears_of_the_end(is_closed_first: bool) -> None:  # noqa: FBT001
    near, far = socket.socketpair()
    far.settimeout(20)

    async def end() -> None:
        _, writer = await asyncio.open_connection(sock=near)
        straight = _Straight(Wire(writer), writer.transport)
        if is_closed_first:
            straight.close()
        writer.transport.abort()
        await asyncio.sleep(0)
        straight.close()

    asyncio.run(end())
    with suppress(ConnectionResetError):
        assert far.recv(1) == b""
    far.close()


# --- in ---

TLS = Path(__file__).parents[1] / "data" / "tls"
TLS_FIRST = {"tls_required": True}
HELLO = {"server_id": "x", "version": "2.12.0", "headers": True, "max_payload": 1 << 20}


class Counted(NatsClient):
    """Counts how much is taken where it arrives."""

    taken_count = ping_count = 0

    async def _process_ping(self) -> None:
        self.ping_count += 1
        await super()._process_ping()

    def take(self, data: bytes) -> bytes:
        before = self.stats["in_msgs"]
        left = super().take(data)
        self.taken_count += self.stats["in_msgs"] - before
        return left


@contextmanager
def client_of(
    pieces: Sequence[Any],  # bytes, or what is waited for before the next
    hear: Callable[[str, bytes, bytes], None],
    *,
    rounds: Sequence[int] = (0, 0, 1, 5, 40),
) -> Iterator[Counted]:
    """A client with one subscription, to whom a server says these pieces."""

    random = Random(len(pieces))
    is_over = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps(HELLO).encode() + b"\r\n")
        while not (await reader.readline()).startswith(b"PING"):
            pass
        writer.write(b"PONG\r\n")
        while not (await reader.readline()).startswith(b"SUB own"):
            pass
        for piece in pieces:
            if isinstance(piece, Event):
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, piece.wait, 20)
                continue
            writer.write(piece)
            await writer.drain()
            # Some find the client through with all before, some do not.
            for _ in range(random.choice(rounds)):
                await asyncio.sleep(0)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        is_over.set()

    async def begin() -> tuple[asyncio.Server, Counted]:
        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        made = Counted(parse_nats_url(f"nats://127.0.0.1:{port}"), lambda **_: None)
        await made.connect(
            f"nats://127.0.0.1:{port}", allow_reconnect=False, error_cb=slowly
        )
        made.open_ears()
        # Not among the first: nobody is known by the place in a list.
        await made.subscribe("other", cb=at_once(lambda *_: None))
        await made.subscribe("it", cb=at_once(hear))
        # Of nats-py's own, which has no room, and says so for a while.
        await made.subscribe("own", cb=slowly, pending_bytes_limit=1)
        return server, made

    async def slowly(_: Any) -> None:
        for _ in range(60):
            await asyncio.sleep(0)

    async def end(server: asyncio.Server, made: Counted) -> None:
        server.close()
        await made.close()
        await asyncio.wait_for(is_over.wait(), 20)

    thread = LoopThread("ears")
    server, made = asyncio.run_coroutine_threadsafe(begin(), thread.loop).result(10)
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(end(server, made), thread.loop).result(10)
        thread.soon(thread.stop)
        thread.join(10)


def said(random: Random) -> tuple[bytes, tuple[str, bytes, bytes] | None]:
    """Something that a server may say, and what of it is to be heard."""
    data = b"%d " % random.randrange(1_000)
    data += b"\r\nMSG " * random.choice((0, 0, 0, 1, 400, 30_000))
    match random.randrange(8):
        case 0:
            return b"PING\r\n", None
        case 1:
            return b"+OK\r\n", None
        case 2:  # not subscribed to any more
            return b"MSG gone 99 %d\r\n%b\r\n" % (len(data), data), None
        case 3:
            head = b"NATS/1.0\r\nnumber: 1\r\n\r\n"
            sizes = (len(head), len(head) + len(data))
            line = b"HMSG it.h 2 %d %d\r\n%b%b\r\n" % (*sizes, head, data)
            return line, ("it.h", data, head)
        case _:
            reply = random.choice((b"", b"_INBOX.1 "))
            line = b"MSG it 2 %b%d\r\n%b\r\n" % (reply, len(data), data)
            return line, ("it", data, b"")


@pytest.mark.parametrize("seed", range(12))
def test_all_is_heard_whole_and_in_order_in_whatever_pieces_it_arrives(
    seed: int,
) -> None:
    random = Random(seed)
    pieces: list[bytes] = []
    wanted: list[tuple[str, bytes, bytes]] = []
    for _ in range(100):
        some = [said(random) for _ in range(random.choice((1, 1, 1, 2, 10)))]
        wanted += [heard for _, heard in some if heard is not None]
        stream, begin = b"".join(line for line, _ in some), 0
        while begin < len(stream):
            size = random.choice((1, 5, 30, 70_000, 1_000_000, 1_000_000))
            pieces.append(stream[begin : begin + size])
            begin += size
    heard: list[tuple[str, bytes, bytes]] = []
    with client_of(pieces, lambda *message: heard.append(message)) as client:
        eventually(lambda: len(heard) >= len(wanted))
        assert heard == wanted
        assert client.is_connected
        # Of both kinds: there and then, and by nats-py's own reader.
        assert 0.02 < client.taken_count / len(wanted) < 0.9


def test_nothing_overtakes_what_waits_for_nats_py() -> None:
    """Neither the rest of a message that is cut, nor what is beyond one reading."""
    slow = b"MSG own 3 1\r\nx\r\n"
    cut = b"MSG it 2 20\r\n"
    payload = b"MSG it 2 4\r\nfake\r\n.."
    padding = DEFAULT_BUFFER_SIZE - len(slow) - len(b"+OK\r\nMSG it 2 30000\r\n\r\n")
    full = b"+OK\r\nMSG it 2 %d\r\n%b\r\n" % (padding, b"f" * padding) + slow
    assert len(full) == DEFAULT_BUFFER_SIZE
    pieces = [
        b"+OK\r\n",
        cut,
        payload + b"\r\n",
        b"MSG it 2 1\r\na",
        b"\r\nMSG it 2 1\r\nb\r\n",
        # While nats-py is busy with this one the next arrive, each by itself.
        slow,
        cut,
        payload + b"\r\n",
        b"MSG it 2 1\r\nc\r\n",
        *(b"+OK\r\n",) * 10,
        full + b"MSG it 2 1\r\nd\r\n",
        b"MSG it 2 1\r\ne\r\n",
    ]
    heard: list[bytes] = []
    with client_of(pieces, lambda _, data, __: heard.append(data[:20]), rounds=(10,)):
        eventually(lambda: heard[-1:] == [b"e"])
    assert heard == [payload, b"a", b"b", payload, b"c", b"f" * 20, b"d", b"e"]


def test_one_who_raises_keeps_nobody_from_hearing_the_next() -> None:
    heard: list[bytes] = []

    def hear(_: str, data: bytes, __: bytes) -> None:
        heard.append(data)
        raise ValueError(data)

    with client_of([b"MSG it 2 1\r\na\r\nMSG it 2 1\r\nb\r\n"], hear) as client:
        eventually(lambda: heard == [b"a", b"b"])
        assert client.is_connected


@pytest.mark.parametrize(
    "wrong",
    [
        b"MSG it 2 x\r\na\r\n",
        b"MSG it\r\n",
        b"MSG it two 1\r\na\r\n",
        b"MSG it 2 %b\r\na\r\n" % (b"1" * 5_000),
        b"?\r\n",
    ],
    ids=["size", "words", "sid", "digits", "nothing"],
)
def test_what_is_no_message_ends_the_connection(wrong: bytes) -> None:
    heard: list[bytes] = []
    pieces = [b"MSG it 2 1\r\na\r\n", wrong]
    with client_of(pieces, lambda _, data, __: heard.append(data)) as client:
        eventually(lambda: client.is_closed)
        assert heard == [b"a"]


def test_the_end_of_a_connection_is_seen() -> None:
    pieces = [b"MSG it 2 1\r\na\r\n", b"-ERR 'Stale Connection'\r\n"]
    heard: list[bytes] = []
    with client_of(pieces, lambda _, data, __: heard.append(data)) as client:
        eventually(lambda: client.is_closed)
        assert heard == [b"a"]


LATE = [b"MSG it 2 1\r\nb\r\nPING\r\n"]


def test_a_client_that_is_lost_hears_nothing_more() -> None:
    heard: list[bytes] = []
    late = Event()
    pieces = [b"MSG it 2 1\r\na\r\n", late, *LATE]
    with client_of(pieces, lambda _, data, __: heard.append(data)) as client:
        eventually(lambda: heard == [b"a"])
        client.hear_no_more()
        late.set()
        eventually(lambda: client.ping_count)
    assert heard == [b"a"]


def test_what_arrives_for_a_closed_client_is_left_to_nats_py() -> None:
    """Which reads nothing more, though it waits for a peer that does not read."""
    heard: list[bytes] = []
    late = Event()
    pieces = [b"+OK\r\n", b"MSG it 2 1\r\na\r\n", late, *LATE]
    with client_of(
        pieces, lambda _, data, __: heard.append(data), rounds=(40,)
    ) as client:
        eventually(lambda: client.taken_count == 1)
        client._status = NatsClient.CLOSED
        late.set()
        eventually(lambda: client.ping_count)
        assert client.taken_count == 1
        client._status = NatsClient.CONNECTED


def test_what_nats_py_has_not_read_yet_comes_first() -> None:
    parser = _Parser(NatsClient(parse_nats_url("nats://127.0.0.1"), lambda **_: None))
    assert not parser.is_through

    asyncio.run(parser.parse(b"+OK\r\n"))
    assert parser.is_through
    parser.leave(10)
    assert not parser.is_through
    # Less than it might read, and yet not all.
    asyncio.run(parser.parse(b"+OK\r\n"))
    assert not parser.is_through
    asyncio.run(parser.parse(b"+OK\r\n"))
    assert parser.is_through
    asyncio.run(parser.parse(b"+OK\r\n" * DEFAULT_BUFFER_SIZE))
    assert not parser.is_through


@pytest.mark.parametrize("end", ["close_notify", "nothing said"])
def test_over_tls_all_is_heard_that_came_before_the_end(end: str) -> None:
    """However much of it waits when the loop comes to look."""
    count, message = 250, b"MSG it 1 1000\r\n%b\r\n" % (b"x" * 1_000)
    go, sent = Event(), Event()

    def serve(listening: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
        plain, _ = listening.accept()
        with context.wrap_socket(plain, server_side=True) as wire:
            wire.sendall(b"INFO %b\r\n" % json.dumps(HELLO | TLS_FIRST).encode())
            got = b""
            while b"SUB it" not in got:
                got += wire.recv(65_536)
                if got.endswith(b"PING\r\n"):
                    wire.sendall(b"PONG\r\n")
            assert go.wait(20)
            wire.sendall(message * count)
            if end == "close_notify":
                wire.setblocking(False)
                with suppress(ssl.SSLError):
                    wire.unwrap()
            socket.socket.shutdown(wire, socket.SHUT_WR)
            sent.set()
            assert closed.wait(20)

    heard: list[bytes] = []
    closed = Event()

    async def listen(port: int) -> None:
        url = f"nats://localhost:{port}"
        client = NatsClient(parse_nats_url(url), lambda **_: None)
        await client.connect(
            url,
            allow_reconnect=False,
            tls=ssl.create_default_context(cafile=TLS / "ca.pem"),
            tls_handshake_first=True,
            error_cb=quiet,
        )
        client.open_ears()
        wire: Any = client._transport
        own = wire._io_writer.transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        await client.subscribe("it", cb=at_once(lambda _, data, __: heard.append(data)))
        await client._flush_pending(force_flush=True)
        await asyncio.sleep(0.05)
        go.set()
        assert sent.wait(20)  # and nobody reads meanwhile
        for _ in range(2_000):
            if client.is_closed:
                break
            await asyncio.sleep(0.01)
        assert client.is_closed

    async def quiet(_: Exception) -> None:
        pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=serve, args=(listening,))
        server.start()
        try:
            asyncio.run(listen(listening.getsockname()[1]))
        finally:
            closed.set()
            server.join(20)
    assert len(heard) == count
