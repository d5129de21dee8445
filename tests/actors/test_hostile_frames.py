import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest

import actors.clients as clients_module
from actors import Grain
from actors.clients import (
    BELIEVED_EVERY_NS,
    BYTES_MAX,
    FORGET_EVERY_NS,
    NAMES_MAX,
    REQUESTS_MAX,
    RESOLUTIONS_MAX,
    Clients,
)
from actors.engine import Settings
from actors.engine_nats import NatsEngine
from actors.nats_connection import NatsConnection, parse_nats_url
from actors.node import PlacementNode
from actors.postbox import OF_CLIENTS
from actors.store_memory import MemoryStore
from actors.transport_nats import find_subject_of, subject_of
from messages.codec import BadFrame, Codec
from messages.frames import (
    Answer,
    Deliver,
    Failure,
    Find,
    FindRefused,
    Found,
    Frame,
    Mark,
    Marked,
    Refused,
    Resolve,
    Resolved,
)
from messages.pack import unpack
from placement.errors import Overloaded
from placement.topology import Address
from tests.actors.actors_under_test import Echo
from tests.actors.nats_servers import NatsServer, nats_server
from tests.actors.node_processes import Process, ended, placement
from tests.waiting import eventually

pytestmark = pytest.mark.servers

GOLDEN = [
    bytes.fromhex(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "data" / "frames").glob("*.hex"))
]
HOSTILE = Address("mallory.1")
OF_FINDING = (Find, Found, FindRefused)


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as started:
        yield started


def hostile(chance: random.Random, to: Address, cluster: str) -> bytes:
    """Bytes that a stranger might send; the same for the same chance."""
    match chance.randrange(8):
        case 0:
            return chance.randbytes(chance.randrange(200))
        case 1:
            mutated = bytearray(chance.choice(GOLDEN))
            for _ in range(chance.randrange(1, 4)):
                mutated[chance.randrange(len(mutated))] = chance.randrange(256)
            return bytes(mutated)
        case 2:
            return b"\x91" * chance.randrange(1, 5_000) + b"\xc0"
        case 3:  # lengths that are not there
            return chance.choice((b"\xdd", b"\xdb", b"\xc6", b"\xdf")) + b"\xff" * 4
        case 4:
            version = chance.choice((0, 2, 99, -1, 1 << 63))
            return bytes(msgpack.packb((version, cluster, HOSTILE, to, 1, [19, 1])))
        case 5:
            data = Codec("other").encode(HOSTILE, to, 1, Mark("k/x", 1, 1))
            return data[: chance.randrange(1, len(data) + 1)]
        case 6:  # another's name
            body = Mark("k/x", 1, chance.randrange(9))
            return Codec(cluster).encode("somebody.1", to, 1, body)
        case _:
            return b"\xc1" + chance.randbytes(chance.randrange(60))


def refused_in(data: bytes, to: Address, cluster: str, *, is_node: bool) -> int:
    """How many refusals `data` must lead to."""
    codec, count = Codec(cluster), 0
    try:
        frames = unpack(data)
    except BadFrame:
        return 1
    for frame in frames:
        try:
            envelope = codec.decode(frame, receiver=to)
        except BadFrame:
            count += 1
            continue
        is_said = is_node or isinstance(envelope.body, OF_CLIENTS)
        is_said = is_said and not isinstance(envelope.body, OF_FINDING)
        count += envelope.sender != HOSTILE or not is_said
    return count


def test_ten_thousand_hostile_frames_are_each_refused_and_counted(
    server: NatsServer,
) -> None:
    settings = Settings(cluster="hostile", renew_every=0.5)
    engine = NatsEngine(server.url, MemoryStore(), settings=settings)
    with (
        closing(engine),
        PlacementNode(
            "node", kinds={"echo": Echo}, engine=engine, settings=settings
        ) as node,
        closing(NatsConnection.open(parse_nats_url(server.url))) as stranger,
    ):
        node.start_member()
        session = node.session
        chance, expected = random.Random(7), 0
        for number in range(10_000):
            is_node = number % 2 == 0
            data = hostile(chance, node.address, "hostile")
            expected += refused_in(data, node.address, "hostile", is_node=is_node)
            subject = subject_of("hostile", node.address, HOSTILE, is_node=is_node)
            eventually(lambda: stranger.publish(subject, data))  # noqa: B023
        stranger.flush()
        eventually(lambda: node.events.counts["FrameRefused"] >= expected)

        assert node.events.counts["FrameRefused"] == expected > 9_000
        assert node.ref("echo/1").ask("still here") == "still here"
        assert node.session == session


def test_a_repeated_frame_is_handled_once(server: NatsServer) -> None:
    settings = Settings(cluster="repeated", renew_every=0.5)
    engine = NatsEngine(server.url, MemoryStore(), settings=settings)
    got: list[bytes] = []
    with (
        closing(engine),
        PlacementNode("node", engine=engine, settings=settings) as node,
        closing(NatsConnection.open(parse_nats_url(server.url))) as client,
    ):
        node.start_member()
        client.subscribe(
            subject_of("repeated", HOSTILE, node.address, is_node=True),
            lambda _, data: got.extend(unpack(data)),
        )
        subject = subject_of("repeated", node.address, HOSTILE, is_node=False)
        codec = Codec("repeated")
        again = codec.encode(HOSTILE, node.address, 1, Mark("k/x", 1, 1))
        for _ in range(500):
            assert client.publish(subject, again)
        last = codec.encode(HOSTILE, node.address, 2, Mark("k/x", 1, 2))
        assert client.publish(subject, last)
        eventually(lambda: len(got) >= 2)

        bodies = [codec.decode(data, receiver=HOSTILE).body for data in got]
        assert bodies == [Marked("k/x", 1, 1), Marked("k/x", 1, 2)]
        assert node.events.counts["FrameRefused"] == 499


def spoiled(chance: random.Random, to: Address, cluster: str) -> bytes:
    """A golden frame in the right envelope, of which something is wrong inside."""
    envelope = msgpack.unpackb(chance.choice(GOLDEN), strict_map_key=False)
    head = [1, cluster, HOSTILE, to, chance.randrange(1, LAST)]
    body = bytearray(msgpack.packb(envelope[5]))
    for _ in range(chance.randrange(1, 4)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    return b"\x96" + b"".join(map(msgpack.packb, head)) + bytes(body)


class Refusals:
    """What a node that says all has said of frames that it refuses."""

    def __init__(self, node: Process) -> None:
        self._node, self._read, self.count = node, 0, 0

    def have_come(self, expected: int) -> bool:
        """Whether so many have been, after another look; more are a failure."""
        said = self._node.err_from(self._read)
        whole = said[: said.rfind(b"\n") + 1]
        self._read += len(whole)
        self.count += whole.count(b'"FrameRefused"')
        assert self.count <= expected
        return self.count == expected


LAST = 1 << 40  # above all that is sent again


@pytest.mark.long
def test_a_hundred_thousand_hostile_frames_harm_no_node_process(
    server: NatsServer, tmp_path: Path
) -> None:
    cluster, name = "hundred", "one"
    where = ["--engine", server.url, "--cluster", cluster]
    node = Process(
        tmp_path,
        name,
        *("node", name, *where, "--json", "--verbose"),
        *("--kind", "echo=tests.actors.actors_under_test:Echo"),
    )
    codec, chance = Codec(cluster), random.Random(13)
    with (
        ended(node),
        closing(NatsConnection.open(parse_nats_url(server.url))) as stranger,
    ):
        session = str(node.start().ready()["session"])
        to = Address(session.partition("#")[0])
        refusals, expected = Refusals(node), 0
        ways = {
            is_node: subject_of(cluster, to, HOSTILE, is_node=is_node)
            for is_node in (True, False)
        }

        def say(subject: str, data: bytes) -> None:
            eventually(lambda: stranger.publish(subject, data))

        say(ways[False], codec.encode(HOSTILE, to, LAST, Mark("k/x", 1, 1)))
        again = [
            codec.encode(HOSTILE, to, LAST, Mark("k/x", 1, 1)),
            codec.encode(HOSTILE, to, 5, Deliver("echo/mine", 1, 1, None, "", 9, ())),
        ]
        resident = 0
        for number in range(100_000):
            is_node = number % 2 == 0
            match number % 5:
                case 0:
                    say(ways[is_node], spoiled(chance, to, cluster))
                    expected += 1
                case 1:
                    say(ways[is_node], chance.choice(again))
                    expected += 1
                case 2:  # where any node is sought
                    data = hostile(chance, to, cluster)
                    say(find_subject_of(cluster, HOSTILE), data)
                    expected += refused_in(data, Address("*"), cluster, is_node=False)
                case _:
                    data = hostile(chance, to, cluster)
                    say(ways[is_node], data)
                    expected += refused_in(data, to, cluster, is_node=is_node)
            if number % 1_000 == 999:
                # Not more at once than wait for their log.
                stranger.flush(timeout_s=30)
                eventually(lambda: refusals.have_come(expected), 60)  # noqa: B023
            if number == 20_000:
                assert placement("ask", "echo/mine", "1", *where).returncode == 0
                resident = resident_kib(node.pid)
        asked = placement("ask", "echo/mine", '"still here"', *where, "--json")
        assert '"still here"' in asked.stdout, asked.stderr
        assert session in asked.stdout
        assert refusals.have_come(expected)
        assert resident_kib(node.pid) - resident < 16 << 10


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("the system does not say")


def test_memory_stays_flat_and_service_goes_on_under_hostile_frames(
    server: NatsServer, tmp_path: Path
) -> None:
    cluster = "flat"
    where = ["--engine", server.url, "--cluster", cluster]
    node = Process(
        tmp_path,
        "node",
        *("node", "one", *where, "--json"),
        *("--kind", "echo=tests.actors.actors_under_test:Echo"),
    )
    codec = Codec(cluster)
    with (
        ended(node),
        closing(NatsConnection.open(parse_nats_url(server.url))) as stranger,
    ):
        session = str(node.start().ready()["session"])
        to = Address(session.partition("#")[0])
        chance = random.Random(11)
        numbers, markers = itertools.count(1), itertools.count(1)

        def await_all() -> None:
            """Have the node come to the end of what it was sent, on both sides."""
            answered: list[bytes] = []
            for is_node in (True, False):
                # Each time a sender of which it has no number yet.
                marker = Address(f"marker.{next(markers)}")
                answers = subject_of(cluster, marker, to, is_node=True)
                stranger.subscribe(
                    answers, lambda _, data: answered.extend(unpack(data))
                )
                subject = subject_of(cluster, to, marker, is_node=is_node)
                mark = codec.encode(marker, to, 1, Mark("k/x", 1, 1))
                assert stranger.publish(subject, mark)
            eventually(lambda: len(answered) == 2)

        def flood(count: int) -> None:
            for number in range(count):
                is_node = number % 2 == 0
                subject = subject_of(cluster, to, HOSTILE, is_node=is_node)
                data = hostile(chance, to, cluster)
                eventually(lambda: stranger.publish(subject, data))  # noqa: B023
            # And what a client may say, without an end: of members to come, to
            # be kept for years.
            subject = subject_of(cluster, to, HOSTILE, is_node=False)
            for _ in range(count):
                number = next(numbers)
                resolve = Resolve(number, f"nobody/{number}", 1 << 60, 1 << 60)
                data = codec.encode(HOSTILE, to, number, resolve)
                eventually(lambda: stranger.publish(subject, data))  # noqa: B023
            stranger.flush(timeout_s=30)
            await_all()

        sizes = []
        for _ in range(4):
            flood(6_000)
            sizes.append(resident_kib(node.pid))
        asked = placement("ask", "echo/mine", '"still here"', *where, "--json")
        assert asked.returncode == 0, asked.stderr
        assert '"still here"' in asked.stdout
        assert session in asked.stdout
        # What it takes at first, for buffers of frames that wait, does not come again.
        assert sizes[-1] - sizes[-2] < 8 << 10, sizes


class Held(Grain):
    """Comes back from no turn before it is let go."""

    let_go = threading.Event()

    def on_receive(self, message: Any) -> Any:
        self.let_go.wait(30)
        return message


def test_a_client_that_asks_too_much_at_once_hears_overloaded(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients_module, "REQUESTS_MAX", 5)
    settings = Settings(cluster="asks", renew_every=0.5)
    store = MemoryStore()
    engines = [NatsEngine(server.url, store, settings=settings) for _ in range(2)]
    with (
        closing(engines[0]),
        closing(engines[1]),
        PlacementNode(
            "node", kinds={"held": Held}, engine=engines[0], settings=settings
        ) as node,
        PlacementNode("client", engine=engines[1], settings=settings) as client,
    ):
        node.start_member()
        client.start_client()
        client.resolve("held/1")
        futures = [client.ref("held/1").ask(n, block=False) for n in range(7)]
        refused = []
        for number in (5, 6):
            with pytest.raises(Overloaded) as overloaded:
                futures[number].get(timeout=10)
            refused.append(overloaded.value)
        assert all("waits for 5 answers already" in str(each) for each in refused)
        assert node.events.counts["ClientRefused"] == 2
        Held.let_go.set()
        assert [each.get(timeout=10) for each in futures[:5]] == list(range(5))
        assert client.ref("held/1").ask("again") == "again"


# --- what a node bears of clients ---

ALICE, BOB = Address("alice.1"), Address("bob.1")


def deliver(number: int) -> Deliver:
    return Deliver("k/x", 1, number, None, "", 1_000, ())


def test_one_client_waits_for_so_many_answers_and_no_other_suffers() -> None:
    clients = Clients(lambda: 5)

    def refused(sender: Address, body: Frame, now_ns: int = 0) -> Any:
        return clients.refuse(sender, body, size=100, now_ns=now_ns)

    for number in range(1, REQUESTS_MAX + 1):
        # Another start of it is the same client.
        sender = Address(f"alice.{number % 3}")
        assert refused(sender, deliver(number)) is None
    failure = refused(ALICE, deliver(0xFFFF_FFFF))
    assert isinstance(failure, Failure)
    assert failure.reason == "Overloaded"
    refusal = refused(ALICE, Resolve(1, "k/x", 0, 1_000))
    assert isinstance(refusal, Refused)
    assert (refusal.request, refusal.reason) == (1, "Pending")
    assert refused(BOB, deliver(1)) is None
    # What wants no answer is not counted here: inboxes bound it.
    assert refused(ALICE, deliver(0)) is None
    assert refused(ALICE, Mark("k/x", 1, 1)) is None

    clients.answered(Address("alice.2"), Answer(2, None, 1))
    assert refused(ALICE, Resolve(1, "k/x", 0, 1_000)) is None
    assert refused(ALICE, Resolve(2, "k/x", 0, 1_000)) is not None
    clients.answered(ALICE, Resolved(1, "k/x", "a.1#1", 1))
    assert refused(ALICE, Resolve(2, "k/x", 0, 1_000)) is None
    # What was never answered is over with its own time.
    assert refused(ALICE, deliver(1), 999_999_999) is not None
    assert refused(ALICE, deliver(1), 1_000_000_000) is None


def test_what_is_refused_to_a_client_is_no_walk_over_all_that_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients_module, "REQUESTS_MAX", 3)
    walks = 0

    class Walked(dict[Any, Any]):
        def items(self) -> Any:
            nonlocal walks
            walks += 1
            return super().items()

    clients = Clients(lambda: 5)
    # Each of these is over at another time.
    for number, now_ns in ((1, 0), (2, 1), (3, 2)):
        assert clients.refuse(ALICE, deliver(number), size=1, now_ns=now_ns) is None
    clients._clients["alice"].asked = Walked(clients._clients["alice"].asked)

    def refused_at(now_ns: int) -> bool:
        return clients.refuse(ALICE, deliver(9), size=1, now_ns=now_ns) is not None

    second = 1_000_000_000
    assert all(refused_at(now_ns) for now_ns in (3, 4, second - 1))
    assert walks == 0
    assert not refused_at(second)
    assert clients.refuse(ALICE, deliver(10), size=1, now_ns=second + 1) is not None
    assert walks == 1
    later = second + FORGET_EVERY_NS
    assert clients.refuse(ALICE, deliver(10), size=1, now_ns=later) is None
    assert walks == 2


def test_one_client_has_so_many_resolutions_at_once() -> None:
    clients = Clients(lambda: 5)
    for number in range(RESOLUTIONS_MAX):
        resolve = Resolve(number, "k/x", 0, 10)
        assert clients.refuse(ALICE, resolve, size=1, now_ns=0) is None
    refusal = clients.refuse(ALICE, Resolve(9_999, "k/x", 0, 10), size=1, now_ns=0)
    assert isinstance(refusal, Refused)
    assert refusal.reason == "Pending"
    assert clients.refuse(ALICE, deliver(1), size=1, now_ns=0) is None
    clients.answered(ALICE, Refused(3, "k/x", "NotReady", ""))
    resolve = Resolve(9_999, "k/x", 0, 10)
    assert clients.refuse(ALICE, resolve, size=1, now_ns=0) is None


def test_what_one_client_waits_for_is_bounded_in_bytes() -> None:
    clients = Clients(lambda: 5)
    half = BYTES_MAX // 2
    for number in (1, 2):
        assert clients.refuse(ALICE, deliver(number), size=half, now_ns=0) is None
    assert clients.refuse(ALICE, deliver(3), size=1, now_ns=0) is not None
    clients.answered(ALICE, Failure(1, "NotReady", "", "", {}))
    assert clients.refuse(ALICE, deliver(3), size=1, now_ns=0) is None


def test_nothing_is_kept_of_a_client_that_waits_for_nothing() -> None:
    clients = Clients(lambda: 5)
    assert clients.refuse(ALICE, deliver(1), size=1, now_ns=0) is None
    clients.answered(ALICE, Answer(1, None, 1))
    assert clients._clients == {}
    for number in range(NAMES_MAX + 50):
        sender = Address(f"client-{number}.1")
        assert clients.refuse(sender, deliver(1), size=1, now_ns=0) is None
    assert len(clients._clients) == NAMES_MAX


def test_a_client_has_the_members_read_now_and_then_only() -> None:
    clients = Clients(lambda: 5)
    newer, known = Resolve(1, "k/x", 6, 10), Resolve(1, "k/x", 5, 10)
    now_ns = BELIEVED_EVERY_NS

    assert clients.tame(newer, now_ns) == newer
    assert clients.tame(newer, now_ns + 1) == known
    assert clients.tame(known, now_ns + 1) is known
    assert clients.tame(newer, now_ns + BELIEVED_EVERY_NS) == newer
