"""A program that has nothing of this package talks to node processes."""

import ast
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import actors.node as node_module
from actors.clients import (
    BYTES_MAX,
    FINDS_MAX,
    NAMES_MAX,
    REQUESTS_MAX,
    RESOLUTIONS_MAX,
    Clients,
)
from actors.engine import Settings
from actors.engine_nats import NatsEngine
from actors.nats_connection import NatsConnection, NatsRefused, parse_nats_url
from actors.node import FOUND_MAX, PlacementNode
from actors.store_memory import MemoryStore
from actors.transport_nats import find_subject_of, subject_of
from messages.codec import Codec
from messages.frames import (
    ANY_NODE,
    Find,
    FindRefused,
    Found,
    Frame,
    LoopBack,
    Mark,
    Marked,
    Resolve,
)
from messages.pack import unpack
from placement.contracts import SessionRecord, StoreFailure
from placement.topology import Address
from tests.actors.nats_servers import NatsServer, nats_server
from tests.actors.node_processes import ROOT, Process, ended
from tests.waiting import eventually

pytestmark = pytest.mark.servers

PROGRAM = ROOT / "tests" / "clients" / "by_message.py"
PAGE = (ROOT / "messages" / "CLIENTS.md").read_text()
KINDS = ("echo=tests.actors.actors_under_test:Echo",)
MORE_KINDS = (*KINDS, "scripted=tests.actors.actors_under_test:Scripted")
WITHIN_S = 120.0
CAROL = Address("carol.1")


def documented() -> str:
    """The permissions of the README, with those of the page among the users."""
    readme = re.search(
        r"```conf\n(authorization .*?)\n  \]\n\}\n```",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    page = re.search(r"```conf\n(.*?)```", PAGE, re.DOTALL)
    assert readme is not None
    assert page is not None
    return f"{readme[1]}\n{page[1]}\n  ]\n}}\n"


def url_of(server: NatsServer, user: str, password: str) -> str:
    return server.url.replace("//", f"//{user}:{password}@")


def ask_all(url: str, name: str, *asked: tuple[str, Any]) -> list[dict[str, Any]]:
    """What the program hears, one after the other."""
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), url, name],
        input="".join(json.dumps(each) + "\n" for each in asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_program_is_short_and_has_nothing_of_ours() -> None:
    text = PROGRAM.read_text()
    imported = {
        name.name if isinstance(each, ast.Import) else str(each.module)
        for each in ast.walk(ast.parse(text))
        if isinstance(each, ast.Import | ast.ImportFrom)
        for name in each.names
    }
    assert imported - sys.stdlib_module_names == {"nats", "msgpack"}
    assert f"one of {len(text.splitlines())} lines" in PAGE
    assert len(text.splitlines()) <= 80


def test_r6_a_program_finds_a_node_resolves_asks_and_hears_why_not(
    tmp_path: Path,
) -> None:
    with nats_server(more=documented()) as server:
        nodes = [
            Process(
                tmp_path,
                name,
                *("node", name, "--json", "--engine"),
                url_of(server, name, password) + f"/?inbox=_INBOX_{name}",
                *(part for kind in MORE_KINDS for part in ("--kind", kind)),
                *("--witness", str(tmp_path / "witness")),
            )
            for name, password in (("one", "change-1"), ("two", "change-2"))
        ]
        with ended(*nodes):
            for node in nodes:
                node.launch()
            for node in nodes:
                node.await_ready()
            heard = ask_all(
                url_of(server, "carol", "change-4"),
                "carol",
                *((f"echo/{number}", {"n": number}) for number in range(40)),
                ("nobody/1", None),
                ("scripted/1", ["raise"]),
                ("scripted/1", {"": "nothing", "args": {}}),
                ("scripted/fails", None),
                ("echo/1", "still here"),
            )
            log = "".join(node.out + node.err for node in nodes)
        assert heard[:40] == [{"answer": {"n": number}} for number in range(40)]
        assert [each.get("error") for each in heard[40:]] == [
            "NoAuthority",
            "HandlerFailed",
            "BadMessage",
            "ActivationFailed",
            None,
        ]
        assert "as told" in heard[41]["message"]
        assert "no activation today" in heard[43]["message"]
        # Both had some of them: redirects were followed.
        witness = (tmp_path / "witness").read_text()
        assert '"session": "one.' in witness
        assert '"session": "two.' in witness
        assert "change-" not in log + witness


def test_the_permissions_let_a_client_find_as_itself_and_not_take_questions() -> None:
    with nats_server(more=documented()) as server:
        url = parse_nats_url(url_of(server, "carol", "change-4"))
        with closing(NatsConnection.open(url)) as carol:
            for sender, refused in ((CAROL, 0), (Address("alice.1"), 1)):
                before = carol.counts["ServerError"]
                assert carol.publish(find_subject_of("default", sender), b"x")
                carol.flush()
                assert carol.counts["ServerError"] == before + refused
            for queue in ("", "nodes"):
                with pytest.raises(NatsRefused, match="not permitted to subscribe"):
                    carol.subscribe(
                        "placement.default.find.*.*", lambda *_: None, queue=queue
                    )


# --- what a node says to who looks for one ---


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as started:
        yield started


class Seeker:
    """A client by message, in the test's own process."""

    def __init__(self, server: NatsServer, cluster: str, address: Address) -> None:
        self.address, self.cluster = address, cluster
        self.codec = Codec(cluster)
        self.heard: list[tuple[str, Frame]] = []
        self.connection = NatsConnection.open(parse_nats_url(server.url))
        name, _, boot = address.partition(".")
        self.connection.subscribe(
            f"placement.{cluster}.node.{name}.{boot}.>", self._arrived
        )

    def _arrived(self, _: str, data: bytes) -> None:
        for frame in unpack(data):
            envelope = self.codec.decode(frame, receiver=self.address)
            self.heard.append((envelope.sender, envelope.body))

    def find(self, request: int, *, number: int = 1) -> None:
        data = self.codec.encode(self.address, ANY_NODE, number, Find(request))
        self.say(data)

    def say(self, data: bytes) -> None:
        subject = find_subject_of(self.cluster, self.address)
        eventually(lambda: self.connection.publish(subject, data))

    def close(self) -> None:
        self.connection.close()


class NotYet(MemoryStore):
    """A store in which no session can be opened."""

    def open_session(self, record: SessionRecord, /) -> bool:
        raise StoreFailure("not today")

    def another(self) -> "NotYet":
        return self


def placed(server: NatsServer, cluster: str, store: MemoryStore) -> NatsEngine:
    return NatsEngine(server.url, store, settings=Settings(cluster=cluster))


def test_one_of_the_members_answers_with_those_that_own_partitions(
    server: NatsServer,
) -> None:
    cluster = "found"
    store, settings = MemoryStore(), Settings(cluster=cluster)
    engines = [placed(server, cluster, store) for _ in range(2)]
    with (
        closing(engines[0]),
        closing(engines[1]),
        PlacementNode("one", engine=engines[0], settings=settings) as one,
        PlacementNode("two", engine=engines[1], settings=settings) as two,
        closing(Seeker(server, cluster, CAROL)) as seeker,
    ):
        for node in (one, two):
            node.start_member()
        one.wait_for(lambda: len(one.topology.members) == 2, 30)
        for number in range(60):
            seeker.find(number)  # each under number 1: `Find` is not counted
        eventually(lambda: len(seeker.heard) == 60)
        first = {one.address: one.session, two.address: two.session}
        for sender, body in seeker.heard:
            assert isinstance(body, Found)
            assert body.epoch == one.epoch
            assert body.sessions[0] == first[Address(sender)]
            assert sorted(body.sessions) == sorted(map(str, first.values()))
        assert {sender for sender, _ in seeker.heard} == set(first)
        assert sorted(body.request for _, body in seeker.heard) == list(range(60))  # type: ignore[union-attr]

        two.drain()
        eventually(lambda: one.topology.owners() == one.topology.members[:1])
        eventually(lambda: two.epoch == one.epoch)
        seeker.heard.clear()
        for number in range(20):
            seeker.find(number)
        eventually(lambda: len(seeker.heard) == 20)
        assert {body.sessions for _, body in seeker.heard} == {(one.session,)}  # type: ignore[union-attr]

        one.drain()
        eventually(lambda: not one.topology.owners())
        eventually(lambda: two.epoch == one.epoch)
        seeker.find(99)
        eventually(lambda: len(seeker.heard) == 21)
        refused = FindRefused(99, "NotReady", "every member is draining")
        assert seeker.heard[-1][1] == refused


def test_a_node_that_is_no_member_yet_says_so(server: NatsServer) -> None:
    cluster = "not-yet"
    engine = placed(server, cluster, NotYet())
    settings = Settings(cluster=cluster)
    with (
        closing(engine),
        PlacementNode("one", engine=engine, settings=settings) as node,
        closing(Seeker(server, cluster, CAROL)) as seeker,
    ):
        node.begin_member()
        seeker.find(5)
        eventually(lambda: seeker.heard)
        (sender, body) = seeker.heard[0]
        assert sender == node.address
        assert isinstance(body, FindRefused)
        assert (body.request, body.reason) == (5, "NotReady")
        assert body.message.startswith("one: ")


def test_a_node_that_has_lost_its_session_names_nobody(server: NatsServer) -> None:
    cluster = "lapsed"
    engine, settings = placed(server, cluster, MemoryStore()), Settings(cluster=cluster)
    with (
        closing(engine),
        PlacementNode("one", engine=engine, settings=settings) as node,
        closing(Seeker(server, cluster, CAROL)) as seeker,
    ):
        node.start_member()
        node.session_changed(None, "its session has lapsed")
        seeker.find(5)
        eventually(lambda: seeker.heard)
        refused = FindRefused(5, "NotReady", "one: its session has lapsed")
        assert seeker.heard == [(node.address, refused)]


def test_a_node_names_so_many_members_and_begins_with_itself(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"at most {FOUND_MAX} sessions" in PAGE
    monkeypatch.setattr(node_module, "FOUND_MAX", 2)
    cluster = "many"
    engine, settings = placed(server, cluster, MemoryStore()), Settings(cluster=cluster)
    nodes = [
        PlacementNode(name, engine=engine, settings=settings)
        for name in ("a", "b", "c")
    ]
    with (
        closing(engine),
        nodes[0],
        nodes[1],
        nodes[2],
        closing(Seeker(server, cluster, CAROL)) as seeker,
    ):
        for node in nodes:
            node.start_member()
        for node in nodes:
            node.wait_for(lambda: len(node.topology.members) == 3, 30)  # noqa: B023
        for number in range(60):
            seeker.find(number)
        eventually(lambda: len(seeker.heard) == 60)
        named = {
            sender.partition(".")[0]: [each.partition(".")[0] for each in body.sessions]  # type: ignore[union-attr]
            for sender, body in seeker.heard
        }
        # All three are on one connection, and each is asked.
        assert named == {"a": ["a", "b"], "b": ["b", "c"], "c": ["c", "a"]}


def test_what_is_wrong_or_hostile_where_clients_find_harms_nobody(
    server: NatsServer,
) -> None:
    cluster = "harmless"
    engine, settings = placed(server, cluster, MemoryStore()), Settings(cluster=cluster)
    mallory = Address("mallory.1")
    with (
        closing(engine),
        PlacementNode("one", engine=engine, settings=settings) as node,
        closing(Seeker(server, cluster, CAROL)) as carol,
        closing(Seeker(server, cluster, mallory)) as stranger,
    ):
        node.start_member()
        session = node.session
        codec, chance = Codec(cluster), random.Random(3)
        hostile = [
            codec.encode(mallory, ANY_NODE, 1, Resolve(1, "k/x", 0, 1_000)),
            codec.encode(mallory, ANY_NODE, 1, LoopBack(1)),
            codec.encode(mallory, ANY_NODE, 1, Found(1, 1 << 60, ("mallory.1#1",))),
            codec.encode(mallory, ANY_NODE, 1, FindRefused(1, "NotReady", "")),
            codec.encode(mallory, node.address, 1, Find(1)),
            codec.encode(CAROL, ANY_NODE, 1 << 62, Find(1)),
            Codec("other").encode(mallory, ANY_NODE, 1, Find(1)),
            b"\x91" * 5_000,
            b"\xdd\xff\xff\xff\xff",
            *(chance.randbytes(40) for _ in range(500)),
        ]
        for data in hostile:
            stranger.say(data)
        # And what is no place for it: a node's own subjects.
        direct: list[Frame] = [
            Find(1),
            Found(1, 1 << 60, ("mallory.1#1",)),
            FindRefused(1, "", ""),
        ]
        for number, body in enumerate(direct, start=1):
            for is_node in (True, False):
                subject = subject_of(cluster, node.address, mallory, is_node=is_node)
                data = codec.encode(mallory, node.address, number, body)
                assert stranger.connection.publish(subject, data)
        expected = len(hostile) + 2 * len(direct)
        eventually(lambda: node.events.counts["FrameRefused"] >= expected)
        assert node.events.counts["FrameRefused"] == expected
        assert stranger.heard == []

        # Too often: the others are told the members all the same.
        for number in range(3 * FINDS_MAX):
            stranger.find(number)
        carol.find(1)
        eventually(lambda: len(stranger.heard) == 3 * FINDS_MAX and carol.heard)
        assert carol.heard == [(node.address, Found(1, node.epoch, (str(session),)))]

        # What mallory says as itself is heard as before, under its own numbers.
        subject = subject_of(cluster, node.address, mallory, is_node=False)
        mark = codec.encode(mallory, node.address, 10, Mark("k/x", 1, 1))
        assert stranger.connection.publish(subject, mark)
        eventually(lambda: stranger.heard[-1][1] == Marked("k/x", 1, 1))
        assert node.session == session


def test_a_client_is_told_the_members_so_often_in_a_second() -> None:
    clients = Clients(lambda: 5)

    def refused(name: str, now_ns: int) -> Any:
        return clients.refuse(Address(f"{name}.1"), Find(7), size=1, now_ns=now_ns)

    began_ns = 10_000_000_000
    assert [refused("alice", began_ns) for _ in range(FINDS_MAX)] == [None] * FINDS_MAX
    refusal = refused("alice", began_ns + 999_999_999)
    assert isinstance(refusal, FindRefused)
    assert (refusal.request, refusal.reason) == (7, "Overloaded")
    assert refused("bob", began_ns) is None
    for number in range(NAMES_MAX):
        refused(f"client-{number}", began_ns)
    assert len(clients._finds) == NAMES_MAX
    assert refused("late", began_ns) is not None
    assert refused("alice", began_ns + 1_000_000_000) is None
    assert len(clients._finds) == 1


def test_the_bounds_of_a_client_are_those_of_the_page() -> None:
    plain = " ".join(PAGE.split())
    assert f"{REQUESTS_MAX:,} requests without an answer" in plain
    assert f"{RESOLUTIONS_MAX:,} resolutions among them, {BYTES_MAX >> 20} MiB" in plain
    assert f"the members told {FINDS_MAX} times a second" in plain
