"""The store over a JetStream key-value bucket, on real servers."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.errors import ConnectionClosedError

from actors import nats_entries, nats_sessions, store_nats
from actors.conformance import StoreConformance
from actors.nats_bucket import Bucket, NoAnswer, NotNow, WrongRevision
from actors.nats_connection import NatsConnection, parse_nats_url
from actors.nats_token import key_token_of
from actors.store_memory import MemoryStore
from actors.store_nats import NatsPlace, NatsStore
from actors.store_url import BadStore, check_store, open_store
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
    Release,
    Released,
    Save,
    Saved,
    SessionRecord,
    Stale,
    Store,
    StoreFailure,
)
from placement.entry import Acquisition, ActivationEntry
from placement.identity import Identity
from placement.topology import Member, SessionId
from tests.actors.nats_servers import (
    NatsServer,
    free_ports,
    nats_cluster,
    nats_server,
)
from tests.waiting import eventually

pytestmark = pytest.mark.servers

A, B = SessionId("node-a.1#1"), SessionId("node-b.1#1")
CART, USER = Identity("cart", "42"), Identity("user", "7")
KIB, MIB = 1 << 10, 1 << 20
SECRET = "s3cr3t-word"
PATIENCE_S = 60.0
PATIENT = "&timeout_ms=30000"

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
    """The URL of a cluster that has no bucket yet; its store has time."""
    return new_url(server.url, timeout_ms=30_000)


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


@contextmanager
def in_a_hurry(store: NatsStore, timeout_s: float = 0.5) -> Iterator[None]:
    """Give it less time than a store may need that is opened, on a slow machine."""
    before = store._timeout_s
    store._timeout_s = store._entries._timeout_s = timeout_s
    try:
        yield
    finally:
        store._timeout_s = store._entries._timeout_s = before


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
    with (
        nats_server() as paused,
        closing(nats_store(new_url(paused.url, timeout_ms=30_000))) as store,
    ):
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
        try:
            eventually(lambda: len(waiting) >= 64)
        finally:
            paused.signal(signal.SIGCONT)
            thread.join()

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


def test_a_connection_that_ends_before_it_can_be_answered_is_lost_like_another(
    store: NatsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = Bucket.listen
    failures = 2

    async def listen_or_fail(bucket: Bucket) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise ConnectionClosedError
        await listen(bucket)

    monkeypatch.setattr(Bucket, "listen", listen_or_fail)
    store._bucket = None
    assert store.read_sessions().topology.members == ()
    assert not failures

    monkeypatch.setattr(store, "_timeout_s", 0.0)
    for call in (store.read_sessions, lambda: store.load([Load(CART)])):
        failures, store._bucket = 1_000_000, None
        with pytest.raises(StoreFailure, match="connection closed") as failed:
            call()
        assert not failed.value.may_have_happened


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
        version, until_s = 1, time.monotonic() + PATIENCE_S
        while (version < 20 or len(seen) < 20) and time.monotonic() < until_s:
            version += 1
            saved(store, entry, version, b"%d" % (version % 10) * MIB)
        is_over.set()
        thread.join()

    assert len(seen) >= 20
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

        # Without more, 64 KiB are one message, which is too large for that server.
        for version, size in enumerate((64 * KIB, MIB), start=1):
            saved(store, entry, version, b"x" * size)

            assert loaded(store).record.snapshot == b"x" * size
        assert len(keys(store.url, "p.")) == 32


def test_a_snapshot_that_is_too_large_fails_alone(
    store: NatsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_entries._Rules, "snapshot_bytes_max", 100)
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
    tokens = [key_token_of(each) for each in (one, other) if is_utf8(each)]

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


# --- answers that are lost, writes that are late, reads that are old ---------


class Faults:
    """What is to go wrong with the next requests of every bucket."""

    def __init__(self) -> None:
        self.writes: deque[str] = deque()
        self.stale: dict[str, deque[tuple[int, bytes] | None]] = {}
        self.late: list[tuple[str, bytes, int]] = []
        self.log: list[str] = []


class FaultyBucket(Bucket):
    """A bucket of a real server whose answers are lost, late or old as it is told."""

    faults: Faults

    async def write(self, key: str, data: bytes, *, expected: int, until: float) -> int:
        fault = self.faults.writes.popleft() if self.faults.writes else ""
        self.faults.log.append(fault)
        if fault in ("late", "silence"):
            self.faults.late.append((key, data, expected))
            if fault == "silence":
                await asyncio.sleep(until - asyncio.get_running_loop().time())
            raise NoAnswer("simulated: on its way for long")
        if fault == "unsent":
            raise NotNow("simulated: nobody is there")
        revision = await super().write(key, data, expected=expected, until=until)
        if fault == "lost":
            raise NoAnswer("simulated: the answer is lost")
        return revision

    async def read(self, key: str, *, until: float) -> tuple[int, bytes] | None:
        old = self.faults.stale.get(key)
        if old:
            return old.popleft()
        return await super().read(key, until=until)

    async def arrive(self) -> list[str]:
        """Have the late writes arrive; the keys that this has changed."""
        changed = []
        while self.faults.late:
            key, data, expected = self.faults.late.pop()
            until = asyncio.get_running_loop().time() + 5
            try:
                await super().write(key, data, expected=expected, until=until)
            except WrongRevision:
                continue
            # A part under a name that nobody uses is no change.
            if not key.startswith("p."):
                changed.append(key)
        return changed


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """What is to go wrong in stores that are opened afterwards."""
    faults = Faults()
    monkeypatch.setattr(FaultyBucket, "faults", faults, raising=False)
    monkeypatch.setattr(store_nats, "Bucket", FaultyBucket)
    return faults


@pytest.fixture
def faulty(faults: Faults, url: str) -> Iterator[NatsStore]:
    with closing(nats_store(url)) as opened:
        for session in (A, B):
            open_session(opened, session)
        yield opened


def arrive(store: NatsStore) -> list[str]:
    async def work(bucket: Bucket) -> list[str]:
        assert isinstance(bucket, FaultyBucket)
        return await bucket.arrive()

    return store._call(work)


def stored(store: NatsStore, key: str) -> tuple[int, bytes] | None:
    async def work(bucket: Bucket) -> tuple[int, bytes] | None:
        until = asyncio.get_running_loop().time() + 5
        return await Bucket.read(bucket, key, until=until)

    return store._call(work)


@pytest.mark.parametrize("fault", ["lost", "late", "unsent"])
@pytest.mark.parametrize("tries", [1, 3])
def test_r3_3_whatever_becomes_of_a_write_its_outcome_is_read_back(
    fault: str, tries: int, faulty: NatsStore, faults: Faults
) -> None:
    def troubled() -> None:
        faults.writes.extend([fault] * tries)

    mine = acquisition()
    troubled()
    revision = acquired(faulty, CART, mine).entry.revision
    troubled()
    request = Claim(CART, A, next(_numbers), mine, revision)
    (claimed,) = faulty.claim([request])
    assert isinstance(claimed, Claimed)
    token = claimed.entry.fencing_token
    troubled()
    assert faulty.save([Save(CART, token, 3, b"three")]) == [Saved(3)]
    troubled()
    assert faulty.save([Save(CART, token, 4, b"4" * MIB)]) == [Saved(4)]
    troubled()
    assert faulty.give_up([GiveUp(CART, token, 5, b"five")]) == [GivenUp()]
    other = acquisition(B)
    acquired(faulty, CART, other)
    troubled()
    assert faulty.release([Release(CART, other)]) == [Released()]
    faults.writes.clear()
    assert arrive(faulty) == []

    entry = loaded(faulty)
    assert (entry.owner, entry.fencing_token) == (None, token)
    assert (entry.record.version, entry.record.snapshot) == (5, b"five")
    acquired(faulty, CART, acquisition())


@pytest.mark.parametrize("fault", ["lost", "late", "unsent"])
def test_r3_5_whatever_becomes_of_a_write_sessions_stay_true(
    fault: str, faulty: NatsStore, faults: Faults
) -> None:
    session = SessionId("node-c.1#1")
    members = [Member(session=session)]

    for _ in range(2):  # each call, and the same again
        faults.writes.extend([fault] * 2)
        assert faulty.open_session(SessionRecord(session=session, ttl_ms=5_000))
    for _ in range(2):
        faults.writes.append(fault)
        view = faulty.renew_session(session, 3)
        assert view is not None
        assert [each.count for each in view.sessions] == [0, 0, 3]
    faults.writes.append(fault)
    assert faulty.write_members(members, 0).epoch == 1
    assert faulty.write_members(members, 0).members == tuple(members)
    for _ in range(2):
        faults.writes.append(fault)
        assert faulty.close_session(session, 3)
    faults.writes.clear()
    assert arrive(faulty) == []

    assert faulty.renew_session(session, 4) is None
    view = faulty.read_sessions()
    assert view.topology.epoch == 1
    assert [each.session for each in view.sessions if not each.closed] == [A, B]


def test_r3_3_what_is_released_is_not_taken_by_an_earlier_try(
    faulty: NatsStore, faults: Faults
) -> None:
    mine = acquisition()
    faults.writes.append("silence")
    with in_a_hurry(faulty):
        (lost,) = faulty.try_acquire([Acquire(CART, mine)])
    assert lost == Failed("simulated: on its way for long", may_have_happened=True)

    assert faulty.release([Release(CART, mine)]) == [Released()]

    assert arrive(faulty) == []
    acquired(faulty, CART, acquisition(B))


def test_r3_3_what_is_refused_is_not_claimed_by_an_earlier_try(
    faulty: NatsStore, faults: Faults
) -> None:
    request = locked_claim(faulty)
    faults.writes.append("silence")
    with in_a_hurry(faulty):
        (lost,) = faulty.claim([request])
    assert isinstance(lost, Failed)

    other = acquisition(B)
    (refused,) = faulty.claim([Claim(CART, B, next(_numbers), other, 0)])

    assert isinstance(refused, ClaimRefused)
    assert arrive(faulty) == []
    assert loaded(faulty).owner is None


class Past:
    """An identity that A owns, and what its key has been until then."""

    def __init__(self, store: NatsStore, faults: Faults) -> None:
        self.key = f"e.{CART}"
        self.store, self.faults = store, faults
        self.readings = {"absent": self.now()}
        self.mine = acquisition()
        revision = acquired(store, CART, self.mine).entry.revision
        self.readings["locked"] = self.now()
        self.claim = Claim(CART, A, next(_numbers), self.mine, revision)
        (claimed,) = store.claim([self.claim])
        assert isinstance(claimed, Claimed)
        self.entry = claimed.entry
        self.readings["owned"] = self.now()
        saved(store, self.entry, 1, b"one")

    def now(self) -> tuple[int, bytes] | None:
        return stored(self.store, self.key)

    def comes_back(self, reading: str, times: int) -> None:
        self.faults.stale[self.key] = deque([self.readings[reading]] * times)


@pytest.fixture
def past(faulty: NatsStore, faults: Faults) -> Past:
    return Past(faulty, faults)


@pytest.fixture
def fresh(past: Past) -> Iterator[NatsStore]:
    """Another connection, which has seen nothing yet."""
    with closing(past.store.another()) as opened:
        yield opened


old_readings = pytest.mark.parametrize("reading", ["absent", "locked", "owned"])
times = pytest.mark.parametrize("times", [1, 3])


@old_readings
@times
def test_r3_3_no_old_reading_refuses_a_save(
    reading: str, times: int, past: Past, fresh: NatsStore
) -> None:
    past.comes_back(reading, times)

    saved(fresh, past.entry, 2, b"two")

    assert loaded(past.store).record.snapshot == b"two"


@old_readings
@times
def test_r3_3_no_old_reading_confirms_a_giving_up(
    reading: str, times: int, past: Past, fresh: NatsStore
) -> None:
    past.comes_back(reading, times)

    assert fresh.give_up([GiveUp(CART, past.entry.fencing_token)]) == [GivenUp()]

    entry = loaded(past.store)
    assert (entry.owner, entry.record.snapshot) == (None, b"one")


@old_readings
@times
def test_r3_3_no_old_reading_refuses_or_repeats_a_claim(
    reading: str, times: int, past: Past, fresh: NatsStore
) -> None:
    past.comes_back(reading, times)

    (again,) = fresh.claim([past.claim])

    assert isinstance(again, Claimed)
    assert again.entry.fencing_token == past.entry.fencing_token
    # What the activation would start from is the newest.
    assert again.entry.record.snapshot == b"one"


@old_readings
@times
def test_r3_5_no_old_reading_confirms_a_release(
    reading: str, times: int, past: Past, fresh: NatsStore
) -> None:
    mine = acquisition(B)
    acquired(past.store, CART, mine)
    past.comes_back(reading, times)

    assert fresh.release([Release(CART, mine)]) == [Released()]

    acquired(past.store, CART, acquisition())


@times
def test_r3_1_no_old_reading_confirms_a_lock(
    times: int, past: Past, fresh: NatsStore
) -> None:
    other = acquisition(B)
    acquired(past.store, CART, other)
    past.comes_back("locked", times)

    outcome = fresh.try_acquire([Acquire(CART, past.mine)])

    assert outcome == [LockHeld(other)]


def test_r3_5_no_old_reading_makes_an_open_session_look_closed(
    faulty: NatsStore, faults: Faults
) -> None:
    view = faulty.renew_session(A, 1)
    assert view is not None
    faults.stale[f"s.{key_token_of(B)}"] = deque([None])
    faults.stale["cluster"] = deque([None])

    again = faulty.renew_session(A, 2)

    assert again is not None
    assert [each.session for each in again.sessions] == [A, B]


def test_r3_5_a_session_that_seems_absent_is_not_closed_by_that(
    faulty: NatsStore, faults: Faults
) -> None:
    entry = owned(faulty)
    with closing(faulty.another()) as fresh:
        faults.stale[f"s.{key_token_of(A)}"] = deque([None])

        acquired_by_b = acquired(fresh, CART, acquisition(B))

        assert acquired_by_b.owner_is_open
        assert acquired_by_b.entry.fencing_token == entry.fencing_token
        faults.stale[f"s.{key_token_of(A)}"] = deque([None])
        assert faulty.renew_session(A, 1) is not None


@times
def test_r3_5_no_old_reading_confirms_an_opening(
    times: int, faulty: NatsStore, faults: Faults
) -> None:
    key = f"s.{key_token_of(B)}"
    opened = stored(faulty, key)
    assert faulty.close_session(B, 0)
    with closing(faulty.another()) as fresh:
        faults.stale[key] = deque([opened] * times)

        assert not fresh.open_session(SessionRecord(session=B, ttl_ms=5_000))


def test_r3_5_who_closes_a_session_takes_it_off_the_list(faulty: NatsStore) -> None:
    assert listed(faulty) == [A, B]

    assert faulty.close_session(B, 0)

    assert listed(faulty) == [A]


@times
def test_r3_4_an_old_reading_whose_parts_are_gone_is_read_again(
    times: int, past: Past, fresh: NatsStore
) -> None:
    saved(past.store, past.entry, 2, b"2" * MIB)
    past.readings["big"] = past.now()
    saved(past.store, past.entry, 3, b"3" * MIB)
    past.comes_back("big", times)

    assert loaded(fresh).record.snapshot == b"3" * MIB


def test_what_a_leader_that_steps_down_refuses_may_have_happened(
    faulty: NatsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refusing(bucket: Bucket, *_: Any, **__: Any) -> Any:
        error = {"code": 503, "err_code": 10008, "description": "unavailable"}
        return json.dumps({"error": error}).encode()

    async def write(bucket: Bucket) -> None:
        await Bucket.write(bucket, "e.k/a", b"", expected=0, until=0.0)

    monkeypatch.setattr(Bucket, "_ask", refusing)
    with pytest.raises(NoAnswer, match="unavailable"):
        faulty._call(write)


def test_r3_5_a_session_is_listed_before_its_record_exists(
    faulty: NatsStore, faults: Faults
) -> None:
    session = SessionId("node-c.1#1")
    faults.writes.extend(["", "silence"])
    with in_a_hurry(faulty), pytest.raises(StoreFailure) as caught:
        open_session(faulty, session)
    assert caught.value.may_have_happened

    # Its opener is gone; the write arrives all the same.
    assert arrive(faulty) == [f"s.{key_token_of(session)}"]

    names = [each.session for each in faulty.read_sessions().sessions]
    assert names == [A, B, session]


def test_sessions_that_others_have_closed_are_kept_by_nobody(
    faulty: NatsStore,
) -> None:
    many = [SessionId(f"node-{number}.1#1") for number in range(5)]
    with closing(faulty.another()) as other:
        for session in many:
            open_session(other, session)
        faulty.read_sessions()
        assert set(faulty._sessions._sessions) == {A, B, *many}
        for session in many:
            assert other.close_session(session, 0)

    faulty.read_sessions()

    assert set(faulty._sessions._sessions) == {A, B}


def test_r3_5_a_session_newer_than_the_list_stays_known(
    faulty: NatsStore, faults: Faults
) -> None:
    session = SessionId("node-c.1#1")
    with closing(faulty.another()) as other:
        open_session(other, session)
        owned(other, CART, session)
        # By its entry: the list that is known here does not have it.
        (found,) = faulty.load([Load(CART)])
        assert isinstance(found, Loaded)
        assert found.owner_is_open
        faults.stale["cluster"] = deque([None])
        faulty.read_sessions()

        assert set(faulty._sessions._sessions) == {A, B, session}


def test_r3_5_a_closed_session_does_not_stay_listed(
    faulty: NatsStore, faults: Faults
) -> None:
    # It is closed, and who has closed it dies before it is off the list.
    faults.writes.extend(["", "unsent"])
    assert faulty.close_session(B, 0)
    assert listed(faulty) == [A, B]

    with closing(faulty.another()) as other:
        view = other.renew_session(A, 1)

        assert view is not None
        assert [each.session for each in view.sessions] == [A]
        assert listed(faulty) == [A]


def listed(store: NatsStore) -> list[str]:
    found = stored(store, "cluster")
    assert found is not None
    return list(nats_sessions._cluster_from(found[1]).opened)


def test_r3_4_parts_that_a_crash_has_left_go_with_the_next_claim(
    faulty: NatsStore, faults: Faults, url: str
) -> None:
    entry = owned(faulty)
    saved(faulty, entry, 1, b"1" * MIB)
    # The parts are written, and whoever wrote them dies before the entry.
    faults.writes.extend(["", "", "", "", "silence"])
    with in_a_hurry(faulty, 1.0):
        (lost,) = faulty.save([Save(CART, entry.fencing_token, 2, b"2" * MIB)])
    assert isinstance(lost, Failed)
    assert len(keys(url, "p.")) == 8

    faulty.close_session(A, 0)
    again = owned(faulty, session=B)

    assert again.record.snapshot == b"1" * MIB
    assert arrive(faulty) == []
    assert len(keys(url, "p.")) == 4
    assert loaded(faulty).record.snapshot == b"1" * MIB


# --- the same as the memory store --------------------------------------------


IDENTITIES = [Identity("k", name) for name in ("a", "b")]


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """What is asked of two identities by two sessions, and what goes wrong with it."""
    step = st.tuples(
        st.sampled_from(["acquire", "release", "claim", "save", "give_up", "close"]),
        st.sampled_from(IDENTITIES),
        st.integers(0, 2),  # which session
        st.integers(1, 3),  # which procedure, attempt or version
        st.integers(0, 2),  # which of the tokens and revisions seen until then
        st.sampled_from(["", "", "", "lost", "late", "unsent"]),
        st.booleans(),  # through which connection
    )
    return draw(st.lists(step, min_size=5, max_size=30))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(stories())
def test_r3_6_faults_or_none_the_outcomes_are_those_of_the_memory_store(
    server: NatsServer, faults: Faults, story: list[tuple[Any, ...]]
) -> None:
    sessions = [SessionId(f"node-{name}.1#1") for name in "abc"]
    memory = MemoryStore()
    with (
        closing(nats_store(new_url(server.url))) as first,
        closing(first.another()) as second,
    ):
        faults.writes.clear()
        for session in sessions:
            open_session(memory, session)
            open_session(first, session)
        pairs: dict[Identity, list[tuple[ActivationEntry, ...]]] = {}
        for verb, identity, who, number, which, fault, is_second in story:
            seen = pairs.setdefault(
                identity, [(ActivationEntry(identity=identity),) * 2]
            )
            old = seen[-1 - which % len(seen)]
            found: list[Any] = []
            stores: tuple[Store, ...] = (memory, second if is_second else first)
            for place, store in enumerate(stores):
                faults.writes.clear()
                if store is not memory and fault:
                    faults.writes.append(fault)
                lock = Acquisition(sessions[who], number)
                token, revision = old[place].fencing_token, old[place].revision
                match verb:
                    case "acquire":
                        outcomes: Any = store.try_acquire([Acquire(identity, lock)])
                    case "release":
                        outcomes = store.release([Release(identity, lock)])
                    case "claim":
                        claim = Claim(identity, sessions[who], number, lock, revision)
                        outcomes = store.claim([claim])
                    case "save":
                        save = Save(identity, token, number, b"%d" % number)
                        outcomes = store.save([save])
                    case "give_up":
                        outcomes = store.give_up([GiveUp(identity, token)])
                    case _:
                        outcomes = [store.close_session(sessions[who], 0)]
                found += outcomes
            faults.writes.clear()
            assert type(found[0]) is type(found[1]), (verb, found)
            now = loaded(memory, identity), loaded(first, identity)
            for one, other in (now, [getattr(each, "entry", None) for each in found]):
                assert comparable(one) == comparable(other), (verb, found)
            if now[0] != seen[-1][0]:
                seen.append(now)
        assert arrive(first) == []
    for seen in pairs.values():
        for place in (0, 1):
            tokens = [each[place].fencing_token for each in seen]
            assert tokens == sorted(tokens)


def comparable(entry: ActivationEntry | None) -> Any:
    if entry is None:
        return None
    record = entry.record
    return (entry.owner, entry.attempt, record.version, record.snapshot)


# --- servers that end --------------------------------------------------------


class Writer:
    """Claims and saves all the time, in batches, and knows what was confirmed.

    What fails is asked again, as every request may be.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.identities = [Identity(name, str(number)) for number in range(50)]
        self.lock = acquisition()
        self.tokens: dict[Identity, int] = {}
        self.confirmed: dict[Identity, int] = {}
        self.failures: list[Failed] = []
        self.is_over = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._claim()
            version = 0
            while not self.is_over.is_set():
                version += 1
                self._save(version)
        except BaseException as error:  # noqa: BLE001  raised by whoever waits
            self.error = error

    def _claim(self) -> None:
        attempts = {each: next(_numbers) for each in self.identities}
        while len(self.tokens) < len(self.identities):
            left = [each for each in self.identities if each not in self.tokens]
            self._asked(
                self.store.try_acquire, [Acquire(each, self.lock) for each in left]
            )
            claims = [Claim(each, A, attempts[each], self.lock, 0) for each in left]
            for outcome in self._asked(self.store.claim, claims):
                if isinstance(outcome, Claimed):
                    entry = outcome.entry
                    self.tokens[entry.identity] = entry.fencing_token

    def _save(self, version: int) -> None:
        left = list(self.identities)
        while left and not self.is_over.is_set():
            requests = [
                Save(each, self.tokens[each], version, b"%d" % version) for each in left
            ]
            outcomes = self._asked(self.store.save, requests)
            for identity, outcome in zip(left, outcomes, strict=True):
                if isinstance(outcome, Saved):
                    assert outcome.version == version
                    self.confirmed[identity] = version
                else:
                    assert isinstance(outcome, Failed), outcome
            left = [each for each in left if self.confirmed.get(each) != version]

    def _asked(self, method: Callable[[Any], Any], requests: Sequence[Any]) -> Any:
        try:
            outcomes = method(requests)
        except StoreFailure as error:
            outcomes = [Failed(str(error), error.may_have_happened)] * len(requests)
        self.failures += [each for each in outcomes if isinstance(each, Failed)]
        return outcomes

    def has_saved(self, more: int = 1) -> None:
        """Wait until each identity has been saved some more times."""
        wanted = min(self.confirmed.values(), default=0) + more

        def have_been() -> bool:
            assert self.error is None, self.error
            return min(self.confirmed.values(), default=0) >= wanted

        eventually(have_been, PATIENCE_S, or_say=lambda: self.failures[-3:])

    def check(self, store: Store) -> None:
        """All that was confirmed is there."""
        assert self.error is None, self.error
        for identity, version in self.confirmed.items():
            entry = loaded(store, identity)
            assert entry.fencing_token == self.tokens[identity]
            assert entry.record.version >= version
            assert entry.record.snapshot == b"%d" % entry.record.version


def test_r3_4_what_was_confirmed_survives_the_death_of_the_server() -> None:
    with nats_server() as mortal, closing(nats_store(new_url(mortal.url))) as store:
        open_session(store, A)
        with Writer(store, "k") as writer:
            for _ in range(3):
                writer.has_saved(3)
                mortal.kill()
                mortal.start()
            writer.has_saved(3)

        writer.check(store)
        with closing(open_store(store.url)) as other:
            writer.check(other)
        tokens = [*writer.tokens.values(), owned(store, Identity("new", "1")).revision]
        assert tokens[-1] == max(tokens)
        assert store.renew_session(A, 1) is not None


def test_a_short_absence_of_the_server_fails_nothing() -> None:
    with (
        nats_server() as mortal,
        closing(nats_store(new_url(mortal.url, timeout_ms=30_000))) as store,
    ):
        open_session(store, A)
        with Writer(store, "k") as writer:
            writer.has_saved()
            mortal.kill()
            mortal.start()
            writer.has_saved()

        assert writer.failures == []
        writer.check(store)


def test_r3_4_what_was_confirmed_survives_the_death_of_the_leader() -> None:
    with nats_cluster() as servers:
        url = new_url(urls_of(servers), replicas=3)
        with closing(nats_store(url)) as store:
            open_session(store, A)
            with Writer(store, "k") as writer:
                writer.has_saved(3)
                name = state_of_cluster(url)["leader"]
                (leader,) = [each for each in servers if name == each.folder.name]
                leader.kill()
                writer.has_saved(3)
                leader.launch()
                writer.has_saved(3)

            writer.check(store)
            for survivor in servers:
                if survivor is not leader:
                    with closing(
                        open_store(f"{survivor.url}/{url[url.index('?') :]}")
                    ) as other:
                        writer.check(other)
            assert store.renew_session(A, 1) is not None


class Appender:
    """Claims a list, appends to it, gives it up; and again, until it is told to stop.

    Owners come one after the other: what one has confirmed, the next one finds.
    """

    def __init__(self, store: Store, session: SessionId) -> None:
        self.store, self.session = store, session
        self.confirmed: list[tuple[int, str]] = []
        self.errors: list[BaseException] = []
        self.is_over = threading.Event()
        open_session(store, session)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.is_over.is_set():
                self._append()
        except BaseException as error:  # noqa: BLE001  raised by whoever waits
            self.errors.append(error)

    def _append(self) -> None:
        lock = acquisition(self.session)
        got = self._sure(self.store.try_acquire, Acquire(CART, lock))
        if not isinstance(got, Acquired):
            return
        claim = Claim(CART, self.session, next(_numbers), lock, got.entry.revision)
        claimed = self._sure(self.store.claim, claim)
        if not isinstance(claimed, Claimed):
            self._sure(self.store.release, Release(CART, lock))
            return
        token, record = claimed.entry.fencing_token, claimed.entry.record
        mark = f"{self.session}:{claim.attempt}"
        text = f"{(record.snapshot or b'').decode()} {mark}".encode()
        save = Save(CART, token, record.version + 1, text)
        assert self._sure(self.store.save, save) == Saved(record.version + 1)
        self.confirmed.append((token, mark))
        assert self._sure(self.store.give_up, GiveUp(CART, token)) == GivenUp()

    def _sure(self, method: Callable[[Any], Any], request: Any) -> Any:
        return until_done(lambda: method([request]))[0]


@pytest.mark.long
def test_r2_5_no_append_is_lost_while_leaders_die() -> None:
    with nats_cluster() as servers:
        url = new_url(urls_of(servers), replicas=3)
        with closing(nats_store(url)) as store:
            connections = [store.another() for _ in range(3)]
            appenders = [
                Appender(mine, SessionId(f"node-{number}.1#1"))
                for number, mine in enumerate(connections)
            ]
            for _ in range(2):
                have_appended(appenders, 20)
                name = state_of_cluster(url)["leader"]
                (leader,) = [each for each in servers if name == each.folder.name]
                leader.kill()
                have_appended(appenders, 20)
                leader.start()
            for appender in appenders:
                appender.is_over.set()
            for appender, mine in zip(appenders, connections, strict=True):
                appender.thread.join()
                mine.close()

            assert [each.errors for each in appenders] == [[], [], []]
            confirmed = sorted(each for one in appenders for each in one.confirmed)
            found = (loaded(store).record.snapshot or b"").decode().split()
            assert found == [mark for _, mark in confirmed]


def have_appended(appenders: Sequence[Appender], more: int) -> None:
    wanted = sum(len(each.confirmed) for each in appenders) + more

    def have_been() -> bool:
        assert not any(each.errors for each in appenders), appenders
        return sum(len(each.confirmed) for each in appenders) >= wanted

    eventually(have_been, PATIENCE_S)


def state_of_cluster(url: str) -> dict[str, Any]:
    servers, _, _ = url.partition("/?")
    found: dict[str, Any] = api(servers, "INFO", cluster_of(url))["cluster"]
    return found


def test_a_server_that_is_silent_holds_up_a_batch_once() -> None:
    with (
        nats_server() as paused,
        closing(nats_store(new_url(paused.url, timeout_ms=30_000))) as store,
    ):
        open_session(store, A)
        tokens = {each: owned(store, each).fencing_token for each in (CART, USER)}
        saves = [Save(each, token, 1, b"s") for each, token in tokens.items()]
        others = [Save(Identity("k", str(n)), 1, 1, b"") for n in range(999)]
        paused.signal(signal.SIGSTOP)
        begun_s = time.monotonic()

        with in_a_hurry(store):
            outcomes = store.save([*saves, *others])
            took_s = time.monotonic() - begun_s
            with pytest.raises(StoreFailure) as caught:
                store.renew_session(A, 1)

        # Not once for each of them.
        assert took_s < 15
        assert {type(each) for each in outcomes} == {Failed}
        sent = [each for each in outcomes[:2] if isinstance(each, Failed)]
        assert [each.may_have_happened for each in sent] == [True, True]
        assert caught.value.may_have_happened
        paused.signal(signal.SIGCONT)
        # It heals, and what may have happened is found out.
        again = until_done(lambda: store.save(saves))
        assert again == [Saved(1), Saved(1)]


def until_done(call: Callable[[], Any]) -> Any:
    """What `call` returns once nothing of it fails."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            outcomes = call()
        except StoreFailure:
            outcomes = [Failed("")]
        if not any(isinstance(each, Failed) for each in outcomes):
            return outcomes
        assert time.monotonic() < until_s


def test_a_server_that_is_away_is_a_failure_that_surely_did_not_happen() -> None:
    with (
        nats_server() as mortal,
        closing(nats_store(new_url(mortal.url, timeout_ms=30_000))) as store,
    ):
        open_session(store, A)
        entry = owned(store)
        mortal.kill()
        eventually(lambda: not store._is_up.is_set())
        store._down_since_s -= 60.0

        begun_s = time.monotonic()
        for call in (
            lambda: store.save([Save(CART, entry.fencing_token, 1, b"s")]),
            lambda: store.renew_session(A, 2),
            store.read_sessions,
        ):
            with pytest.raises(StoreFailure, match="there is no connection") as caught:
                call()
            assert not caught.value.may_have_happened
        # Nobody waits for a server that has been away for longer than a call may take.
        assert time.monotonic() - begun_s < 15

        mortal.start()
        saves = [Save(CART, entry.fencing_token, 1, b"s")]
        assert until_done(lambda: store.save(saves)) == [Saved(1)]


def test_a_closed_connection_does_nothing(url: str) -> None:
    store = nats_store(url)
    store.close()
    store.close()

    for call in (lambda: store.load([Load(CART)]), store.read_sessions):
        with pytest.raises(StoreFailure) as caught:
            call()
        assert not caught.value.may_have_happened


# --- buckets and servers that cannot be used ---------------------------------


def test_the_bucket_has_the_settings_that_are_relied_on(
    store: NatsStore, url: str
) -> None:
    servers, _, _ = url.partition("/?")

    config = api(servers, "INFO", cluster_of(url))["config"]

    wanted = {
        "storage": "file",
        "retention": "limits",
        "max_msgs_per_subject": 1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "discard": "new",
        "num_replicas": 1,
        "allow_direct": False,
    }
    assert {name: config.get(name, False) for name in wanted} == wanted


def test_in_a_cluster_each_write_is_kept_three_times(
    three: Sequence[NatsServer],
) -> None:
    url = new_url(urls_of(three))
    with closing(nats_store(url)) as store:
        assert store.url == url

        assert len(state_of_cluster(url)["replicas"]) == 2
    with pytest.raises(BadStore, match="num_replicas is 3, not 1"):
        open_store(f"{url}&replicas=1")
    open_store(f"{url}&replicas=3").close()


def test_more_replicas_than_servers_are_refused(url: str) -> None:
    with pytest.raises(BadStore, match="replicas > 1 not supported"):
        open_store(f"{url}&replicas=3")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"max_msgs_per_subject": 5}, "max_msgs_per_subject is 5, not 1"),
        ({"storage": "memory"}, 'storage is "memory", not "file"'),
        ({"max_age": 3_600_000_000_000}, "max_age is 3600000000000, not 0"),
        ({"discard": "old"}, 'discard is "old", not "new"'),
        ({"max_msg_size": 1_000}, "max_msg_size is 1000, not -1"),
        ({"retention": "interest"}, 'retention is "interest", not "limits"'),
        ({"no_ack": True}, "no_ack is true, not false"),
        ({"deny_purge": True}, "deny_purge is true, not false"),
        ({"allow_msg_ttl": True}, "allow_msg_ttl is set"),
        ({"persist_mode": "async"}, "persist_mode is set"),
        ({"metadata": {}}, "is of another program"),
        (
            {"metadata": {"placement_store_form": "2"}},
            "has form 2; this program knows form 1",
        ),
        ({"subjects": ["$KV.placement_{}.e.>"]}, "subjects is "),
    ],
)
def test_a_bucket_with_other_settings_is_refused_and_left_as_it_is(
    changed: dict[str, Any], why: str, server: NatsServer
) -> None:
    url = new_url(server.url)
    cluster = cluster_of(url)
    config = {
        "name": f"KV_placement_{cluster}",
        "subjects": [f"$KV.placement_{cluster}.>"],
        "storage": "file",
        "retention": "limits",
        "max_msgs_per_subject": 1,
        "discard": "new",
        "metadata": {"placement_store_form": "1"},
        **changed,
    }
    config["subjects"] = [each.format(cluster) for each in config["subjects"]]
    made = api(server.url, "CREATE", cluster, **config)
    assert "config" in made, made

    for use in (check_store, open_store):
        with pytest.raises(BadStore) as caught:
            use(url)
        assert why in str(caught.value)

    assert api(server.url, "INFO", cluster)["config"] == made["config"]


def test_a_bucket_with_the_settings_that_are_relied_on_is_used(
    server: NatsServer,
) -> None:
    url = new_url(server.url)
    cluster = cluster_of(url)
    config = {
        "name": f"KV_placement_{cluster}",
        "subjects": [f"$KV.placement_{cluster}.>"],
        "max_msgs_per_subject": 1,
        "discard": "new",
        "max_bytes": 200_000,
        "metadata": {"placement_store_form": "1"},
    }
    assert "config" in api(server.url, "CREATE", cluster, **config)
    with closing(nats_store(url)) as store:
        open_session(store, A)
        entry = owned(store)
        saved(store, entry, 1, b"x" * 50_000)

        # What is full refuses, and keeps what it has confirmed.
        (full,) = store.save([Save(CART, entry.fencing_token, 2, b"y" * 300_000)])

        assert isinstance(full, Failed)
        assert "the bucket is full" in full.message
        assert not full.may_have_happened
        assert loaded(store).record.snapshot == b"x" * 50_000
        assert store.renew_session(A, 1) is not None


@pytest.mark.parametrize("answer", ["no suitable peers", "none"])
def test_servers_that_do_not_see_each_other_yet_are_asked_again(
    answer: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api_of = Bucket._api
    verbs: list[str] = []

    async def api_that_begins(bucket: Bucket, verb: str, *more: Any) -> bytes:
        verbs.append(verb)
        if verb != "CREATE" or verbs.count("CREATE") > 2:
            return await api_of(bucket, verb, *more)
        if answer == "none":
            raise NoAnswer("simulated: no answer in time")
        error = {"code": 400, "err_code": 10005, "description": answer}
        return json.dumps({"error": error}).encode()

    monkeypatch.setattr(Bucket, "_api", api_that_begins)

    with closing(open_store(url)) as store:
        open_session(store, A)

    assert verbs.count("CREATE") == 3


def test_checking_creates_no_bucket(url: str) -> None:
    check_store(url)

    servers, _, _ = url.partition("/?")
    assert api(servers, "INFO", cluster_of(url))["error"]["err_code"] == 10059


def test_another_connection_never_creates_the_bucket_anew(
    store: NatsStore, url: str
) -> None:
    servers, _, _ = url.partition("/?")
    assert api(servers, "DELETE", cluster_of(url))["success"]

    with closing(store.another()) as other:
        for each in (store, other):
            with pytest.raises(StoreFailure):
                open_session(each, SessionId("node-c.1#1"))

    # Its tokens would begin again from 1.
    assert api(servers, "INFO", cluster_of(url))["error"]["err_code"] == 10059


def test_a_damaged_record_is_a_failure_and_never_taken_for_absent(
    store: NatsStore, url: str
) -> None:
    entry = owned(store)
    servers, _, _ = url.partition("/?")
    subject = f"$KV.placement_{cluster_of(url)}"
    for damage in ("", "\x00", "not ours"):
        for key in (f"e.{CART}", f"s.{key_token_of(B)}"):
            asked(servers, f"{subject}.{key}", damage)
        with closing(store.another()) as fresh:
            for outcomes in (
                fresh.load([Load(CART)]),
                fresh.save([Save(CART, entry.fencing_token, 1, b"")]),
                fresh.try_acquire([Acquire(CART, acquisition())]),
                store.save([Save(CART, entry.fencing_token, 1, b"")]),
            ):
                (outcome,) = outcomes
                assert isinstance(outcome, Failed), outcome
                assert "is damaged" in outcome.message
                assert not outcome.may_have_happened
            with pytest.raises(StoreFailure, match="is damaged"):
                fresh.read_sessions()


def test_a_server_that_is_not_there_is_told_in_one_sentence() -> None:
    (port,) = free_ports(1)
    url = f"nats://user:{SECRET}@127.0.0.1:{port}"

    with pytest.raises(StoreFailure) as caught:
        open_store(url)
    with pytest.raises(BadStore) as checked:
        check_store(url)

    assert not caught.value.may_have_happened
    for error in (caught.value, checked.value):
        assert f"NATS nats://127.0.0.1:{port}: no connection" in str(error)
        assert "\n" not in str(error)
        assert SECRET not in str(error)


def test_a_server_without_jetstream_is_told_in_one_sentence() -> None:
    with nats_server(jetstream=False) as plain:
        for use in (check_store, open_store):
            with pytest.raises(BadStore, match="JetStream is off"):
                use(f"{plain.url}/?timeout_ms=300")


PERMITTED = """
accounts {
  JS { jetstream: enabled, users: [
    { user: node, password: "$SECRET", permissions: {
        publish: ["$KV.placement_mine.>", "$JS.API.STREAM.INFO.KV_placement_mine",
                  "$JS.API.STREAM.CREATE.KV_placement_mine",
                  "$JS.API.STREAM.MSG.GET.KV_placement_mine",
                  "$JS.API.STREAM.PURGE.KV_placement_mine"],
        subscribe: "_INBOX.>" } },
    { user: client, password: "$SECRET", permissions: {
        publish: "$JS.API.STREAM.>", subscribe: "_INBOX.>" } },
    { user: deaf, password: "$SECRET", permissions: {
        publish: ">", subscribe: "other.>" } },
  ] }
  NONE { users: [ { user: none, password: "$SECRET" } ] }
}
""".replace("$SECRET", SECRET)


@pytest.fixture(scope="module")
def guarded() -> Iterator[NatsServer]:
    with nats_server(more=PERMITTED) as started:
        yield started


def as_user(server: NatsServer, user: str, password: str = SECRET) -> str:
    address = server.url.removeprefix("nats://")
    return f"nats://{user}:{password}@{address}/?cluster="


def test_the_permissions_of_a_node_are_enough(guarded: NatsServer) -> None:
    with closing(nats_store(as_user(guarded, "node") + "mine")) as store:
        open_session(store, A)
        entry = owned(store)
        saved(store, entry, 1, b"1" * MIB)
        saved(store, entry, 2, b"2" * MIB)
        store.write_members([Member(session=A)], 0)
        assert store.renew_session(A, 1) is not None
        assert store.close_session(A, 1)
        open_session(store, B)
        assert owned(store, session=B).record.snapshot == b"2" * MIB


@pytest.mark.parametrize(
    ("user", "cluster", "why"),
    [
        ("node", "theirs", "it is not permitted to publish to $JS.API.STREAM.INFO.KV"),
        ("deaf", "mine", "it is not permitted to receive answers"),
        ("none", "mine", "JetStream is off"),
        ("wrong", "mine", "the server refuses the credentials"),
    ],
)
def test_who_is_not_permitted_is_told_what_in_one_sentence(
    user: str, cluster: str, why: str, guarded: NatsServer
) -> None:
    for use in (check_store, open_store):
        begun_s = time.monotonic()
        with pytest.raises(BadStore) as caught:
            use(as_user(guarded, user) + cluster + PATIENT)
        assert why in str(caught.value)
        assert time.monotonic() - begun_s < 15
        assert SECRET not in str(caught.value)


def test_who_may_not_write_is_told_so_at_once(guarded: NatsServer) -> None:
    session = SessionId("node-x.1#1")
    with closing(nats_store(as_user(guarded, "node") + "mine")) as node:
        open_session(node, session)
    url = as_user(guarded, "client") + "mine" + PATIENT
    with closing(nats_store(url)) as client:
        begun_s = time.monotonic()
        (outcome,) = client.try_acquire([Acquire(USER, acquisition(session))])
        with pytest.raises(StoreFailure, match="not permitted to publish to") as caught:
            client.renew_session(session, 1)

        assert isinstance(outcome, Failed)
        assert "it is not permitted to publish to $KV.placement_mine" in outcome.message
        assert not outcome.may_have_happened
        assert not caught.value.may_have_happened
        assert time.monotonic() - begun_s < 15


def test_a_secret_is_shown_nowhere(
    guarded: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = as_user(guarded, "node") + "mine&replicas=1"
    with closing(nats_store(url)) as store, closing(store.another()) as other:
        guarded.kill()
        with in_a_hurry(store), pytest.raises(StoreFailure) as caught:
            until_failed(lambda: store.load([Load(CART)]))
        guarded.start()
        shown = [store.url, repr(store), str(store), repr(other), repr(store._place)]
        shown += [str(caught.value), repr(caught.value), caplog.text]
        shown += [str(caught.value.__cause__), repr(store.__dict__)]

        assert store.url == other.url
        assert store.url == f"{guarded.url}/?cluster=mine&replicas=1"
    for text in shown:
        assert SECRET not in text


def until_failed(call: Callable[[], Any]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        call()


def test_without_the_extra_the_package_works_and_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['nats'] = None; "
        "from actors.store_url import *; open_store('memory://').close()\n"
        "try: open_store('nats://127.0.0.1:1')\n"
        "except BadStore as error: sys.exit(str(error))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )

    assert "pip install 'actor-placement[nats]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_stores_read_no_module_of_nats() -> None:
    code = (
        "import sys; from actors.store_url import open_store; "
        "open_store('memory://').close(); "
        "sys.exit('asyncio' in sys.modules or 'actors.store_nats' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], check=False)

    assert done.returncode == 0
