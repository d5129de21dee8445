"""Real NATS servers for tests: of the wheel, in a folder of their own."""

import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from actors.nats_server import find_server
from tests.waiting import eventually

READY_WITHIN_S = 20.0


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, and that no outgoing connection is given."""
    found: list[int] = []
    for _ in range(_TRIES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", next(_ports)))
            found.append(probe.getsockname()[1])
        if len(found) == count:
            return found
    raise AssertionError("no port is free")


def _ports_in_turn() -> Iterator[int]:
    """Each once, from a place that is another one in each process of tests."""
    try:
        outgoing = int(_OUTGOING.read_text().split()[0])
    except OSError:  # not Linux
        outgoing = _OUTGOING_ELSEWHERE
    ports = range(_PORT_MIN, outgoing) or range(_PORT_MIN, _OUTGOING_ELSEWHERE)
    place = random.SystemRandom().randrange(len(ports))
    while True:
        yield ports[place % len(ports)]
        place += 1


_TRIES = 1_000
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PORT_MIN, _OUTGOING_ELSEWHERE = 10_000, 32_768
_ports = _ports_in_turn()


def _memory() -> str | None:
    """Where a folder costs no disk, if there is much room; else the usual place.

    Hundreds of streams are thousands of files, which a disk takes seconds to remove.
    """
    with suppress(OSError):
        if shutil.disk_usage(_SHARED_MEMORY).free > _ROOM:
            return _SHARED_MEMORY
    return None


_SHARED_MEMORY, _ROOM = "/dev/shm", 4 << 30


class NatsServer:
    """One server process; it can be killed, paused and started again on its data."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        jetstream: bool = True,
        more: str = "",
        name: str = "test",
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
        ready: str = "Server is ready",
    ) -> None:
        self.port = port
        self.host = host
        self._within = within
        self.folder = folder
        self._ready = ready
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        store = f'jetstream {{ store_dir: "{folder / "data"}" }}' if jetstream else ""
        self._config = folder / "server.conf"
        self._config.write_text(
            f"server_name: {name}\nlisten: {host}:{port}\n"
            f"max_payload: 8MB\n{store}\n{more}\n",
            encoding="utf-8",
        )

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def launch(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._within, str(find_server()), "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_ready(self) -> None:
        def is_ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.log
            return self._ready in self.log

        eventually(is_ready, READY_WITHIN_S, or_say=lambda: self.log)

    def start(self) -> None:
        self.launch()
        self.await_ready()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def nats_server(
    *, jetstream: bool = True, more: str = "", folder: Path | None = None
) -> Iterator[NatsServer]:
    """Start one server; nothing of it is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="nats-", dir=_memory()) as name:
        (port,) = free_ports(1)
        server = NatsServer(
            folder or Path(name), port=port, jetstream=jetstream, more=more
        )
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextmanager
def nats_cluster(count: int = 3) -> Iterator[Sequence[NatsServer]]:
    """Start servers that are one JetStream cluster, and has a leader."""
    with tempfile.TemporaryDirectory(prefix="nats-", dir=_memory()) as name:
        ports = free_ports(2 * count)
        clients, routes = ports[:count], ports[count:]
        urls = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        servers = [
            NatsServer(
                Path(name) / f"n{number}",
                port=port,
                name=f"n{number}",
                more=(
                    "cluster { name: test, listen: 127.0.0.1:"
                    f"{routes[number]}, routes: [{urls}] }}"
                ),
                ready="metadata leader",
            )
            for number, port in enumerate(clients)
        ]
        try:
            for server in servers:
                server.launch()
            for server in servers:
                server.await_ready()
            yield servers
        finally:
            # Servers of a cluster that are told to end wait for each other.
            for server in servers:
                server.kill()
