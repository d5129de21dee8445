"""The PostgreSQL store's own promises: one server, lost connections, every failure."""

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from decimal import Decimal
from typing import Any

import pytest

from actors import Cluster, postgres_database, store_postgres
from actors.postgres_database import Connection
from actors.store_postgres import PostgresStore
from actors.store_url import open_store
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    Failed,
    GiveUp,
    Load,
    LockRefused,
    Release,
    Save,
    Saved,
    SessionRecord,
    Store,
    StoreFailure,
)
from placement.entry import Acquisition
from placement.identity import Identity
from placement.topology import Member, SessionId
from tests.actors.actors_under_test import Account
from tests.actors.postgres_builders import (
    CART,
    NODE,
    USER,
    backend_of,
    in_a_hurry,
    load,
    opened,
    own,
    terminate,
)
from tests.actors.postgres_server import PostgresServer, Wire
from tests.actors.store_processes import race
from tests.waiting import eventually

pytestmark = pytest.mark.servers

# --- builders ---


def save(
    store: Store, token: int, version: int, snapshot: bytes, identity: Identity = CART
) -> object:
    (outcome,) = store.save([Save(identity, token, version, snapshot)])
    return outcome


def in_a_transaction(store: Store, *calls: Callable[[], object]) -> None:
    with store.transaction():
        for call in calls:
            call()


def waits_for_a_lock(server: PostgresServer, process: int) -> bool:
    return bool(
        server.run(f"SELECT FROM pg_locks WHERE pid = {process} AND NOT granted")
    )


# --- transactions ---


def test_commits_are_synchronous_and_bounded_whatever_the_server_has_set(
    url: str,
) -> None:
    slack = (
        "options=-csynchronous_commit%3Doff"
        "%20-cdefault_transaction_isolation%3Dserializable"
    )
    with opened(f"{url}&{slack}&timeout_ms=1234") as store:
        with store.transaction():
            own(store, CART)
            assert store._connection is not None
            found = [
                store._connection.execute(f"SHOW {name}".encode()).fetchall()
                for name in (
                    "synchronous_commit",
                    "statement_timeout",
                    "idle_in_transaction_session_timeout",
                    "transaction_isolation",
                )
            ]
        assert found == [[("on",)], [("1234ms",)], [("1234ms",)], [("read committed",)]]


def test_a_stronger_synchronous_commit_stays(url: str) -> None:
    strong = "options=-csynchronous_commit%3Dremote_apply"
    with opened(f"{url}&{strong}") as store, store.transaction():
        own(store, CART)
        assert store._connection is not None
        found = store._connection.execute("SHOW synchronous_commit").fetchall()

    assert found == [("remote_apply",)]


def test_nothing_is_left_in_the_servers_session(url: str) -> None:
    """So that a pooler may give every transaction another session."""
    with opened(url) as store:
        assert store._connection is not None
        look = (
            "SELECT (SELECT count(*) FROM pg_prepared_statements),"
            " (SELECT count(*) FROM pg_settings WHERE source = 'session'),"
            " (SELECT count(*) FROM pg_locks"
            "  WHERE pid = pg_backend_pid() AND locktype = 'advisory')"
        )
        for number in range(20):
            entry = own(store, Identity("k", str(number)), number)
            store.save([Save(entry.identity, entry.fencing_token, 1, b"state")])
            store.renew_session(NODE, number)
            store.read_sessions()
            load(store, CART)

        assert store._connection.execute(look).fetchall() == [(0, 0, 0)]


def test_a_batch_costs_two_round_trips(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips: list[int] = []
    send = PostgresStore._send

    def counting(store: PostgresStore, *statements: Any) -> Any:
        trips.append(len(statements))
        return send(store, *statements)

    with opened(url) as store:
        identities = [Identity("k", str(number)) for number in range(100)]
        mine = Acquisition(NODE, 1)
        monkeypatch.setattr(PostgresStore, "_send", counting)

        with store.transaction():
            store.try_acquire([Acquire(each, mine) for each in identities])
        assert len(trips) == 2
        with store.transaction():
            claims = [Claim(each, NODE, 1, mine, 0) for each in identities]
            claimed = store.claim(claims)
        assert len(trips) == 4
        tokens = [each.entry.fencing_token for each in claimed]  # type: ignore[union-attr]
        store.save(
            [Save(*each, 1, b"state") for each in zip(identities, tokens, strict=True)]
        )
        assert len(trips) == 6
        store.load([Load(each) for each in identities])
        assert len(trips) == 7
        store.renew_session(NODE, 1)
        store.read_sessions()
        assert len(trips) == 9
        store.load([])
        store.save([])
        in_a_transaction(store)
        assert len(trips) == 9


def test_a_renewal_waits_for_no_batch_and_a_closing_does(
    postgres: PostgresServer, url: str
) -> None:
    with (
        opened(f"{url}&timeout_ms=20000") as store,
        closing(store.another()) as renewing,
        closing(store.another()) as closing_it,
    ):
        assert isinstance(closing_it, PostgresStore)
        closing_it.read_sessions()
        closed: list[bool] = []
        thread = threading.Thread(
            target=lambda: closed.append(closing_it.close_session(NODE, 7))
        )
        with store.transaction():
            own(store, CART)
            view = renewing.renew_session(NODE, 7)
            assert view is not None
            assert [each.count for each in view.sessions] == [7]
            thread.start()
            eventually(lambda: waits_for_a_lock(postgres, backend_of(closing_it)))
            assert closed == []
        thread.join()

        assert closed == [True]
        assert load(store, CART).owner == NODE
        assert store.renew_session(NODE, 8) is None


def test_a_body_that_raises_undoes_its_transaction(url: str) -> None:
    with opened(url) as store:
        with pytest.raises(ZeroDivisionError):
            in_a_transaction(
                store,
                lambda: own(store, CART),
                lambda: store.close_session(NODE, 0),
                lambda: store.write_members([Member(session=NODE)], 0),
                lambda: 1 // 0,
            )

        assert load(store, CART).owner is None
        assert store.renew_session(NODE, 1) is not None
        assert store.read_sessions().topology.epoch == 0


def test_a_transaction_in_which_a_call_failed_does_not_commit(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(url) as store:

        def failing() -> None:
            rename = f"ALTER TABLE {schema}.identities RENAME TO away"
            assert store._connection is not None
            store._connection.execute(rename.encode())
            with pytest.raises(StoreFailure, match="does not exist"):
                store.load([Load(USER)])

        def following() -> None:
            with pytest.raises(StoreFailure, match="does not exist"):
                store.close_session(NODE, 0)

        with pytest.raises(StoreFailure, match="does not exist") as caught:
            in_a_transaction(store, lambda: own(store, CART), failing, following)

        assert caught.value.may_have_happened is False
        assert load(store, CART).owner is None
        assert store.renew_session(NODE, 1) is not None


def test_a_transaction_sees_what_it_has_written(url: str) -> None:
    with opened(url) as store:
        token = own(store, CART).fencing_token
        save(store, token, 1, b"one")
        other = SessionId("node-b.1#1")

        with store.transaction():
            store.release([Release(CART, Acquisition(NODE, 9))])
            assert load(store, CART).record.snapshot == b"one"
            assert save(store, token, 2, b"two") == Saved(2)
            assert load(store, CART).record.snapshot == b"two"
            store.give_up([GiveUp(USER, 1)])
            own(store, USER, 2)
            store.open_session(SessionRecord(session=other, ttl_ms=1))
            view = store.renew_session(other, 4)
            assert view is not None
            assert [each.count for each in view.sessions] == [0, 4]
            store.write_members([Member(session=other)], 0)
            store.close_session(other, 4)
            seen = store.read_sessions()
            assert [each.session for each in seen.sessions] == [NODE, other]
            assert [each.closed for each in seen.sessions] == [False, True]

        assert load(store, CART).record.snapshot == b"two"
        assert load(store, USER).owner == NODE
        assert store.read_sessions() == seen
    with opened(url) as store, store.transaction():
        assert [each.session for each in store.read_sessions().sessions] == [
            NODE,
            other,
        ]


def test_what_is_locked_or_claimed_keeps_a_snapshot_that_is_not_written_again(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    toast = (
        "SELECT pg_relation_size(reltoastrelid) FROM pg_class"
        f" WHERE oid = '{schema}.identities'::regclass"
    )
    with opened(url) as store:
        state = os.urandom(100_000)
        token = own(store, CART).fencing_token
        save(store, token, 1, state)
        before = postgres.run(toast)

        for number in range(2, 6):
            store.give_up([GiveUp(CART, token)])
            entry = own(store, CART, number)
            token = entry.fencing_token
            assert entry.record.snapshot == state

        assert before != [(0,)]
        assert postgres.run(toast) == before


def test_large_snapshots_are_sent_in_pieces(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_postgres, "_CHUNK_BYTES", 1_000)
    pieces: list[int] = []
    send = PostgresStore._send

    def counting(store: PostgresStore, *statements: Any) -> Any:
        pieces.append(sum(each[0] is store_postgres._WRITE_ROWS for each in statements))
        return send(store, *statements)

    monkeypatch.setattr(PostgresStore, "_send", counting)
    sizes = (400, 400, 400, 5_000, 0, 1_000, 1)
    with opened(url) as store:
        tokens = [
            own(store, Identity("k", str(number)), number).fencing_token
            for number in range(len(sizes))
        ]

        saved = store.save(
            [
                Save(Identity("k", str(number)), tokens[number], 1, bytes(size))
                for number, size in enumerate(sizes)
            ]
        )

        assert saved == [Saved(1)] * len(sizes)
        assert pieces[-1] == 5
        for number, size in enumerate(sizes):
            assert load(store, Identity("k", str(number))).record.snapshot == bytes(
                size
            )


@pytest.mark.parametrize("size", [500_000, 4_000_000, 30_000_000])
def test_a_batch_may_be_larger_than_what_the_network_takes_at_once(
    size: int, url: str
) -> None:
    identities = [Identity("k", str(number)) for number in range(4)]
    with opened(f"{url}&timeout_ms=20000") as store:
        tokens = [
            own(store, each, n).fencing_token for n, each in enumerate(identities)
        ]
        states = [os.urandom(size // 4) for _ in identities]

        with store.transaction():
            saved = store.save(
                [
                    Save(identity, token, 1, state)
                    for identity, token, state in zip(
                        identities, tokens, states, strict=True
                    )
                ]
            )

        assert saved == [Saved(1)] * 4
        assert [load(store, each).record.snapshot for each in identities] == states


def test_a_lock_on_what_was_never_claimed_leaves_no_row(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(url) as store:
        for number in range(10):
            mine = Acquisition(NODE, number)
            store.try_acquire([Acquire(CART, mine)])
            store.release([Release(CART, mine)])

    assert postgres.run(f"SELECT count(*) FROM {schema}.identities") == [(0,)]


def test_r2_3_a_closed_session_takes_no_lock(url: str) -> None:
    gone = SessionId("node-b.1#1")
    with opened(url) as store:
        store.close_session(gone, 0)

        late = store.try_acquire([Acquire(CART, Acquisition(gone, 1))])

        assert late == [LockRefused(f"session {gone} is closed")]


def test_numbers_of_commits_go_with_their_connections(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    look = f"SELECT number FROM {schema}.commits ORDER BY number"
    with opened(url) as store, closing(store.another()) as other:
        own(store, CART)
        own(other, USER, 2)
        load(other, USER)
        assert postgres.run(look) == [(2,), (3,)]
    assert postgres.run(look) == []

    postgres.run(
        f"INSERT INTO {schema}.commits VALUES"
        " ('dead', 1, now() - interval '25 hours'), ('new', 2, now())"
    )
    open_store(url).close()
    assert postgres.run(look) == [(2,)]


@pytest.mark.parametrize(
    "name", ["a\u200db", "\u00a0", "\u3000", "\ue000", "\U000e0001"]
)
def test_an_identity_that_shows_nothing_is_one_like_any_other(
    name: str, url: str
) -> None:
    identity = Identity("k", name)
    with opened(url) as store:
        token = own(store, identity).fencing_token
        assert save(store, token, 1, b"state", identity) == Saved(1)
        assert load(store, identity).record.snapshot == b"state"


# --- failures ---


def test_a_request_that_cannot_be_stored_fails_alone(url: str) -> None:
    with opened(url) as store:
        store.snapshot_bytes_max = 1_000
        token = own(store, CART).fencing_token
        other = own(store, USER, 2).fencing_token
        rude, zero = SessionId("node-\ud800.1#1"), SessionId("node-\0.1#1")

        saved = store.save(
            [
                Save(CART, token, 1, bytes(1_001)),
                Save(USER, other, 1, bytes(1_000)),
                Save(CART, token, 1 << 63, b"state"),
            ]
        )
        given_up = store.give_up([GiveUp(CART, token, 1, bytes(1_001))])
        acquired = store.try_acquire(
            [
                Acquire(Identity("k", "1"), Acquisition(rude, 1)),
                Acquire(Identity("k", "2"), Acquisition(NODE, 1 << 64)),
                Acquire(Identity("k", "3"), Acquisition(NODE, 3)),
                Acquire(Identity("k", "4"), Acquisition(zero, 4)),
            ]
        )
        claimed = store.claim(
            [
                Claim(Identity("k", "3"), NODE, 1 << 63, Acquisition(NODE, 3), 0),
                Claim(Identity("k", "3"), rude, 3, Acquisition(NODE, 3), 0),
                Claim(Identity("k", "3"), zero, 3, Acquisition(NODE, 3), 0),
                Claim(Identity("k", "3"), NODE, 3, Acquisition(NODE, 3), 0),
            ]
        )

        for outcomes, stand in (
            (saved, [False, True, False]),
            (given_up, [False]),
            (acquired, [False, False, True, False]),
            (claimed, [False, False, False, True]),
        ):
            failed = [each for each in outcomes if isinstance(each, Failed)]
            assert [not isinstance(each, Failed) for each in outcomes] == stand
            assert not any(each.may_have_happened for each in failed)
        assert load(store, CART).owner == NODE
        assert load(store, CART).record.snapshot is None
        assert load(store, USER).record.snapshot == bytes(1_000)


def test_a_session_that_cannot_be_stored_is_a_failure(url: str) -> None:
    with opened(url) as store:
        for session, number in (
            (SessionId("\ud800"), 0),
            (SessionId("\0"), 0),
            (NODE, 1 << 63),
        ):
            with pytest.raises(StoreFailure) as caught:
                store.renew_session(session, number)
            assert caught.value.may_have_happened is False
        endless = SessionRecord(session=SessionId("node-b.1#1"), ttl_ms=1 << 63)
        with pytest.raises(StoreFailure, match="64 bits"):
            store.open_session(endless)
        with pytest.raises(StoreFailure):
            store.write_members([Member(session=SessionId("\ud800"))], 0)
        assert store.renew_session(NODE, 1) is not None
        assert store.read_sessions().topology.epoch == 0


def test_a_damaged_membership_is_a_failure(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(url) as store:
        for damage in ('[{"session": 7}]', "7"):
            postgres.run(f"UPDATE {schema}.membership SET members = '{damage}'")

            for call in (
                store.read_sessions,
                lambda: store.renew_session(NODE, 1),
                lambda: store.write_members([], 0),
            ):
                with pytest.raises(StoreFailure):
                    call()


def test_a_closed_connection_fails(url: str) -> None:
    with opened(url) as store, closing(store.another()) as unused:
        pass

    for call in (
        lambda: load(store, CART),
        lambda: store.renew_session(NODE, 1),
        unused.read_sessions,
    ):
        with pytest.raises(StoreFailure, match="closed"):
            call()
    store.close()


# --- waiting, and its end ---


def test_who_holds_the_row_for_long_makes_others_fail_and_they_work_again_later(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(f"{url}&timeout_ms=20000") as store, postgres.connect() as holder:
        entry = own(store, CART)
        with holder.transaction():
            holder.execute(f"SELECT FROM {schema}.store FOR UPDATE".encode())

            for call in (
                lambda: own(store, USER),
                lambda: store.close_session(NODE, 0),
                lambda: in_a_transaction(store, lambda: own(store, USER)),
            ):
                with (
                    in_a_hurry(store, 100),
                    pytest.raises(StoreFailure, match="timeout") as caught,
                ):
                    call()
                assert caught.value.may_have_happened is False
            assert load(store, CART).fencing_token == entry.fencing_token
            assert store.renew_session(NODE, 1) is not None

        assert own(store, USER, 2).owner == NODE


def test_a_transaction_that_stands_still_is_ended_by_the_server(
    postgres: PostgresServer, url: str
) -> None:
    patient = f"{url}&timeout_ms=20000"
    with opened(patient) as store, closing(store.another()) as other:
        own(store, CART)
        process = backend_of(store)
        look = f"SELECT FROM pg_stat_activity WHERE pid = {process}"

        def stand_still() -> None:
            eventually(lambda: postgres.run(look) == [])

        with (
            in_a_hurry(store, 400),
            pytest.raises(StoreFailure, match="connection") as caught,
        ):
            in_a_transaction(store, lambda: own(store, USER, 2), stand_still)

        assert caught.value.may_have_happened is False
        assert load(other, USER).owner is None
        assert own(other, USER, 3).owner == NODE
        assert own(store, Identity("k", "1"), 4).owner == NODE


def test_who_is_cut_off_in_the_middle_of_a_transaction_is_waited_for_some_seconds(
    wire: Wire, schema: str, url: str
) -> None:
    """The server waits for what was cut off for as long as it likes, row in hand."""
    with (
        opened(wire.url(f"schema={schema}&timeout_ms=20000")) as cut_off,
        opened(f"{url}&timeout_ms=20000") as other,
    ):
        own(cut_off, CART)
        done: list[object] = []

        def be_cut_off() -> None:
            with suppress(StoreFailure):
                done.append(own(cut_off, USER, 2))

        thread = threading.Thread(target=be_cut_off)
        with in_a_hurry(cut_off, 400):
            # Of what is written at once the row arrives, the commit's number does not.
            wire.fall_silent("commits")
            thread.start()
            eventually(lambda: wire.cut_count)

            assert own(other, Identity("k", "1"), 3).owner == NODE
            thread.join()
        assert len(done) == (load(other, USER).owner == NODE)


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.renew_session(NODE, 1),
        lambda store: store.load([Load(CART)]),
        lambda store: own(store, USER, 2),
    ],
)
def test_a_server_that_stands_still_is_not_waited_for(
    call: Callable[[Store], object],
    postgres: PostgresServer,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres_database, "_GRACE_S", 0.2)
    # Tries that are made again end with the time, too.
    with opened(f"{url}&timeout_ms=20000") as store:
        own(store, CART)
        before = backend_of(store)
        os.kill(before, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with in_a_hurry(store, 400):
                call(store)
            assert time.monotonic() - began < 15
            assert store._connection is None or backend_of(store) != before
        finally:
            os.kill(before, signal.SIGCONT)


def test_a_deadlock_changes_nothing_and_the_same_succeeds_later(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    quick = "options=-cdeadlock_timeout%3D10ms"
    with (
        opened(f"{url}&timeout_ms=20000&{quick}") as store,
        postgres.connect() as other,
    ):
        process = other.info.backend_pid

        def take_the_other_way() -> None:
            with other.transaction():
                other.execute("SET LOCAL deadlock_timeout = '60s'")
                other.execute(f"UPDATE {schema}.sessions SET ttl_ms = ttl_ms".encode())
                other.execute(f"SELECT FROM {schema}.store FOR UPDATE".encode())

        thread = threading.Thread(target=take_the_other_way)

        def let_it_wait() -> None:
            thread.start()
            eventually(lambda: waits_for_a_lock(postgres, process))

        def close() -> None:
            assert store.close_session(NODE, 0)

        with pytest.raises(StoreFailure, match="deadlock") as caught:
            in_a_transaction(store, lambda: own(store, CART), let_it_wait, close)
        thread.join()

        assert caught.value.may_have_happened is False
        assert load(store, CART).owner is None
        in_a_transaction(store, lambda: own(store, CART), close)
        assert load(store, CART).owner == NODE


def test_a_renewal_that_conflicts_is_repeated(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(f"{url}&timeout_ms=20000") as store, postgres.connect() as other:
        process = backend_of(store)
        counts: list[int] = []

        def renew() -> None:
            view = store.renew_session(NODE, 5)
            assert view is not None
            counts.extend(each.count for each in view.sessions)

        thread = threading.Thread(target=renew)
        with other.transaction():
            other.execute(f"UPDATE {schema}.sessions SET count = 2".encode())
            thread.start()
            eventually(lambda: waits_for_a_lock(postgres, process))
        thread.join()

        assert counts == [5]
        assert backend_of(store) == process


def test_a_closing_that_meets_a_renewal_sees_its_count(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(f"{url}&timeout_ms=20000") as store, postgres.connect() as other:
        process = backend_of(store)
        closed: list[bool] = []
        thread = threading.Thread(
            target=lambda: closed.append(store.close_session(NODE, 0))
        )
        with other.transaction():
            other.execute(f"UPDATE {schema}.sessions SET count = 1".encode())
            thread.start()
            eventually(lambda: waits_for_a_lock(postgres, process))
        thread.join()

        assert closed == [False]
        assert store.close_session(NODE, 1)


def test_an_interrupted_call_leaves_a_store_that_works(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Connection.send

    def interrupted(
        connection: Connection, statements: Iterable[tuple[bytes, Sequence[Any]]]
    ) -> None:
        send(connection, statements)
        raise KeyboardInterrupt

    with opened(url) as store:
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "send", interrupted)
            before = backend_of(store)
            with pytest.raises(KeyboardInterrupt):
                store.renew_session(NODE, 3)

        view = store.renew_session(NODE, 2)
        assert view is not None
        assert [each.count for each in view.sessions] == [3]
        assert backend_of(store) != before  # it might answer what was asked before


# --- connections that are lost ---

COMMITTING = "commits VALUES"
RENEWING = "greatest(count"
TAKING = "FOR UPDATE"


def test_a_connection_that_was_lost_unused_is_made_again(
    postgres: PostgresServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(url) as store:
        calls: list[Callable[[], object]] = [
            lambda: own(store, CART),
            lambda: store.renew_session(NODE, 1),
            lambda: load(store, CART),
            store.read_sessions,
            lambda: in_a_transaction(store, lambda: own(store, USER, 2)),
            lambda: store.write_members([Member(session=NODE)], 0),
        ]
        for number, call in enumerate(calls):
            before = backend_of(store)
            terminate(postgres, before)
            call()
            assert backend_of(store) != before, number
        assert load(store, USER).owner == NODE
    gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize("before", [True, False])
def test_a_call_whose_commit_is_lost_is_made_once(
    before: bool,  # noqa: FBT001
    postgres: PostgresServer,
    schema: str,
    wire: Wire,
) -> None:
    with opened(wire.url(f"schema={schema}&sslmode=disable")) as store:
        mine = Acquisition(NODE, 1)
        calls: list[Callable[[], object]] = [
            lambda: store.try_acquire([Acquire(CART, mine)]),
            lambda: store.claim([Claim(CART, NODE, 1, mine, 0)]),
            lambda: store.save([Save(CART, 1, 4, b"state")]),
            lambda: store.give_up([GiveUp(CART, 1, 5, b"last")]),
            lambda: store.open_session(SessionRecord(session="b.1#1", ttl_ms=1)),  # type: ignore[arg-type]
            lambda: store.write_members([Member(session=NODE)], 0),
            lambda: store.close_session(NODE, 0),
        ]
        outcomes = []
        for number, call in enumerate(calls, start=1):
            wire.cut(COMMITTING, before=before)
            outcomes.append(call())
            assert wire.cut_count == number

        acquired, claimed, saved, given_up, opened_it, topology, closed = outcomes
        assert isinstance(acquired[0], Acquired)  # type: ignore[index]
        assert claimed[0].entry.fencing_token == 1  # type: ignore[index]
        assert saved == [Saved(4)]
        assert type(given_up[0]).__name__ == "GivenUp"  # type: ignore[index]
        assert (opened_it, closed) == (True, True)
        assert topology.epoch == 1  # type: ignore[attr-defined]
        # Each once: claim, save and giving up have drawn one revision.
        assert postgres.run(f"SELECT revision FROM {schema}.store") == [(3,)]
        assert load(store, CART).record.snapshot == b"last"


@pytest.mark.parametrize("before", [True, False])
def test_a_transaction_whose_commit_is_lost_says_how_it_went(
    before: bool,  # noqa: FBT001
    schema: str,
    wire: Wire,
) -> None:
    with opened(wire.url(f"schema={schema}&sslmode=disable")) as store:
        wire.cut(COMMITTING, before=before)

        if before:
            with pytest.raises(StoreFailure) as caught:
                in_a_transaction(store, lambda: own(store, CART))
            assert caught.value.may_have_happened is False
        else:
            in_a_transaction(store, lambda: own(store, CART))

        assert wire.cut_count == 1
        assert load(store, CART).owner == (None if before else NODE)


@pytest.mark.parametrize("before", [True, False])
def test_a_commit_that_cannot_be_looked_up_may_have_happened(
    before: bool,  # noqa: FBT001
    schema: str,
    wire: Wire,
) -> None:
    url = wire.url(f"schema={schema}&sslmode=disable&timeout_ms=20000")
    with opened(url) as store:
        for call in (
            lambda: own(store, CART),
            lambda: in_a_transaction(store, lambda: own(store, USER, 2)),
        ):
            wire.cut(COMMITTING, before=before, then_refuse=True)
            with in_a_hurry(store, 250):
                with pytest.raises(StoreFailure, match="could not be found") as caught:
                    call()
                assert caught.value.may_have_happened is True
                with pytest.raises(StoreFailure) as caught:
                    store.read_sessions()
                assert caught.value.may_have_happened is False
            wire.refuses = False
        assert load(store, USER).owner == (None if before else NODE)


def test_a_commit_that_waits_for_a_standby_is_not_taken_for_done(
    postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_database, "_GRACE_S", 0.2)

    def set_standby(statement: str, found: str) -> None:
        postgres.run(f"ALTER SYSTEM {statement}", "SELECT pg_reload_conf()")
        look = "SHOW synchronous_standby_names"
        eventually(lambda: postgres.run(look) == [(found,)])

    with opened(f"{url}&timeout_ms=20000") as store:
        mine = Acquisition(NODE, 1)
        store.try_acquire([Acquire(CART, mine)])
        request = Claim(CART, NODE, 1, mine, 0)
        set_standby("SET synchronous_standby_names = 'none'", "none")
        try:
            for call in (
                lambda: store.claim([request]),
                lambda: store.renew_session(NODE, 1),
            ):
                with in_a_hurry(store, 200), pytest.raises(StoreFailure) as caught:
                    call()
            assert caught.value.may_have_happened is True
        finally:
            set_standby("RESET synchronous_standby_names", "")

        (claimed,) = store.claim([request])
        assert isinstance(claimed, Claimed)
        assert claimed.entry.fencing_token == 1


@pytest.mark.parametrize("before", [True, False])
def test_a_renewal_whose_answer_is_lost_is_repeated(
    before: bool,  # noqa: FBT001
    schema: str,
    wire: Wire,
) -> None:
    with opened(wire.url(f"schema={schema}&sslmode=disable")) as store:
        wire.cut(RENEWING, before=before)

        view = store.renew_session(NODE, 3)

        assert wire.cut_count == 1
        assert view is not None
        assert [each.count for each in view.sessions] == [3]


def test_a_transaction_that_loses_its_connection_in_between_changes_nothing(
    postgres: PostgresServer, url: str
) -> None:
    with opened(url) as store:
        with pytest.raises(StoreFailure, match="connection") as caught:
            in_a_transaction(
                store,
                lambda: own(store, CART),
                lambda: terminate(postgres, backend_of(store)),
                lambda: own(store, USER, 2),
            )

        assert caught.value.may_have_happened is False
        assert load(store, CART).owner is None
        assert load(store, USER).owner is None


def test_a_call_that_loses_every_connection_gives_up(schema: str, wire: Wire) -> None:
    with opened(wire.url(f"schema={schema}&sslmode=disable&timeout_ms=60000")) as store:
        wire.cut(TAKING, before=True, times=1_000)

        with pytest.raises(StoreFailure) as caught:
            own(store, CART)

        assert caught.value.may_have_happened is False
        assert 3 <= wire.cut_count < 100


# --- under load ---


class Writer:
    """Claims and saves without end, and keeps what the store has confirmed."""

    def __init__(self, url: str, number: int) -> None:
        self.session = SessionId(f"node-{number}.1#1")
        self.store = open_store(url)
        self.identities = [Identity(f"w{number}", str(each)) for each in range(5)]
        self.confirmed: dict[Identity, tuple[int, int, bytes]] = {}
        self.tokens: list[int] = []
        self.counts = [0]
        self.batches = 0
        self.failures: list[StoreFailure] = []
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with closing(self.store):
                while not self._once(
                    lambda: self.store.open_session(
                        SessionRecord(session=self.session, ttl_ms=5_000)
                    )
                ):
                    pass
                number = 0
                while not self.stop.is_set():
                    number += 1
                    self._turn(number)
        except BaseException as error:  # noqa: BLE001  told by the main thread
            self.errors.append(error)

    def _once(self, call: Callable[[], Any]) -> Any:
        """Make a call until it has an outcome, as every request may be repeated."""
        while True:
            try:
                return call()
            except StoreFailure as error:
                self.failures.append(error)
                if len(self.failures) > 100_000:
                    raise

    def _turn(self, number: int) -> None:
        store = self.store
        mine = Acquisition(self.session, number)

        def take() -> list[Any]:
            with store.transaction():
                return list(
                    store.try_acquire([Acquire(each, mine) for each in self.identities])
                )

        acquired = self._once(take)
        claims = [
            Claim(each, self.session, number, mine, got.entry.revision)
            for each, got in zip(self.identities, acquired, strict=True)
        ]
        claimed = self._once(lambda: store.claim(claims))
        tokens = [each.entry.fencing_token for each in claimed]
        assert min(tokens) > max(self.tokens, default=0)
        self.tokens += tokens
        for each in claimed:
            confirmed = self.confirmed.get(each.entry.identity)
            if confirmed is not None:
                assert each.entry.record.version == confirmed[1]
                assert each.entry.record.snapshot == confirmed[2]
        saves = [
            Save(each, token, number, f"{self.session} {number}".encode())
            for each, token in zip(self.identities, tokens, strict=True)
        ]

        def write() -> list[Any]:
            with store.transaction():
                return list(store.save(saves))

        saved = self._once(write)
        assert saved == [Saved(number)] * len(saves)
        for each in saves:
            self.confirmed[each.identity] = (each.fencing_token, number, each.snapshot)
        view = self._once(lambda: store.renew_session(self.session, number))
        assert view is not None
        counts = {each.session: each.count for each in view.sessions}
        assert counts[self.session] == number
        give_ups = [
            GiveUp(each, token)
            for each, token in zip(self.identities, tokens, strict=True)
        ]
        outcomes = self._once(lambda: store.give_up(give_ups))
        assert {type(each).__name__ for each in outcomes} == {"GivenUp"}
        self.batches += 1


def check_all_is_there(url: str, writers: Sequence[Writer]) -> None:
    tokens = [token for writer in writers for token in writer.tokens]
    assert len(set(tokens)) == len(tokens)
    with closing(open_store(url)) as store:
        for writer in writers:
            assert writer.errors == []
            for identity, (token, version, snapshot) in writer.confirmed.items():
                entry = load(store, identity)
                assert entry.fencing_token >= token
                assert entry.record.version >= version
                if entry.record.version == version:
                    assert entry.record.snapshot == snapshot
        store.open_session(SessionRecord(session=NODE, ttl_ms=5_000))
        assert own(store, CART).fencing_token > max(tokens)


@contextmanager
def writing(url: str, count: int) -> Iterator[list[Writer]]:
    writers = [Writer(url, number) for number in range(count)]
    for writer in writers:
        writer.thread.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.stop.set()
        for writer in writers:
            writer.thread.join()


def test_r3_4_connections_ended_under_load_take_nothing_confirmed_back(
    postgres: PostgresServer, schema: str
) -> None:
    url = postgres.url(f"schema={schema}&application_name={schema}")
    ended = Counter[bool]()
    with writing(url, 4) as writers, postgres.connect() as killer:

        def batches() -> list[int]:
            assert all(writer.thread.is_alive() for writer in writers)
            return [writer.batches for writer in writers]

        for _ in range(5_000):
            before = sum(batches())
            found = killer.execute(
                "SELECT pg_terminate_backend(pid),"
                " query ~ 'COMMIT' AND state = 'active' FROM pg_stat_activity"
                " WHERE application_name = %s AND (random() < 0.5 OR query ~ 'COMMIT')",
                [schema],
            ).fetchall()
            ended.update(in_commit for _, in_commit in found)
            # Somebody is served in spite of it, however slow all of them are.
            eventually(lambda before=before: sum(batches()) > before)  # type: ignore[misc]
            if ended.total() >= 300 and min(ended[True], ended[False]) >= 10:
                break
        # Many, and of each kind: while they commit, and anywhere else.
        assert ended.total() >= 300
        assert min(ended[True], ended[False]) >= 10
        eventually(lambda: min(batches()) >= 25)

    check_all_is_there(url, writers)


def test_r3_4_a_server_that_crashes_under_load_takes_nothing_confirmed_back(
    postgres: PostgresServer, url: str
) -> None:
    with writing(url, 3) as writers:
        for _ in range(3):
            before = [writer.batches for writer in writers]
            eventually(
                lambda before=before: all(  # type: ignore[misc]
                    writer.batches > count + 3
                    for writer, count in zip(writers, before, strict=True)
                )
            )
            postgres.stop(immediately=True)
            postgres.start()

    check_all_is_there(url, writers)
    assert any(writer.failures for writer in writers)


def test_r3_1_of_several_processes_exactly_one_claims_each_identity(
    postgres: PostgresServer, schema: str
) -> None:
    url = postgres.url(f"schema={schema}&timeout_ms=30000")

    winners = race(url)

    with opened(url) as store:
        assert {each: load(store, each).owner for each in winners} == winners


# --- a cluster ---


def test_r3_4_a_cluster_serves_through_ended_connections_and_a_killed_node(
    postgres: PostgresServer, schema: str
) -> None:
    url = postgres.url(f"schema={schema}&application_name={schema}")
    one = Decimal(1)

    def cluster() -> Cluster:
        return Cluster.embedded(
            nodes=3, kinds={"account": Account}, store=url, ttl=4.0, ask_timeout=30.0
        )

    with cluster() as running, ExitStack() as stack:
        accounts = [running.proxy(Account, str(number)) for number in range(6)]
        connection = stack.enter_context(postgres.connect())

        def connections(what: str) -> list[Any]:
            return connection.execute(
                f"SELECT {what} FROM pg_stat_activity WHERE application_name = %s",
                [schema],
            ).fetchall()

        for turn in range(1, 7):
            if turn in (2, 4):
                # One connects anew only when it has something to do: a renewal, say.
                eventually(lambda: len(connections("pid")) >= 2)
                assert len(connections("pg_terminate_backend(pid, 5000)")) >= 2
            if turn == 3:
                running.kill_node("node-2")
            for number, account in enumerate(accounts):
                key = f"{turn}-{number}"
                answer = running.ask(account.deposit(one), request_id=key)
                assert answer == turn
        tokens = [
            running.resolve(f"account/{number}").fencing_token for number in range(6)
        ]

    with cluster() as running:
        for number, token in enumerate(tokens):
            account = running.proxy(Account, str(number))
            assert running.ask(account.balance()) == 6
            assert running.resolve(f"account/{number}").fencing_token > token
