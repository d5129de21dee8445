"""Real NATS servers for tests: of the wheel, in a folder of their own."""

import signal
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
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


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
        ready: str = "Server is ready",
    ) -> None:
        self.port = port
        self.folder = folder
        self._ready = ready
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        store = f'jetstream {{ store_dir: "{folder / "data"}" }}' if jetstream else ""
        self._config = folder / "server.conf"
        self._config.write_text(
            f"server_name: {name}\nlisten: 127.0.0.1:{port}\n"
            f"max_payload: 8MB\n{store}\n{more}\n",
            encoding="utf-8",
        )

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def launch(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(find_server()), "--config", str(self._config)],
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

    def stop(self) -> None:
        if self._process is None:
            return
        with suppress(OSError):
            self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextmanager
def nats_server(
    *, jetstream: bool = True, more: str = "", folder: Path | None = None
) -> Iterator[NatsServer]:
    """Start one server; nothing of it is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="nats-") as name:
        (port,) = free_ports(1)
        server = NatsServer(
            folder or Path(name), port=port, jetstream=jetstream, more=more
        )
        try:
            server.start()
            yield server
        finally:
            server.stop()


@contextmanager
def nats_cluster(count: int = 3) -> Iterator[Sequence[NatsServer]]:
    """Start servers that are one JetStream cluster, and has a leader."""
    with tempfile.TemporaryDirectory(prefix="nats-") as name:
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
            for server in servers:
                server.stop()
