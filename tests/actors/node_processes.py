"""Real node processes for tests, ended for sure."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
PLACEMENT = [sys.executable, "-c", "from actors.main import main; main()"]
READY_WITHIN_S = 30.0


def placement(
    *args: str,
    timeout_s: float = 60,
    env: dict[str, str] | None = None,
    within: Sequence[str] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; `within` is what begins its command line."""
    return subprocess.run(
        [*within, *PLACEMENT, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
    )


class Process:
    """One long-running command, or another `program`; it says when it is ready."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *args: str,
        within: Sequence[str] = (),
        program: Sequence[str] = PLACEMENT,
        env: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.args = args
        self._begin = [*within, *program]
        self._env = {**os.environ, **(env or {})}
        self._out = folder / f"{name}.out"
        self._err = folder / f"{name}.err"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def err_from(self, at: int) -> bytes:
        """What it has said to standard error, from there on."""
        with self._err.open("rb") as file:
            file.seek(at)
            return file.read()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*self._begin, *self.args],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def start(self) -> "Process":
        self.launch()
        self.await_ready()
        return self

    def await_ready(self) -> None:
        assert self._process is not None
        process = self._process
        eventually(
            lambda: "ready" in self.out or process.poll() is not None,
            within_s=READY_WITHIN_S,
        )
        assert process.poll() is None, self.err

    def ready(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.out.splitlines()[0])
        return found

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(OSError):
                self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()


def requests_in(path: Path, identities: int, each: int) -> Path:
    """A file of so many requests to each of so many tallies."""
    lines = [
        json.dumps({"identity": f"file/{number}", "payload": turn})
        for turn in range(each)
        for number in range(identities)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def counts_in(report: Path) -> dict[str, int]:
    """How many requests each identity has counted, as a run has reported."""
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    return {line["identity"]: line["count"] for line in lines}


@contextmanager
def ended(*processes: Process) -> Iterator[None]:
    """Have none of them left afterwards."""
    try:
        yield
    finally:
        for each in processes:
            each.kill()
