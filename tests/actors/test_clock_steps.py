"""The clock of one host steps; what is told by the date is told to people only."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from actors.nats_connection import NatsConnection, parse_nats_url
from actors.transport_nats import subject_of
from actors.witness import FileWitness
from placement.topology import Address, SessionId, address_of
from tests.actors.nats_servers import NatsServer, nats_server
from tests.actors.node_processes import (
    Process,
    counts_in,
    ended,
    placement,
    requests_in,
)
from tests.actors.system_needs import lacking
from tests.waiting import eventually

pytestmark = [pytest.mark.servers, pytest.mark.long]

HOUR_S = 3_600
WITHIN_S = 240.0
CLOCKS = """
import time
print(time.clock_gettime(time.CLOCK_REALTIME), time.clock_gettime(time.CLOCK_BOOTTIME),
    time.clock_gettime(time.CLOCK_MONOTONIC), time.monotonic(), time.time())
"""


class Clock:
    """The date of one process, in seconds from the true one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.step(0)
        self.env = {
            "LD_PRELOAD": str(faking_library()),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            # Clocks that only go on are no dates: nobody can set those.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def step(self, seconds: int) -> None:
        """Be so far from the true date from now on."""
        part = self._file.with_suffix(".part")
        part.write_text(f"{seconds:+d}s\n")
        part.replace(self._file)


def faking_library() -> Path:
    """Debian's libfaketime, that of programs with threads."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        lacking("clocks that step need libfaketime (Debian: apt-get install faketime)")
    return found[0]


def test_the_faked_date_is_no_other_clock(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    for seconds in (HOUR_S, -HOUR_S):
        clock.step(seconds)
        before = (time.clock_gettime(time.CLOCK_BOOTTIME), time.monotonic())
        done = subprocess.run(
            [sys.executable, "-c", CLOCKS],
            env={**os.environ, **clock.env},
            capture_output=True,
            text=True,
            check=True,
        )
        date, boot, monotonic, also_monotonic, also_date = map(
            float, done.stdout.split()
        )
        assert before[0] <= boot <= time.clock_gettime(time.CLOCK_BOOTTIME)
        assert before[1] <= monotonic <= also_monotonic <= time.monotonic()
        assert abs(date - seconds - time.time()) < HOUR_S / 2
        assert abs(also_date - date) < HOUR_S / 2


def members(where: list[str]) -> dict[str, Any]:
    """Who the members are, and what each owns."""
    done = placement("status", *where, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    del found["observed_at_ms"]
    return found


def assert_dates(server: NatsServer, node: Process, seconds: int) -> None:
    """Have `node` say something: it dates it so far from now."""
    to, sender = address_of(SessionId(str(node.ready()["session"]))), Address("x.1")
    began = len(node.err)
    with closing(NatsConnection.open(parse_nats_url(server.url))) as stranger:
        subject = subject_of("default", to, sender, is_node=False)
        assert stranger.publish(subject, b"no frame")
        stranger.flush()
        eventually(lambda: "FrameRefused" in node.err[began:])
    said = [line for line in node.err[began:].splitlines() if "FrameRefused" in line]
    at = datetime.fromisoformat(json.loads(said[0])["at"]).timestamp()
    assert abs(at - seconds - time.time()) < HOUR_S / 2


def test_an_hour_more_or_less_on_one_host_changes_nothing(tmp_path: Path) -> None:
    requests = requests_in(tmp_path / "requests", 100, 100)
    report, witness = tmp_path / "report", tmp_path / "witness"
    clock = Clock(tmp_path / "clock")
    with nats_server() as server:
        where = ["--engine", server.url]
        nodes = [
            Process(
                tmp_path,
                name,
                *("node", name, *where, "--json", "--verbose", "--kind", "file"),
                *("--witness", str(witness)),
                env=clock.env if name == "node-1" else None,
            )
            for name in ("node-1", "node-2", "node-3")
        ]
        run = Process(
            tmp_path,
            "run",
            *("run", str(requests), *where, "--json", "--report", str(report)),
        )
        with ended(run, *nodes):
            for node in nodes:
                node.launch()
            for node in nodes:
                node.await_ready()
            status = members(where)
            run.launch()
            for number, seconds in enumerate((HOUR_S, -HOUR_S, 0), start=1):
                eventually(
                    lambda: witness.read_text().count('"handled"') > number * 1_000,  # noqa: B023
                    WITHIN_S,
                )
                clock.step(seconds)
                # It lives by that date: so much is told to people.
                assert_dates(server, nodes[0], seconds)
            assert run.wait(WITHIN_S) == 0, run.err
            found: Any = json.loads(run.out)
            assert (found["answered"], found["failed"]) == (100 * 100, 0)
            assert members(where) == status
            assert [node.ready()["session"] for node in nodes] == sorted(
                status["partitions"]
            )
    assert set(counts_in(report).values()) == {100}
    seen = FileWitness(witness)
    assert seen.double_count == 0
    # None has moved: each was started once.
    assert seen.activation_count == seen.identity_count
