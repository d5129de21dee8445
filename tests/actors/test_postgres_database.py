"""Which database and schema a URL names, and what cannot be a store."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from actors import postgres_database
from actors.main import main
from actors.postgres_database import SCHEMA_VERSION, parse_postgres
from actors.store_url import BadStore, check_store, open_store
from placement.contracts import (
    StoreFailure,
)
from placement.identity import Identity
from placement.topology import SessionId
from tests.actors.postgres_builders import (
    CART,
    NODE,
    ROOT,
    backend_of,
    load,
    opened,
    own,
    terminate,
)
from tests.actors.postgres_server import PASSWORD, PostgresServer, Wire
from tests.actors.store_processes import run_all, start

pytestmark = pytest.mark.servers


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
        ("h/db?sslmode", "option sslmode has no value"),
        ("h/db?sslmode=", "option sslmode has no value"),
        ("h/db?colour=red", "unknown option 'colour'; known are schema, timeout_ms"),
        ("h/db?schema=a&schema=b", "option schema is given twice"),
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
    look = postgres_database._LOOK_AT_DATABASE
    assert what in look
    monkeypatch.setattr(
        postgres_database, "_LOOK_AT_DATABASE", look.replace(what, instead)
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
    # Whatever transactions are by default there.
    defaults = (
        "options=-cdefault_transaction_isolation%3Dserializable"
        "%20-cdefault_transaction_read_only%3Don"
    )
    urls = [
        postgres.url(f"schema={postgres.new_schema()}&{defaults}") for _ in range(8)
    ]

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
