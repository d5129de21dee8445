"""The SQLite store's own promises: one file, several processes, every failure."""

import os
import resource
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from actors import store_sqlite
from actors.store_sqlite import APPLICATION_ID, SCHEMA_VERSION, SqliteStore
from actors.store_url import BadStore, check_store, open_store
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    Failed,
    GiveUp,
    Load,
    Loaded,
    Release,
    Save,
    Saved,
    SessionRecord,
    Store,
    StoreFailure,
)
from placement.entry import Acquisition, ActivationEntry
from placement.identity import Identity
from placement.topology import SessionId
from tests.actors.store_processes import race, run_all, start
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65_534

NODE = SessionId("node-a.1#1")
CART = Identity("cart", "42")
USER = Identity("user", "7")


# --- builders ---


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@contextmanager
def opened(path: Path, options: str = "") -> Iterator[SqliteStore]:
    with closing(open_store(f"sqlite:///{path}{options}")) as store:
        assert isinstance(store, SqliteStore)
        store.open_session(SessionRecord(session=NODE, ttl_ms=5_000))
        yield store


def own(store: Store, identity: Identity, number: int = 1) -> ActivationEntry:
    mine = Acquisition(NODE, number)
    (acquired,) = store.try_acquire([Acquire(identity, mine)])
    assert isinstance(acquired, Acquired)
    request = Claim(identity, NODE, number, mine, acquired.entry.revision)
    (claimed,) = store.claim([request])
    assert isinstance(claimed, Claimed)
    return claimed.entry


def load(store: Store, identity: Identity) -> ActivationEntry:
    (loaded,) = store.load([Load(identity)])
    assert isinstance(loaded, Loaded)
    return loaded.entry


def save(store: Store, token: int, version: int, snapshot: bytes) -> object:
    (outcome,) = store.save([Save(CART, token, version, snapshot)])
    return outcome


def in_a_transaction(store: Store, *calls: Callable[[], object]) -> None:
    with store.transaction():
        for call in calls:
            call()


def digest(folder: Path) -> dict[str, str]:
    """What every file of `folder` holds, and that there is no other."""
    return {
        file.name: sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


# --- what is no store, and stays as it is ---


def foreign_file(path: Path, *, wal: bool = False) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if wal:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE sessions (session TEXT)")
        connection.execute("INSERT INTO sessions VALUES ('mine')")


def foreign_wal_file(path: Path) -> None:
    foreign_file(path, wal=True)


def named_foreign_file(path: Path) -> None:
    foreign_file(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA application_id = 4711")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def newer_file(path: Path) -> None:
    with opened(path) as store:
        own(store, CART)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def newer_file_after_a_crash(path: Path) -> None:
    """A newer program has changed the schema, and died before a checkpoint."""
    elsewhere = path.with_name("elsewhere.db")
    with opened(elsewhere) as store:
        store._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        for end in ("", "-wal"):
            content = elsewhere.with_name(elsewhere.name + end).read_bytes()
            path.with_name(path.name + end).write_bytes(content)
    elsewhere.unlink()


def text_file(path: Path) -> None:
    path.write_text("Dear diary,\n" * 1_000)


def short_file(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (foreign_file, "of another program"),
        (foreign_wal_file, "of another program"),
        (named_foreign_file, "of another program"),
        (newer_file, f"schema version {SCHEMA_VERSION + 1}"),
        (newer_file_after_a_crash, f"schema version {SCHEMA_VERSION + 1}"),
        (text_file, "is not a SQLite file"),
        (short_file, "is not a SQLite file"),
    ],
)
def test_a_file_that_is_no_store_is_refused_and_left_untouched(
    make: Callable[[Path], None], why: str, path: Path
) -> None:
    make(path)
    before = digest(path.parent)

    with pytest.raises(BadStore, match=why):
        check_store(f"sqlite:///{path}")
    with pytest.raises(BadStore, match=why):
        open_store(f"sqlite:///{path}")

    after = digest(path.parent)
    if "store.db-wal" in before:
        # SQLite indexes the log that it finds; nothing is kept in that index.
        after.pop("store.db-shm", None)
    assert after == before


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadStore, match="is a directory"):
        open_store(f"sqlite:///{tmp_path}")


def test_a_pipe_is_refused(path: Path) -> None:
    os.mkfifo(path)

    with pytest.raises(BadStore, match="is not a regular file"):
        open_store(f"sqlite:///{path}")


def test_a_missing_directory_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(BadStore, match=r"directory .*/missing does not exist"):
        open_store(f"sqlite:///{tmp_path}/missing/store.db")

    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_directory_is_refused(path: Path) -> None:
    path.write_bytes(b"")

    with pytest.raises(BadStore, match="Not a directory"):
        open_store(f"sqlite:///{path}/store.db")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that another user can reach; pytest's own is the tester's alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to write everywhere, where the tests have it."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_file_is_refused_and_left_untouched(public_folder: Path) -> None:
    path = public_folder / "store.db"
    with opened(path):
        pass
    path.chmod(0o444)
    public_folder.chmod(0o777)
    before = digest(public_folder)

    with as_nobody():
        with pytest.raises(BadStore, match="is read-only"):
            check_store(f"sqlite:///{path}")
        with pytest.raises(BadStore, match="is read-only"):
            open_store(f"sqlite:///{path}")

    assert digest(public_folder) == before


def test_a_read_only_directory_is_refused(public_folder: Path) -> None:
    path = public_folder / "store.db"
    public_folder.chmod(0o555)

    with as_nobody(), pytest.raises(BadStore, match="cannot be written to"):
        open_store(f"sqlite:///{path}")

    assert digest(public_folder) == {}


# --- one file ---


def test_after_the_last_close_there_is_one_file(path: Path) -> None:
    with opened(path) as store, closing(store.another()) as other:
        own(store, CART)
        own(other, USER)
        assert path.with_name("store.db-wal").exists()

    assert list(digest(path.parent)) == ["store.db"]


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()

    with opened(path) as store:
        own(store, CART)

    check_store(f"sqlite:///{path}")


def test_the_file_says_whose_it_is_and_of_which_version(path: Path) -> None:
    with opened(path):
        # Also without the log beside it, which the newest writes may be in.
        header = path.read_bytes()[:100]

    assert int.from_bytes(header[68:72]) == APPLICATION_ID
    assert int.from_bytes(header[60:64]) == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("options", "synchronous"),
    [("", 2), ("?synchronous=FULL", 2), ("?synchronous=normal", 1)],
)
def test_every_commit_is_synced_unless_the_url_says_otherwise(
    options: str, synchronous: int, path: Path
) -> None:
    with opened(path, options) as store, closing(store.another()) as other:
        for each in (store._connection, other._connection):
            assert each.execute("PRAGMA synchronous").fetchone() == (synchronous,)
            assert each.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_another_connection_finds_a_relative_path_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with closing(open_store("sqlite:///store.db")) as store:
        store.open_session(SessionRecord(session=NODE, ttl_ms=5_000))
        entry = own(store, CART)
        monkeypatch.chdir(tmp_path / "elsewhere")

        with closing(store.another()) as other:
            assert load(other, CART).fencing_token == entry.fencing_token

    assert list(digest(tmp_path / "elsewhere")) == []


def test_a_lock_on_what_was_never_claimed_leaves_no_row(path: Path) -> None:
    with opened(path) as store:
        for number in range(10):
            mine = Acquisition(NODE, number)
            store.try_acquire([Acquire(CART, mine)])
            store.release([Release(CART, mine)])

        rows = store._connection.execute("SELECT count(*) FROM identities").fetchone()

    assert rows == (0,)


# --- failures ---


def test_what_another_process_has_locked_fails_and_works_again_later(
    path: Path,
) -> None:
    code = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
connection.close()
"""
    with opened(path, "?busy_timeout_ms=100") as store:
        entry = own(store, CART)
        other = start(code, path)
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"

        for call in (
            lambda: own(store, USER),
            lambda: store.renew_session(NODE, 1),
            lambda: store.transaction().__enter__(),
        ):
            with pytest.raises(StoreFailure, match="locked") as caught:
                call()
            assert caught.value.may_have_happened is False
        assert load(store, CART).fencing_token == entry.fencing_token

        other.communicate("\n", timeout=30)
        assert own(store, USER).owner == NODE
        assert store.renew_session(NODE, 1) is not None


def test_what_another_process_locks_for_a_while_is_waited_for(path: Path) -> None:
    code = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
while sys.stdin.readline() == "still?\\n":
    print("still locked", flush=True)
connection.execute("ROLLBACK")
connection.close()
"""
    begun, owned = threading.Event(), list[ActivationEntry]()

    def look(statement: str) -> None:
        if statement.startswith("BEGIN IMMEDIATE"):
            begun.set()

    with opened(path, "?busy_timeout_ms=30000") as store:
        other = start(code, path)
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "locked\n"
        store._connection.set_trace_callback(look)
        owner = threading.Thread(target=lambda: owned.append(own(store, CART)))
        owner.start()
        # It has begun, and the other process holds its lock through many an answer.
        assert begun.wait(30)
        for _ in range(300):
            other.stdin.write("still?\n")
            other.stdin.flush()
            assert other.stdout.readline() == "still locked\n"
        assert not owned

        other.communicate("\n", timeout=30)
        owner.join(30)

    assert [entry.owner for entry in owned] == [NODE]


def test_a_file_that_another_process_is_making_is_waited_for(path: Path) -> None:
    code = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
connection.close()
"""
    other = start(code, path)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"

    with pytest.raises(StoreFailure, match="locked") as caught:
        open_store(f"sqlite:///{path}?busy_timeout_ms=200")
    assert caught.value.may_have_happened is False

    other.communicate("\n", timeout=30)
    with opened(path) as store:
        assert own(store, CART).owner == NODE


def test_a_connection_waits_for_the_turn_of_another_and_no_longer(path: Path) -> None:
    with opened(path, "?busy_timeout_ms=100") as store:
        with closing(store.another()) as other, store.transaction():
            own(store, CART)
            with pytest.raises(StoreFailure, match="locked") as caught:
                other.renew_session(NODE, 1)

        assert caught.value.may_have_happened is False
        assert load(store, CART).owner == NODE


def _waits(turns: store_sqlite._Turns, count: int) -> bool:
    return len(turns._waiting) == count


def test_of_one_process_who_has_waited_longest_writes_next() -> None:
    turns = store_sqlite._Turns()
    order: list[int] = []

    def write(number: int) -> None:
        assert turns.take(30)
        order.append(number)
        turns.pass_on()

    assert turns.take(0)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for count, thread in enumerate(threads, start=1):
        thread.start()
        eventually(partial(_waits, turns, count))
    assert not turns.take(0.001)
    turns.pass_on()
    for thread in threads:
        thread.join()

    assert order == [0, 1, 2, 3, 4]
    assert turns.take(0)


def test_a_full_file_fails_and_works_on(path: Path) -> None:
    with opened(path, "?max_pages=40") as store:
        token = own(store, CART).fencing_token
        assert save(store, token, 1, b"small") == Saved(1)

        def too_much() -> None:
            save(store, token, 2, bytes(1_000_000))

        with pytest.raises(StoreFailure, match="full") as caught:
            too_much()
        with pytest.raises(StoreFailure, match="full"):
            in_a_transaction(store, lambda: own(store, USER), too_much)

        assert caught.value.may_have_happened is False
        assert load(store, CART).record.snapshot == b"small"
        assert load(store, USER).owner is None
        assert save(store, token, 2, b"small again") == Saved(2)
        assert own(store, USER).owner == NODE


def test_a_commit_that_the_disk_fails_may_have_happened(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as store:
        token = own(store, CART).fencing_token
        # Python ignores the signal: writing on is an error, as on a broken disk.
        log = path.with_name("store.db-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (log + 8_192, hard))
        try:
            with pytest.raises(StoreFailure) as caught:
                save(store, token, 1, bytes(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert caught.value.may_have_happened is True
        assert load(store, CART).record.snapshot is None
        assert save(store, token, 1, b"state") == Saved(1)


def test_a_request_that_cannot_be_stored_fails_alone(path: Path) -> None:
    with opened(path) as store:
        store.snapshot_bytes_max = 1_000
        token = own(store, CART).fencing_token
        other = own(store, USER, 2).fencing_token
        rude = SessionId("node-\ud800.1#1")

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
            ]
        )
        claimed = store.claim(
            [
                Claim(Identity("k", "3"), NODE, 1 << 63, Acquisition(NODE, 3), 0),
                Claim(Identity("k", "3"), rude, 3, Acquisition(NODE, 3), 0),
                Claim(Identity("k", "3"), NODE, 3, Acquisition(NODE, 3), 0),
            ]
        )

        for outcomes, stand in (
            (saved, [False, True, False]),
            (given_up, [False]),
            (acquired, [False, False, True]),
            (claimed, [False, False, True]),
        ):
            failed = [each for each in outcomes if isinstance(each, Failed)]
            assert [not isinstance(each, Failed) for each in outcomes] == stand
            assert not any(each.may_have_happened for each in failed)
        assert load(store, CART).owner == NODE
        assert load(store, CART).record.snapshot is None
        assert load(store, USER).record.snapshot == bytes(1_000)


def test_a_session_that_cannot_be_stored_is_a_failure(path: Path) -> None:
    with opened(path) as store:
        for session, count in ((SessionId("\ud800"), 0), (NODE, 1 << 63)):
            with pytest.raises(StoreFailure) as caught:
                store.renew_session(session, count)
            assert caught.value.may_have_happened is False
        endless = SessionRecord(session=SessionId("node-b.1#1"), ttl_ms=1 << 63)
        with pytest.raises(StoreFailure, match="64 bits"):
            store.open_session(endless)
        assert store.renew_session(NODE, 1) is not None


def test_a_body_that_raises_undoes_its_transaction(path: Path) -> None:
    with opened(path) as store:
        with pytest.raises(ZeroDivisionError):
            in_a_transaction(
                store,
                lambda: own(store, CART),
                lambda: store.close_session(NODE, 0),
                lambda: 1 // 0,
            )

        assert load(store, CART).owner is None
        assert store.renew_session(NODE, 1) is not None


def test_a_transaction_in_which_a_call_failed_does_not_commit(path: Path) -> None:
    with opened(path) as store:

        def failing() -> None:
            store._connection.execute("ALTER TABLE identities RENAME TO away")
            with pytest.raises(StoreFailure, match="no such table"):
                store.load([Load(USER)])

        def following() -> None:
            # SQLite may have ended the transaction: nothing is written past it.
            store._connection.execute("ROLLBACK")
            with pytest.raises(StoreFailure, match="no such table"):
                store.close_session(NODE, 0)

        with pytest.raises(StoreFailure, match="no such table") as caught:
            in_a_transaction(store, lambda: own(store, CART), failing, following)

        assert caught.value.may_have_happened is False
        assert load(store, CART).owner is None
        assert store.renew_session(NODE, 1) is not None


def test_a_damaged_membership_is_a_failure(path: Path) -> None:
    with opened(path) as store:
        store._connection.execute("UPDATE membership SET members = 'garbage'")

        with pytest.raises(StoreFailure, match="membership"):
            store.read_sessions()
        with pytest.raises(StoreFailure, match="membership"):
            store.renew_session(NODE, 1)


def test_a_closed_connection_fails(path: Path) -> None:
    with opened(path) as store:
        pass

    for call in (lambda: load(store, CART), lambda: store.renew_session(NODE, 1)):
        with pytest.raises(StoreFailure, match="closed"):
            call()
    store.close()


# --- several processes ---


def test_r3_1_of_several_processes_exactly_one_claims_each_identity(
    path: Path,
) -> None:
    # The file is not there yet: they also race for making it.
    url = f"sqlite:///{path}?synchronous=OFF&busy_timeout_ms=30000"

    winners = race(url)

    # Of connections that close at the same moment none may be the last one, and
    # the log then stays for whoever opens the file next.
    assert not set(digest(path.parent)) - {"store.db", "store.db-shm", "store.db-wal"}
    with opened(path) as store:
        owners = {each: load(store, each).owner for each in winners}
    assert list(digest(path.parent)) == ["store.db"]
    assert owners == winners


WRITING = """
import sys
from actors.store_url import open_store
from placement.contracts import *
from placement.entry import Acquisition
from placement.identity import Identity
store, me, life = open_store(sys.argv[1]), sys.argv[2], sys.argv[3]
store.open_session(SessionRecord(session=me, ttl_ms=5000))
number = 0
while True:
    number += 1
    tokens = []
    with store.transaction():
        for half in ("left", "right"):
            identity, mine = Identity(half, f"{life}-{number}"), Acquisition(me, number)
            (acquired,) = store.try_acquire([Acquire(identity, mine)])
            (claimed,) = store.claim([Claim(identity, me, number, mine, 0)])
            token = claimed.entry.fencing_token
            store.save([Save(identity, token, number, str(token).encode())])
            tokens.append(token)
    print(number, *tokens, flush=True)
"""


def test_r3_4_what_was_committed_survives_a_killed_process_and_nothing_else(
    path: Path,
) -> None:
    newest = 0
    for life in range(4):
        session = SessionId(f"node-{life}.1#1")
        process = start(WRITING, f"sqlite:///{path}", session, life)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(20 + 7 * life)]
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
        # The last line may be cut: its transaction was committed all the same.
        lines += [line for line in rest.splitlines(keepends=True) if line[-1] == "\n"]

        with opened(path) as store:
            for line in lines:
                number, *tokens = map(int, line.split())
                for half, token in zip(("left", "right"), tokens, strict=True):
                    entry = load(store, Identity(half, f"{life}-{number}"))
                    assert (entry.owner, entry.fencing_token) == (session, token)
                    assert entry.record.snapshot == str(token).encode()
                    assert token > newest
            # What was under way when it was killed happened whole, or not at all.
            for number in range(len(lines) + 1, len(lines) + 5):
                halves = [
                    load(store, Identity(half, f"{life}-{number}")).record.version
                    for half in ("left", "right")
                ]
                assert halves in ([number, number], [0, 0])
            newest = own(store, Identity("after", str(life)), life).fencing_token
            assert newest > max(int(line.split()[2]) for line in lines)
            checked = store._connection.execute("PRAGMA integrity_check").fetchall()
            assert checked == [("ok",)]


def test_a_process_killed_while_it_made_the_file_is_no_obstacle(path: Path) -> None:
    code = """
import os, signal, sys
from actors import store_sqlite
from actors.store_url import open_store

class Killer(tuple):
    def __iter__(self):
        yield from super().__iter__()
        os.kill(os.getpid(), signal.SIGKILL)

store_sqlite._SCHEMA = Killer(store_sqlite._SCHEMA)
open_store(sys.argv[1])
"""
    process = start(code, f"sqlite:///{path}")
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL

    with opened(path) as store:
        assert own(store, CART).owner == NODE


def test_processes_that_open_a_new_file_at_once_all_get_it(path: Path) -> None:
    code = """
import sys
from actors.store_url import open_store
print("ready", flush=True)
sys.stdin.readline()
open_store(sys.argv[1]).close()
"""
    for number in range(5):
        url = f"sqlite:///{path.with_name(f'{number}.db')}"

        run_all([start(code, url) for _ in range(6)])

        check_store(url)


def test_a_look_leaves_the_locks_of_this_process_alone(path: Path) -> None:
    """Closing a descriptor of the file would drop them, and lose the log."""
    code = """
import sys
from actors.store_url import open_store
open_store(sys.argv[1]).close()
"""
    url = f"sqlite:///{path}"
    with opened(path) as store:
        entry = own(store, CART)
        check_store(url)
        # Were the locks gone, this process would think that it is the last one.
        start(code, url).communicate(timeout=30)
        assert path.with_name("store.db-wal").exists()
        own(store, USER, 2)

    with opened(path) as store:
        assert load(store, CART).fencing_token == entry.fencing_token
        assert load(store, USER).owner == NODE
