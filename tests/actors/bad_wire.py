"""A program that carries connections badly: late, and until it drops them.

    python -m tests.actors.bad_wire HOST PORT TARGET [DELAY_S LOST_EACH_S SEED]

TARGET is host:port, or the path of a socket. From a SIGUSR1 on so much of the
connections is lost in each second, and of new ones at once: each is a line of output.
"""

import asyncio
import random
import signal
import sys
from contextlib import suppress


class BadWire:
    """Forwards what comes, each piece a while later, as long as it pleases."""

    def __init__(self, target: str, delay_s: float, lost: float, seed: int) -> None:
        self._target = target
        self._delay_s = delay_s
        self._lost = lost
        self._chance = random.Random(seed)
        self._carried: set[asyncio.Task[None]] = set()
        self._is_bad = asyncio.Event()

    async def accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry one connection to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._carried.add(task)
        ends = [writer]
        try:
            if self._is_lost():
                return
            far_reader, far_writer = await self._connect()
            ends.append(far_writer)
            ways = (
                asyncio.create_task(self._carry(reader, far_writer)),
                asyncio.create_task(self._carry(far_reader, writer)),
            )
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # it is over, one way or the other
        finally:
            self._carried.discard(task)
            for each in ends:
                each.transport.abort()

    async def lose(self) -> None:
        """Lose connections, from the signal on."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._is_bad.set)
        await self._is_bad.wait()
        while True:
            await asyncio.sleep(1)
            for task in tuple(self._carried):
                if self._is_lost():
                    task.cancel()

    def _is_lost(self) -> bool:
        is_lost = self._is_bad.is_set() and self._chance.random() < self._lost
        if is_lost:
            print("lost", flush=True)  # noqa: T201
        return is_lost

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.startswith("/"):
            return await asyncio.open_unix_connection(self._target)
        host, _, port = self._target.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        now_s = asyncio.get_running_loop().time
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1_000)

        async def give() -> None:
            while True:
                due_s, data = await pieces.get()
                await asyncio.sleep(max(0.0, due_s - now_s()))
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        giving = asyncio.create_task(give())
        try:
            data = b"?"
            while data:
                data = b""
                with suppress(ConnectionError):
                    data = await reader.read(1 << 16)
                await pieces.put((now_s() + self._delay_s, data))
            await giving
        finally:
            giving.cancel()


async def main(host: str, port: str, target: str, *more: str) -> None:
    delay_s, lost, seed = more or ("0", "0", "0")
    wire = BadWire(target, float(delay_s), float(lost), int(seed))
    server = await asyncio.start_server(wire.accept, host, int(port))
    print(f"ready {server.sockets[0].getsockname()[1]}", flush=True)  # noqa: T201
    await wire.lose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
