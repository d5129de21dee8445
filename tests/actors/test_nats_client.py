"""What our client of NATS writes beside nats-py: whole messages, in their order."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from actors.loop_thread import LoopThread
from actors.nats_client import _Straight
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
