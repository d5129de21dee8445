"""The processes of a soak: servers and nodes, and the faults done to them."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self, assert_never

from actors.witness import machine_ns
from scripts.soaking.judge import Pause
from scripts.soaking.schedule import Fault
from tests.actors.nats_servers import NatsServer, free_ports
from tests.actors.postgres_server import PostgresServer

ROOT = Path(__file__).parents[2]
#: Long, since nothing here is about being fast.
PATIENCE_S = 120.0
_DRAIN_S = 20.0
_LOOK_S = 0.02
_PROGRAM = "from actors.main import main; main()"
_CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
)


class SoakFailure(Exception):
    """A process that did not do what it has to, and what."""


class NodeProcess:
    """One node; each start of it is another process, with a witness of its own."""

    def __init__(self, name: str, folder: Path, options: Sequence[str]) -> None:
        self.name = name
        self.pauses: list[Pause] = []
        self._folder, self._options = folder, options
        self._ready = folder / f"{name}.ready"
        self._log = folder / f"{name}.log"
        self._starts = 0
        self._serves = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _witness(self) -> Path:
        return self._folder / f"{self.name}.{self._starts}.witness"

    def ensure(self, is_over: threading.Event) -> None:
        """Have it serve, however often it ends while a server is away.

        Raises:
            SoakFailure: it does not, however long it is waited for.
        """
        until_s = time.monotonic() + PATIENCE_S
        while not self._serves and not is_over.is_set():
            self.kill()
            self._launch()
            self._await_ready(is_over, until_s)
            if not self._serves and time.monotonic() > until_s:
                raise SoakFailure(f"{self.name} does not start: {self._said()}")

    def _launch(self) -> None:
        self._starts += 1
        self._ready.unlink(missing_ok=True)
        command = [sys.executable, "-c", _PROGRAM, "node", self.name, *self._options]
        command += ["--ready-file", str(self._ready), "--witness", str(self._witness)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for who started it
            )

    def _await_ready(self, is_over: threading.Event, until_s: float) -> None:
        process = self._process
        assert process is not None
        while not self._serves and time.monotonic() < until_s:
            if process.poll() is not None or is_over.wait(_LOOK_S):
                return
            self._serves = self._ready.exists()

    def look(self) -> None:
        """Look whether it still runs.

        Raises:
            SoakFailure: it has ended, and nobody had told it to.
        """
        assert self._process is not None
        code = self._process.poll()
        if self._serves and code is not None:
            raise SoakFailure(f"{self.name} ended with {code}: {self._said()}")

    def kill(self) -> None:
        """End it as a crash does."""
        self._serves = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self, seconds: float, is_over: threading.Event) -> None:
        """Have it stand still for so long."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        is_over.wait(seconds)
        self.pauses.append(Pause(self._witness, machine_ns()))
        self._process.send_signal(signal.SIGCONT)

    def drain(self, is_over: threading.Event) -> None:
        """Have it hand over and end, as well as it can meanwhile.

        Raises:
            SoakFailure: it does not end.
        """
        assert self._process is not None
        self._serves = False
        self._process.terminate()
        until_s = time.monotonic() + PATIENCE_S
        while self._process.poll() is None and not is_over.wait(_LOOK_S):
            if time.monotonic() > until_s:
                raise SoakFailure(f"{self.name} does not end on SIGTERM")

    def _said(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"


class SoakedCluster:
    """Servers and nodes; one thread for each does what is scheduled for it.

    `stores` are given to the nodes in turn; without any NATS keeps all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: Sequence[str],
        ttl_s: float,
        on_postgres: bool,
        stores: Sequence[str] = (),
    ) -> None:
        self._stack = ExitStack()
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.faults: Counter[str] = Counter()
        self.violations: list[str] = []
        (port,) = free_ports(1)
        self.server = NatsServer(folder / "nats", port=port)
        self.postgres = PostgresServer() if on_postgres else None
        if self.postgres is not None:
            self._stack.callback(self.postgres.remove)
            stores = [self.postgres.url("schema=soak")]
        self.stores: tuple[str | None, ...] = tuple(stores) or (None,)
        options = ["--engine", self.server.url, "--ttl", str(ttl_s), "--kind", "file"]
        options += ["--drain-timeout", str(_DRAIN_S)]
        self._nodes: dict[str, NodeProcess] = {}
        for number, name in enumerate(nodes):
            store = self.stores[number % len(self.stores)]
            own = options if store is None else [*options, "--store", store]
            self._nodes[name] = NodeProcess(name, folder, own)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.push(self._stack)
            if self.postgres is not None:
                self.postgres.start()
            stack.callback(self.server.kill)
            self.server.start()
            for node in self._nodes.values():
                stack.callback(node.kill)
            stack.callback(self.end_faults)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing of it starts, and no fault is under way."""
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def pauses(self) -> list[Pause]:
        """All pauses of nodes there were."""
        return [pause for node in self._nodes.values() for pause in node.pauses]

    def ensure_nodes(self) -> None:
        """Have all nodes serve; not awaited."""
        self._in_threads(
            {
                name: partial(node.ensure, self._is_over)
                for name, node in self._nodes.items()
            }
        )

    def begin_faults(self, scheduled: Mapping[str, Sequence[Fault]]) -> None:
        """Do what is scheduled; not awaited."""
        began_s = time.monotonic()
        self._in_threads(
            {
                target: partial(self._do_all, began_s, faults)
                for target, faults in scheduled.items()
            }
        )

    def end_faults(self) -> None:
        """Do no more of them, and end what is under way."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._is_over.clear()

    def look(self) -> None:
        """Look whether all nodes that should run do."""
        for node in self._nodes.values():
            self._noting(node.name, node.look)

    def _in_threads(self, tasks: Mapping[str, Callable[[], None]]) -> None:
        self._threads = [
            threading.Thread(target=self._noting, args=each, name=each[0], daemon=True)
            for each in tasks.items()
        ]
        for thread in self._threads:
            thread.start()

    def _noting(self, target: str, task: Callable[[], None]) -> None:
        try:
            task()
        except SoakFailure as error:
            self.violations.append(str(error))
        except Exception as error:  # noqa: BLE001  it is part of what is found
            self.violations.append(f"{target}: {error!r}")

    def _do_all(self, began_s: float, faults: Sequence[Fault]) -> None:
        for fault in faults:
            wait_s = began_s + fault.at_s - time.monotonic()
            if self._is_over.wait(max(0.0, wait_s)):
                return
            self._do(fault)
            self.faults[fault.what] += 1

    def _do(self, fault: Fault) -> None:
        match fault.what:
            case "kill" | "pause" | "drain":
                self._do_to(self._nodes[fault.target], fault)
            case "server-kill":
                self.server.kill()
                self.server.start()
            case "server-pause":
                self.server.signal(signal.SIGSTOP)
                self._is_over.wait(fault.lasts_s)
                self.server.signal(signal.SIGCONT)
            case "store-cut":
                assert self.postgres is not None
                self.postgres.run(_CUT)
            case "store-crash":
                assert self.postgres is not None
                self.postgres.stop(immediately=True)
                self.postgres.start()
            case _:
                assert_never(fault.what)

    def _do_to(self, node: NodeProcess, fault: Fault) -> None:
        node.look()
        match fault.what:
            case "kill":
                node.kill()
            case "pause":
                node.pause(fault.lasts_s, self._is_over)
            case _:
                node.drain(self._is_over)
        node.ensure(self._is_over)
