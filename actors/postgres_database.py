"""A database of PostgreSQL: how a URL names it, and the schema of a store in it."""

import logging
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, LiteralString, TypeAlias, TypeVar
from zlib import crc32

import psycopg
from psycopg import generators, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, TransactionStatus

from actors.store_memory import BadStore
from actors.store_secrets import is_secret, without_secrets
from actors.url_options import Option, number_of, read_options
from placement.contracts import StoreFailure

PROGRAM = "actor-placement"
SCHEMA_VERSION = 1

_SERVER_VERSION_MIN = 120_000

_OPTIONS = {"schema", "timeout_ms", "ssl"}
_KNOWN = "schema, timeout_ms, and those of libpq, such as sslmode"
_TIMEOUT_MS_MAX = 600_000

# How many times a statement's time a transaction may take: all others that write wait
# for one at a time.
_STATEMENTS_PER_TRANSACTION = 5

# Beyond the time that the server has to end a statement by itself.
_GRACE_S = 1.0

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

# The first two do not count while the server waits for the rest of what is sent at
# once: of who is cut off in the middle of that only the third tells, which servers
# before 17 do not have. CASE, so that these do not hear of it.
_SET: LiteralString = """
SELECT set_config('statement_timeout', %s, true),
       set_config('idle_in_transaction_session_timeout', %s, true),
       CASE WHEN current_setting('server_version_num')::integer >= 170000
            THEN set_config('transaction_timeout', %s, true) END,
       set_config('synchronous_commit',
                  CASE current_setting('synchronous_commit')
                  WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)
"""
# Of connections whose processes have died.
_FORGET_OLD_COMMITS: LiteralString = """
DELETE FROM {schema}.commits WHERE at < now() - interval '1 day'
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

_Answer = TypeVar("_Answer")
Statement: TypeAlias = tuple[LiteralString, Sequence[Any]]
Found: TypeAlias = list[tuple[Any, ...]]


class Silence(psycopg.OperationalError):
    """The server neither answers nor takes anything any more."""


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits for a server only while it moves.

    The server bounds each statement; this is for one that stands still, or whose
    network does.
    """

    silence_max_s = 10.0
    _pipelines: ExitStack | None = None
    _sync: Callable[[], None]

    def send(self, statements: Iterable[tuple[bytes, Sequence[Any]]]) -> list[Found]:
        """Send all of these at once; what each has found, in one round trip."""
        if self._pipelines is None:
            # Never left: leaving it sends a flush after all else, for which the
            # server takes back its bound of how long a transaction may stand still.
            pipelines = ExitStack()
            self._sync = pipelines.enter_context(self.pipeline()).sync
            self._pipelines = pipelines
        cursors = [self.execute(*each, binary=True) for each in statements]
        # More than the socket takes at once: `sync` would wait for the answers to
        # what it has not sent yet.
        self.wait(generators.send(self.pgconn))
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
                    raise Silence("the server does not answer")
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

    def prepare(self) -> None:
        """Create the store where it is not there yet, and check it.

        Raises:
            BadStore: the schema is not a store, or cannot become one.
            StoreFailure: the server cannot be reached.
        """
        with self._looking() as connection:
            if not self._is_there(connection):
                self._create(connection)
            connection.execute(compiled(self.schema, _FORGET_OLD_COMMITS))

    def connect(self) -> Connection:
        """Connect to the server.

        Raises:
            BadStore: it refuses us for good.
            StoreFailure: it is not there, or takes nobody now.
        """
        try:
            connection = Connection.connect(
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

    def settings(self) -> Statement:
        """What each transaction sets for itself."""
        longest_ms = self.timeout_ms * _STATEMENTS_PER_TRANSACTION
        return _SET, [str(ms) for ms in (self.timeout_ms, self.timeout_ms, longest_ms)]

    @contextmanager
    def _looking(self) -> Iterator[Connection]:
        with closing(self.connect()) as connection:
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            connection.read_only = False
            try:
                with connection.transaction():
                    connection.execute(*self.settings())
                    yield connection
            except psycopg.errors.InsufficientPrivilege as error:
                raise BadStore(f"{self.url}: {said(error)}") from error
            except psycopg.Error as error:
                raise StoreFailure(f"{self.url}: {said(error)}") from error

    def _is_there(self, connection: Connection) -> bool:
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

    def _check_tables(self, connection: Connection, tables: Found, user: str) -> None:
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
        found = connection.execute(compiled(self.schema, _READ_VERSION)).fetchone()
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

    def _create(self, connection: Connection) -> None:
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
            connection.execute(compiled(self.schema, "CREATE SCHEMA {schema}"))
        for name, columns in _TABLES.items():
            connection.execute(
                sql.SQL("CREATE TABLE {}.{} ({})").format(
                    sql.Identifier(self.schema), sql.Identifier(name), sql.SQL(columns)
                )
            )
        for statement in _FIRST_ROWS:
            connection.execute(compiled(self.schema, statement))


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

    def refuse(why: str) -> BadStore:
        return BadStore(f"store {shown!r}: {why}")

    known = {each.keyword.decode() for each in Conninfo.get_defaults()} | _OPTIONS
    options = read_options(query, known, names=_KNOWN, refuse=refuse) if mark else {}
    schema, timeout_ms = "placement", 2_000
    kept = []
    for name, (value, written) in options.items():
        match name:
            case "schema":
                schema = _checked_schema(shown, value)
            case "timeout_ms":
                timeout_ms = number_of(
                    name, value, largest=_TIMEOUT_MS_MAX, refuse=refuse
                )
            case "connect_timeout":
                number_of(name, value, largest=_TIMEOUT_MS_MAX // 1_000, refuse=refuse)
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
        url=_url_without_secrets(scheme, authority, path, options.values()),
        # Whatever the environment says: identities and sessions are any text.
        conninfo=make_conninfo(
            **{**_DEFAULTS, **parameters, "client_encoding": "UTF8"}
        ),
        schema=schema,
        timeout_ms=timeout_ms,
    )


def _checked_schema(shown: str, name: str) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,62}", name) or name.startswith("pg_"):
        raise BadStore(
            f"store {shown!r}: schema must be 1 to 63 of A-Z a-z 0-9 _, "
            "and not begin with a digit or pg_"
        )
    return name


def _url_without_secrets(
    scheme: str, authority: str, path: str, options: Iterable[Option]
) -> str:
    """The URL again, which opens the store for whoever has the password."""
    user, at, host = authority.rpartition("@")
    query = "&".join(
        option.written for option in options if not is_secret(option.written)
    )
    return (
        f"{scheme}://{user.partition(':')[0]}{at}{host}"
        f"{'/' if path else ''}{path}{'?' if query else ''}{query}"
    )


def _described(column: tuple[str, bool] | None) -> str:
    if column is None:
        return "missing"
    kind, is_key = column
    return f"{kind} PRIMARY KEY" if is_key else kind


@lru_cache(maxsize=1_000)
def compiled(schema: str, statement: LiteralString) -> bytes:
    """`statement` about the tables of `schema`."""
    return (
        sql.SQL(statement)
        .format(schema=sql.Identifier(schema), program=PROGRAM, version=SCHEMA_VERSION)
        .as_bytes()
    )


def said(error: Exception) -> str:
    """What the server says, without the statement and what was in it."""
    diagnosed = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((diagnosed or str(error)).split())
