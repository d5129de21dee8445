"""The PostgreSQL store's own promises: one server, lost connections, every failure."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from actors import Cluster, store_postgres
from actors.main import main
from actors.store_postgres import SCHEMA_VERSION, PostgresStore, parse_postgres
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
    LockRefused,
    Release,
    Save,
    Saved,
    SessionRecord,
    Store,
    StoreFailure,
)
from placement.entry import Acquisition, ActivationEntry
from placement.identity import Identity
from placement.topology import Member, SessionId
from tests.actors.actors_under_test import Account
from tests.actors.postgres_server import PASSWORD, PostgresServer, Wire

ROOT = Path(__file__).resolve().parents[2]

NODE = SessionId("node-a.1#1")
CART = Identity("cart", "42")
USER = Identity("user", "7")


# --- builders ---


@pytest.fixture
def schema(postgres: PostgresServer) -> str:
    """A schema that is not there yet."""
    return postgres.new_schema()


@pytest.fixture
def url(postgres: PostgresServer, schema: str) -> str:
    return postgres.url(f"schema={schema}")


@pytest.fixture
def wire(postgres: PostgresServer) -> Iterator[Wire]:
    with postgres.wire() as wire:
        yield wire


@contextmanager
def opened(url: str) -> Iterator[PostgresStore]:
    with closing(open_store(url)) as store:
        assert isinstance(store, PostgresStore)
        store.open_session(SessionRecord(session=NODE, ttl_ms=5_000))
        yield store


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


def save(
    store: Store, token: int, version: int, snapshot: bytes, identity: Identity = CART
) -> object:
    (outcome,) = store.save([Save(identity, token, version, snapshot)])
    return outcome


def in_a_transaction(store: Store, *calls: Callable[[], object]) -> None:
    with store.transaction():
        for call in calls:
            call()


def backend_of(store: PostgresStore) -> int:
    """The process that serves the store's connection."""
    assert store._connection is not None
    return store._connection.pgconn.backend_pid


def terminate(server: PostgresServer, *processes: int) -> None:
    """End these connections, and wait until they are gone."""
    for process in processes:
        server.run(f"SELECT pg_terminate_backend({process}, 10000)")


def waits_for_a_lock(server: PostgresServer, process: int) -> bool:
    return bool(
        server.run(f"SELECT FROM pg_locks WHERE pid = {process} AND NOT granted")
    )


def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)


def dump(
    server: PostgresServer, schema: str, database: str = "postgres"
) -> tuple[list[tuple[Any, ...]], list[list[tuple[Any, ...]]]]:
    """All that a schema has: its relations, their columns and their rows."""
    with server.connect(database) as connection:
        tables = connection.execute(
            "SELECT c.relname, c.relkind,"
            " (SELECT array_agg((a.attname, a.atttypid)::text ORDER BY a.attnum)"
            " FROM pg_attribute a WHERE a.attrelid = c.oid)"
            " FROM pg_class c"
            " WHERE c.relnamespace = to_regnamespace(%s)::oid ORDER BY 1",
            [schema],
        ).fetchall()
        rows = [
            connection.execute(f'SELECT * FROM "{schema}"."{name}"'.encode()).fetchall()
            for name, kind, _ in tables
            if kind == "r"
        ]
        return tables, rows


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process of this project, which waits for a line."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_all(processes: Sequence[subprocess.Popen[str]]) -> list[list[str]]:
    """Let processes go that all do the same at once; the lines of each."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


# --- what a URL says ---


def test_a_url_is_a_store_under_both_schemes(
    postgres: PostgresServer, schema: str
) -> None:
    long = postgres.url(f"schema={schema}&sslmode=prefer&timeout_ms=3000")
    with opened(long) as store:
        entry = own(store, CART)

    with opened(long.replace("postgresql://", "postgres://")) as store:
        assert load(store, CART).fencing_token == entry.fencing_token
    with opened(long.replace("postgresql://", "PostgreSQL://")) as store:
        assert load(store, CART).fencing_token == entry.fencing_token


def test_libpq_has_the_options_that_are_its_own() -> None:
    database = parse_postgres(
        "postgresql://me@[::1]:5433,other:5434/my%20db"
        "?sslmode=verify-full&sslrootcert=%2Fca.pem&target_session_attrs=read-write"
        "&connect_timeout=7&schema=elsewhere&timeout_ms=500"
    )

    assert database.schema == "elsewhere"
    assert database.timeout_ms == 500
    for part in (
        "host='::1,other'",
        "port='5433,5434'",
        "dbname='my db'",
        "sslmode=verify-full",
        "sslrootcert=/ca.pem",
        "target_session_attrs=read-write",
        "connect_timeout=7",
        "keepalives_idle=5",
        "tcp_user_timeout=10000",
        "client_encoding=UTF8",
    ):
        assert part.replace("'", "") in database.conninfo.replace("'", "")


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ("h/db?", "an option is not name=value"),
        ("h/db?sslmode", "an option is not name=value"),
        ("h/db?sslmode=", "an option is not name=value"),
        ("h/db?colour=red", "unknown option 'colour'; known are schema, timeout_ms"),
        ("h/db?schema=a&schema=b", "option 'schema' is given twice"),
        ("h/db?schema=pg_mine", "schema must be 1 to 63 of"),
        ("h/db?schema=a%20b", "schema must be 1 to 63 of"),
        ("h/db?schema=" + "a" * 64, "schema must be 1 to 63 of"),
        ("h/db?timeout_ms=0", "timeout_ms must be a number from 1 to 600000"),
        ("h/db?timeout_ms=soon", "timeout_ms must be a number"),
        ("h/db?timeout_ms=9999999", "timeout_ms must be a number"),
        ("h/db?connect_timeout=0", "connect_timeout must be a number from 1 to 600"),
        ("h:port/db", "the port is not a number"),
        ("[::1/db", "write postgresql://user:password@host:port/database"),
        ("u:%zz@h/db", "write postgresql://user:password@host:port/database"),
        ("u:a@b@h/db", "/ ? and @ are written %2F %3F %40"),
        ("u:a/b@h/db", "/ ? and @ are written %2F %3F %40"),
        ("u:a?b=c@h/db", "/ ? and @ are written %2F %3F %40"),
    ],
)
def test_a_wrong_url_is_told_what_is_wrong(rest: str, why: str) -> None:
    for use in (check_store, open_store):
        with pytest.raises(BadStore) as caught:
            use(f"postgresql://{rest}")
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)


# --- the password is shown nowhere ---


@pytest.fixture
def careful(postgres: PostgresServer, schema: str) -> str:
    """A user who has to give the password, and owns a schema."""
    user = f"careful_{schema}"
    secret = PASSWORD.replace("'", "''")
    postgres.run(
        f"CREATE ROLE {user} LOGIN PASSWORD '{secret}' IN ROLE careful",
        f"CREATE SCHEMA {schema} AUTHORIZATION {user}",
    )
    return user


def test_a_password_in_the_url_opens_and_is_shown_nowhere(
    postgres: PostgresServer,
    schema: str,
    careful: str,
    wire: Wire,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = quote(PASSWORD, safe="")
    shown: list[object] = []
    for given in (
        postgres.url(f"schema={schema}", user=f"{careful}:{secret}"),
        postgres.url(f"password={secret}&schema={schema}", user=careful),
        wire.url(f"schema={schema}", user=f"{careful}:{secret}"),
        wire.url(f"schema={schema}&pass%77ord={secret}", user=careful),
    ):
        check_store(given)
        with opened(given) as store, closing(store.another()) as other:
            number = len(shown)
            own(other, Identity("k", str(number)))
            terminate(postgres, backend_of(store))
            own(store, Identity("other", str(number)))
            shown += [store.url, other.url, vars(store), store._database]
            with pytest.raises(StoreFailure) as failed:
                store.renew_session(SessionId("\ud800"), 1)
            shown += [str(failed.value), repr(failed.value)]
        with pytest.raises(BadStore) as refused:
            open_store(f"{given}&sslmode=wrong")
        shown += [str(refused.value), refused.value.__cause__]

    for each in (*shown, caplog.text):
        for form in (PASSWORD, secret, "s3cr3t"):
            assert form not in repr(each)
            assert form not in str(each)
    without = store.url.replace("postgresql://", "")
    assert without == f"{careful}@127.0.0.1:{wire.port}/postgres?schema={schema}"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:s3cr3t/x@h/db",
        "postgresql://u:s3cr3t@x@h/db",
        "postgresql://u:x@s3cr3t@h/db",
        "postgresql://u:x?s3cr3t@h/db",
        "postgresql://u:x?a=s3cr3t@h/db",
        "postgresql://u:s3cr3t%zz@h/db",
        "postgresql://u:s3cr3t@h:port/db",
        "postgresql://u:s3cr3t@h/db?colour=red",
        "postgresql://h/db?password=s3cr3t&colour=red",
        "postgresql://h/db?p%61ssword=s3cr3t&timeout_ms=no",
        "postgresql://h/db?sslpassword=s3cr3t&timeout_ms=no",
        "postgresql:u:s3cr3t@h/db",
        "mysql://u:s3cr3t@h/db",
        "u:s3cr3t@h/db",
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(BadStore) as caught:
        open_store(url)

    assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in repr(caught.value.__cause__)


def test_a_password_may_be_in_a_file(
    url: str,
    careful: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "pgpass"
    file.write_text(f"*:*:*:{careful}:{PASSWORD}\n", encoding="utf-8")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))

    with opened(url.replace("postgres@", f"{careful}@")) as store:
        assert own(store, CART).owner == NODE


# --- what cannot be a store, and stays as it is ---


def refused(url: str, why: str, kind: type[Exception] = BadStore) -> None:
    """Opening says `why` in one sentence, and so does the check where it can."""
    uses = (check_store, open_store) if kind is BadStore else (open_store,)
    for use in uses:
        with pytest.raises(kind, match=why) as caught:
            use(url)
        assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_a_failure(tmp_path: Path, wire: Wire) -> None:
    wire.refuses = True
    for url in (f"postgresql:///db?host={tmp_path}", wire.url()):
        check_store(url)  # nothing is there to be checked
        refused(url, "server", StoreFailure)


def test_a_wrong_password_is_refused(url: str, careful: str) -> None:
    refused(
        url.replace("postgres@", f"{careful}:wrong@"),
        "password authentication failed for user",
    )
    refused(url.replace("postgres@", f"{careful}@"), "no password supplied")


def test_a_user_or_database_that_is_not_there_is_refused(
    postgres: PostgresServer,
) -> None:
    refused(postgres.url(database="elsewhere"), 'database "elsewhere" does not exist')
    refused(postgres.url(user="stranger"), 'role "stranger" does not exist')


def test_tls_that_is_required_and_not_there_is_refused(
    postgres: PostgresServer, wire: Wire
) -> None:
    refused(wire.url("sslmode=require"), "server does not support SSL")
    refused(
        wire.url("sslmode=verify-full&sslrootcert=/no/ca.pem"),
        "server does not support",
    )
    refused(wire.url("sslmode=perhaps"), "invalid sslmode value")


def test_a_user_who_may_not_make_a_schema_is_refused(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    user = f"poor_{schema}"
    postgres.run(f"CREATE ROLE {user} LOGIN")
    poor = url.replace("postgres@", f"{user}@")

    refused(poor, f"user {user} may not create schema {schema} in database postgres")
    assert postgres.run(f"SELECT to_regnamespace('{schema}')") == [(None,)]

    postgres.run(f"CREATE SCHEMA {schema}", f"GRANT USAGE ON SCHEMA {schema} TO {user}")
    refused(poor, f"user {user} may not create tables in schema {schema}")
    postgres.run(f"GRANT CREATE ON SCHEMA {schema} TO {user}")
    check_store(poor)
    with opened(poor) as store:
        assert own(store, CART).owner == NODE


def test_a_user_who_may_not_write_to_the_store_is_refused(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    user = f"reader_{schema}"
    with opened(url):
        pass
    postgres.run(f"CREATE ROLE {user} LOGIN")
    reader = url.replace("postgres@", f"{user}@")

    refused(reader, f"user {user} may not read and write table commits of schema")
    postgres.run(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {user}")
    refused(reader, f"permission denied for schema {schema}")
    postgres.run(f"GRANT USAGE ON SCHEMA {schema} TO {user}")
    with opened(reader) as store:
        assert own(store, CART).owner == NODE


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            ["UPDATE {0}.store SET version = 2"],
            f"has version 2; this program knows version {SCHEMA_VERSION}",
        ),
        (["UPDATE {0}.store SET program = 'mine'"], "is that of program 'mine'"),
        (["DELETE FROM {0}.store"], "is that of program None"),
        (
            ["ALTER TABLE {0}.identities DROP COLUMN attempt"],
            "differs from version 1: column identities.attempt is missing, not bigint",
        ),
        (
            ["ALTER TABLE {0}.sessions ALTER COLUMN count TYPE integer"],
            "column sessions.count is integer, not bigint",
        ),
        (
            ["ALTER TABLE {0}.sessions DROP CONSTRAINT sessions_pkey"],
            "column sessions.session is text, not text PRIMARY KEY",
        ),
        (["DROP TABLE {0}.commits"], "column commits.connection is missing"),
        (
            [
                "DROP SCHEMA {0} CASCADE",
                "CREATE SCHEMA {0}",
                "CREATE TABLE {0}.store (version integer)",
                "CREATE SEQUENCE {0}.numbers",
            ],
            "is another program's; it has numbers, store",
        ),
    ],
)
def test_a_schema_that_is_no_store_of_this_version_is_refused_and_left_untouched(
    changes: list[str], why: str, postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(url) as store:
        own(store, CART)
    postgres.run(*(change.format(schema) for change in changes))
    before = dump(postgres, schema)

    refused(url, why)

    assert dump(postgres, schema) == before


def test_a_database_of_another_encoding_is_refused_and_left_untouched(
    postgres: PostgresServer, schema: str
) -> None:
    database = f"latin_{schema}"
    postgres.run(f"CREATE DATABASE {database} ENCODING 'LATIN1' TEMPLATE template0")

    refused(postgres.url(database=database), "is encoded in LATIN1, not UTF8")

    assert dump(postgres, "placement", database) == ([], [])


@pytest.mark.parametrize(
    ("what", "instead", "kind", "why"),
    [
        ("'server_version_num'", "'block_size'", BadStore, "at least 12 is needed"),
        ("pg_is_in_recovery()", "true", StoreFailure, "a standby, which only reads"),
    ],
)
def test_a_server_that_is_too_old_or_only_reads_is_refused(  # noqa: PLR0917
    what: str,
    instead: str,
    kind: type[Exception],
    why: str,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look = store_postgres._LOOK_AT_DATABASE
    assert what in look
    monkeypatch.setattr(
        store_postgres, "_LOOK_AT_DATABASE", look.replace(what, instead)
    )

    refused(url, why, kind)


def test_without_psycopg_only_this_store_is_missing() -> None:
    code = """
import sys
sys.modules["psycopg"] = None
from actors import Cluster, Grain
from actors.store_url import BadStore, check_store, open_store
import actors.main
open_store("memory://")
for use in check_store, open_store:
    try:
        use("postgresql://me:s3cr3t@host/db")
    except BadStore as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )

    line = (
        "store 'postgresql://me:***@host/db' needs psycopg: "
        "pip install 'actor-placement[postgres]'\n"
    )
    assert done.stdout == line * 2


def test_the_package_imports_psycopg_for_this_store_only() -> None:
    code = (
        "import sys, actors.cluster, actors.main, actors.store_url, actors.conformance;"
        "sys.exit('psycopg' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == 0


def test_the_command_says_one_sentence_and_ends_with_2_or_1(
    postgres: PostgresServer, tmp_path: Path, url: str
) -> None:
    secret = "s3cr3t"
    requests = '{"identity": "item/a", "payload": 1}\n' * 20
    for store, code in (
        (postgres.url(user=f"stranger:{secret}"), 2),
        (postgres.url(database="elsewhere"), 2),
        (f"postgresql://u:{secret}@h/db?colour=red", 2),
        (f"postgresql://u:{secret}@/db?host={tmp_path}", 1),
    ):
        result = CliRunner().invoke(
            main, ["run", "-", "--store", store, "--json"], input=requests
        )

        assert result.exit_code == code, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        said = result.stderr.strip().splitlines()
        assert len(said) <= 4
        assert secret not in result.stderr
    done = CliRunner().invoke(
        main,
        ["run", "-", "--store", url, "--json", "--durable"],
        input=requests,
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["double_activations"] == 0


# --- one schema ---


def test_the_schema_is_named_placement_unless_the_url_says_otherwise(
    postgres: PostgresServer,
) -> None:
    postgres.run("CREATE DATABASE fresh")
    url = postgres.url(database="fresh")

    check_store(url)
    assert dump(postgres, "placement", "fresh") == ([], [])
    open_store(url).close()

    tables, rows = dump(postgres, "placement", "fresh")
    names = {name for name, kind, _ in tables if kind == "r"}
    assert names == {"store", "identities", "sessions", "membership", "commits"}
    assert [(1, "actor-placement", SCHEMA_VERSION, 0)] in rows


def test_processes_that_open_a_new_schema_at_once_all_get_it(
    postgres: PostgresServer,
) -> None:
    code = """
import sys
from actors.store_url import open_store
print("ready", flush=True)
sys.stdin.readline()
for url in sys.argv[1:]:
    open_store(url).close()
"""
    urls = [postgres.url(f"schema={postgres.new_schema()}") for _ in range(8)]

    run_all([start(code, *urls) for _ in range(4)])

    for url in urls:
        check_store(url)


def test_what_a_killed_creation_has_left_is_no_obstacle(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    postgres.run(f"CREATE SCHEMA {schema}")

    check_store(url)
    with opened(url) as store:
        assert own(store, CART).owner == NODE


def test_a_schema_that_is_replaced_while_it_is_used_fails(
    postgres: PostgresServer, schema: str, url: str
) -> None:
    with opened(url) as store:
        postgres.run(f"UPDATE {schema}.store SET version = 2")
        with pytest.raises(StoreFailure, match="has been replaced") as caught:
            own(store, CART)
        assert caught.value.may_have_happened is False

        postgres.run(f"DROP SCHEMA {schema} CASCADE")
        calls: list[Callable[[], object]] = [
            lambda: own(store, CART),
            lambda: load(store, CART),
        ]
        for call in calls:
            with pytest.raises(StoreFailure, match="does not exist") as caught:
                call()
            assert caught.value.may_have_happened is False


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
        before = store._connection.execute(look).fetchall()
        for number in range(20):
            entry = own(store, Identity("k", str(number)), number)
            store.save([Save(entry.identity, entry.fencing_token, 1, b"state")])
            store.renew_session(NODE, number)
            store.read_sessions()
            load(store, CART)

        assert store._connection.execute(look).fetchall() == before
        assert before[0][0] == 0


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
            until(lambda: waits_for_a_lock(postgres, backend_of(closing_it)))
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
        for number, size in enumerate(sizes):
            assert load(store, Identity("k", str(number))).record.snapshot == bytes(
                size
            )


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
    with opened(f"{url}&timeout_ms=100") as store, postgres.connect() as holder:
        entry = own(store, CART)
        with holder.transaction():
            holder.execute(f"SELECT FROM {schema}.store FOR UPDATE".encode())

            for call in (
                lambda: own(store, USER),
                lambda: store.close_session(NODE, 0),
                lambda: in_a_transaction(store, lambda: own(store, USER)),
            ):
                with pytest.raises(StoreFailure, match="timeout") as caught:
                    call()
                assert caught.value.may_have_happened is False
            assert load(store, CART).fencing_token == entry.fencing_token
            assert store.renew_session(NODE, 1) is not None

        assert own(store, USER, 2).owner == NODE


def test_a_transaction_that_stands_still_is_ended_by_the_server(
    postgres: PostgresServer, url: str
) -> None:
    with opened(f"{url}&timeout_ms=100") as store, closing(store.another()) as other:
        own(store, CART)
        process = backend_of(store)
        look = f"SELECT FROM pg_stat_activity WHERE pid = {process}"

        def stand_still() -> None:
            until(lambda: postgres.run(look) == [])

        with pytest.raises(StoreFailure, match="connection") as caught:
            in_a_transaction(store, lambda: own(store, USER, 2), stand_still)

        assert caught.value.may_have_happened is False
        assert load(other, USER).owner is None
        assert own(other, USER, 3).owner == NODE
        assert own(store, Identity("k", "1"), 4).owner == NODE


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
    monkeypatch.setattr(store_postgres, "_GRACE_S", 0.2)
    # Tries that are made again end with the time, too.
    with opened(f"{url}&timeout_ms=200") as store:
        own(store, CART)
        before = backend_of(store)
        os.kill(before, signal.SIGSTOP)
        try:
            began = time.monotonic()
            call(store)
            assert time.monotonic() - began < 5
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
            until(lambda: waits_for_a_lock(postgres, process))

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
            until(lambda: waits_for_a_lock(postgres, process))
        thread.join()

        assert counts == [5]
        assert backend_of(store) == process


# --- connections that are lost ---

COMMITTING = "commits VALUES"
RENEWING = "greatest(count"
TAKING = "FOR UPDATE"


def test_a_connection_that_was_lost_unused_is_made_again(
    postgres: PostgresServer, url: str
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
    url = wire.url(f"schema={schema}&sslmode=disable&timeout_ms=150")
    with opened(url) as store:
        for call in (
            lambda: own(store, CART),
            lambda: in_a_transaction(store, lambda: own(store, USER, 2)),
        ):
            wire.cut(COMMITTING, before=before, then_refuse=True)
            with pytest.raises(StoreFailure, match="could not be found out") as caught:
                call()
            assert caught.value.may_have_happened is True
            with pytest.raises(StoreFailure) as caught:
                store.read_sessions()
            assert caught.value.may_have_happened is False
            wire.refuses = False
        assert load(store, USER).owner == (None if before else NODE)


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
    chance = random.Random(7)
    ended = 0
    with writing(url, 4) as writers, postgres.connect() as killer:
        # Until each has been served for a while in spite of it, and often enough.
        while ended < 300 or min(writer.batches for writer in writers) < 25:
            assert all(writer.thread.is_alive() for writer in writers)
            found = killer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = %s AND (random() < 0.5 OR query ~ 'COMMIT')",
                [schema],
            ).fetchall()
            ended += len(found)
            time.sleep(chance.random() * 0.03)

    check_all_is_there(url, writers)
    assert sum(writer.batches for writer in writers) >= 100


def test_r3_4_a_server_that_crashes_under_load_takes_nothing_confirmed_back(
    postgres: PostgresServer, url: str
) -> None:
    with writing(url, 3) as writers:
        for _ in range(3):
            before = [writer.batches for writer in writers]
            until(
                lambda before=before: all(  # type: ignore[misc]
                    writer.batches > count + 3
                    for writer, count in zip(writers, before, strict=True)
                )
            )
            postgres.stop(immediately=True)
            postgres.start()

    check_all_is_there(url, writers)
    assert any(writer.failures for writer in writers)


CLAIMING = """
import sys
from actors.store_url import open_store
from placement.contracts import *
from placement.entry import Acquisition
from placement.identity import Identity
print("ready", flush=True)
sys.stdin.readline()
store, me = open_store(sys.argv[1]), sys.argv[2]
store.open_session(SessionRecord(session=me, ttl_ms=5000))
for number in range(int(sys.argv[3])):
    identity, mine = Identity("race", str(number)), Acquisition(me, number)
    (acquired,) = store.try_acquire([Acquire(identity, mine)])
    # Also without the lock: the claim alone has to exclude the others.
    revision = acquired.entry.revision if isinstance(acquired, Acquired) else 0
    (claimed,) = store.claim([Claim(identity, me, number, mine, revision)])
    store.release([Release(identity, mine)])
    if isinstance(claimed, Claimed):
        print(number, claimed.entry.fencing_token)
store.close()
"""


def test_r3_1_of_several_processes_exactly_one_claims_each_identity(
    postgres: PostgresServer, schema: str
) -> None:
    url = postgres.url(f"schema={schema}&timeout_ms=30000")
    sessions = [SessionId(f"node-{name}.1#1") for name in "abcd"]

    said = run_all([start(CLAIMING, url, session, 100) for session in sessions])

    won = [line.split() for lines in said for line in lines]
    assert sorted(int(number) for number, _ in won) == list(range(100))
    assert len({token for _, token in won}) == 100
    with opened(url) as store:
        owners = [load(store, Identity("race", str(n))).owner for n in range(100)]
    for session, lines in zip(sessions, said, strict=True):
        assert all(owners[int(line.split()[0])] == session for line in lines)


# --- a cluster ---


def test_r3_4_a_cluster_serves_through_ended_connections_and_a_killed_node(
    postgres: PostgresServer, schema: str
) -> None:
    url = postgres.url(f"schema={schema}&application_name={schema}")
    one = Decimal(1)

    def cluster() -> Cluster:
        return Cluster.embedded(
            nodes=3, kinds={"account": Account}, store=url, ttl=1.0, ask_timeout=30.0
        )

    with cluster() as running, ExitStack() as stack:
        accounts = [running.proxy(Account, str(number)) for number in range(6)]
        connection = stack.enter_context(postgres.connect())
        for turn in range(1, 7):
            if turn in (2, 4):
                found = connection.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE application_name = %s",
                    [schema],
                ).fetchall()
                assert len(found) >= 2
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
