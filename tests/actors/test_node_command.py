import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Self, cast

import pytest
from click.testing import CliRunner

from actors import Grain, client_command
from actors.client_command import ask_command, entry_to
from actors.engine import Settings
from actors.nats_connection import NatsConnection, parse_nats_url
from actors.node import PlacementNode
from actors.node_command import Asked, _leave
from actors.witness import BadWitness, FileWitness
from placement.errors import NotReady, PlacementError
from tests.actors.nats_servers import (
    NatsServer,
    free_ports,
    nats_cluster,
    nats_server,
)
from tests.actors.node_processes import (
    Process,
    counts_in,
    ended,
    placement,
    requests_in,
)
from tests.waiting import eventually

pytestmark = pytest.mark.servers

SECRET = "s3cr3t-word"
ECHO = "echo=tests.actors.actors_under_test:Echo"
STUCK = "stuck=tests.actors.test_node_command:Stuck"
#: Who leaves stays for about as long, since others learn of it when they renew.
LEAVES_SOON = ("--renew-every", "0.2")


class Stuck(Grain):
    """Does not come back from its turn."""

    def on_receive(self, message: Any) -> Any:
        threading.Event().wait()


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as started:
        yield started


class Place:
    """A cluster's place: a server, a store, a witness file, and its processes."""

    def __init__(
        self,
        server: NatsServer,
        folder: Path,
        cluster: str,
        *,
        store: str | None = None,
    ) -> None:
        self.server = server
        #: Little only where a session is to be over.
        self.ttl_s = 5
        self.folder = folder
        self.store = store
        self.witness = folder / "witness"
        self.cluster = cluster
        self.where = ["--engine", server.url, "--cluster", cluster]
        if store is not None:
            self.where += ["--store", store]

    def node(self, name: str, *more: str, kinds: tuple[str, ...] = ()) -> Process:
        args = ["node", name, *self.where, "--ttl", str(self.ttl_s), "--json"]
        args += ["--witness", str(self.witness), *more]
        for kind in kinds or ("file", ECHO):
            args += ["--kind", kind]
        return Process(self.folder, name, *args)

    @contextmanager
    def nodes(self, count: int) -> Iterator[list[Process]]:
        made = [self.node(f"node-{number}") for number in range(1, count + 1)]
        with ended(*made):
            for each in made:
                each.launch()
            for each in made:
                each.await_ready()
            yield made

    @contextmanager
    def under_way(
        self, requests: Path, *more: str, handled: int = 1_000
    ) -> Iterator[Process]:
        """A run of the command, of which so many messages have been handled.

        It stands still, with its window of messages on their way, until it is let go.
        """
        args = ["run", str(requests), *self.where, "--json", *more]
        run = Process(self.folder, "run", *args)
        with ended(run):
            run.launch()
            eventually(lambda: self.handled_count() > handled)
            run.signal(signal.SIGSTOP)
            assert self.handled_count() < len(requests.read_text().splitlines())
            yield run

    def handled_count(self) -> int:
        return self.witness.read_text().count('"handled"')

    @contextmanager
    def entry(self) -> Iterator[PlacementNode]:
        with entry_to(
            self.server.url, self.store, Settings(cluster=self.cluster)
        ) as node:
            yield node

    def double_count(self) -> int:
        return FileWitness(self.witness).double_count


def store_in(folder: Path, kind: str) -> str | None:
    """The store of that kind; none: the engine's own."""
    return None if kind == "nats" else f"sqlite:///{folder}/shared.db"


@pytest.fixture(params=["nats", pytest.param("sqlite", marks=pytest.mark.long)])
def store_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place_of_both(
    server: NatsServer,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    store_kind: str,
) -> Place:
    name = f"{store_kind}-{request.node.originalname}"[:60]
    return Place(server, tmp_path, name, store=store_in(tmp_path, store_kind))


@pytest.fixture
def place(server: NatsServer, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(server, tmp_path, str(request.node.name)[:60])


# --- one node ---


def test_a_node_says_that_it_is_ready_serves_and_leaves_on_sigterm(
    place: Place,
) -> None:
    ready_file = place.folder / "ready"
    node = place.node("one", "--ready-file", str(ready_file), *LEAVES_SOON)
    with ended(node):
        node.start()
        found = node.ready()
        assert found["ready"] == "one"
        assert found["pid"] == node.pid
        eventually(ready_file.exists)
        assert json.loads(ready_file.read_text()) == found

        asked = placement("ask", "echo/1", '{"n": 1}', *place.where, "--json")
        answer = json.loads(asked.stdout)
        token = answer["fencing_token"]
        assert answer == {
            "answer": {"n": 1},
            "owner": found["session"],
            "fencing_token": token,
        }
        resolved = json.loads(
            placement("resolve", "echo/1", *place.where, "--json").stdout
        )
        assert resolved["pid"] == f"echo/1@{found['session']}/{token}"
        told = placement("tell", "echo/1", "2", *place.where)
        assert told.returncode == 0
        status = json.loads(placement("status", *place.where, "--json").stdout)
        assert status["members"] == ["one"]
        assert status["partitions"] == {found["session"]: 4096}
        assert status["nodes"]["one"]["kinds"] == ["echo", "file"]

        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        assert node.out.splitlines() == [json.dumps(found)]
        assert node.err == ""
        assert not ready_file.exists()
    status = json.loads(placement("status", *place.where, "--json").stdout)
    assert status["members"] == []
    assert place.double_count() == 0
    assert FileWitness(place.witness).handled_by == {"one": 2}


def test_a_refusal_is_an_object_with_its_reason_and_exit_code_1(place: Place) -> None:
    with place.nodes(1):
        refused = placement("ask", "nobody/1", *place.where, "--json")
        assert refused.returncode == 1
        assert json.loads(refused.stdout)["error"] == "NoAuthority"
        failed = placement("ask", "file/1", *place.where)
        assert failed.returncode == 1
        assert failed.stdout == ""
        assert "a tally counts requests with an id" in failed.stderr
        wrong = placement("ask", "echo/1", "{no json", *place.where)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.count("\n") == 1


def test_an_answer_is_printed_also_where_its_owner_has_gone_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gone:
        """A node that has an answer, and knows of no owner any more."""

        def ref(self, identity: str) -> "Gone":
            return self

        def ask(self, message: Any, *, request_id: str) -> Any:
            return message

        def peek(self, identity: str) -> None:
            return None

        def resolve(self, identity: str) -> None:
            raise NotReady("nobody may be asked, and nothing started, for this")

    @contextmanager
    def entry(*_: object) -> Iterator[Gone]:
        yield Gone()

    monkeypatch.setattr(client_command, "_entry", entry)
    args = ["echo/1", "7", "--engine", "nats://h", "--json"]
    done = CliRunner().invoke(ask_command, args)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "answer": 7,
        "owner": None,
        "fencing_token": None,
    }


def test_a_node_whose_stop_raises_is_not_waited_for() -> None:
    class Broken:
        name = "one"
        has_left = False

        def stop(self, *, timeout: float) -> None:
            raise RuntimeError("a bug")

    assert not _leave(cast("PlacementNode", Broken()), Asked(), 30.0)


def test_a_second_sigterm_stops_at_once_and_says_so(place: Place) -> None:
    node = place.node("one", kinds=(STUCK,))
    with ended(node), ExitStack() as stack:
        node.start()
        entry = stack.enter_context(place.entry())
        entry.ref("stuck/1").tell(None)
        entry.resolve("stuck/1")
        eventually(lambda: '"started"' in place.witness.read_text())
        node.signal(signal.SIGTERM)
        with pytest.raises(Exception, match="timed out"):
            node.wait(1)
        began_s = time.monotonic()
        node.signal(signal.SIGTERM)
        assert node.wait(20) == 1
        assert time.monotonic() - began_s < 15
        assert "before all of it had ended" in node.err
        assert "Traceback" not in node.err


def test_a_node_logs_as_json_on_request(place: Place) -> None:
    node = place.node("one", "--verbose", *LEAVES_SOON)
    with ended(node):
        node.start().signal(signal.SIGTERM)
        assert node.wait() == 0
        lines = [json.loads(line) for line in node.err.splitlines()]
    assert "TopologyAdopted" in [line["event"] for line in lines]
    assert {line["level"] for line in lines} == {"info"}
    assert all(line["at"] for line in lines)


# --- what is wrong ---


def assert_is_one_sentence(done: Any, message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert SECRET not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--engine", "nats"], "an engine is a URL"),
        (["--engine", "http://h"], "unknown engine"),
        (["--engine", f"nats://u:{SECRET}@h/x"], "nothing may follow"),
        (["--engine", "nats://h?tls_ca=/nowhere"], "there is no file /nowhere"),
        (["--engine", "nats://h", "--store", "memory://"], "is of one process"),
        (["--engine", "nats://h", "--store", "what://"], "unknown scheme"),
        (["--engine", "nats://h", "--ttl", "0"], "ttl must be"),
        (["--engine", "nats://h", "--cluster", "a b"], "cluster must be"),
        (["--engine", "nats://h?cluster=a"], "names no cluster"),
        (["--engine", "nats://h?replicas=x"], "replicas"),
        (["--engine", "nats://h", "--kind", "a=nowhere:A"], "cannot be imported"),
        (["--engine", "nats://h", "--kind", "a b"], "--kind 'a b'"),
        (["--engine", "nats://h", "--witness", "/nowhere/w"], "/nowhere/w"),
    ],
)
def test_bad_input_of_a_node_is_one_sentence(args: list[str], message: str) -> None:
    assert_is_one_sentence(placement("node", "one", *args), message)


@pytest.mark.parametrize(
    "command",
    [
        ["node", "one", "--kind", "file"],
        ["ask", "file/1"],
        ["status", "--json"],
        ["run", "--json"],
    ],
)
def test_a_server_that_is_absent_or_refuses_is_one_sentence_everywhere(
    command: list[str], tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    store = ["--store", f"sqlite:///{tmp_path}/s.db"]
    absent = f"nats://u:{SECRET}@127.0.0.1:{port}"
    done = placement(*command, "--engine", absent, *store)
    assert_is_one_sentence(done, "Connection refused")
    login = 'authorization { user: u, password: "right" }'
    with nats_server(more=login) as guarded:
        wrong = guarded.url.replace("//", f"//u:{SECRET}@")
        done = placement(*command, "--engine", wrong, *store)
        assert_is_one_sentence(done, "refuses the credentials")
    with nats_server(jetstream=False) as plain:
        done = placement(*command, "--engine", plain.url, *store)
        assert_is_one_sentence(done, "JetStream is off")
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_other_settings_is_one_sentence(place: Place) -> None:
    with place.nodes(1):
        done = placement("node", "two", *place.where, "--ttl", "3")
        assert_is_one_sentence(done, "its ttl is 5 s, not 3 s")
        done = placement("node", "two", *place.where, "--partitions", "7")
        assert_is_one_sentence(done, "its partitions is 4096, not 7")


def test_a_cluster_that_is_not_there_is_one_sentence(place: Place) -> None:
    for command in (["status"], ["ask", "file/1"], ["run"]):
        done = placement(*command, *place.where)
        assert_is_one_sentence(done, "there is no cluster")


def test_a_missing_extra_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "nats.py").write_text("raise ModuleNotFoundError(name='nats')\n")
    done = placement(
        "node", "one", "--engine", "nats://h", env={"PYTHONPATH": str(tmp_path)}
    )
    assert_is_one_sentence(done, "pip install 'actor-placement[nats]'")


# --- many nodes ---


def test_three_processes_serve_and_the_witness_saw_no_double(
    place_of_both: Place,
) -> None:
    place = place_of_both
    with place.nodes(3):
        requests = requests_in(place.folder / "requests", 100, 10)
        report = place.folder / "report"
        done = placement(
            "run",
            str(requests),
            *place.where,
            *("--witness", str(place.witness), "--report", str(report), "--json"),
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["nodes"] == 3
        assert found["answered"] == 1_000
        assert found["failed"] == found["double_activations"] == 0
        assert found["activations"] == found["identities"] == 100
        assert sum(each["requests"] for each in found["per_node"].values()) == 1_000
        assert len([e for e in found["per_node"].values() if e["activations"]]) == 3
        assert set(counts_in(report).values()) == {10}

        again = placement("run", str(requests), *place.where, "--json")
        found = json.loads(again.stdout)
        assert found["double_activations"] is None
        assert found["answered"] == 1_000


def test_r2_5_a_process_killed_under_load_and_started_again_loses_no_count(
    place_of_both: Place,
) -> None:
    place = place_of_both
    place.ttl_s = 1
    requests = requests_in(place.folder / "requests", 300, 40)
    report = place.folder / "report"
    with place.nodes(3) as nodes:
        more = ("--witness", str(place.witness), "--report", str(report))
        with place.under_way(requests, *more) as run:
            nodes[0].kill()
            run.signal(signal.SIGCONT)
            nodes[0].start()  # at once, under the same name
            assert run.wait(120) == 0, run.err
            found = json.loads(run.out)
    assert found["failed"] == 0
    assert found["answered"] == 300 * 40
    assert found["double_activations"] == 0
    assert set(counts_in(report).values()) == {40}
    assert found["activations"] > 300


class Load:
    """A client that asks a hundred identities again and again, and notes what fails."""

    def __init__(self, place: Place) -> None:
        self.failures: list[PlacementError] = []
        self._rounds = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask_on)
        self._stack = ExitStack()
        self._entry = self._stack.enter_context(place.entry())

    def __enter__(self) -> Self:
        self._thread.start()
        self.await_rounds(3)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._stack.close()

    def await_rounds(self, count: int) -> None:
        until = self._rounds + count
        eventually(lambda: self._rounds >= until)

    def _ask_on(self) -> None:
        while not self._stop.is_set():
            futures = [
                self._entry.ref(f"echo/{number}").ask(number, block=False)
                for number in range(100)
            ]
            for number, future in enumerate(futures):
                try:
                    assert future.get(timeout=30) == number
                except PlacementError as error:
                    self.failures.append(error)
            self._rounds += 1


def test_a_node_drains_on_sigterm_without_a_failed_request(
    place_of_both: Place,
) -> None:
    place = place_of_both
    with place.nodes(3) as nodes, Load(place) as load:
        for node in nodes[:2]:
            node.signal(signal.SIGTERM)
            assert node.wait() == 0, node.err
            node.start()
            load.await_rounds(3)
    assert load.failures == []
    assert place.double_count() == 0


@pytest.mark.long
def test_a_server_killed_and_started_again_on_its_data_is_survived(
    tmp_path: Path, store_kind: str
) -> None:
    requests = requests_in(tmp_path / "requests", 200, 40)
    with nats_server() as mortal:
        store = store_in(tmp_path, store_kind)
        place = Place(mortal, tmp_path, "default", store=store)
        place.ttl_s = 1
        with place.nodes(3):
            witness = ("--witness", str(place.witness))
            with place.under_way(requests, *witness, handled=500) as run:
                mortal.kill()
                run.signal(signal.SIGCONT)
                mortal.start()
                assert run.wait(120) == 0, run.err
                found = json.loads(run.out)
            assert found["failed"] == found["double_activations"] == 0
            assert found["answered"] == 200 * 40


def test_r2_5_all_processes_killed_and_started_again_serve_what_was_stored(
    place_of_both: Place,
) -> None:
    place = place_of_both
    place.ttl_s = 1
    requests = requests_in(place.folder / "requests", 50, 4)
    report = place.folder / "report"
    with place.nodes(2) as nodes:
        assert placement("run", str(requests), *place.where).returncode == 0
        for node in nodes:
            node.kill()
        for node in nodes:
            node.launch()
        for node in nodes:
            node.await_ready()
        # The same requests again: their ids are counted already.
        done = placement("run", str(requests), *place.where, "--report", str(report))
        assert done.returncode == 0, done.stderr
        assert set(counts_in(report).values()) == {4}
    assert place.double_count() == 0


def test_r2_5_a_process_that_stood_still_handles_nothing_before_it_is_back(
    place_of_both: Place,
) -> None:
    place = place_of_both
    place.ttl_s = 1
    requests = requests_in(place.folder / "requests", 200, 60)
    report = place.folder / "report"
    with place.nodes(3) as nodes:
        more = ("--report", str(report), "--ask-timeout", "20")
        with place.entry() as entry, place.under_way(requests, *more) as run:
            eventually(lambda: len(entry.topology.members) == 3)
            nodes[0].signal(signal.SIGSTOP)
            stopped_s = time.monotonic()
            run.signal(signal.SIGCONT)
            # It stands still until the others have taken it for gone and begun to host
            # what it hosted, and for three times to live at least.
            eventually(
                lambda: (
                    nodes[0].name not in {each.node for each in entry.topology.members}
                )
            )
            eventually(lambda: time.monotonic() >= stopped_s + 3 * place.ttl_s)
            nodes[0].signal(signal.SIGCONT)
            assert run.wait(120) == 0, run.err
            # It is a member again, under another session.
            eventually(lambda: len(entry.topology.members) == 3)
            sessions = [str(member.session) for member in entry.topology.members]
            assert nodes[0].ready()["session"] not in sessions
    assert set(counts_in(report).values()) == {60}
    # One message, past the guard already, may have been under way.
    assert place.double_count() <= 1


@pytest.mark.long
def test_five_processes_start_anew_one_by_one_without_a_failed_request(
    place: Place,
) -> None:
    with place.nodes(5) as nodes, Load(place) as load:
        for node in nodes:
            node.signal(signal.SIGTERM)
            assert node.wait() == 0, node.err
            node.start()
            load.await_rounds(3)
    assert load.failures == []
    assert place.double_count() == 0


@pytest.mark.long
def test_the_leader_of_three_servers_dies_under_load(tmp_path: Path) -> None:
    requests = requests_in(tmp_path / "requests", 100, 60)
    report = tmp_path / "report"
    with nats_cluster() as servers:
        url = "nats://" + ",".join(f"127.0.0.1:{each.port}" for each in servers)
        place = Place(servers[0], tmp_path, "default")
        place.where[1] = url
        # Sessions are over before the store gives up: so what becomes of saves that
        # were on their way is unknown, and asked again, where others would fail.
        place.ttl_s = 1
        with place.nodes(3):
            more = ("--ask-timeout", "40", "--report", str(report))
            with place.under_way(requests, *more, handled=500) as run:
                leader = leader_of(url, "KV_placement_default")
                servers[int(leader[1:])].kill()
                run.signal(signal.SIGCONT)
                assert run.wait(150) == 0, run.err
    assert set(counts_in(report).values()) == {60}
    assert place.double_count() == 0


def leader_of(url: str, stream: str) -> str:
    async def ask(client: Any) -> str:
        info = await client.jetstream().stream_info(stream)
        return str(info.cluster.leader)

    with closing(NatsConnection.open(parse_nats_url(url))) as connection:
        return connection.call(ask, timeout_s=5)


def test_processes_that_share_no_truth_are_seen_as_doubles(place: Place) -> None:
    """The judge sees what is wrong: two stores, and so two owners of all."""
    other = Place(
        place.server,
        place.folder,
        place.cluster,
        store=f"sqlite:///{place.folder}/other.db",
    )
    one, two = place.node("one"), other.node("two")
    with ended(one, two), ExitStack() as stack:
        one.start()
        two.start()
        entries = [stack.enter_context(each.entry()) for each in (place, other)]
        for _ in range(3):
            for entry in entries:
                eventually(lambda: entry.topology.members)  # noqa: B023
                assert entry.ref("echo/1").ask(1) == 1
    assert place.double_count() > 0


def test_what_is_no_witness_is_refused_and_a_torn_line_is_not_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "witness"
    line = {
        "at_ns": 2,
        "what": "handled",
        "identity": "k/1",
        "session": "a.1#1",
        "fencing_token": 1,
    }
    started = {**line, "what": "started", "at_ns": 1}
    later = {**started, "fencing_token": 2, "session": "b.1#1", "at_ns": 3}
    late = {**line, "at_ns": 4}

    def judged(*lines: dict[str, Any], end: str = "") -> int:
        path.write_text("".join(json.dumps(each) + "\n" for each in lines) + end)
        return FileWitness(path).double_count

    assert judged(line, started, later, end='{"at_ns"') == 0
    assert judged(started, line, later, late) == 1
    assert judged(later, {**started, "at_ns": 5}) == 1
    with pytest.raises(BadWitness, match="line 1"):
        judged({"at_ns": 1})


# --- up ---


def test_up_starts_a_server_and_nodes_and_ctrl_c_stops_all(tmp_path: Path) -> None:
    data = tmp_path / "data"
    witness = str(tmp_path / "witness")
    up = Process(
        tmp_path,
        "up",
        *("up", "--nodes", "3", "--port", "0", "--json", "--data", str(data)),
        *("--witness", witness, *LEAVES_SOON),
    )
    with ended(up):
        up.start()
        found: Any = up.ready()
        assert sorted(found["nodes"]) == ["node-1", "node-2", "node-3"]
        done = placement(
            "run",
            str(requests_in(tmp_path / "requests", 30, 3)),
            *("--engine", found["ready"], "--witness", witness, "--json"),
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["answered"] == 90
        up.signal(signal.SIGINT)
        assert up.wait() == 0, up.err
        assert not any(Path(f"/proc/{pid}").exists() for pid in found["nodes"].values())
    assert FileWitness(Path(witness)).double_count == 0
    assert not list(data.glob("*.ports"))


def test_up_says_which_node_has_ended_and_goes_on(tmp_path: Path) -> None:
    up = Process(
        tmp_path,
        "up",
        *("up", "--nodes", "2", "--port", "0", "--json", "--ttl", "1"),
        *("--store", f"sqlite:///{tmp_path}/s.db"),
    )
    with ended(up):
        up.start()
        found: Any = up.ready()
        os.kill(found["nodes"]["node-1"], signal.SIGKILL)
        eventually(lambda: "node-1 has ended: exit code -9" in up.err)
        asked = placement(
            *("ask", "file/1", "1", "--request-id", "x:1", "--json"),
            *("--engine", found["ready"], "--store", f"sqlite:///{tmp_path}/s.db"),
        )
        assert asked.returncode == 0, asked.stderr
        up.signal(signal.SIGTERM)
        assert up.wait() == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nodes", "0"], "at least one node"),
        (["--ttl", "0"], "ttl must be"),
        (["--store", "what://"], "unknown scheme"),
        (["--store", "memory://"], "node-1 does not start"),
        (["--kind", "a=nowhere:A"], "cannot be imported"),
        (["--data", "/proc/nowhere"], "--data /proc/nowhere"),
    ],
)
def test_up_refuses_what_cannot_work(args: list[str], message: str) -> None:
    done = placement("up", "--port", "0", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_up_says_that_its_port_is_taken(server: NatsServer) -> None:
    done = placement("up", "--port", str(server.port))
    assert_is_one_sentence(done, "address already in use")
