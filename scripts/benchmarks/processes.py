"""Whole processes: the command on its sample, the start of a cluster, an import.

python -m scripts.benchmarks.processes
"""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import resources
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from scripts.benchmarks.measure import Effort, Measurement, in_turn

_COMMAND = "import sys; from actors.main import main; sys.exit(main())"
_SAMPLE_LINES = 64_469


def _output(*arguments: str, **variables: str) -> Any:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    return json.loads(done.stdout)


def run_sample(effort: Effort) -> Measurement:
    """`placement run --json`, by its own seconds, against reading the file alone."""

    def ours() -> float:
        found = _output("-c", _COMMAND, "run", "--json")
        assert found["answered"] == found["requests"] == _SAMPLE_LINES
        assert found["failed"] == found["double_activations"] == 0
        return float(found["answered"] / found["seconds"])

    def limit() -> float:
        began = time.perf_counter()
        file = resources.files("actors").joinpath("data", "commit-touches.jsonl.gz")
        lines = gzip.decompress(file.read_bytes()).splitlines()
        found = [msgspec.json.decode(line)["identity"] for line in lines]
        seconds = time.perf_counter() - began
        assert len(found) == _SAMPLE_LINES
        return len(found) / seconds

    return in_turn(ours, limit, effort.runs)


def _start() -> dict[str, float]:
    """Milliseconds of a start, and of as many threads that have answered once."""
    from actors import Cluster, Grain  # noqa: PLC0415  not what is measured

    class Echo(Grain):
        def on_receive(self, message: Any) -> Any:
            return message

    before = threading.active_count()
    began = time.perf_counter()
    cluster = Cluster.embedded(nodes=3, kinds={"echo": Echo})
    ours = time.perf_counter() - began
    made = threading.active_count() - before
    assert len(cluster.snapshot().members) == 3  # noqa: PLR2004
    assert cluster.ref("echo/1").ask(1) == 1
    cluster.stop()
    began = time.perf_counter()
    for _ in range(made):
        answered = threading.Event()
        threading.Thread(target=answered.set, daemon=True).start()
        assert answered.wait(10)
    limit = time.perf_counter() - began
    return {"ours": ours * 1e3, "limit": limit * 1e3}


def start(effort: Effort) -> Measurement:
    """A cluster of three nodes serves."""
    found = [_output("-m", "scripts.benchmarks.processes") for _ in range(effort.runs)]
    return Measurement(
        ours=tuple(each["ours"] for each in found),
        limit=tuple(each["limit"] for each in found),
    )


def import_all(effort: Effort) -> Measurement:
    """What a first program imports, against what the package needs of others.

    Compiled before, whatever the environment says of writing that down.
    """
    with TemporaryDirectory() as compiled:

        def child(imports: str) -> Callable[[], float]:
            code = (
                "import time; began = time.perf_counter()\n"
                f"{imports}\n"
                "print((time.perf_counter() - began) * 1e3)"
            )
            kept = {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
            return lambda: float(_output("-c", code, **kept))

        ours = child("from actors import Cluster, Grain, Kind, Rejected, handler")
        limit = child("import msgpack, msgspec, pykka, xxhash")
        ours()
        limit()
        return in_turn(ours, limit, effort.rounds)


if __name__ == "__main__":
    print(json.dumps(_start()))
