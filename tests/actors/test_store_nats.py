"""The store over a JetStream key-value bucket, on real servers."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import store_nats
from actors.conformance import StoreConformance
from actors.nats_bucket import token_of
from actors.nats_connection import NatsConnection, parse_nats_url
from actors.store_nats import NatsPlace, NatsStore
from actors.store_url import open_store
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    ClaimRefused,
    Failed,
    GivenUp,
    GiveUp,
    Load,
    Loaded,
    LockHeld,
    Save,
    Saved,
    SessionRecord,
    Stale,
    Store,
    StoreFailure,
)
from placement.entry import Acquisition, ActivationEntry
from placement.identity import Identity
from placement.topology import SessionId
from tests.actors.nats_servers import (
    NatsServer,
    nats_cluster,
    nats_server,
)

A, B = SessionId("node-a.1#1"), SessionId("node-b.1#1")
CART, USER = Identity("cart", "42"), Identity("user", "7")
KIB, MIB = 1 << 10, 1 << 20
SECRET = "s3cr3t-word"
PATIENCE_S = 60.0

_numbers = count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as started:
        yield started


@pytest.fixture(scope="module")
def three() -> Iterator[Sequence[NatsServer]]:
    with nats_cluster() as started:
        yield started


@pytest.fixture
def url(server: NatsServer) -> str:
    """The URL of a cluster that has no bucket yet."""
    return new_url(server.url)


@pytest.fixture
def store(url: str) -> Iterator[NatsStore]:
    """A store without contents in which A and B are open."""
    with closing(nats_store(url)) as opened:
        for session in (A, B):
            open_session(opened, session)
        yield opened


def new_url(servers: str, **options: Any) -> str:
    more = "".join(f"&{name}={value}" for name, value in options.items())
    return f"{servers}/?cluster=c{next(_numbers)}{more}"


def nats_store(url: str) -> NatsStore:
    opened = open_store(url)
    assert isinstance(opened, NatsStore)
    return opened


def open_session(store: Store, session: SessionId) -> None:
    assert store.open_session(SessionRecord(session=session, ttl_ms=5_000))


def acquisition(session: SessionId = A) -> Acquisition:
    return Acquisition(session, next(_numbers))


def acquired(store: Store, identity: Identity, mine: Acquisition) -> Acquired:
    (outcome,) = store.try_acquire([Acquire(identity, mine)])
    assert isinstance(outcome, Acquired), outcome
    return outcome


def locked_claim(
    store: Store, identity: Identity = CART, session: SessionId = A
) -> Claim:
    """A claim for which the lock is held."""
    mine = acquisition(session)
    revision = acquired(store, identity, mine).entry.revision
    return Claim(identity, session, next(_numbers), mine, revision)


def owned(
    store: Store, identity: Identity = CART, session: SessionId = A
) -> ActivationEntry:
    (outcome,) = store.claim([locked_claim(store, identity, session)])
    assert isinstance(outcome, Claimed), outcome
    return outcome.entry


def loaded(store: Store, identity: Identity = CART) -> ActivationEntry:
    (outcome,) = store.load([Load(identity)])
    assert isinstance(outcome, Loaded), outcome
    return outcome.entry


def saved(store: Store, entry: ActivationEntry, version: int, snapshot: bytes) -> None:
    request = Save(entry.identity, entry.fencing_token, version, snapshot)
    assert store.save([request]) == [Saved(version)]


def api(server: str, verb: str, cluster: str = "", **wanted: Any) -> dict[str, Any]:
    """Ask JetStream itself, past the store."""
    return asked(
        server, f"$JS.API.STREAM.{verb}.KV_placement_{cluster}", json.dumps(wanted)
    )


def asked(server: str, subject: str, text: str = "") -> dict[str, Any]:
    connection = NatsConnection.open(parse_nats_url(server), name="test")

    async def work(client: Any) -> dict[str, Any]:
        answer = await client.request(subject, text.encode(), timeout=5)
        found = json.loads(answer.data)
        assert isinstance(found, dict)
        return found

    try:
        return connection.call(work, timeout_s=10)
    finally:
        connection.close()


def cluster_of(url: str) -> str:
    return NatsPlace.parse(url).cluster


def state(url: str, filtered: str = ">") -> dict[str, Any]:
    """What the stream says of itself."""
    servers, _, _ = url.partition("/?")
    info = api(servers, "INFO", cluster_of(url), subjects_filter=filtered)
    assert "state" in info, info
    found: dict[str, Any] = info["state"]
    return found


def keys(url: str, prefix: str) -> list[str]:
    """The keys that begin with `prefix`, as the server has them."""
    bucket = f"$KV.{NatsPlace.parse(url).bucket}."
    found = state(url, f"{bucket}{prefix}>").get("subjects") or {}
    return sorted(subject.removeprefix(bucket) for subject in found)


# --- the contracts -----------------------------------------------------------


class TestNatsStore(StoreConformance):
    replicas = 1

    @pytest.fixture(autouse=True)
    def on_a_server(self, server: NatsServer) -> None:
        self.servers = server.url

    def open_store(self) -> Store:
        self.url = new_url(self.servers, replicas=self.replicas)
        return open_store(self.url)

    def reopen(self, store: Store) -> Store:
        store.close()
        return open_store(self.url)


class TestNatsStoreOnThreeServers(TestNatsStore):
    replicas = 3

    @pytest.fixture(autouse=True)
    def on_a_server(self, three: Sequence[NatsServer]) -> None:
        self.servers = urls_of(three)


def urls_of(servers: Sequence[NatsServer]) -> str:
    return ",".join(
        each.url if each is servers[0] else each.url.removeprefix("nats://")
        for each in servers
    )


# --- writes ------------------------------------------------------------------


def test_r3_3_a_new_identity_is_claimed_by_two_writes_and_saved_by_one(
    store: NatsStore, url: str
) -> None:
    identities = [Identity("k", str(number)) for number in range(100)]
    mine = acquisition()
    reads, begun = store_reads(store), state(url)["last_seq"]

    store.try_acquire([Acquire(each, mine) for each in identities])
    claims = store.claim(
        [Claim(each, A, next(_numbers), mine, 0) for each in identities]
    )
    claimed = state(url)["last_seq"]
    tokens = [each.entry.fencing_token for each in claims if isinstance(each, Claimed)]
    saves = store.save(
        [
            Save(each, token, 1, b"s")
            for each, token in zip(identities, tokens, strict=True)
        ]
    )
    done = state(url)["last_seq"]

    assert saves == [Saved(1)] * 100
    assert (claimed - begun, done - claimed) == (200, 100)
    # The session, once for the locks and once for the claims.
    assert store_reads(store) - reads == 2


def store_reads(store: NatsStore) -> int:
    assert store._bucket is not None
    return store._bucket.read_count


def test_r3_3_the_token_is_the_revision_of_the_claims_own_write(
    store: NatsStore, url: str
) -> None:
    entry = owned(store)

    assert entry.fencing_token == entry.revision == state(url)["last_seq"]


def test_a_batch_has_more_than_64_writes_on_their_way() -> None:
    identities = [Identity("k", str(number)) for number in range(300)]
    with nats_server() as paused, closing(nats_store(new_url(paused.url))) as store:
        open_session(store, A)
        mine = acquisition()
        outcomes: list[Any] = []
        requests = [Acquire(each, mine) for each in identities]
        thread = threading.Thread(
            target=lambda: outcomes.extend(store.try_acquire(requests))
        )
        # The read of the session is done before the server stands still.
        assert store._bucket is not None
        waiting = store._bucket._waiting
        most: list[int] = []
        count_waiting(store, most, lambda: paused.signal(signal.SIGSTOP))
        thread.start()
        until_s = time.monotonic() + 1.5
        while len(waiting) < 200 and time.monotonic() < until_s:
            time.sleep(0.01)
        on_their_way = len(waiting)
        paused.signal(signal.SIGCONT)
        thread.join()

        assert on_their_way >= 64
        assert all(isinstance(outcome, Acquired) for outcome in outcomes)


def count_waiting(
    store: NatsStore, most: list[int], at_first: Callable[[], None]
) -> None:
    bucket = store._bucket
    assert bucket is not None
    write = bucket.write

    async def counted(*args: Any, **more: Any) -> int:
        if not most:
            at_first()
        most.append(len(bucket._waiting))
        return await write(*args, **more)

    bucket.write = counted  # type: ignore[method-assign]


def test_requests_for_one_identity_are_done_one_after_the_other(
    store: NatsStore, url: str
) -> None:
    token = owned(store).fencing_token
    begun = state(url)["last_seq"]

    outcomes = store.save(
        [Save(CART, token, version, b"%d" % version) for version in range(1, 101)]
    )

    assert outcomes == [Saved(version) for version in range(1, 101)]
    assert state(url)["last_seq"] - begun == 100
    assert loaded(store).record.snapshot == b"100"


def test_what_another_connection_has_written_is_found(store: NatsStore) -> None:
    with closing(store.another()) as other:
        entry = owned(store)
        # The other has seen an older revision of the key than there is now.
        saved(other, entry, 1, b"one")
        saved(store, entry, 2, b"two")
        saved(other, entry, 3, b"three")

        assert loaded(store).record.snapshot == b"three"
        assert other.give_up([GiveUp(CART, entry.fencing_token)]) == [GivenUp()]
        request = Save(CART, entry.fencing_token, 4, b"four")
        assert store.save([request]) == [Stale(entry.fencing_token)]


def test_r2_5_of_many_connections_one_claims_each_identity(store: NatsStore) -> None:
    identities = [Identity("race", str(number)) for number in range(200)]
    sessions = [SessionId(f"node-{number}.1#1") for number in range(4)]
    won: dict[SessionId, list[ActivationEntry]] = {}
    start = threading.Barrier(len(sessions))

    def race(session: SessionId, mine: Store) -> None:
        open_session(mine, session)
        lock = acquisition(session)
        start.wait()
        got = mine.try_acquire([Acquire(each, lock) for each in identities])
        outcomes = mine.claim(
            [
                Claim(each, session, next(_numbers), lock, 0)
                for each, outcome in zip(identities, got, strict=True)
                # Who has no lock claims all the same, and is refused.
                if isinstance(outcome, Acquired | LockHeld)
            ]
        )
        assert {type(outcome) for outcome in outcomes} <= {Claimed, ClaimRefused}
        won[session] = [each.entry for each in outcomes if isinstance(each, Claimed)]

    connections = [store.another() for _ in sessions]
    threads = [
        threading.Thread(target=race, args=each)
        for each in zip(sessions, connections, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in connections:
        connection.close()

    entries = [entry for each in won.values() for entry in each]
    assert sorted(entry.identity for entry in entries) == sorted(identities)
    assert len({entry.fencing_token for entry in entries}) == len(identities)
    for entry in entries:
        assert loaded(store, entry.identity).owner == entry.owner


# --- snapshots ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "part_count"),
    [
        (64 * KIB, 0),
        (64 * KIB + 1, 1),
        (256 * KIB, 1),
        (256 * KIB + 1, 2),
        (5 * MIB, 20),
    ],
)
def test_r3_4_a_snapshot_of_any_size_comes_back(
    size: int, part_count: int, store: NatsStore, url: str
) -> None:
    snapshot = bytes(range(251)) * (size // 251 + 1)
    snapshot = snapshot[:size]
    entry = owned(store)

    saved(store, entry, 1, snapshot)

    assert len(keys(url, "p.")) == part_count
    with closing(store.another()) as other:
        assert loaded(other).record.snapshot == snapshot
        # The lock, the claim and the giving up carry it on.
        assert other.give_up([GiveUp(CART, entry.fencing_token)]) == [GivenUp()]
        assert owned(other, session=B).record.snapshot == snapshot
    assert loaded(store).record.snapshot == snapshot
    assert len(keys(url, "p.")) == part_count


def test_r3_4_a_replaced_snapshot_leaves_nothing_behind(
    store: NatsStore, url: str
) -> None:
    entry = owned(store)

    for version, size in enumerate((MIB, 2 * MIB, 10, MIB, 300 * KIB), start=1):
        saved(store, entry, version, b"%d" % version * size)

        record = loaded(store).record
        assert (record.version, record.snapshot) == (version, b"%d" % version * size)
    assert len(keys(url, "p.")) == 2
    store.give_up([GiveUp(CART, entry.fencing_token, 6, b"last")])
    assert keys(url, "p.") == []
    assert loaded(store).record.snapshot == b"last"


def test_r3_3_a_refused_save_leaves_no_parts(store: NatsStore, url: str) -> None:
    with closing(store.another()) as other:
        entry = owned(store)
        saved(store, entry, 1, b"one")
        # It is decided over what it knows, and found out when the entry is written.
        other.give_up([GiveUp(CART, entry.fencing_token)])

        refused = store.save([Save(CART, entry.fencing_token, 2, b"x" * MIB)])

        assert refused == [Stale(entry.fencing_token)]
        assert keys(url, "p.") == []


def test_r3_4_a_big_snapshot_is_read_whole_while_it_is_replaced(
    store: NatsStore,
) -> None:
    entry = owned(store)
    saved(store, entry, 1, b"1" * MIB)
    is_over = threading.Event()
    seen: list[tuple[int, set[bytes]]] = []

    def read(mine: NatsStore) -> None:
        while not is_over.is_set():
            record = loaded(mine).record
            snapshot = record.snapshot or b""
            assert len(snapshot) == MIB
            seen.append((record.version, {snapshot[:1], snapshot[-1:]}))

    with closing(store.another()) as other:
        thread = threading.Thread(target=read, args=(other,))
        thread.start()
        for version in range(2, 40):
            saved(store, entry, version, b"%d" % (version % 10) * MIB)
        is_over.set()
        thread.join()

    assert len(seen) > 5
    for version, ends in seen:
        assert ends == {b"%d" % (version % 10)}
    assert [version for version, _ in seen] == sorted(version for version, _ in seen)


def test_r3_4_what_the_server_cannot_take_at_once_goes_in_smaller_parts() -> None:
    with (
        nats_server(more="max_payload: 64KB") as small,
        closing(nats_store(new_url(small.url))) as store,
    ):
        open_session(store, A)
        entry = owned(store)

        saved(store, entry, 1, b"x" * MIB)

        assert loaded(store).record.snapshot == b"x" * MIB
        assert len(keys(store.url, "p.")) == 32


def test_a_snapshot_that_is_too_large_fails_alone(
    store: NatsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_nats._Rules, "snapshot_bytes_max", 100)
    cart, user = owned(store, CART), owned(store, USER)

    outcomes = store.save(
        [
            Save(CART, cart.fencing_token, 1, b"x" * 101),
            Save(USER, user.fencing_token, 1, b"x" * 100),
            Save(USER, user.fencing_token, 1 << 63, b""),
        ]
    )

    assert outcomes == [
        Failed("snapshot has 101 bytes, at most 100", may_have_happened=False),
        Saved(1),
        Failed(f"{1 << 63} does not fit into 64 bits", may_have_happened=False),
    ]


# --- identities --------------------------------------------------------------


@given(st.text(min_size=1), st.text(min_size=1))
def test_texts_that_differ_have_tokens_that_differ(one: str, other: str) -> None:
    tokens = [token_of(each) for each in (one, other) if is_utf8(each)]

    assert (len(set(tokens)) == 2) == (one != other and len(tokens) == 2)
    for token in tokens:
        assert set(token) <= set(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_/="
        )


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def test_r3_4_strange_identities_are_kept_apart(store: NatsStore) -> None:
    names = [
        *(".", "..", "a.b", "a..b", "*", ">", "a.*", "a.>", "$KV", "a b", "=", "=41"),
        *("A", "a", "a/", "/a", "//", "\\", "%2E", "œ", "o\u0308", "\u00f6", "\u202e"),
        *("\N{LION FACE}" * 128, "x" * 512, "." * 512, "\ufeff", "\u2028", "'\"`"),
    ]
    identities = [Identity(kind, name) for kind in ("k", "k.k") for name in names]
    for number, identity in enumerate(identities):
        saved(store, owned(store, identity), 1, b"%d" % number)

    with closing(store.another()) as other:
        for number, identity in enumerate(identities):
            assert loaded(other, identity).record.snapshot == b"%d" % number


def test_an_identity_that_is_no_utf8_fails_alone(store: NatsStore) -> None:
    broken = str.__new__(Identity, "k/\ud800")

    outcomes = store.load([Load(broken), Load(CART)])

    assert isinstance(outcomes[0], Failed)
    assert not outcomes[0].may_have_happened
    assert isinstance(outcomes[1], Loaded)
    with pytest.raises(StoreFailure) as caught:
        store.open_session(SessionRecord(session=SessionId("\ud800"), ttl_ms=1))
    assert not caught.value.may_have_happened
