"""The store in one SQLite file, for the processes of one machine.

A write transaction has the file for itself (`BEGIN IMMEDIATE`), so it keeps the
rows that it has read, decides over them in memory, and writes each changed row
and the revision once, directly before it commits: a batch costs one read and one
write an identity, and one sync.

Server operations: SQLite has no server; a renewal is one transaction of one
update and three reads.
"""

import os
import sqlite3
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

from actors.store_memory import BadStore, RecordStore, Row, wall_ms
from actors.store_rows import (
    columns_of,
    members_from,
    record_from,
    row_from,
    text_of_members,
)
from placement.contracts import SessionRecord, StoreFailure
from placement.identity import Identity
from placement.topology import SessionId, Topology
from placement.value import value

APPLICATION_ID = 0x61637470  # "actp"
SCHEMA_VERSION = 1

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")

# Measured with 300,000 identities in random order: a fifth more claims a second
# than with SQLite's 2 MB and 1,000 pages, since fewer pages are written twice.
_CACHE_KIB = 32_768
_CHECKPOINT_AFTER_PAGES = 4_000

# What a row holds besides its snapshot, with room to spare.
_ROW_BYTES_MAX = 65_536

# SQLite waits by asking again after ever longer pauses, to 100 ms; asked anew this
# often, it starts from 1 ms. Without it, four processes that write all the time
# keep one of them out for 2 s.
_ASK_ANEW_AFTER_S = 0.05

# Where one connection creates the file, another cannot wait for it in SQLite.
_RETRY_AFTER_S = 0.005

_SCHEMA = (
    """
CREATE TABLE identities (
    identity TEXT PRIMARY KEY NOT NULL,
    owner TEXT,
    attempt INTEGER NOT NULL,
    fencing_token INTEGER NOT NULL,
    version INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    lock_session TEXT,
    lock_procedure INTEGER,
    snapshot BLOB
)""",
    """
CREATE TABLE sessions (
    session TEXT PRIMARY KEY NOT NULL,
    ttl_ms INTEGER NOT NULL,
    count INTEGER NOT NULL,
    closed INTEGER NOT NULL
) WITHOUT ROWID""",
    "CREATE INDEX open_sessions ON sessions (session) WHERE closed = 0",
    """
CREATE TABLE membership (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL,
    members TEXT NOT NULL
)""",
    "INSERT INTO membership VALUES (1, 0, '[]')",
    """
CREATE TABLE revision (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    revision INTEGER NOT NULL
)""",
    "INSERT INTO revision VALUES (1, 0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_READ_ROW = """
SELECT owner, attempt, fencing_token, version, revision,
       lock_session, lock_procedure, snapshot
FROM identities WHERE identity = ?
"""
_READ_ROWS = """
SELECT identity, owner, attempt, fencing_token, version, revision,
       lock_session, lock_procedure, snapshot
FROM identities WHERE identity IN ({})
"""
_LOOK_UP_MAX = 500
_WRITE_ROW = """
INSERT INTO identities
    (owner, attempt, fencing_token, version, revision,
     lock_session, lock_procedure, snapshot, identity)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (identity) DO UPDATE SET
    owner = excluded.owner, attempt = excluded.attempt,
    fencing_token = excluded.fencing_token, version = excluded.version,
    revision = excluded.revision, lock_session = excluded.lock_session,
    lock_procedure = excluded.lock_procedure, snapshot = excluded.snapshot
"""
_DELETE_ROW = "DELETE FROM identities WHERE identity = ?"
_READ_REVISION = "SELECT revision FROM revision"
_WRITE_REVISION = "UPDATE revision SET revision = ?"
_READ_SESSION = "SELECT session, ttl_ms, count, closed FROM sessions WHERE session = ?"
_READ_OPEN = "SELECT session, ttl_ms, count, closed FROM sessions WHERE closed = 0"
_WRITE_SESSION = """
INSERT INTO sessions (session, ttl_ms, count, closed) VALUES (?, ?, ?, ?)
ON CONFLICT (session) DO UPDATE SET count = excluded.count, closed = excluded.closed
"""
_READ_MEMBERS = "SELECT epoch, members FROM membership"
_WRITE_MEMBERS = "UPDATE membership SET epoch = ?, members = ?"


@value(kw_only=True, sealed=True)
class SqliteFile:
    """Which file, and how it is used.

    `synchronous` is SQLite's: with anything below FULL a power cut may take back
    what was answered. `busy_timeout_ms` is how long a call waits for another's
    transaction. `max_pages` bounds the file (of 4 KiB each; 0: it does not).
    """

    path: Path
    synchronous: str = "FULL"
    busy_timeout_ms: int = 2_000
    max_pages: int = 0

    def look(self) -> None:
        """Check that the file is a store, or that one can be created there.

        It creates nothing and changes nothing.

        Raises:
            BadStore: it is not, and why.
        """
        path = self.path
        try:
            found = path.stat()
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise BadStore(f"{path}: {error.strerror}") from error
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise BadStore(f"{path} is a directory, not a file")
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise BadStore(f"{path} is not a regular file")
        if not path.parent.is_dir():
            raise BadStore(f"{path}: the directory {path.parent} does not exist")
        if not _may_write(path.parent):
            # Also where the file exists: SQLite keeps two more files beside it.
            raise BadStore(f"{path}: the directory {path.parent} cannot be written to")
        if found is not None and not _may_write(path):
            raise BadStore(f"{path} is read-only")
        # An empty file is one that is about to become a store.
        if found is not None and found.st_size > 0:
            self._look_inside()

    def open(self) -> sqlite3.Connection:
        """Open the file, and create it where it is not there yet.

        Raises:
            BadStore: it is not a store, or cannot become one.
            StoreFailure: it is locked for longer than the busy timeout.
        """
        self.look()
        give_up_at = time.monotonic() + self.busy_timeout_ms / 1000
        while True:
            try:
                return self._open()
            except sqlite3.Error as error:
                # SQLite does not wait for a file that another is just creating.
                if not _is_busy(error):
                    raise BadStore(f"{self.path} cannot be opened: {error}") from error
                if time.monotonic() >= give_up_at:
                    raise StoreFailure(
                        f"{self.path}: {error}", may_have_happened=False
                    ) from error
                time.sleep(_RETRY_AFTER_S)

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rwc",
            uri=True,
            timeout=min(self.busy_timeout_ms / 1000, _ASK_ANEW_AFTER_S),
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if _is_empty(connection):
            # Before WAL is switched on: so the file itself says from its first
            # page on whose it is, and never only a log beside it.
            connection.execute("BEGIN IMMEDIATE")
            if _is_empty(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
            connection.execute("COMMIT")
        _check_kind(connection, self.path)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise BadStore(f"{self.path}: no write-ahead log can be kept beside it")
        connection.execute(f"PRAGMA synchronous = {self.synchronous}")
        connection.execute(f"PRAGMA cache_size = {-_CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_AFTER_PAGES}")
        if self.max_pages:
            connection.execute(f"PRAGMA max_page_count = {self.max_pages}")

    def _look_inside(self) -> None:
        # Through SQLite, never by open(): closing a descriptor of the file would
        # drop the locks that this process holds on it. `immutable` reads that
        # file alone, and leaves nothing beside it.
        try:
            self._check_as("immutable=1")
        except sqlite3.Error as error:
            raise BadStore(f"{self.path} is not a SQLite file: {error}") from error
        # A newer program may have changed the schema in the log, and died. Where
        # there is no log, or this look fails, the opening decides.
        with suppress(OSError, sqlite3.Error):
            if self.path.with_name(f"{self.path.name}-wal").stat().st_size > 0:
                self._check_as("mode=ro")

    def _check_as(self, how: str) -> None:
        uri = f"{self.path.absolute().as_uri()}?{how}"
        with closing(sqlite3.connect(uri, uri=True, timeout=0)) as connection:
            _check_kind(connection, self.path)


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise BadStore(f"{path} is a SQLite file of another program")
    if version > SCHEMA_VERSION:
        raise BadStore(
            f"{path} has schema version {version}; "
            f"this program knows versions up to {SCHEMA_VERSION}"
        )


def _is_empty(connection: sqlite3.Connection) -> bool:
    # Not by its pages: a transaction that may write has one before it writes.
    (schema,) = connection.execute("PRAGMA schema_version").fetchone()
    return bool(schema == 0)


def _may_write(path: Path) -> bool:
    # SQLite opens with the effective user's rights, so these are asked.
    effective = os.access in os.supports_effective_ids
    return os.access(path, os.W_OK, effective_ids=effective)


def _is_busy(error: sqlite3.Error) -> bool:
    # The extended codes keep the primary one in their lowest byte.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class _Turns:
    """Who writes next, among the connections of this process: first come, first served.

    Without it, a batch writer that commits and begins again keeps a renewal out for
    0.5 s at a time; with it, a renewal waits for one batch.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Lock] = deque()

    def take(self, timeout_s: float) -> bool:
        """Wait for the turn; false where it does not come in time."""
        with self._mutex:
            if not self._is_taken:
                self._is_taken = True
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        if turn.acquire(timeout=timeout_s):
            return True
        with self._mutex:
            if turn in self._waiting:
                self._waiting.remove(turn)
                return False
        return True  # it came just now

    def pass_on(self) -> None:
        """Give the turn to who has waited longest."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False


_turns_guard = threading.Lock()
_turns: WeakValueDictionary[str, _Turns] = WeakValueDictionary()


def _turns_of(path: Path) -> _Turns:
    with _turns_guard:
        return _turns.setdefault(os.path.realpath(path), _Turns())


@dataclass(slots=True)
class _Work:
    """What one transaction has read, and what it is going to write.

    Sessions and members are written at once, since they are few.
    """

    revision_before: int = 0
    revision: int = 0
    rows: dict[Identity, Row] = field(default_factory=dict)
    changed: dict[Identity, Row] = field(default_factory=dict)
    sessions: dict[SessionId, SessionRecord | None] = field(default_factory=dict)
    lost_by: StoreFailure | None = None


class SqliteStore(RecordStore):
    """A connection to a store in a SQLite file.

    Raises:
        BadStore: the file is not a store, or cannot become one.
        StoreFailure: it is locked.
    """

    has_one_writer: ClassVar[bool] = True

    def __init__(
        self, url: str, file: SqliteFile, *, now_ms: Callable[[], int] = wall_ms
    ) -> None:
        super().__init__(url, now_ms)
        # Absolute, so that another connection finds the same file for sure.
        self._file = replace(file, path=file.path.absolute())
        self._turns = _turns_of(self._file.path)
        self._connection = self._file.open()
        self._cursor = self._connection.cursor()
        self._work = _Work()
        self._is_in_transaction = False
        limit = self._connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
        self.snapshot_bytes_max = limit - _ROW_BYTES_MAX

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the calls inside one transaction; undo it where the body raises."""
        assert not self._is_in_transaction, "transactions do not nest"
        with self._transaction(writes=True):
            yield

    def another(self) -> "SqliteStore":
        """Open another connection to the same file."""
        return SqliteStore(self._url, self._file, now_ms=self._now_ms)

    def close(self) -> None:
        """Close the connection; the last one leaves one file."""
        with suppress(sqlite3.Error):
            self._connection.close()

    # --- transactions ---

    @contextmanager
    def _call(self, *, writes: bool) -> Iterator[None]:
        if self._is_in_transaction:
            # SQLite may have ended it: what follows would be written for itself.
            if self._work.lost_by is not None:
                raise self._work.lost_by
            with self._failures():
                yield
        else:
            with self._transaction(writes=writes), self._failures():
                yield

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, StoreFailure) as error:
            # Part of the call may be in `_work`: the transaction must not commit,
            # also where its body goes on.
            self._work.lost_by = self._failure(error, may_have_happened=False)
            raise self._work.lost_by from error

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[None]:
        if writes and not self._turns.take(self._file.busy_timeout_ms / 1000):
            raise StoreFailure(f"{self._file.path} is locked", may_have_happened=False)
        try:
            self._begin(writes=writes)
            yield
            self._commit()
        finally:
            self._is_in_transaction = False
            self._work = _Work()
            self._roll_back()
            if writes:
                self._turns.pass_on()

    def _begin(self, *, writes: bool) -> None:
        give_up_at = time.monotonic() + self._file.busy_timeout_ms / 1000
        while not self._is_in_transaction:
            try:
                self._cursor.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                # The first read is where a transaction that only reads begins.
                revision = self._read_revision()
                self._work = _Work(revision_before=revision, revision=revision)
                self._is_in_transaction = True
            except sqlite3.Error as error:
                self._roll_back()
                if not _is_busy(error) or time.monotonic() >= give_up_at:
                    raise self._failure(error, may_have_happened=False) from error

    def _commit(self) -> None:
        work = self._work
        if work.lost_by is not None:
            raise work.lost_by
        try:
            self._write(work)
        except sqlite3.Error as error:
            raise self._failure(error, may_have_happened=False) from error
        try:
            self._cursor.execute("COMMIT")
        except sqlite3.Error as error:
            # Whatever else failed, the log may hold all of it: after a crash its
            # recovery would find a transaction that we have rolled back.
            unsure = not _is_busy(error)
            raise self._failure(error, may_have_happened=unsure) from error

    def _roll_back(self) -> None:
        """Undo what is left of a transaction, so that the next one can begin."""
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._cursor.execute("ROLLBACK")

    def _write(self, work: _Work) -> None:
        written, gone = [], []
        for identity, row in work.changed.items():
            if row.is_blank():
                gone.append((str(identity),))
                continue
            written.append((*columns_of(row), str(identity)))
        if written:
            self._cursor.executemany(_WRITE_ROW, written)
        if gone:
            self._cursor.executemany(_DELETE_ROW, gone)
        if work.revision > work.revision_before:
            self._cursor.execute(_WRITE_REVISION, (work.revision,))

    def _failure(self, error: Exception, *, may_have_happened: bool) -> StoreFailure:
        return StoreFailure(
            f"{self._file.path}: {error}", may_have_happened=may_have_happened
        )

    # --- records ---

    def _look_up(self, identities: Sequence[Identity]) -> None:
        # One statement for many: each of them gives up the interpreter's lock,
        # and among busy threads waits long to have it back.
        rows = self._work.rows
        # One that is no UTF-8 is left for its own request to fail by.
        missing = {
            str(each): each
            for each in identities
            if each not in rows and each.isprintable()
        }
        names = list(missing)
        for start in range(0, len(names), _LOOK_UP_MAX):
            some = names[start : start + _LOOK_UP_MAX]
            marks = ",".join("?" * len(some))
            found = {
                name: row_from(values)
                for name, *values in self._cursor.execute(
                    _READ_ROWS.format(marks), some
                )
            }
            for name in some:
                rows[missing[name]] = found.get(name) or Row()

    def _row(self, identity: Identity) -> Row:
        rows = self._work.rows
        row = rows.get(identity)
        if row is None:
            # A plain str: sqlite3 looks for an adapter of every subclass.
            found = self._cursor.execute(_READ_ROW, (str(identity),)).fetchone()
            row = rows[identity] = Row() if found is None else row_from(found)
        return row

    def _keep_row(self, identity: Identity, row: Row) -> None:
        self._work.changed[identity] = row

    def _next_revision(self) -> int:
        self._work.revision += 1
        return self._work.revision

    def _read_revision(self) -> int:
        (revision,) = self._cursor.execute(_READ_REVISION).fetchone()
        return int(revision)

    def _session(self, session: SessionId) -> SessionRecord | None:
        sessions = self._work.sessions
        if session not in sessions:
            found = self._cursor.execute(_READ_SESSION, (session,)).fetchone()
            sessions[session] = None if found is None else record_from(*found)
        return sessions[session]

    def _keep_session(self, record: SessionRecord) -> None:
        self._cursor.execute(
            _WRITE_SESSION,
            (record.session, record.ttl_ms, record.count, record.closed),
        )
        self._work.sessions[record.session] = record

    def _open_sessions(self) -> Iterable[SessionRecord]:
        return [record_from(*found) for found in self._cursor.execute(_READ_OPEN)]

    def _topology(self) -> Topology:
        epoch, members = self._cursor.execute(_READ_MEMBERS).fetchone()
        try:
            return Topology(epoch=epoch, members=members_from(members))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreFailure(f"the membership is damaged: {error}") from error

    def _keep_topology(self, topology: Topology) -> None:
        self._cursor.execute(
            _WRITE_MEMBERS, (topology.epoch, text_of_members(topology.members))
        )
