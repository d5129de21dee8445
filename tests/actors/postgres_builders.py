"""What the tests of the PostgreSQL store are written in."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from actors import postgres_database
from actors.postgres_database import PostgresDatabase
from actors.store_postgres import PostgresStore
from actors.store_url import open_store
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    Load,
    Loaded,
    SessionRecord,
    Store,
)
from placement.entry import Acquisition, ActivationEntry
from placement.identity import Identity
from placement.topology import SessionId
from tests.actors.postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parents[2]

NODE = SessionId("node-a.1#1")
CART = Identity("cart", "42")
USER = Identity("user", "7")


@contextmanager
def opened(url: str) -> Iterator[PostgresStore]:
    with closing(open_store(url)) as store:
        assert isinstance(store, PostgresStore)
        store.open_session(SessionRecord(session=NODE, ttl_ms=5_000))
        yield store


@contextmanager
def in_a_hurry(store: PostgresStore, timeout_ms: int) -> Iterator[None]:
    """Give it less time than a store may need that is opened, on a slow machine."""

    def give(database: PostgresDatabase) -> None:
        store._database = database
        if store._connection is not None:
            silence_max_s = database.timeout_ms / 1_000 + postgres_database._GRACE_S
            store._connection.silence_max_s = silence_max_s

    before = store._database
    give(replace(before, timeout_ms=timeout_ms))
    try:
        yield
    finally:
        give(before)


def own(
    store: Store, identity: Identity, number: int = 1, session: SessionId = NODE
) -> ActivationEntry:
    mine = Acquisition(session, number)
    (acquired,) = store.try_acquire([Acquire(identity, mine)])
    assert isinstance(acquired, Acquired)
    request = Claim(identity, session, number, mine, acquired.entry.revision)
    (claimed,) = store.claim([request])
    assert isinstance(claimed, Claimed)
    return claimed.entry


def load(store: Store, identity: Identity) -> ActivationEntry:
    (loaded,) = store.load([Load(identity)])
    assert isinstance(loaded, Loaded)
    return loaded.entry


def backend_of(store: PostgresStore) -> int:
    """The process that serves the store's connection."""
    assert store._connection is not None
    return store._connection.pgconn.backend_pid


def terminate(server: PostgresServer, *processes: int) -> None:
    """End these connections, and wait until they are gone."""
    for process in processes:
        server.run(f"SELECT pg_terminate_backend({process}, 10000)")
