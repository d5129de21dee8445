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

import logging
import re
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, LiteralString, TypeAlias, TypeVar
from urllib.parse import unquote
from zlib import crc32

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, TransactionStatus

from actors.store_memory import (
    BadStore,
    RecordStore,
    Row,
    Unstorable,
    _Outcome,
    _Request,
    wall_ms,
)
from actors.store_secrets import is_secret, without_secrets
from actors.store_sqlite import members_from, text_of
from placement.contracts import Failed, SessionRecord, SessionView, StoreFailure
from placement.entry import Acquisition
from placement.identity import Identity
from placement.topology import Member, SessionId, Topology

PROGRAM = "actor-placement"
SCHEMA_VERSION = 1

_SERVER_VERSION_MIN = 120_000

_TIMEOUT_MS_MAX = 600_000

# Beyond the time that the server has to end a statement by itself.
_GRACE_S = 1.0

# A message of the protocol has at most 1 GiB, and the server copies it around.
_SNAPSHOT_BYTES_MAX = 256 << 20
_CHUNK_BYTES = 8 << 20

# How often a call that surely changed nothing is made, within its time.
_TRIES_MAX = 10
_PAUSE_S = 0.05

# libpq's options, where the URL does not give them: a server that is gone is found
# gone within some seconds.
_DEFAULTS = {
    "connect_timeout": "3",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "fallback_application_name": "placement",
    "gssencmode": "disable",
}

# What a connection is refused with for good, whenever it is tried. libpq gives no
# code with it; another language's text is a failure to connect like any other.
_REFUSED_FOR_GOOD = re.compile(
    "authentication failed|no password supplied|does not exist|no pg_hba.conf entry"
    "|not permitted|permission denied|SSL was required|not support SSL|certificate"
    '|invalid [a-z_]+ value|invalid .*value "|invalid port',
)

_TABLES: Mapping[str, LiteralString] = {
    "store": """
    id smallint PRIMARY KEY CHECK (id = 1),
    program text NOT NULL,
    version integer NOT NULL,
    revision bigint NOT NULL
""",
    "identities": """
    identity text COLLATE "C" PRIMARY KEY,
    owner text,
    attempt bigint NOT NULL,
    fencing_token bigint NOT NULL,
    version bigint NOT NULL,
    revision bigint NOT NULL,
    lock_session text,
    lock_procedure bigint,
    snapshot bytea
""",
    "sessions": """
    session text COLLATE "C" PRIMARY KEY,
    ttl_ms bigint NOT NULL,
    count bigint NOT NULL,
    closed boolean NOT NULL
""",
    "membership": """
    id smallint PRIMARY KEY CHECK (id = 1),
    epoch bigint NOT NULL,
    members jsonb NOT NULL
""",
    "commits": """
    connection text COLLATE "C" PRIMARY KEY,
    number bigint NOT NULL,
    at timestamp with time zone NOT NULL
""",
}

# What PostgreSQL says of each: its type, and whether it is the primary key.
_COLUMNS: Mapping[tuple[str, str], tuple[str, bool]] = {
    (table, column): (
        re.split(" COLLATE| PRIMARY| NOT", kind)[0],
        "PRIMARY KEY" in kind,
    )
    for table, columns in _TABLES.items()
    for column, kind in (
        line.strip().rstrip(",").split(" ", 1) for line in columns.strip().splitlines()
    )
}

_FIRST_ROWS: tuple[LiteralString, ...] = (
    "CREATE INDEX open_sessions ON {schema}.sessions (session) WHERE NOT closed",
    "INSERT INTO {schema}.membership VALUES (1, 0, '[]')",
    "INSERT INTO {schema}.store VALUES (1, {program}, {version}, 0)",
)

_BEGIN: LiteralString = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
# One snapshot for all that is read. A renewal writes as the first thing in it.
_BEGIN_AT_ONCE: LiteralString = "BEGIN ISOLATION LEVEL REPEATABLE READ READ WRITE"
_BEGIN_READING: LiteralString = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_SET: LiteralString = """
SELECT set_config('statement_timeout', %s, true),
       set_config('idle_in_transaction_session_timeout', %s, true),
       set_config('synchronous_commit',
                  CASE current_setting('synchronous_commit')
                  WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)
"""
_COMMIT: LiteralString = "COMMIT"
# A commit that waits for a standby is never cut short: it would be taken for one
# that the standby has, too.
_WAIT_FOR_COMMIT: LiteralString = "SELECT set_config('statement_timeout', '0', true)"

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
# Of connections whose processes have died.
_FORGET_OLD_COMMITS: LiteralString = """
DELETE FROM {schema}.commits WHERE at < now() - interval '1 day'
"""

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

_LOOK_AT_DATABASE: LiteralString = """
SELECT current_setting('server_version_num')::integer,
       current_setting('server_version'),
       current_setting('server_encoding'),
       current_database(), current_user, pg_is_in_recovery(),
       has_database_privilege(current_database(), 'CREATE'),
       (SELECT has_schema_privilege(oid, 'CREATE')
        FROM pg_namespace WHERE nspname = %s)
"""
_LOOK_AT_SCHEMA: LiteralString = """
SELECT c.relname, a.attname,
       format_type(a.atttypid, a.atttypmod),
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary
               AND i.indkey::text = a.attnum::text),
       has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
       AND has_table_privilege(c.oid, 'UPDATE')
       AND has_table_privilege(c.oid, 'DELETE')
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a
    ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname = %s AND c.relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
"""
_READ_VERSION: LiteralString = "SELECT program, version FROM {schema}.store"

# It warns of what follows from an error that is raised anyway. Who has configured
# no log sees none.
logging.getLogger("psycopg").addHandler(logging.NullHandler())

_Result = TypeVar("_Result")
_Answer = TypeVar("_Answer")
_Statement: TypeAlias = tuple[LiteralString, Sequence[Any]]
_Found: TypeAlias = list[tuple[Any, ...]]


class _NotDone(StoreFailure):
    """Surely nothing was written, and the same again may succeed.

    Where the connection was lost at a commit, that holds only once it is looked up.
    """

    def __init__(self, message: str, *, is_lost: bool) -> None:
        super().__init__(message, may_have_happened=False)
        self.is_lost = is_lost


class _Silence(psycopg.OperationalError):
    """The server neither answers nor takes anything any more."""


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits for a server only while it moves.

    The server bounds each statement; this is for one that stands still, or whose
    network does.
    """

    silence_max_s = 10.0
    _pipelines: ExitStack | None = None
    _sync: Callable[[], None]

    def send(self, statements: Iterable[tuple[bytes, Sequence[Any]]]) -> list[_Found]:
        """Send all of these at once; what each has found, in one round trip."""
        if self._pipelines is None:
            # Never left: leaving it sends a flush after all else, for which the
            # server takes back its bound of how long a transaction may stand still.
            self._pipelines = ExitStack()
            self._sync = self._pipelines.enter_context(self.pipeline()).sync
        cursors = [self.execute(*each, binary=True) for each in statements]
        self._sync()
        return [[] if each.description is None else each.fetchall() for each in cursors]

    def undo(self) -> None:
        """End a transaction, whatever became of it and of what has been sent."""
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            with suppress(psycopg.Error):  # it has been raised, or is undone
                self._sync()
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            self.send([(b"ROLLBACK", ())])

    def close(self) -> None:
        """Close it, answered or not."""
        super().close()
        if self._pipelines is not None:
            with suppress(psycopg.Error):  # it is closed
                self._pipelines.close()

    def wait(
        self,
        gen: Generator[Any, Any, _Answer],
        interval: float = 0.1,
        timeout: float | None = None,
    ) -> _Answer:
        """Wait for what `gen` waits for."""
        return super().wait(self._while_it_moves(gen), interval, timeout)

    def _while_it_moves(
        self, gen: Generator[Any, Any, _Answer]
    ) -> Generator[Any, Any, _Answer]:
        try:
            wanted = next(gen)
            until_s = time.monotonic() + self.silence_max_s
            while True:
                ready = yield wanted
                if ready:
                    until_s = time.monotonic() + self.silence_max_s
                elif time.monotonic() >= until_s:
                    raise _Silence("the server does not answer")
                wanted = gen.send(ready)
        except StopIteration as end:
            answer: _Answer = end.value
            return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresDatabase:
    """Which database and schema, and how it is reached.

    `url` has no password in it; `conninfo` is for libpq and may have one.
    `timeout_ms` is how long the server may take over a statement, waiting for
    others' transactions included.
    """

    url: str
    conninfo: str = field(repr=False)
    schema: str = "placement"
    timeout_ms: int = 2_000

    def look(self) -> None:
        """Check that the schema is a store, or that one can be created there.

        It creates nothing and changes nothing. A server that is not there now is
        for the opening to find.

        Raises:
            BadStore: it is not, and why.
        """
        with suppress(StoreFailure), self._looking() as connection:
            self._is_there(connection)

    def open(self, *, now_ms: Callable[[], int] = wall_ms) -> "PostgresStore":
        """Open the store, and create it where it is not there yet.

        Raises:
            BadStore: the schema is not a store, or cannot become one.
            StoreFailure: the server cannot be reached.
        """
        with self._looking() as connection:
            if not self._is_there(connection):
                self._create(connection)
            connection.execute(_compiled(self.schema, _FORGET_OLD_COMMITS))
        return PostgresStore(self, now_ms=now_ms)

    def connect(self) -> _Connection:
        """Connect to the server.

        Raises:
            BadStore: it refuses us for good.
            StoreFailure: it is not there, or takes nobody now.
        """
        try:
            connection = _Connection.connect(
                self.conninfo,
                autocommit=True,
                # Behind PgBouncer the next transaction may be another session's.
                prepare_threshold=None,
            )
        except psycopg.Error as error:
            said = " ".join(str(error).split())
            if _REFUSED_FOR_GOOD.search(said):
                raise BadStore(f"{self.url}: {said}") from error
            raise StoreFailure(
                f"{self.url}: {said}", may_have_happened=False
            ) from error
        connection.silence_max_s = self.timeout_ms / 1_000 + _GRACE_S
        return connection

    def settings(self) -> _Statement:
        """What each transaction sets for itself."""
        return _SET, [str(self.timeout_ms)] * 2

    @contextmanager
    def _looking(self) -> Iterator[_Connection]:
        with closing(self.connect()) as connection:
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            connection.read_only = False
            try:
                with connection.transaction():
                    connection.execute(*self.settings())
                    yield connection
            except psycopg.errors.InsufficientPrivilege as error:
                raise BadStore(f"{self.url}: {_said(error)}") from error
            except psycopg.Error as error:
                raise StoreFailure(f"{self.url}: {_said(error)}") from error

    def _is_there(self, connection: _Connection) -> bool:
        """Tell whether the store is there; false: it can be created."""
        found = connection.execute(_LOOK_AT_DATABASE, [self.schema]).fetchone()
        assert found is not None
        number, version, encoding, database, user, is_standby, may_make, may_fill = (
            found
        )
        if number < _SERVER_VERSION_MIN:
            raise BadStore(
                f"{self.url}: the server is PostgreSQL {version}; "
                f"at least {_SERVER_VERSION_MIN // 10_000} is needed"
            )
        if encoding != "UTF8":
            raise BadStore(
                f"{self.url}: database {database} is encoded in {encoding}, not UTF8"
            )
        if is_standby:
            raise StoreFailure(
                f"{self.url}: the server is a standby, which only reads",
                may_have_happened=False,
            )
        tables = connection.execute(_LOOK_AT_SCHEMA, [self.schema]).fetchall()
        if tables:
            self._check_tables(connection, tables, user)
            return True
        if may_fill is None and not may_make:
            raise BadStore(
                f"{self.url}: user {user} may not create schema {self.schema} in "
                f"database {database}; its owner can: CREATE SCHEMA "
                f'"{self.schema}" AUTHORIZATION "{user}"'
            )
        if may_fill is False:
            raise BadStore(
                f"{self.url}: user {user} may not create tables in schema {self.schema}"
            )
        return False

    def _check_tables(self, connection: _Connection, tables: _Found, user: str) -> None:
        there = {
            (table, column): (kind, is_key) for table, column, kind, is_key, _ in tables
        }
        if not {("store", "program"), ("store", "version")} <= there.keys():
            names = ", ".join(sorted({table for table, *_ in tables}))
            raise BadStore(
                f"{self.url}: schema {self.schema} is another program's; it has {names}"
            )
        unusable = sorted(
            {table for table, *_, is_usable in tables if not is_usable} & _TABLES.keys()
        )
        if unusable:
            raise BadStore(
                f"{self.url}: user {user} may not read and write "
                f"table {unusable[0]} of schema {self.schema}"
            )
        found = connection.execute(_compiled(self.schema, _READ_VERSION)).fetchone()
        program, version = found or (None, None)
        if program != PROGRAM:
            raise BadStore(
                f"{self.url}: schema {self.schema} is that of program {program!r}"
            )
        if version != SCHEMA_VERSION:
            raise BadStore(
                f"{self.url}: schema {self.schema} has version {version}; "
                f"this program knows version {SCHEMA_VERSION}"
            )
        for (table, column), wanted in _COLUMNS.items():
            is_what = there.get((table, column))
            if is_what != wanted:
                raise BadStore(
                    f"{self.url}: schema {self.schema} differs from version {version}: "
                    f"column {table}.{column} is {_described(is_what)}, "
                    f"not {_described(wanted)}"
                )

    def _create(self, connection: _Connection) -> None:
        # Two that create it at once: the second waits here, and finds it made.
        connection.execute(
            "SELECT pg_advisory_xact_lock(%s::bigint)",
            [crc32(f"{PROGRAM} {self.schema}".encode())],
        )
        if self._is_there(connection):
            return
        found = connection.execute(
            "SELECT to_regnamespace(quote_ident(%s)) IS NULL", [self.schema]
        ).fetchone()
        if found == (True,):
            connection.execute(_compiled(self.schema, "CREATE SCHEMA {schema}"))
        for name, columns in _TABLES.items():
            connection.execute(
                sql.SQL("CREATE TABLE {}.{} ({})").format(
                    sql.Identifier(self.schema), sql.Identifier(name), sql.SQL(columns)
                )
            )
        for statement in _FIRST_ROWS:
            connection.execute(_compiled(self.schema, statement))


def parse_postgres(url: str) -> PostgresDatabase:
    """Which database `url` names.

    Raises:
        BadStore: it is no such URL, and why; the message has no password in it.
    """
    shown = without_secrets(url)
    scheme, _, rest = url.partition("://")
    place, mark, query = rest.partition("?")
    authority, _, path = place.partition("/")
    if authority.count("@") > 1 or "@" in path or "@" in query:
        raise BadStore(
            f"store {shown!r}: in a user, password or option, / ? and @ are "
            "written %2F %3F %40"
        )
    options = _options(shown, query) if mark else []
    schema, timeout_ms = "placement", 2_000
    kept = []
    for name, value, written in options:
        match name:
            case "schema":
                schema = _checked_schema(shown, value)
            case "timeout_ms":
                timeout_ms = _number(shown, name, value, largest=_TIMEOUT_MS_MAX)
            case "connect_timeout":
                _number(shown, name, value, largest=_TIMEOUT_MS_MAX // 1_000)
                kept.append(written)
            case _:
                kept.append(written)
    try:
        # By libpq itself: several hosts, addresses of any kind, its own escapes.
        found = conninfo_to_dict(f"{scheme.lower()}://{place}?{'&'.join(kept)}")
    except (psycopg.Error, UnicodeError):
        raise BadStore(
            f"store {shown!r}: write postgresql://user:password@host:port/database"
        ) from None
    parameters = {name: str(value) for name, value in found.items()}
    for port in filter(None, parameters.get("port", "").split(",")):
        if not port.isdecimal():
            raise BadStore(f"store {shown!r}: the port is not a number")
    return PostgresDatabase(
        url=_url_without_secrets(scheme, authority, path, options),
        # Whatever the environment says: identities and sessions are any text.
        conninfo=make_conninfo(
            **{**_DEFAULTS, **parameters, "client_encoding": "UTF8"}
        ),
        schema=schema,
        timeout_ms=timeout_ms,
    )


def _options(shown: str, query: str) -> list[tuple[str, str, str]]:
    """Each option's name and value, and how it is written."""
    known = {each.keyword.decode() for each in Conninfo.get_defaults()} | {"ssl"}
    options: list[tuple[str, str, str]] = []
    for part in query.split("&"):
        written, _, value = part.partition("=")
        name = unquote(written)
        if not name or not value:
            raise BadStore(f"store {shown!r}: an option is not name=value")
        if name not in known | {"schema", "timeout_ms"}:
            raise BadStore(
                f"store {shown!r}: unknown option {name!r}; known are schema, "
                "timeout_ms, and those of libpq, such as sslmode"
            )
        if any(name == each for each, *_ in options):
            raise BadStore(f"store {shown!r}: option {name!r} is given twice")
        options.append((name, unquote(value), part))
    return options


def _checked_schema(shown: str, name: str) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,62}", name) or name.startswith("pg_"):
        raise BadStore(
            f"store {shown!r}: schema must be 1 to 63 of A-Z a-z 0-9 _, "
            "and not begin with a digit or pg_"
        )
    return name


def _number(shown: str, name: str, value: str, *, largest: int) -> int:
    if not re.fullmatch("[0-9]{1,6}", value) or not 1 <= int(value) <= largest:
        raise BadStore(f"store {shown!r}: {name} must be a number from 1 to {largest}")
    return int(value)


def _url_without_secrets(
    scheme: str, authority: str, path: str, options: Iterable[tuple[str, str, str]]
) -> str:
    """The URL again, which opens the store for whoever has the password."""
    user, at, host = authority.rpartition("@")
    query = "&".join(part for *_, part in options if not is_secret(part))
    return (
        f"{scheme}://{user.partition(':')[0]}{at}{host}"
        f"{'/' if path else ''}{path}{'?' if query else ''}{query}"
    )


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
        self._connection: _Connection | None = None
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
        rule: Callable[[_Request, int], _Outcome],
        requests: Sequence[_Request],
        *,
        writes: bool = True,
    ) -> list[_Outcome | Failed]:
        # The other outcomes have no snapshot in them: it is not read for them.
        bare: tuple[object, ...] = (self._release, self._save, self._give_up)
        self._reads_snapshots = rule not in bare
        each = super()._each
        return self._repeated(lambda: each(rule, requests, writes=writes))

    def _repeated(self, call: Callable[[], _Result]) -> _Result:
        """Make a call again that surely has not happened, for a while."""
        until_s = time.monotonic() + self._database.timeout_ms / 1_000
        for number in range(_TRIES_MAX - 1):
            try:
                return call()
            except _NotDone:
                # A transaction's calls are the caller's to make again.
                if self._is_in_transaction:
                    raise
                # A connection may have been dead from the first, and found so late.
                if number > 0 and time.monotonic() >= until_s:
                    raise
        return call()

    def _renew(self, session: SessionId, count: int) -> SessionView | None:
        with self._sessions_call():
            _check_text(session)
            _, _, renewed, members, records, *_ = self._send(
                (_BEGIN_AT_ONCE, ()),
                self._database.settings(),
                (_RENEW_SESSION, [count, session]),
                (_READ_MEMBERS, ()),
                (_READ_VIEW, ()),
                (_WAIT_FOR_COMMIT, ()),
                (_COMMIT, ()),
            )
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

    def _read(self, *statements: _Statement) -> list[_Found]:
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

    def _send_reading(self, *statements: _Statement) -> list[_Found]:
        return self._send(
            (_BEGIN_READING, ()), self._database.settings(), *statements, (_COMMIT, ())
        )[2:-1]

    def _begun(self, begin: Callable[[], list[_Found]]) -> list[_Found]:
        try:
            return begin()
        except _NotDone:
            if not self._is_in_transaction:
                raise
            # Nothing has been decided yet, and the body cannot be repeated.
            return begin()

    def _revision_of(self, found: _Found) -> int:
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
            self._send(*statements, mark, (_WAIT_FOR_COMMIT, ()), (_COMMIT, ()))
        except _NotDone as error:
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

    def _send(self, *statements: _Statement) -> list[_Found]:
        """Send all of these at once; what each has found, in one round trip.

        Raises:
            StoreFailure: one of them failed, and the transaction with it.
        """
        if self._connection is None:
            self._connection = self._connect()
        schema = self._database.schema
        try:
            return self._connection.send(
                (_compiled(schema, text), values) for text, values in statements
            )
        except (psycopg.Error, UnicodeError) as error:
            if isinstance(error, _Silence):
                self._drop()
            self._roll_back()
            if self._connection is None:
                raise self._not_done(error, is_lost=True) from error
            if isinstance(error, psycopg.Error) and _may_be_repeated(error):
                raise self._not_done(error, is_lost=False) from error
            raise self._failure(_said(error)) from error
        except BaseException:
            # Interrupted: what has been sent is still under way.
            self._drop()
            raise

    def _connect(self) -> _Connection:
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

    def _not_done(self, error: Exception, *, is_lost: bool) -> _NotDone:
        return _NotDone(f"{self._url}: {_said(error)}", is_lost=is_lost)

    # --- records ---

    def _writing(self, work: _Work) -> Iterator[_Statement]:
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
            members = text_of(work.topology.members)
            yield _WRITE_MEMBERS, [work.topology.epoch, members]
        if work.revision > work.revision_before:
            yield _WRITE_REVISION, [work.revision]

    def _look_up(self, identities: Sequence[Identity]) -> None:
        work = self._work
        # One that is no UTF-8 is left for its own request to fail by.
        missing = {
            str(each): each
            for each in identities
            if (each not in work.rows or self._is_missed(each)) and each.isprintable()
        }
        if not missing:
            return
        read = _READ_ROWS if self._reads_snapshots else _READ_ROWS_BARE
        (found,) = self._read((read, [list(missing)]))
        rows = {name: values for name, *values in found}
        for name, identity in missing.items():
            row = _row_from(rows[name]) if name in rows else Row()
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
        if identity not in self._work.rows:
            _check_text(identity)
            self._look_up([identity])
        return self._work.rows[identity]

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
            work.sessions[session] = None if not found else _record_from(*found[0])
            if takes:
                work.taken.add(session)
        return work.sessions[session]

    def _keep_session(self, record: SessionRecord) -> None:
        self._work.sessions[record.session] = record
        self._work.changed_sessions[record.session] = record

    def _open_sessions(self) -> Iterable[SessionRecord]:
        if not self._work.has_begun:
            self._read()
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


@lru_cache(maxsize=1_000)
def _compiled(schema: str, statement: LiteralString) -> bytes:
    """`statement` about the tables of `schema`."""
    return (
        sql.SQL(statement)
        .format(schema=sql.Identifier(schema), program=PROGRAM, version=SCHEMA_VERSION)
        .as_bytes()
    )


def _said(error: Exception) -> str:
    """What the server says, without the statement and what was in it."""
    diagnosed = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((diagnosed or str(error)).split())


def _may_be_repeated(error: psycopg.Error) -> bool:
    # Class 40: a transaction that conflicts with another, by no fault of its own.
    return (error.sqlstate or "").startswith("40")


def _check_text(text: str) -> None:
    text.encode()
    if "\0" in text:
        raise Unstorable("PostgreSQL stores no zero byte in a text")


def _values_of(identity: Identity, row: Row) -> tuple[Any, ...]:
    lock = row.lock
    return (
        str(identity),
        row.owner,
        row.attempt,
        row.fencing_token,
        row.version,
        row.revision,
        None if lock is None else lock.session,
        None if lock is None else lock.procedure,
        row.snapshot,
    )


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


def _row_from(found: Sequence[Any]) -> Row:
    owner, attempt, token, version, revision, session, procedure, snapshot = found
    return Row(
        owner=owner,
        attempt=attempt,
        fencing_token=token,
        version=version,
        revision=revision,
        lock=None if session is None else Acquisition(session, procedure),
        snapshot=snapshot,
    )


def _record_from(
    session: SessionId,
    ttl_ms: int,
    count: int,
    closed: bool,  # noqa: FBT001
) -> SessionRecord:
    return SessionRecord(session=session, ttl_ms=ttl_ms, count=count, closed=closed)


def _records_by_session(found: _Found) -> dict[SessionId, SessionRecord]:
    records = [_record_from(*each) for each in found]
    return {record.session: record for record in records}


def _topology_from(found: _Found) -> Topology:
    try:
        ((epoch, members),) = found
        return Topology(epoch=epoch, members=members_from(members))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreFailure(
            f"the membership is damaged: {error}", may_have_happened=False
        ) from error


def _view_from(members: _Found, records: _Found) -> SessionView:
    known = _records_by_session(records)
    return SessionView(
        _topology_from(members), tuple(known[each] for each in sorted(known))
    )


def _described(column: tuple[str, bool] | None) -> str:
    if column is None:
        return "missing"
    kind, is_key = column
    return f"{kind} PRIMARY KEY" if is_key else kind
