import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import actors.transport_nats as transport_module
from actors.clock import SystemClock
from actors.dispatch import ThreadDispatcher
from actors.loop_thread import LoopDispatcher
from actors.nats_connection import NatsConnection, NatsRefused, parse_nats_url
from actors.postbox import CLIENTS_MAX, Postbox
from actors.transport import Origin
from actors.transport_nats import (
    NatsTransport,
    subject_of,
    text_of_token,
    token_of,
)
from messages.codec import BadFrame, Codec
from messages.frames import (
    AskOwner,
    Deliver,
    Frame,
    LoopBack,
    Mark,
    Marked,
    Resolve,
    Resolved,
    TopologyHint,
)
from messages.pack import pack
from placement.event import Happened
from placement.topology import Address
from tests.actors.nats_servers import NatsServer, nats_server
from tests.waiting import eventually

pytestmark = pytest.mark.servers

A, B, C = Address("node-1.a1"), Address("node 2.b2"), Address("client.c3")
HINT = TopologyHint(7)


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as started:
        yield started


class Process:
    """One connection with a transport, and the boxes on it."""

    def __init__(
        self,
        url: str,
        cluster: str = "default",
        *,
        is_on_loop: bool = False,
        **more: Any,
    ) -> None:
        self.connection = NatsConnection.open(parse_nats_url(url), pack=pack)
        self.dispatcher: ThreadDispatcher | LoopDispatcher
        if is_on_loop:
            self.dispatcher = LoopDispatcher(self.connection.thread, SystemClock())
        else:
            self.dispatcher = ThreadDispatcher("test-system", SystemClock())
        self.cluster = cluster
        self.transport = NatsTransport(
            self.connection, cluster, self.dispatcher, **more
        )
        self.got: list[tuple[Address, Frame]] = []
        self.happened: list[Happened] = []

    def box(self, address: Address, *, is_member: bool = True) -> Postbox:
        box = Postbox(
            cluster=self.cluster,
            address=address,
            transport=self.transport,
            dispatcher=self.dispatcher,
            handle=lambda sender, body: self.got.append((sender, body)),
            publish=self.happened.append,
        )
        box.open(is_member=is_member)
        return box

    def names(self) -> list[str]:
        return [each.name for each in self.happened]

    def close(self) -> None:
        if isinstance(self.dispatcher, LoopDispatcher):
            self.dispatcher.stop(5)
        self.connection.close()
        self.dispatcher.stop(5)


@contextmanager
def processes(count: int, url: str, **more: Any) -> Iterator[list[Process]]:
    made = [Process(url, **more) for _ in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.close()


@given(st.text(min_size=1, max_size=40))
def test_every_name_is_one_token_that_is_no_other_names(name: str) -> None:
    token = token_of(name)

    assert text_of_token(token) == name
    assert not set(token) & set(".*> \t\r\n")


@pytest.mark.parametrize("token", ["=zz", "=2", "=61", "a=ff", "=E9=", "", "ä"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(BadFrame):
        text_of_token(token)


def test_frames_arrive_with_their_sender_in_order_and_as_they_were(
    server: NatsServer,
) -> None:
    with processes(2, server.url) as (here, there):
        sender, _ = here.box(A), there.box(B)
        sent: list[Frame] = [Marked("k/x", 1, number) for number in range(3_000)]
        for frame in sent:
            assert sender.send(B, frame)
        eventually(lambda: len(there.got) == len(sent))

        assert there.got == [(A, frame) for frame in sent]
        assert there.happened == []
        assert there.transport._inbound_bytes == 0


@pytest.mark.parametrize("is_on_loop", [False, True])
def test_frames_alone_and_together_arrive_in_order_and_wait_no_longer(
    server: NatsServer, *, is_on_loop: bool
) -> None:
    with processes(2, server.url, is_on_loop=is_on_loop) as (here, there):
        sender, _ = here.box(A), there.box(B)
        sent: list[Frame] = []
        for burst in (1, 1, 100, 1, 2, 500, 1, 1, 1, 30) * 5:
            frames: list[Frame] = [
                Marked("k/x", 1, len(sent) + number) for number in range(burst)
            ]
            for frame in frames:
                assert sender.send(B, frame)
            sent.extend(frames)
            if burst == 1:
                # Nothing waits there then: the next one may come alone.
                eventually(lambda: len(there.got) == len(sent))
        eventually(lambda: len(there.got) == len(sent))

        assert there.got == [(A, frame) for frame in sent]
        assert there.happened == []
        eventually(lambda: there.transport._inbound_bytes == 0)


def test_small_frames_that_wait_together_are_one_message(server: NatsServer) -> None:
    with processes(2, server.url) as (here, there):
        sender, _ = here.box(A), there.box(B)
        hold = threading.Event()
        here.connection.thread.soon(lambda: hold.wait(60))
        for number in range(100):
            assert sender.send(B, Marked("k/x", 1, number))
        messages = here.connection.client.stats["out_msgs"]
        hold.set()
        eventually(lambda: len(there.got) == 100)

        assert here.connection.client.stats["out_msgs"] == messages + 1


def test_the_bytes_are_those_of_a_call_within_the_process(server: NatsServer) -> None:
    raw: list[bytes] = []
    with processes(1, server.url) as (here,):
        here.connection.subscribe(
            subject_of("default", B, A, is_node=True), lambda _, data: raw.append(data)
        )
        assert here.box(A).send(B, HINT)
        eventually(lambda: raw)
    assert raw == [Codec("default").encode(A, B, 1, HINT)]


def test_a_client_says_what_clients_say_and_is_answered(server: NatsServer) -> None:
    with processes(2, server.url) as (here, there):
        node, client = here.box(A), there.box(C, is_member=False)
        said: list[Frame] = [
            Resolve(1, "k/x", 0, 10),
            Deliver("k/x", 1, 1, None, "", 10, ()),
            Mark("k/x", 1, 1),
        ]
        for frame in said:
            assert client.send(A, frame)
        eventually(lambda: len(here.got) == len(said))
        assert node.send(C, Resolved(1, "k/x", f"{A}#1", 1))
        eventually(lambda: there.got)

        assert here.got == [(C, frame) for frame in said]
        assert there.got == [(A, Resolved(1, "k/x", f"{A}#1", 1))]


def test_a_client_that_speaks_as_a_node_is_refused_counted_and_named(
    server: NatsServer,
) -> None:
    with processes(2, server.url) as (here, there):
        here.box(A)
        client = there.box(C, is_member=False)
        assert client.send(A, AskOwner("k/x", f"{A}#1", 1, 1))
        assert client.send(A, LoopBack(1))
        eventually(lambda: len(here.happened) == 2)

        assert here.names() == ["FrameRefused"] * 2
        assert "is a client, and may not say that" in here.happened[0].reason
        assert here.got == []


def test_who_speaks_as_another_is_refused(server: NatsServer) -> None:
    with processes(2, server.url) as (here, there):
        here.box(A)
        data = Codec("default").encode(B, A, 1, HINT)
        subject = subject_of("default", A, C, is_node=True)
        assert there.connection.publish(subject, data)
        eventually(lambda: here.happened)

        assert here.names() == ["FrameRefused"]
        assert f"{C!r} speaks as {B!r}" in here.happened[0].reason
        assert here.got == []


def test_one_bad_frame_of_a_pack_harms_no_other(server: NatsServer) -> None:
    with processes(2, server.url) as (here, there):
        here.box(A)
        codec = Codec("default")
        frames = [
            codec.encode(B, A, 1, HINT),
            b"nonsense",
            codec.encode(B, A, 2, HINT),
        ]
        subject = subject_of("default", A, B, is_node=True)
        (message,) = pack(frames, 1 << 20)
        for data in (message, b"\xc1broken"):
            assert there.connection.publish(subject, data)
            there.connection.flush()
        eventually(lambda: len(here.happened) == 2 and len(here.got) == 2)


def test_a_node_of_another_cluster_is_not_heard(server: NatsServer) -> None:
    with (
        processes(1, server.url, cluster="a.b") as (here,),
        processes(1, server.url, cluster="a*b") as (other,),
    ):
        here.box(A)
        assert other.box(B).send(A, HINT)
        other.connection.flush()
        here.connection.flush()
        assert here.box(B).send(A, LoopBack(1))
        eventually(lambda: here.got)

        assert here.got == [(B, LoopBack(1))]


def test_a_detached_node_hears_nothing_more(server: NatsServer) -> None:
    with processes(2, server.url) as (here, there):
        box, sender = here.box(A), there.box(B)
        assert sender.send(A, HINT)
        eventually(lambda: here.got)
        box.close()
        here.connection.flush()
        assert sender.send(A, HINT)
        there.connection.flush()
        again = here.box(A)
        assert sender.send(A, LoopBack(1))
        eventually(lambda: len(here.got) == 2)
        again.kill()

        assert here.got[-1] == (B, LoopBack(1))
        assert not box.send(B, HINT)


def test_what_does_not_wait_here_any_more_is_dropped_and_said(
    server: NatsServer,
) -> None:
    with (
        processes(1, server.url, inbound_bytes_max=1_000) as (here,),
        processes(1, server.url) as (there,),
    ):
        here.box(A)
        sender = there.box(B)
        hold = threading.Event()
        here.dispatcher.post(hold.wait, 60)
        for _ in range(100):
            assert sender.send(A, Marked("k/" + "x" * 50, 1, 1))
            there.connection.flush()
        eventually(lambda: "FramesDropped" in here.names())
        hold.set()
        eventually(lambda: len(here.got) + len(here.names()) == 100)
        eventually(lambda: here.transport._inbound_bytes == 0)
        heard = len(here.got)
        assert 0 < heard < 100
        assert here.names() == ["FramesDropped"] * (100 - heard)
        assert sender.send(A, HINT)
        eventually(lambda: here.got[-1] == (B, HINT))


def test_one_client_makes_no_node_stop_listening_to_others(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "CLIENT_FRAMES_MAX", 10)
    with processes(3, server.url) as (here, there, other):
        here.box(A)
        loud, node = there.box(C, is_member=False), other.box(B)
        quiet = there.box(Address("quiet.4"), is_member=False)
        hold = threading.Event()
        here.dispatcher.post(hold.wait, 60)
        for number in range(30):
            assert loud.send(A, Mark("k/x", 1, number))
            there.connection.flush()
        eventually(lambda: here.names().count("FramesDropped") == 20)
        assert quiet.send(A, Mark("k/x", 1, 99))
        assert node.send(A, HINT)
        there.connection.flush()
        other.connection.flush()
        hold.set()
        eventually(lambda: len(here.got) == 12)
        assert "frames of client wait already" in here.happened[0].reason
        assert here.transport._of_clients == {}


def test_large_frames_of_clients_leave_room_for_those_of_nodes(
    server: NatsServer,
) -> None:
    with (
        processes(1, server.url, inbound_bytes_max=8_000) as (here,),
        processes(2, server.url) as (there, other),
    ):
        own = here.box(A)
        node = other.box(B)
        loud = [
            there.box(Address(f"{name}.1"), is_member=False)
            for name in ("one", "two", "three")
        ]
        hold = threading.Event()
        here.dispatcher.post(hold.wait, 60)
        for client in loud:
            for number in range(10):
                assert client.send(A, Mark("k/" + "x" * 440, 1, number))
                there.connection.flush()
        # Of the first two a quarter each; nothing is left to the third.
        eventually(lambda: here.names().count("FramesDropped") == 30 - 8)
        assert own.send(A, LoopBack(1))
        assert node.send(A, HINT)
        here.connection.flush()
        other.connection.flush()
        hold.set()
        eventually(lambda: {(A, LoopBack(1)), (B, HINT)} <= set(here.got))
        eventually(lambda: here.transport._inbound_bytes == 0)
        assert {sender for sender, _ in here.got} == {A, B, "one.1", "two.1"}
        reasons = {each.reason for each in here.happened}
        assert reasons == {
            "2000 bytes of frames of one wait already",
            "2000 bytes of frames of two wait already",
            "4000 bytes of frames of clients wait already",
        }
        assert here.transport._client_bytes == 0
        assert here.transport._of_clients == {}


def test_what_cannot_be_sent_now_surely_reaches_nobody() -> None:
    with nats_server() as mortal, processes(2, mortal.url) as (here, there):
        box, _ = here.box(A), there.box(B)
        mortal.kill()
        eventually(lambda: "NatsDisconnected" in here.names())
        assert not box.send(B, HINT)

        mortal.start()
        eventually(lambda: "NatsReconnected" in here.names())
        eventually(lambda: "NatsReconnected" in there.names())
        assert box.send(B, LoopBack(2))
        eventually(lambda: there.got)
        assert there.got == [(A, LoopBack(2))]


def test_a_frame_is_no_larger_than_the_server_takes() -> None:
    with (
        nats_server(more="max_payload: 2KB") as small,
        processes(1, small.url) as (here,),
    ):
        assert here.transport.frame_bytes_max == 2_048


def test_the_numbers_of_the_last_clients_only_are_remembered(
    server: NatsServer,
) -> None:
    with processes(1, server.url) as (here,):
        box = here.box(A)
        codec = Codec("default")
        for number in range(CLIENTS_MAX + 10):
            client = Address(f"c.{number}")
            box._arrived(
                codec.encode(client, A, 5, Mark("k/x", 1, 1)),
                Origin(client, is_node=False),
            )
        assert len(box._last_seen) == len(box._last_clients) == CLIENTS_MAX
        assert len(here.got) == CLIENTS_MAX + 10


PERMISSIONS = """
authorization {
  users: [
    { user: alice, password: a, permissions: {
        publish: ["placement.default.client.*.*.alice.*",
                  "placement.default.find.alice.*"]
        subscribe: ["placement.default.node.alice.*.>"] } }
    { user: one, password: a, permissions: {
        publish: ["placement.default.node.*.*.one.*"]
        subscribe: ["placement.default.*.one.*.>",
                    "placement.default.find.*.* nodes"] } }
    { user: two, password: a, permissions: {
        publish: ["placement.default.node.*.*.two.*"]
        subscribe: ["placement.default.*.two.*.>",
                    "placement.default.find.*.* nodes"] } }
  ]
}
"""


def test_permissions_bind_who_speaks_and_as_what() -> None:
    one, two, alice = Address("one.1"), Address("two.2"), Address("alice.3")
    with nats_server(more=PERMISSIONS) as guarded:
        place = guarded.url.removeprefix("nats://")
        made = {
            name: Process(f"nats://{name}:a@{place}")
            for name in ("one", "two", "alice")
        }
        try:
            made["one"].box(one)
            node = made["two"].box(two)
            client = made["alice"].box(alice, is_member=False)
            assert node.send(one, HINT)
            assert client.send(one, Mark("k/x", 1, 1))
            eventually(lambda: len(made["one"].got) == 2)

            forged = [
                (made["alice"], subject_of("default", one, alice, is_node=True)),
                (made["alice"], subject_of("default", one, two, is_node=True)),
                (
                    made["alice"],
                    subject_of("default", one, Address("bob.1"), is_node=False),
                ),
                (made["two"], subject_of("default", one, one, is_node=True)),
            ]
            for number, (process, subject) in enumerate(forged):
                sender = Address(subject.split(".", 5)[5])
                data = Codec("default").encode(sender, one, 100 + number, HINT)
                before = process.connection.counts["ServerError"]
                assert process.connection.publish(subject, data)
                process.connection.flush()
                assert process.connection.counts["ServerError"] == before + 1
            with pytest.raises(NatsRefused, match="not permitted to subscribe"):
                made["alice"].box(Address("alice.4"), is_member=True)
            assert node.send(one, LoopBack(3))
            eventually(lambda: (two, LoopBack(3)) in made["one"].got)
            assert len(made["one"].got) == 3
        finally:
            for each in made.values():
                each.close()
