import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from actors.client_command import entry_to
from actors.engine import Settings
from actors.nats_connection import NatsConnection, NatsRefused, parse_nats_url
from actors.transport_nats import subject_of
from messages.codec import Codec
from messages.frames import Mark, TopologyHint
from placement.topology import Address
from tests.actors.nats_servers import NatsServer, nats_server
from tests.actors.node_processes import (
    ROOT,
    Process,
    ended,
    placement,
)
from tests.waiting import eventually

pytestmark = pytest.mark.servers

ECHO = "echo=tests.actors.actors_under_test:Echo"
PASSWORDS = {"one": "change-1", "two": "change-2", "alice": "change-3"}


def documented() -> str:
    """The permissions of the README."""
    found = re.search(
        r"```conf\n(authorization .*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found is not None
    return found[1]


class Guarded:
    """A server with the permissions of the README, and its two nodes."""

    def __init__(self, server: NatsServer, one: Process, two: Process) -> None:
        self.server, self.one, self.two = server, one, two

    def url(self, user: str) -> str:
        return url_of(self.server, user)


def url_of(server: NatsServer, user: str) -> str:
    place = server.url.removeprefix("nats://")
    return f"nats://{user}:{PASSWORDS[user]}@{place}/?inbox=_INBOX_{user}"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    with nats_server(more=documented()) as server:
        nodes = [
            Process(
                folder,
                name,
                *("node", name, "--engine", url_of(server, name), "--json"),
                *("--kind", ECHO, "--witness", str(folder / "witness")),
            )
            for name in ("one", "two")
        ]
        with ended(*nodes):
            for node in nodes:
                node.start()
            yield Guarded(server, *nodes)
            for node in nodes:
                log = node.out + node.err + (folder / "witness").read_text()
                assert not [each for each in PASSWORDS.values() if each in log]


def test_nodes_and_clients_need_no_more_than_the_documented_permissions(
    guarded: Guarded,
) -> None:
    owners = set()
    with entry_to(guarded.url("alice"), None, Settings(), name="alice") as entry:
        for number in range(50):
            assert entry.ref(f"echo/{number}").ask(number) == number
            owners.add(entry.resolve(f"echo/{number}").pid.node)
        assert entry.events.counts["NatsServerError"] == 0
    assert owners == {"one", "two"}
    status = placement("status", "--engine", guarded.url("alice"), "--json")
    assert json.loads(status.stdout)["members"] == ["one", "two"]
    assert "permissions" not in guarded.one.err + guarded.two.err


def test_a_client_under_another_name_is_one_sentence(guarded: Guarded) -> None:
    where = ["--engine", guarded.url("alice"), "--name", "bob"]
    done = placement("ask", "echo/1", "1", *where)
    assert done.returncode == 2
    assert "it is not permitted to subscribe to placement.default.node.bob" in (
        done.stderr
    )
    assert done.stderr.count("\n") == 1
    assert PASSWORDS["alice"] not in done.stderr


def test_a_client_cannot_be_a_node(guarded: Guarded) -> None:
    done = placement("node", "alice", "--engine", guarded.url("alice"), "--kind", ECHO)
    assert done.returncode == 2
    assert "permi" in done.stderr
    assert done.stderr.count("\n") == 1


def forged(to: Address) -> list[tuple[str, bytes]]:
    """What alice must not say, and where."""
    codec = Codec("default")
    alice, one, bob = Address("alice.9"), Address("one.9"), Address("bob.9")
    hint = TopologyHint(1 << 40)
    return [
        (
            subject_of("default", to, alice, is_node=True),
            codec.encode(alice, to, 1, hint),
        ),
        (subject_of("default", to, one, is_node=True), codec.encode(one, to, 1, hint)),
        (
            subject_of("default", to, bob, is_node=False),
            codec.encode(bob, to, 1, Mark("k/x", 1, 1)),
        ),
        ("$KV.placement_default.cluster", b"{}"),
        ("$KV.placement_default.e.echo/1", b"x"),
        ("$KV.placement_clusters.default", b"{}"),
        ("$JS.API.STREAM.PURGE.KV_placement_default", b"{}"),
        ("$JS.API.STREAM.DELETE.KV_placement_default", b""),
        ("$JS.API.STREAM.MSG.DELETE.KV_placement_default", b'{"seq":1}'),
        ("$JS.API.STREAM.UPDATE.KV_placement_default", b"{}"),
        ("$JS.API.CONSUMER.CREATE.KV_placement_default", b"{}"),
        ("_INBOX_one.x", b"an answer of mine"),
    ]


def test_what_a_client_forges_is_refused_by_the_server(guarded: Guarded) -> None:
    session = str(guarded.one.ready()["session"])
    to = Address(session.partition("#")[0])
    with closing(NatsConnection.open(parse_nats_url(guarded.url("alice")))) as alice:
        for subject, data in forged(to):
            before = alice.counts["ServerError"]
            assert alice.publish(subject, data)
            alice.flush()
            assert alice.counts["ServerError"] == before + 1, subject
        for subject in (
            f"placement.default.node.{to}.>",
            "placement.default.client.one.*.>",
            "placement.>",
            "$KV.placement_default.>",
            "_INBOX_one.>",
            "_INBOX.>",
            ">",
        ):
            with pytest.raises(NatsRefused, match="not permitted to subscribe"):
                alice.subscribe(subject, lambda *_: None)
    asked = placement(
        "ask", "echo/1", "1", "--engine", guarded.url("alice"), "--name", "alice"
    )
    assert asked.returncode == 0, asked.stderr
    status = placement("status", "--engine", guarded.url("alice"), "--json")
    assert session in status.stdout


def test_a_node_cannot_speak_as_another(guarded: Guarded) -> None:
    session = str(guarded.one.ready()["session"])
    to = Address(session.partition("#")[0])
    with closing(NatsConnection.open(parse_nats_url(guarded.url("two")))) as two:
        for sender, is_node in (("one.9", True), ("alice.9", False)):
            subject = subject_of("default", to, Address(sender), is_node=is_node)
            before = two.counts["ServerError"]
            assert two.publish(subject, b"x")
            two.flush()
            assert two.counts["ServerError"] == before + 1


def test_no_secret_is_in_a_log_however_much_is_said(
    guarded: Guarded, tmp_path: Path
) -> None:
    url = guarded.url("two").replace("/?", "/?tls=true&")
    done = placement("node", "two", "--engine", url, "--verbose", "--json")
    assert done.returncode == 2
    assert "does not ask for TLS" in done.stderr
    node = Process(
        tmp_path,
        "again",
        *("node", "two", "--engine", guarded.url("two"), "--verbose", "--json"),
        *("--kind", ECHO),
    )
    with ended(node):
        node.start()
        eventually(lambda: "TopologyAdopted" in node.err)
        said = node.out + node.err + done.stderr
    assert not [each for each in PASSWORDS.values() if each in said]
