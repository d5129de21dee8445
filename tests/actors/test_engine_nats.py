import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import actors.engine_nats as engine_module
from actors.engine import Settings
from actors.engine_nats import BUCKET, ClusterRecord, NatsEngine
from actors.engine_url import BadEngine, open_engine
from actors.nats_connection import (
    BadNatsUrl,
    NatsConnection,
    NatsRefused,
    NatsUnreachable,
    parse_nats_url,
)
from actors.node import PlacementNode
from actors.store_memory import BadStore, MemoryStore
from placement.errors import PlacementError
from placement.event import Event
from tests.actors.actors_under_test import Echo
from tests.actors.nats_servers import (
    NatsServer,
    free_ports,
    nats_cluster,
    nats_server,
)
from tests.waiting import eventually

pytestmark = pytest.mark.servers

SECRET = "s3cr3t-word"


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as started:
        yield started


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)[:60]


@contextmanager
def nodes_over(
    url: str, names: str, settings: Settings
) -> Iterator[dict[str, PlacementNode]]:
    """A node for each letter, each on an engine of its own; c is a client."""
    store = MemoryStore()
    with ExitStack() as stack:
        made = {}
        for name in names:
            engine = NatsEngine(url, store, settings=settings)
            stack.callback(engine.close)
            node = PlacementNode(
                name, kinds={"echo": Echo}, engine=engine, settings=settings
            )
            # Not in good order: a node that leaves so stays for a while.
            stack.callback(node.kill)
            made[name] = node
        for name, node in made.items():
            if name == "c":
                node.start_client()
            else:
                node.start_member()
        members = [node for name, node in made.items() if name != "c"]
        eventually(
            lambda: all(
                len(node.topology.members) == len(members) for node in made.values()
            )
        )
        yield made


def test_r1_4_nodes_of_many_processes_are_one_cluster(
    server: NatsServer, cluster: str
) -> None:
    settings = Settings(cluster=cluster, ttl=5.0)
    with nodes_over(server.url, "abc", settings) as nodes:
        client = nodes["c"]
        for number in range(100):
            assert client.ref(f"echo/{number}").ask({"n": number}) == {"n": number}
            resolution = client.resolve(f"echo/{number}")
            assert nodes["a"].resolve(f"echo/{number}").pid == resolution.pid
        hosted = {name: len(nodes[name].snapshot().activations) for name in "ab"}
        assert sum(hosted.values()) == 100
        assert min(hosted.values()) > 10


def test_a_node_that_leaves_loses_no_message(server: NatsServer, cluster: str) -> None:
    settings = Settings(cluster=cluster, ttl=5.0)
    with nodes_over(server.url, "abc", settings) as nodes:
        client, failures = nodes["c"], []
        asked = 0
        stop = threading.Event()

        def ask_on() -> None:
            nonlocal asked
            while not stop.is_set():
                futures = [
                    client.ref(f"echo/{number}").ask(number, block=False)
                    for number in range(50)
                ]
                for number, future in enumerate(futures):
                    try:
                        assert future.get(timeout=20) == number
                    except PlacementError as error:
                        failures.append(error)
                asked += 1

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(ask_on)
            eventually(lambda: asked > 3)
            nodes["a"].stop()
            before = asked
            eventually(lambda: asked > before + 3)
            stop.set()
            done.result()
        assert failures == []
        assert len(nodes["b"].snapshot().activations) == 50


def test_who_knows_of_no_leave_yet_gets_its_messages_back(
    server: NatsServer, cluster: str
) -> None:
    settings = Settings(cluster=cluster, ttl=5.0)
    with nodes_over(server.url, "abc", settings) as nodes:
        client = nodes["c"]
        for number in range(50):
            assert client.ref(f"echo/{number}").ask(number) == number
        left = nodes["a"].session
        assert left is not None
        hold = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            # The client reads no members meanwhile.
            client._engine._lanes[1].post(hold.wait, 60)  # type: ignore[attr-defined]
            stopped = pool.submit(nodes["a"].stop)
            eventually(lambda: nodes["a"].has_left)
            assert left in client.topology
            futures = [
                client.ref(f"echo/{number}").ask(number, timeout=20, block=False)
                for number in range(50)
            ]
            hold.set()
            assert [each.get(timeout=20) for each in futures] == list(range(50))
            stopped.result()
        for number in range(50):
            assert client.ref(f"echo/{number}").ask(number, timeout=20) == number


def test_what_a_node_gives_back_after_others_know_that_it_has_left_is_not_lost(
    server: NatsServer, cluster: str
) -> None:
    settings = Settings(cluster=cluster, ttl=5.0)
    with nodes_over(server.url, "abc", settings) as nodes:
        client, leaver = nodes["c"], nodes["a"]
        for number in range(50):
            assert client.ref(f"echo/{number}").ask(number) == number
        left = leaver.session
        assert left is not None
        hold, reads = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            client._engine._lanes[1].post(reads.wait, 60)  # type: ignore[attr-defined]
            stopped = pool.submit(leaver.stop)
            eventually(lambda: leaver.has_left)
            # What is sent there now is taken in when the client knows better.
            leaver._engine.system.post(hold.wait, 60)
            futures = [
                client.ref(f"echo/{number}").ask(number, timeout=20, block=False)
                for number in range(50)
            ]
            reads.set()
            eventually(lambda: left not in client.topology)
            # Nothing that is said later goes before it.
            later = client.ref("echo/1").ask("later", timeout=20, block=False)
            hold.set()
            assert [each.get(timeout=20) for each in futures] == list(range(50))
            assert later.get(timeout=20) == "later"
            stopped.result()


def test_r2_5_a_killed_node_is_taken_over_after_its_time_to_live(
    server: NatsServer, cluster: str
) -> None:
    settings = Settings(cluster=cluster, ttl=1.0)
    with nodes_over(server.url, "abc", settings) as nodes:
        client = nodes["c"]
        tokens = {
            number: client.resolve(f"echo/{number}").fencing_token
            for number in range(40)
        }
        dead = nodes["a"].session
        assert dead is not None
        nodes["a"].kill()
        eventually(lambda: dead not in client.topology)
        for number, token in tokens.items():
            assert client.ref(f"echo/{number}").ask(number) == number
            assert client.resolve(f"echo/{number}").fencing_token >= token
        assert len(nodes["b"].snapshot().activations) == 40


def test_a_cluster_goes_on_when_its_server_has_been_away(cluster: str) -> None:
    settings = Settings(cluster=cluster, ttl=1.0)
    with (
        nats_server() as mortal,
        nodes_over(mortal.url, "abc", settings) as nodes,
    ):
        events: list[Event] = []
        nodes["a"].events.subscribe(events.append)
        assert nodes["c"].ref("echo/1").ask(1) == 1
        mortal.kill()
        eventually(lambda: "SessionLapsed" in [event.name for event in events])
        assert "NatsDisconnected" in [event.name for event in events]
        mortal.start()
        eventually(lambda: "NatsReconnected" in [event.name for event in events])
        for number in range(20):
            assert nodes["c"].ref(f"echo/{number}").ask(number, timeout=20) == number


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"ttl": 3.0}, "its ttl is 2 s, not 3 s"),
        ({"partitions": 64}, "its partitions is 4096, not 64"),
    ],
)
def test_a_node_with_other_settings_is_refused_with_the_difference(
    server: NatsServer, cluster: str, other: dict[str, float], message: str
) -> None:
    NatsEngine(
        server.url, MemoryStore(), settings=Settings(cluster=cluster, ttl=2.0)
    ).close()
    before = set(threading.enumerate())
    settings = Settings(**{"cluster": cluster, "ttl": 2.0, **other})  # type: ignore[arg-type]
    with pytest.raises(BadEngine, match=message):
        NatsEngine(server.url, MemoryStore(), settings=settings)
    assert set(threading.enumerate()) <= before

    adopting = NatsEngine(server.url, MemoryStore(), settings=settings, adopts=True)
    adopting.close()
    assert (adopting.settings.ttl, adopting.settings.partitions) == (2.0, 4096)


def test_another_protocol_version_is_never_adopted(
    server: NatsServer, cluster: str
) -> None:
    engine = NatsEngine(server.url, MemoryStore(), settings=Settings(cluster="first"))
    engine.close()
    connection = NatsConnection.open(parse_nats_url(server.url))
    try:
        record = ClusterRecord(
            cluster=cluster, protocol=99, partitions=4096, ttl_ms=5_000
        )

        async def write(client: "object") -> None:
            import msgspec  # noqa: PLC0415

            from actors.transport_nats import token_of  # noqa: PLC0415

            js = client.jetstream()  # type: ignore[attr-defined]
            bucket = await js.key_value(BUCKET)
            await bucket.put(token_of(cluster), msgspec.json.encode(record))

        connection.call(write, timeout_s=5)
    finally:
        connection.close()
    with pytest.raises(BadEngine, match="its protocol version is 99, not 1"):
        NatsEngine(
            server.url, MemoryStore(), settings=Settings(cluster=cluster), adopts=True
        )


def test_of_many_first_nodes_one_writes_what_all_have(
    server: NatsServer, cluster: str
) -> None:
    def start(number: int) -> str:
        settings = Settings(cluster=cluster, ttl=1.0 + number)
        try:
            NatsEngine(server.url, MemoryStore(), settings=settings).close()
        except BadEngine as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(start, range(8)))
    assert outcomes.count("") == 1
    assert len(set(outcomes)) == 8


def test_a_cluster_of_three_servers_keeps_what_it_shares_three_times(
    cluster: str,
) -> None:
    with nats_cluster() as servers:
        url = "nats://" + ",".join(f"127.0.0.1:{each.port}" for each in servers)
        settings = Settings(cluster=cluster)
        NatsEngine(url, MemoryStore(), settings=settings).close()
        connection = NatsConnection.open(parse_nats_url(url))
        try:

            async def replicas(client: "object") -> int:
                js = client.jetstream()  # type: ignore[attr-defined]
                info = await js.stream_info(f"KV_{BUCKET}")
                return int(info.config.num_replicas)

            assert connection.call(replicas, timeout_s=5) == 3
        finally:
            connection.close()
        servers[0].kill()
        NatsEngine(url, MemoryStore(), settings=settings).close()


def no_peers_for(
    count: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers see too few others, `count` times; what was wanted is written down."""
    import nats.js.client  # noqa: PLC0415  as the engine has it
    import nats.js.errors  # noqa: PLC0415

    context = nats.js.client.JetStreamContext
    create = context.create_key_value

    async def create_or_refuse(self: Any, **config: Any) -> Any:
        wanted.append(config["replicas"])
        if len(wanted) <= count:
            raise nats.js.errors.BadRequestError(
                code=400, err_code=10005, description="no suitable peers"
            )
        return await create(self, **config)

    monkeypatch.setattr(context, "create_key_value", create_or_refuse)


def test_servers_that_do_not_see_each_other_yet_are_asked_again(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[int] = []
    no_peers_for(3, wanted, monkeypatch)
    with nats_server() as alone:
        NatsEngine(alone.url, MemoryStore(), settings=Settings(cluster=cluster)).close()
    # Only the server itself, which is alone, says that one is enough.
    assert wanted == [3, 3, 3, 3, 1]


def test_servers_that_never_see_each_other_are_said_to_be_too_few(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_AGREE_S", 0.2)
    no_peers_for(1_000, [], monkeypatch)
    with nats_server() as alone, pytest.raises(NatsUnreachable, match="no suitable"):
        NatsEngine(alone.url, MemoryStore(), settings=Settings(cluster=cluster))


def test_a_server_without_jetstream_is_refused() -> None:
    with (
        nats_server(jetstream=False) as plain,
        pytest.raises(BadEngine, match="JetStream is off"),
    ):
        NatsEngine(plain.url, MemoryStore(), settings=Settings())


@pytest.mark.parametrize(
    ("engine", "store", "refusal", "message"),
    [
        ("nats", None, BadEngine, "an engine is a URL"),
        ("http://host", None, BadEngine, "unknown engine 'http'"),
        ("nats://h:x", None, BadNatsUrl, "its port must be"),
        ("nats://127.0.0.1", "memory://", BadStore, "is of one process"),
    ],
)
def test_what_cannot_be_an_engine_is_refused_before_anything_is_opened(
    engine: str, store: str | None, refusal: type[Exception], message: str
) -> None:
    with pytest.raises(refusal, match=message):
        PlacementNode("a", engine=engine, store=store)


def test_a_server_that_is_absent_or_refuses_is_one_sentence() -> None:
    (port,) = free_ports(1)
    with pytest.raises(NatsUnreachable, match="Connection refused"):
        open_engine(f"nats://u:{SECRET}@127.0.0.1:{port}", None, Settings())
    login = f'authorization {{ user: u, password: "{SECRET}" }}'
    with nats_server(more=login) as guarded:
        wrong = guarded.url.replace("//", "//u:wrong@")
        with pytest.raises(NatsRefused, match="refuses the credentials"):
            open_engine(wrong, None, Settings())


def test_a_permission_that_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # The server answers nothing; what it says besides is looked at after that.
    monkeypatch.setattr(engine_module, "_ANSWER_S", 0.5)
    login = """
    authorization { users: [ { user: u, password: p, permissions: {
        publish: ["placement.>"], subscribe: [">"] } } ] }
    """
    with nats_server(more=login) as guarded:
        url = guarded.url.replace("//", "//u:p@")
        with pytest.raises(NatsRefused, match=r"publish to .\$js\.api"):
            NatsEngine(url, MemoryStore(), settings=Settings())


def test_processes_of_one_machine_share_a_sqlite_store(
    server: NatsServer, cluster: str, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path}/shared.db"
    code = (
        "import sys\n"
        "from actors.node import PlacementNode\n"
        "from tests.actors.actors_under_test import Echo\n"
        f"with PlacementNode('other', kinds={{'echo': Echo}}, engine={server.url!r},\n"
        f"    store={store!r}, cluster={cluster!r}) as node:\n"
        "    node.start_member()\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with PlacementNode(
            "here",
            kinds={"echo": Echo},
            engine=server.url,
            store=store,
            cluster=cluster,
        ) as node:
            node.start_member()
            owners = set()
            for number in range(50):
                assert node.ref(f"echo/{number}").ask(number) == number
                owners.add(node.resolve(f"echo/{number}").pid.node)
            assert owners == {"here", "other"}
        other.stdin.close()
        assert other.wait(20) == 0
