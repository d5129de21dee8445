"""Node processes on hosts whose cables are cut, and over wires that carry badly."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.witness import FileWitness
from tests.actors.hosts import Hosts, network_hosts
from tests.actors.nats_servers import NatsServer, nats_server
from tests.actors.node_processes import (
    Process,
    counts_in,
    ended,
    placement,
    requests_in,
)
from tests.actors.postgres_server import PostgresServer
from tests.waiting import eventually

pytestmark = [pytest.mark.servers, pytest.mark.long]

WIRE = [sys.executable, "-m", "tests.actors.bad_wire"]
NATS_PORT, POSTGRES_PORT = 4222, 5432
WITHIN_S = 240.0


class Cabled:
    """Three nodes on hosts of their own; NATS and the store are in the hub."""

    def __init__(self, hosts: Hosts, folder: Path, schema: str) -> None:
        self.hosts, self.folder = hosts, folder
        self.witness = folder / "witness"
        nats, store = hosts.address("peers"), hosts.address("store")
        place = f"postgresql://postgres@{store}:{POSTGRES_PORT}/postgres"
        self.where = [
            *("--engine", f"nats://{nats}:{NATS_PORT}"),
            *("--store", f"{place}?schema={schema}"),
        ]
        self.nodes = [
            Process(
                folder,
                f"node-{number}",
                *("node", f"node-{number}", *self.where, "--json"),
                *("--kind", "file", "--witness", str(self.witness)),
                within=hosts.within(number),
            )
            for number in (1, 2, 3)
        ]

    def members(self) -> list[str]:
        """Who the members are, as a client in the hub is told."""
        done = placement("status", *self.where, "--json", within=self.hosts.hub)
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)["members"]
        return found

    def run(self, requests: Path, report: Path) -> Process:
        return Process(
            self.folder,
            "run",
            *("run", str(requests), *self.where, "--json", "--report", str(report)),
            *("--ask-timeout", "60"),
            within=self.hosts.hub,
        )

    def handled(self) -> int:
        return self.witness.read_text().count('"handled"')


@pytest.fixture
def cabled(postgres: PostgresServer, schema: str, tmp_path: Path) -> Iterator[Cabled]:
    with network_hosts(3) as hosts:
        server = NatsServer(
            tmp_path / "nats",
            port=NATS_PORT,
            host=hosts.address("peers"),
            within=hosts.hub,
        )
        wire = Process(
            tmp_path,
            "wire",
            *(hosts.address("store"), str(POSTGRES_PORT)),
            str(postgres.folder / ".s.PGSQL.5432"),
            within=hosts.hub,
            program=WIRE,
        )
        place = Cabled(hosts, tmp_path, schema)
        try:
            server.start()
            with ended(wire, *place.nodes):
                wire.start()
                for node in place.nodes:
                    node.launch()
                for node in place.nodes:
                    node.await_ready()
                yield place
        finally:
            server.kill()


@pytest.mark.parametrize("lane", ["peers", "store"])
def test_r2_5_a_node_that_is_cut_off_hosts_nothing_and_the_others_host_all(
    cabled: Cabled, lane: str
) -> None:
    """Cut off from its peers, not from the store; and the other way round."""
    requests = requests_in(cabled.folder / "requests", 200, 60)
    report = cabled.folder / "report"
    run = cabled.run(requests, report)
    with ended(run):
        run.launch()
        eventually(lambda: cabled.handled() > 1_000, WITHIN_S)
        cabled.hosts.cut(1, lane)
        assert cabled.handled() < 200 * 60
        # It is cut off until all is done, by the others: they serve what it had.
        eventually(lambda: cabled.members() == ["node-2", "node-3"], WITHIN_S)
        before = seen_of(cabled)
        assert run.wait(WITHIN_S) == 0, run.err
        found = json.loads(run.out)
        assert (found["answered"], found["failed"]) == (200 * 60, 0)
        assert set(counts_in(report).values()) == {60}
        assert cabled.members() == ["node-2", "node-3"]
        assert seen_of(cabled) == before

        cabled.hosts.heal(1, lane)
        every = ["node-1", "node-2", "node-3"]
        eventually(lambda: cabled.members() == every, WITHIN_S)
    new = requests_in(cabled.folder / "new", 300, 1)
    new.write_text(new.read_text().replace("file/", "file/new-"))
    done = placement("run", str(new), *cabled.where, within=cabled.hosts.hub)
    assert done.returncode == 0, done.stderr
    assert seen_of(cabled) > before
    assert FileWitness(cabled.witness).double_count == 0


def seen_of(cabled: Cabled) -> int:
    """How many messages node-1 has handled."""
    return FileWitness(cabled.witness).handled_by["node-1"]


def test_a_fifth_of_the_connections_lost_each_second_and_all_late_loses_nothing(
    tmp_path: Path,
) -> None:
    requests = requests_in(tmp_path / "requests", 60, 8)
    report, witness = tmp_path / "report", tmp_path / "witness"
    with nats_server() as server:
        target = server.url.removeprefix("nats://")
        wire = Process(
            tmp_path,
            "wire",
            *("127.0.0.1", "0", target, "0.1", "0.2", "7"),
            program=WIRE,
        )
        with ended(wire):
            url = f"nats://127.0.0.1:{wire.start().out.split()[1]}"
            nodes = [
                Process(
                    tmp_path,
                    name,
                    *("node", name, "--engine", url, "--json", "--kind", "file"),
                    *("--ttl", "10", "--witness", str(witness)),
                )
                for name in ("node-1", "node-2", "node-3")
            ]
            with ended(*nodes):
                for node in nodes:
                    node.launch()
                for node in nodes:
                    node.await_ready()
                run = Process(
                    tmp_path,
                    "run",
                    *("run", str(requests), "--engine", url, "--json"),
                    # Who lost an answer waits so long, and asks again by its id.
                    *("--ask-timeout", "8", "--report", str(report)),
                )
                with ended(run):
                    run.launch()
                    eventually(
                        lambda: witness.exists() and '"handled"' in witness.read_text(),
                        WITHIN_S,
                    )
                    # From now on: nobody starts who is not let in at first.
                    wire.signal(signal.SIGUSR1)
                    assert run.wait(2 * WITHIN_S) == 0, run.err
                    found = json.loads(run.out)
                    assert (found["answered"], found["failed"]) == (480, 0)
                assert wire.out.count("lost") > 3
    assert set(counts_in(report).values()) == {8}
    assert FileWitness(witness).double_count == 0
