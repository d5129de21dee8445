import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

import actors.nats_connection as connection_module
from actors.nats_connection import (
    BadNatsUrl,
    ConnectionEvent,
    NatsConnection,
    NatsLost,
    NatsRefused,
    NatsUnreachable,
    parse_nats_url,
)
from tests.actors.nats_servers import (
    NatsServer,
    free_ports,
    nats_cluster,
    nats_server,
)
from tests.waiting import eventually

pytestmark = pytest.mark.servers

if TYPE_CHECKING:
    from actors.nats_client import NatsClient

SECRET = "s3cr3t-word"
LOGINS = f"""
authorization {{
  users: [
    {{ user: node, password: "{SECRET}" }}
    {{ user: guest, password: guest,
       permissions: {{ subscribe: ["open.>", "_INBOX.>"], publish: ["open.>"] }} }}
  ]
}}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as started:
        yield started


def connected(url: str, **more: Any) -> "closing[NatsConnection]":
    return closing(NatsConnection.open(parse_nats_url(url), **more))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nats:/x", "a NATS URL is nats://"),
        ("nats://", "names its servers"),
        ("nats://host:0", "its port must be 1 to 65535"),
        ("nats://host:99999", "its port must be 1 to 65535"),
        ("nats://host/path", "nothing may follow the first /"),
        ("nats://host?colour=red", "unknown option 'colour'"),
        ("nats://host?tls=maybe", "tls must be true or false"),
        ("nats://host?creds=", "option creds has no value"),
        ("nats://host?inbox=a.*", "inbox is no subject"),
        ("nats://host?nkey=a&nkey=b", "option nkey is given twice"),
        (f"nats://{SECRET}@host?token=b", "the token is given twice"),
        (f"nats://u:{SECRET}@host?creds=a", "user and creds are given"),
        (f"nats://u:{SECRET}:x/y@ho st", "names its servers"),
        (f"nats://u:{SECRET}/x", "its port must be 1 to 65535"),
        (f"nats://u:{SECRET}?x@host", "written %3F"),
        (f"nats://:{SECRET}@host", "before the @"),
        ("nats://host?tls_key=a", "tls_key is given without tls_cert"),
        ("nats://host?tls=false&tls_first=true", "tls is false"),
    ],
)
def test_a_wrong_url_is_refused_without_its_secret(url: str, message: str) -> None:
    with pytest.raises(BadNatsUrl, match=message) as refused:
        parse_nats_url(url)
    assert SECRET not in str(refused.value)


def test_a_url_shows_no_secret() -> None:
    url = parse_nats_url(
        f"nats://node:{SECRET}@one,two:5222/?replicas=3", more=("replicas",)
    )

    assert (url.user, url.password) == ("node", SECRET)
    assert str(url) == "nats://one:4222,two:5222"
    assert url.options == {"replicas": "3"}
    assert SECRET not in repr(url)
    assert parse_nats_url(f"nats://{SECRET}@one").token == SECRET


def test_a_file_that_is_not_there_is_refused() -> None:
    for option in ("creds", "nkey", "tls_ca", "tls_cert"):
        with pytest.raises(BadNatsUrl, match="there is no file /nowhere"):
            parse_nats_url(f"nats://host?{option}=/nowhere").check()


def test_nothing_of_nats_is_imported_before_a_connection() -> None:
    code = (
        "import sys, actors.nats_connection, actors.node, actors.main\n"
        "assert not [n for n in sys.modules if n.split('.')[0] == 'nats']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_missing_extra_is_named_with_what_installs_it() -> None:
    code = (
        "import sys; sys.modules['nats'] = None\n"
        "from actors.nats_connection import *\n"
        "try: NatsConnection.open(parse_nats_url('nats://127.0.0.1'))\n"
        "except MissingExtra as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert "pip install 'actor-placement[nats]'" in done.stdout


def test_frames_arrive_in_order_on_the_thread_of_the_connection(
    server: NatsServer,
) -> None:
    got: list[tuple[str, bytes, str]] = []
    with connected(server.url) as connection:
        connection.subscribe(
            "order.*",
            lambda subject, data: got.append(
                (subject, data, threading.current_thread().name)
            ),
        )
        sent = [b"%d" % number for number in range(2_000)]
        assert all(connection.publish("order.x", data) for data in sent)
        eventually(lambda: len(got) == len(sent))

    assert [data for _, data, _ in got] == sent
    assert {(subject, name) for subject, _, name in got} == {
        ("order.x", "nats-placement")
    }


@pytest.fixture
def all_by_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever publishes writes nothing itself."""
    monkeypatch.setattr(connection_module, "_LONELY_NS", 1 << 62)


def test_a_lonely_frame_goes_out_though_the_thread_is_busy(server: NatsServer) -> None:
    got: list[bytes] = []
    with connected(server.url) as connection, connected(server.url) as reader:
        reader.subscribe("lonely", lambda _, data: got.append(data))
        hold = threading.Event()
        connection.thread.soon(lambda: hold.wait(60))
        assert connection.publish("lonely", b"first")
        eventually(lambda: got == [b"first"])
        # These follow it closely: they go out together, by the loop.
        more = [b"%d" % number for number in range(100)]
        for data in (b"second", *more):
            assert connection.publish("lonely", data)
        hold.set()
        eventually(lambda: len(got) == 102)
        assert got == [b"first", b"second", *more]


@pytest.mark.usefixtures("all_by_the_loop")
def test_one_wake_up_hands_over_many_frames(server: NatsServer) -> None:
    packs: list[int] = []

    def pack(frames: Any, limit: int) -> Any:
        packs.append(len(frames))
        return [b"".join(frames)]

    with connected(server.url, pack=pack) as connection:
        hold = threading.Event()
        connection.thread.soon(lambda: hold.wait(60))
        for _ in range(500):
            assert connection.publish("many", b"x")
        hold.set()
        connection.flush()
    assert packs == [500]


@pytest.mark.usefixtures("all_by_the_loop")
def test_a_bug_on_the_way_out_loses_what_it_was_about_and_nothing_later(
    server: NatsServer,
) -> None:
    def pack(frames: Any, limit: int) -> Any:
        if b"bug" in frames:
            raise ZeroDivisionError
        return frames

    got: list[bytes] = []
    with connected(server.url, pack=pack) as connection:
        connection.subscribe("bug", lambda _, data: got.append(data))
        assert connection.publish("bug", b"bug")
        lost = "frames lost with their connection"
        eventually(lambda: connection.counts[lost] == 1)
        assert connection.publish("bug", b"after")
        eventually(lambda: got == [b"after"])


@pytest.mark.usefixtures("all_by_the_loop")
def test_a_full_outbound_buffer_is_a_failure_that_is_seen(server: NatsServer) -> None:
    with connected(server.url, outbound_bytes_max=1_000) as connection:
        events: list[ConnectionEvent] = []
        connection.listen(events.append)
        hold = threading.Event()
        connection.thread.soon(lambda: hold.wait(60))
        outcomes = [connection.publish("full", b"x" * 100) for _ in range(20)]
        hold.set()
        connection.flush()
        assert outcomes == [True] * 10 + [False] * 10
        assert connection.counts["frames refused: outbound buffer full"] == 10
        assert [event.name for event in events] == ["OutboundFull"]
        assert connection.publish("full", b"x" * 1_000)


def test_a_frame_that_the_server_does_not_take_is_lost_alone() -> None:
    with nats_server(more="max_payload: 1KB") as small:
        got: list[bytes] = []
        with connected(small.url) as connection:
            events: list[ConnectionEvent] = []
            connection.listen(events.append)
            connection.subscribe("size", lambda _, data: got.append(data))
            for data in (b"a", b"x" * 2_000, b"b"):
                assert connection.publish("size", data)
            eventually(lambda: got == [b"a", b"b"])
            assert [event.name for event in events] == ["OutboundLost"]


def test_what_a_slow_reader_has_not_come_to_waits_and_is_not_lost(
    server: NatsServer,
) -> None:
    with connected(server.url) as connection, connected(server.url) as sender:
        events: list[ConnectionEvent] = []
        got: list[bytes] = []
        hold = threading.Event()

        def received(_: str, data: bytes) -> None:
            got.append(data)
            hold.wait(60)

        connection.listen(events.append)
        connection.subscribe("slow", received)
        sent = [b"%d" % number for number in range(5_000)]
        for data in sent:
            assert sender.publish("slow", data)
        sender.flush()
        eventually(lambda: got)
        hold.set()
        eventually(lambda: len(got) == len(sent))
        assert got == sent
        assert events == []


def test_a_reader_too_slow_for_its_server_is_seen_and_heals() -> None:
    with (
        nats_server(
            more="max_payload: 200KB\nmax_pending: 200KB\nwrite_deadline: 1s"
        ) as small,
        connected(small.url) as connection,
        connected(small.url) as sender,
    ):
        names: list[str] = []
        got: list[bytes] = []
        hold = threading.Event()

        def received(_: str, data: bytes) -> None:
            got.append(data)
            hold.wait(60)

        connection.listen(lambda event: names.append(event.name))
        connection.subscribe("slow", received)
        # More than all sockets between them hold.
        for _ in range(400):
            eventually(lambda: sender.publish("slow", b"x" * 100_000))
        sender.flush()
        hold.set()
        eventually(lambda: "Reconnected" in names)
        assert "Disconnected" in names
        assert len(got) < 400
        got.clear()
        assert sender.publish("slow", b"after")
        eventually(lambda: got == [b"after"])


def test_one_who_raises_is_logged_and_hears_the_next_message(
    server: NatsServer,
) -> None:
    with connected(server.url) as connection:
        got: list[bytes] = []

        def received(_: str, data: bytes) -> None:
            got.append(data)
            raise RuntimeError("told")

        connection.subscribe("raise", received)
        for data in (b"1", b"2"):
            assert connection.publish("raise", data)
        eventually(lambda: got == [b"1", b"2"])
        assert connection.is_connected


def test_it_heals_by_itself_and_repeats_nothing(server: NatsServer) -> None:
    got: list[bytes] = []
    with nats_server() as mortal, connected(mortal.url) as connection:
        events: list[ConnectionEvent] = []
        connection.listen(events.append)
        connection.subscribe("heal", lambda _, data: got.append(data))
        assert connection.publish("heal", b"before")
        eventually(lambda: got == [b"before"])

        async def forever(_: "NatsClient") -> None:
            await asyncio.sleep(60)

        waiting = connection.submit(forever, timeout_s=60)
        mortal.kill()
        with pytest.raises(NatsLost) as lost:
            waiting.result(10)
        assert lost.value.may_have_happened
        assert not connection.publish("heal", b"meanwhile")
        with pytest.raises(NatsLost) as refused:
            connection.submit(forever, timeout_s=1).result(10)
        assert not refused.value.may_have_happened

        mortal.start()
        eventually(lambda: connection.is_connected)
        assert connection.publish("heal", b"after")
        eventually(lambda: got[-1] == b"after")
        assert got == [b"before", b"after"]
        names = [event.name for event in events if event.name != "ServerError"]
        assert names[0] == "Disconnected"
        eventually(lambda: events[-1].name == "Reconnected")


def test_it_is_connected_again_when_the_server_has_its_subscriptions(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    with connected(server.url) as connection:
        connection.subscribe("there", lambda *_: None)
        connection.listen(lambda event: done.append(event.name))
        flush = connection_module._flush

        async def flushed(client: "NatsClient", timeout_s: float) -> None:
            subjects = [each.subject for each in client._subs.values()]
            await flush(client, timeout_s)
            done.append(f"the server has {', '.join(subjects)}")

        monkeypatch.setattr(connection_module, "_flush", flushed)
        connection.thread.soon(lambda: connection._lose(connection.client))
        eventually(lambda: "Reconnected" in done)
    assert done == ["Disconnected", "the server has there", "Reconnected"]


@pytest.mark.usefixtures("all_by_the_loop")
def test_frames_go_out_again_though_the_last_ones_were_lost_before_they_could(
    server: NatsServer,
) -> None:
    got: list[bytes] = []
    with connected(server.url) as connection:
        connection.subscribe("again", lambda _, data: got.append(data))
        client = connection.client
        hold = threading.Event()
        connection.thread.soon(lambda: hold.wait(60))
        # What publishes it is ended before its first step.
        assert connection.publish("again", b"lost")
        connection.thread.soon(lambda: connection._lose(client))
        hold.set()
        eventually(lambda: connection.counts["Reconnected"] == 1)

        assert connection.publish("again", b"after")
        eventually(lambda: got)
        assert got == [b"after"]


def test_work_that_is_lost_before_its_first_step_surely_did_not_happen(
    server: NatsServer,
) -> None:
    async def work(_: "NatsClient") -> None:
        raise AssertionError("it began")

    with connected(server.url) as connection:
        client = connection.client
        hold = threading.Event()
        connection.thread.soon(lambda: hold.wait(60))
        done = connection.submit(work, timeout_s=60)
        connection.thread.soon(lambda: connection._lose(client))
        hold.set()
        with pytest.raises(NatsLost, match="there is no connection") as lost:
            done.result(30)
    assert not lost.value.may_have_happened


def test_a_server_that_stands_still_is_lost_and_close_is_bounded() -> None:
    with nats_server() as mortal:
        with connected(mortal.url) as connection:
            events: list[ConnectionEvent] = []
            connection.listen(events.append)
            mortal.signal(signal.SIGSTOP)
            eventually(lambda: "Disconnected" in [event.name for event in events])
        began_s = time.monotonic()
        with pytest.raises(NatsUnreachable):
            NatsConnection.open(parse_nats_url(mortal.url), timeout_s=0.5)
        assert time.monotonic() - began_s < 30
        mortal.signal(signal.SIGCONT)


def test_a_closed_connection_refuses_and_leaves_no_thread(server: NatsServer) -> None:
    connection = NatsConnection.open(parse_nats_url(server.url))
    connection.close()
    connection.close()

    assert not connection._thread.is_alive
    assert not connection.publish("x", b"x")
    with pytest.raises(NatsLost, match="closed"):
        connection.flush()


def test_an_absent_server_is_one_sentence() -> None:
    (port,) = free_ports(1)
    with pytest.raises(NatsUnreachable, match="Connection refused") as refused:
        NatsConnection.open(parse_nats_url(f"nats://u:{SECRET}@127.0.0.1:{port}"))
    assert SECRET not in str(refused.value)


def test_credentials_are_asked_for_and_never_shown() -> None:
    with nats_server(more=LOGINS) as guarded:
        place = guarded.url.removeprefix("nats://")
        for wrong in (f"nats://node:{SECRET}x@{place}", f"nats://{place}"):
            with pytest.raises(NatsRefused, match="refuses the credentials") as refused:
                NatsConnection.open(parse_nats_url(wrong))
            assert SECRET not in str(refused.value)
        with connected(f"nats://node:{SECRET}@{place}") as connection:
            assert connection.is_connected
            assert SECRET not in repr(connection) + repr(connection.url)


def test_a_subscription_that_is_not_permitted_is_refused() -> None:
    with nats_server(more=LOGINS) as guarded:
        place = guarded.url.removeprefix("nats://")
        with connected(f"nats://guest:guest@{place}") as connection:
            events: list[ConnectionEvent] = []
            connection.listen(events.append)
            connection.subscribe("open.Door", lambda *_: None)
            with pytest.raises(NatsRefused, match="not permitted to subscribe to Shut"):
                connection.subscribe("Shut", lambda *_: None)
            assert [event.name for event in events] == ["SubscriptionLost"]
            assert connection.publish("Shut", b"x")
            eventually(lambda: events[-1].name == "ServerError")
            assert "permissions violation for publish" in events[-1].reason


def test_the_loss_of_one_server_of_three_is_survived() -> None:
    with nats_cluster() as servers:
        url = ",".join(f"127.0.0.1:{server.port}" for server in servers)
        got: list[bytes] = []
        with connected(f"nats://{url}") as connection:
            connection.subscribe("three", lambda _, data: got.append(data))
            port = connection.client.connected_url.port  # type: ignore[union-attr]
            next(server for server in servers if server.port == port).kill()
            eventually(lambda: not connection.is_connected)
            eventually(lambda: connection.is_connected)
            assert connection.publish("three", b"x")
            eventually(lambda: got == [b"x"])


def test_a_server_that_refuses_and_closes_at_once_is_heard() -> None:
    info = b'INFO {"server_id":"x","version":"2.15.0","max_payload":1048576}\r\n'
    read: list[bytes] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(info)
                read.append(peer.recv(4_096))
                peer.sendall(b"-ERR 'Authorization Violation'\r\n")
            # Whatever comes now is answered with a reset.

        server = threading.Thread(target=serve)
        server.start()
        url = parse_nats_url(f"nats://127.0.0.1:{listener.getsockname()[1]}")

        with pytest.raises(NatsRefused, match="refuses the credentials"):
            NatsConnection.open(url)

        server.join()
    assert read[0].startswith(b"CONNECT ")
    assert read[0].endswith(b"PING\r\n")
