"""The store in a PostgreSQL database, for processes of any machines.

A transaction that writes entries first takes the one row that holds the revision,
and keeps it until it ends. So there is one such transaction at a time, and fencing
tokens commit in their order, as the numbers of a sequence would not. It keeps the
rows that it has read, decides over them in memory, and writes each changed row once,
together with its commit: two round trips for a batch. Renewals take only the row of
their session, and wait for no batch.

Each commit leaves its number in a row of its connection. Where the answer to one is
lost, that row tells whether it happened. (`pg_xact_status` does not: after a crash
the server may give a lost transaction's id to another one.)

Nothing is kept in the server's session: settings are those of a transaction, and no
statement is prepared. So it works behind PgBouncer in transaction mode too.

Server operations: a renewal is one transaction, in one round trip, of one update
and two reads.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, LiteralString, TypeVar

import psycopg

from actors.postgres_database import (
    SCHEMA_VERSION,
    Connection,
    Found,
    PostgresDatabase,
    Silence,
    Statement,
    compiled,
    said,
)
from actors.store_memory import BadStore, RecordStore, Row, Unstorable, wall_ms
from actors.store_rows import (
    columns_of,
    members_from,
    record_from,
    row_from,
    text_of_members,
)
from placement.contracts import SessionRecord, SessionView, StoreFailure
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology

# A message of the protocol has at most 1 GiB, and the server copies it around.
_SNAPSHOT_BYTES_MAX = 256 << 20
_CHUNK_BYTES = 8 << 20

# How often a call that surely changed nothing is made, within its time.
_TRIES_MAX = 10
_PAUSE_S = 0.05

_BEGIN: LiteralString = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
# One snapshot for all that is read. A renewal writes as the first thing in it.
_BEGIN_AT_ONCE: LiteralString = "BEGIN ISOLATION LEVEL REPEATABLE READ READ WRITE"
_BEGIN_READING: LiteralString = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_COMMIT: LiteralString = "COMMIT"

_TAKE: LiteralString = "SELECT version, revision FROM {schema}.store FOR UPDATE"
_WRITE_REVISION: LiteralString = "UPDATE {schema}.store SET revision = %s"
_WRITE_COMMIT: LiteralString = """
INSERT INTO {schema}.commits VALUES (%s, %s, now())
ON CONFLICT (connection) DO UPDATE SET number = excluded.number, at = excluded.at
"""
_READ_COMMIT: LiteralString = """
SELECT number FROM {schema}.commits WHERE connection = %s
"""
_FORGET_COMMIT: LiteralString = "DELETE FROM {schema}.commits WHERE connection = %s"
_READ_ROWS: LiteralString = """
SELECT identity, owner, attempt, fencing_token, version, revision,
       lock_session, lock_procedure, snapshot
FROM {schema}.identities WHERE identity = ANY(%b::text[])
"""
_READ_ROWS_BARE: LiteralString = """
SELECT identity, owner, attempt, fencing_token, version, revision,
       lock_session, lock_procedure, NULL::bytea
FROM {schema}.identities WHERE identity = ANY(%b::text[])
"""
_WRITE_ROWS: LiteralString = """
INSERT INTO {schema}.identities
    (identity, owner, attempt, fencing_token, version, revision,
     lock_session, lock_procedure, snapshot)
SELECT * FROM unnest(
    %b::text[], %b::text[], %b::bigint[], %b::bigint[], %b::bigint[], %b::bigint[],
    %b::text[], %b::bigint[], %b::bytea[])
ON CONFLICT (identity) DO UPDATE SET
    owner = excluded.owner, attempt = excluded.attempt,
    fencing_token = excluded.fencing_token, version = excluded.version,
    revision = excluded.revision, lock_session = excluded.lock_session,
    lock_procedure = excluded.lock_procedure, snapshot = excluded.snapshot
"""
# A large snapshot that is not assigned is not written again.
_WRITE_ROWS_BARE: LiteralString = """
INSERT INTO {schema}.identities
    (identity, owner, attempt, fencing_token, version, revision,
     lock_session, lock_procedure)
SELECT * FROM unnest(
    %b::text[], %b::text[], %b::bigint[], %b::bigint[], %b::bigint[], %b::bigint[],
    %b::text[], %b::bigint[])
ON CONFLICT (identity) DO UPDATE SET
    owner = excluded.owner, attempt = excluded.attempt,
    fencing_token = excluded.fencing_token, version = excluded.version,
    revision = excluded.revision, lock_session = excluded.lock_session,
    lock_procedure = excluded.lock_procedure
"""
_DELETE_ROWS: LiteralString = """
DELETE FROM {schema}.identities WHERE identity = ANY(%b::text[])
"""

_READ_OPEN: LiteralString = """
SELECT session, ttl_ms, count, closed FROM {schema}.sessions WHERE NOT closed
"""
_READ_SESSION: LiteralString = """
SELECT session, ttl_ms, count, closed FROM {schema}.sessions WHERE session = %s
"""
# Against renewals, which take nothing else.
_TAKE_SESSION: LiteralString = """
SELECT session, ttl_ms, count, closed FROM {schema}.sessions WHERE session = %s
FOR UPDATE
"""
_WRITE_SESSION: LiteralString = """
INSERT INTO {schema}.sessions (session, ttl_ms, count, closed)
VALUES (%s, %s, %s, %s)
ON CONFLICT (session) DO UPDATE SET count = excluded.count, closed = excluded.closed
"""
_RENEW_SESSION: LiteralString = """
UPDATE {schema}.sessions SET count = greatest(count, %s)
WHERE session = %s AND NOT closed RETURNING count
"""
_READ_VIEW: LiteralString = """
SELECT session, ttl_ms, count, closed FROM {schema}.sessions WHERE NOT closed
UNION
SELECT session, ttl_ms, count, closed FROM {schema}.sessions WHERE session IN (
    SELECT member ->> 'session'
    FROM {schema}.membership, jsonb_array_elements(members) AS member)
"""
_READ_MEMBERS: LiteralString = "SELECT epoch, members::text FROM {schema}.membership"
_WRITE_MEMBERS: LiteralString = """
UPDATE {schema}.membership SET epoch = %s, members = %s
"""

_Result = TypeVar("_Result")


class _Repeatable(StoreFailure):
    """The same again may succeed; `is_lost`: this time the connection was lost."""

    def __init__(self, message: str, *, is_lost: bool) -> None:
        super().__init__(message, may_have_happened=False)
        self.is_lost = is_lost


@dataclass(slots=True)
class _Work:
    """What one transaction has read, and what it is going to write.

    `snapshots` are those that were read, by identity; a row that was read without
    its snapshot is `bare`.
    """

    writes: bool = False
    has_begun: bool = False
    revision_before: int = 0
    revision: int = 0
    rows: dict[Identity, Row] = field(default_factory=dict)
    snapshots: dict[Identity, bytes | None] = field(default_factory=dict)
    bare: set[Identity] = field(default_factory=set)
    changed: dict[Identity, Row] = field(default_factory=dict)
    sessions: dict[SessionId, SessionRecord | None] = field(default_factory=dict)
    taken: set[SessionId] = field(default_factory=set)
    changed_sessions: dict[SessionId, SessionRecord] = field(default_factory=dict)
    topology: Topology | None = None
    has_new_topology: bool = False
    lost_by: StoreFailure | None = None


class PostgresStore(RecordStore):
    """A connection to a store in a PostgreSQL database.

    It connects when it is first needed, and anew after the connection was lost.
    """

    snapshot_bytes_max = _SNAPSHOT_BYTES_MAX

    def __init__(
        self, database: PostgresDatabase, *, now_ms: Callable[[], int] = wall_ms
    ) -> None:
        super().__init__(database.url, now_ms)
        self._database = database
        self._connection: Connection | None = None
        self._is_closed_connection = False
        self._work = _Work()
        self._is_in_transaction = False
        self._reads_snapshots = True
        self._takes_sessions = False
        # The name under which its commits are numbered.
        self._name = secrets.token_hex(16)
        self._commit_count = 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the calls inside one transaction; undo it where the body raises."""
        assert not self._is_in_transaction, "transactions do not nest"
        with self._transaction(writes=True):
            self._is_in_transaction = True
            yield

    def another(self) -> "PostgresStore":
        """Another connection to the same schema."""
        return PostgresStore(self._database, now_ms=self._now_ms)

    def close(self) -> None:
        """Close the connection, for good."""
        self._is_closed_connection = True
        if self._connection is not None and self._commit_count:
            with suppress(StoreFailure):
                self._send(
                    (_BEGIN, ()),
                    self._database.settings(),
                    (_FORGET_COMMIT, [self._name]),
                    (_COMMIT, ()),
                )
        self._drop()

    # --- the contracts, where a lost connection is not the end of a call ---

    def open_session(self, record: SessionRecord, /) -> bool:
        """Create `record`; false where that session has another record already."""
        return self._repeated(partial(super().open_session, record))

    def renew_session(self, session: SessionId, count: int, /) -> SessionView | None:
        """Raise the count to `count` and read all; none where it is not open."""
        if self._is_in_transaction:
            return super().renew_session(session, count)
        return self._repeated(partial(self._renew, session, count))

    def read_sessions(self) -> SessionView:
        """Read all, without a session of one's own."""
        if self._is_in_transaction:
            return super().read_sessions()
        return self._repeated(self._read_all)

    def close_session(self, session: SessionId, count: int, /) -> bool:
        """Close it if its count is still `count`; true if it is closed then."""
        return self._repeated(partial(super().close_session, session, count))

    def write_members(
        self, members: Sequence[Member], expected_epoch: int, /
    ) -> Topology:
        """Replace the members if the epoch is still that; the topology after it."""
        return self._repeated(partial(super().write_members, members, expected_epoch))

    def _each(
        self,
        rule: Callable[[Any, int], Any],
        requests: Sequence[Any],
        *,
        writes: bool = True,
    ) -> list[Any]:
        # The other outcomes have no snapshot in them: it is not read for them.
        bare: tuple[object, ...] = (self._release, self._save, self._give_up)
        self._reads_snapshots = rule not in bare
        each = super()._each
        return self._repeated(lambda: each(rule, requests, writes=writes))

    def _repeated(self, call: Callable[[], _Result]) -> _Result:
        """Make a call again that may succeed then, for a while."""
        until_s = time.monotonic() + self._database.timeout_ms / 1_000
        is_unsure = False
        tries = 0
        while True:
            tries += 1
            try:
                return call()
            except StoreFailure as error:
                is_unsure = is_unsure or error.may_have_happened
                if (
                    isinstance(error, _Repeatable)
                    # A transaction's calls are the caller's to make again.
                    and not self._is_in_transaction
                    and tries < _TRIES_MAX
                    # One may have been dead from the first, and found so late.
                    and (tries == 1 or time.monotonic() < until_s)
                ):
                    continue
                if is_unsure and not error.may_have_happened:
                    raise StoreFailure(str(error)) from error
                raise

    def _renew(self, session: SessionId, count: int) -> SessionView | None:
        with self._sessions_call():
            _check_text(session)
            try:
                _, _, renewed, members, records, _ = self._send(
                    (_BEGIN_AT_ONCE, ()),
                    self._database.settings(),
                    (_RENEW_SESSION, [count, session]),
                    (_READ_MEMBERS, ()),
                    (_READ_VIEW, ()),
                    (_COMMIT, ()),
                )
            except _Repeatable as error:
                # Its commit was sent with the rest.
                error.may_have_happened = error.is_lost
                raise
            return _view_from(members, records) if renewed else None

    def _read_all(self) -> SessionView:
        with self._sessions_call(writes=False):
            _, _, members, records, _ = self._send(
                (_BEGIN_READING, ()),
                self._database.settings(),
                (_READ_MEMBERS, ()),
                (_READ_VIEW, ()),
                (_COMMIT, ()),
            )
            return _view_from(members, records)

    # --- transactions ---

    @contextmanager
    def _call(self, *, writes: bool) -> Iterator[None]:
        if not self._is_in_transaction:
            with self._transaction(writes=writes):
                yield
            return
        if self._work.lost_by is not None:
            raise self._work.lost_by
        try:
            yield
        except StoreFailure as error:
            # Part of the call may be in `_work`: the transaction must not commit,
            # also where its body goes on.
            self._work.lost_by = error
            raise

    @contextmanager
    def _sessions_call(self, *, writes: bool = True) -> Iterator[None]:
        self._takes_sessions = writes
        try:
            with super()._sessions_call(writes=writes):
                yield
        finally:
            self._takes_sessions = False

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[None]:
        if self._is_closed_connection:
            raise StoreFailure("this connection is closed", may_have_happened=False)
        self._work = _Work(writes=writes)
        try:
            yield
            self._commit()
        finally:
            self._is_in_transaction = False
            self._work = _Work()
            self._roll_back()

    def _read(self, *statements: Statement) -> list[Found]:
        """Read in the transaction, which begins with the first thing it reads."""
        work = self._work
        if work.has_begun:
            if work.writes:
                return self._send(*statements)
            return self._send_reading(*statements)
        if not work.writes:
            records, *found = self._send_reading((_READ_OPEN, ()), *statements)
        else:
            begin = partial(
                self._send,
                (_BEGIN, ()),
                self._database.settings(),
                (_TAKE, ()),
                (_READ_OPEN, ()),
                *statements,
            )
            _, _, taken, records, *found = self._begun(begin)
            work.revision_before = work.revision = self._revision_of(taken)
        work.has_begun = True
        work.sessions.update(_records_by_session(records))
        return found

    def _send_reading(self, *statements: Statement) -> list[Found]:
        return self._send(
            (_BEGIN_READING, ()), self._database.settings(), *statements, (_COMMIT, ())
        )[2:-1]

    def _begun(self, begin: Callable[[], list[Found]]) -> list[Found]:
        try:
            return begin()
        except _Repeatable:
            if not self._is_in_transaction:
                raise
            # Nothing has been decided yet, and the body cannot be repeated.
            return begin()

    def _revision_of(self, found: Found) -> int:
        for version, revision in found:
            if version == SCHEMA_VERSION:
                return int(revision)
        raise self._failure("the schema has been replaced by another")

    def _commit(self) -> None:
        work = self._work
        if work.lost_by is not None:
            raise work.lost_by
        statements = list(self._writing(work))
        if not statements:
            return  # the end of the transaction gives the row back
        self._commit_count += 1
        mark = (_WRITE_COMMIT, [self._name, self._commit_count])
        try:
            self._send(*statements, mark, (_COMMIT, ()))
        except _Repeatable as error:
            if not error.is_lost or not self._has_committed():
                raise

    def _has_committed(self) -> bool:
        """Tell whether the last commit happened, of which no answer came.

        Raises:
            StoreFailure: it could not be found out in time.
        """
        until_s = time.monotonic() + 2 * self._database.timeout_ms / 1_000
        while True:
            try:
                # Taking the row waits for that transaction to be over.
                _, _, _, found, _ = self._send(
                    (_BEGIN, ()),
                    self._database.settings(),
                    (_TAKE, ()),
                    (_READ_COMMIT, [self._name]),
                    (_COMMIT, ()),
                )
            except (StoreFailure, BadStore) as error:
                if time.monotonic() >= until_s:
                    raise self._failure(
                        "the connection was lost at a commit, and how that went "
                        f"could not be found out: {error}",
                        may_have_happened=True,
                    ) from error
                time.sleep(_PAUSE_S)
            else:
                return found == [(self._commit_count,)]

    def _roll_back(self) -> None:
        """Undo what is left of a transaction, so that the next one can begin."""
        if self._connection is not None:
            try:
                self._connection.undo()
            except psycopg.Error:
                self._drop()

    # --- the server ---

    def _send(self, *statements: Statement) -> list[Found]:
        """Send all of these at once; what each has found, in one round trip.

        Raises:
            StoreFailure: one of them failed, and the transaction with it.
        """
        if self._connection is None:
            self._connection = self._connect()
        schema = self._database.schema
        try:
            return self._connection.send(
                (compiled(schema, text), values) for text, values in statements
            )
        except (psycopg.Error, UnicodeError) as error:
            if isinstance(error, Silence):
                self._drop()
            self._roll_back()
            if self._connection is None:
                raise self._repeatable(error, is_lost=True) from error
            if isinstance(error, psycopg.Error) and _may_be_repeated(error):
                raise self._repeatable(error, is_lost=False) from error
            raise self._failure(said(error)) from error
        except BaseException:
            # Interrupted: what has been sent is still under way.
            self._drop()
            raise

    def _connect(self) -> Connection:
        try:
            return self._database.connect()
        except BadStore as error:
            raise StoreFailure(str(error), may_have_happened=False) from error

    def _drop(self) -> None:
        """Close the connection; the next call makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _failure(self, why: str, *, may_have_happened: bool = False) -> StoreFailure:
        return StoreFailure(f"{self._url}: {why}", may_have_happened=may_have_happened)

    def _repeatable(self, error: Exception, *, is_lost: bool) -> _Repeatable:
        return _Repeatable(f"{self._url}: {said(error)}", is_lost=is_lost)

    # --- records ---

    def _writing(self, work: _Work) -> Iterator[Statement]:
        """The statements that write what has changed."""
        whole, bare, gone = [], [], []
        for identity, row in work.changed.items():
            if row.is_blank():
                gone.append(str(identity))
            elif row.snapshot is work.snapshots[identity]:
                bare.append(_values_of(identity, row)[:-1])
            else:
                whole.append(_values_of(identity, row))
        for some in _chunks(whole):
            yield _WRITE_ROWS, _columns_of(some)
        if bare:
            yield _WRITE_ROWS_BARE, _columns_of(bare)
        if gone:
            yield _DELETE_ROWS, [gone]
        for record in work.changed_sessions.values():
            yield (
                _WRITE_SESSION,
                [record.session, record.ttl_ms, record.count, record.closed],
            )
        if work.has_new_topology:
            assert work.topology is not None
            members = text_of_members(work.topology.members)
            yield _WRITE_MEMBERS, [work.topology.epoch, members]
        if work.revision > work.revision_before:
            yield _WRITE_REVISION, [work.revision]

    def _look_up(self, identities: Sequence[Identity]) -> None:
        work = self._work
        missing = {
            str(each): each
            for each in identities
            if each not in work.rows or self._is_missed(each)
        }
        if not missing:
            return
        read = _READ_ROWS if self._reads_snapshots else _READ_ROWS_BARE
        (found,) = self._read((read, [list(missing)]))
        rows = {name: values for name, *values in found}
        for name, identity in missing.items():
            row = row_from(rows[name]) if name in rows else Row()
            if identity in work.rows:
                # Read before without its snapshot, and perhaps changed since.
                work.rows[identity].snapshot = row.snapshot
            else:
                work.rows[identity] = row
            work.snapshots[identity] = row.snapshot
            if self._reads_snapshots:
                work.bare.discard(identity)
            else:
                work.bare.add(identity)

    def _is_missed(self, identity: Identity) -> bool:
        return self._reads_snapshots and identity in self._work.bare

    def _row(self, identity: Identity) -> Row:
        return self._work.rows[identity]  # all of a call have been looked up

    def _keep_row(self, identity: Identity, row: Row) -> None:
        self._work.changed[identity] = row
        if row.snapshot is not None:
            self._work.bare.discard(identity)

    def _next_revision(self) -> int:
        self._work.revision += 1
        return self._work.revision

    def _session(self, session: SessionId) -> SessionRecord | None:
        work = self._work
        takes = self._takes_sessions and session not in work.taken
        if session not in work.sessions or takes:
            _check_text(session)
            read = _TAKE_SESSION if takes else _READ_SESSION
            (found,) = self._read((read, [session]))
            # After the reading, which may be the first and then finds it too.
            work.sessions[session] = None if not found else record_from(*found[0])
            if takes:
                work.taken.add(session)
        return work.sessions[session]

    def _keep_session(self, record: SessionRecord) -> None:
        self._work.sessions[record.session] = record
        self._work.changed_sessions[record.session] = record

    def _open_sessions(self) -> Iterable[SessionRecord]:
        # Read as the transaction began, and changed by it since.
        known = self._work.sessions.values()
        return [each for each in known if each is not None and not each.closed]

    def _topology(self) -> Topology:
        work = self._work
        if work.topology is None:
            (found,) = self._read((_READ_MEMBERS, ()))
            work.topology = _topology_from(found)
        return work.topology

    def _keep_topology(self, topology: Topology) -> None:
        self._work.topology = topology
        self._work.has_new_topology = True


def _may_be_repeated(error: psycopg.Error) -> bool:
    # Class 40: a transaction that conflicts with another, by no fault of its own.
    return (error.sqlstate or "").startswith("40")


def _check_text(text: str) -> None:
    text.encode()
    if "\0" in text:
        raise Unstorable("PostgreSQL stores no zero byte in a text")


def _values_of(identity: Identity, row: Row) -> tuple[Any, ...]:
    return (str(identity), *columns_of(row))


def _columns_of(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _chunks(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """The rows, in lists whose snapshots fit into one message of the protocol."""
    some: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        size += len(row[-1] or b"")
        if some and size > _CHUNK_BYTES:
            yield some
            some, size = [], len(row[-1] or b"")
        some.append(row)
    if some:
        yield some


def _records_by_session(found: Found) -> dict[SessionId, SessionRecord]:
    records = [record_from(*each) for each in found]
    return {record.session: record for record in records}


def _topology_from(found: Found) -> Topology:
    try:
        ((epoch, members),) = found
        return Topology(epoch=epoch, members=members_from(members))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreFailure(
            f"the membership is damaged: {error}", may_have_happened=False
        ) from error


def _view_from(members: Found, records: Found) -> SessionView:
    known = _records_by_session(records)
    return SessionView(
        _topology_from(members), tuple(known[each] for each in sorted(known))
    )
