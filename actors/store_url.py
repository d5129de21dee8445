"""Store URLs: which store a URL names, and whether it can be opened.

    memory://                     of this process, gone with it
    sqlite:///relative.db         a SQLite file, from the working directory
    sqlite:////absolute.db        a SQLite file
    nats://host:4222,host2:4222   a JetStream key-value bucket
    postgresql://user@host/db     a schema of a PostgreSQL database (or postgres://)

A path may be percent-encoded. Options of `sqlite:///` follow a `?`:
`synchronous` (OFF, NORMAL, FULL, EXTRA; FULL), `busy_timeout_ms` (2000) and
`max_pages` (of 4 KiB, 0 for no bound; 0). Options of `nats://` are `cluster`
(default), `replicas` (3 in a cluster of servers, else 1), `timeout_ms` (2000) and
those of `actors.nats_url`; of `postgresql://` they are `schema` (placement),
`timeout_ms` (2000) and those of libpq, such as `sslmode`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from actors.store_memory import BadStore, MemoryStore, wall_ms
from actors.store_secrets import without_secrets
from actors.store_sqlite import SYNCHRONOUS, SqliteFile, SqliteStore
from actors.url_options import number_of, read_options
from placement.contracts import Store

if TYPE_CHECKING:
    from actors.postgres_database import PostgresDatabase
    from actors.store_nats import NatsPlace

__all__ = ["BadStore", "check_store", "open_store"]

_OPTIONS = ("synchronous", "busy_timeout_ms", "max_pages")
_BUSY_TIMEOUT_MS_MAX = 600_000
_MAX_PAGES_MAX = 4_294_967_294  # SQLite's own


def check_store(url: str) -> None:
    """Check `url`, and what it names as far as that is there; create nothing.

    Raises:
        BadStore: no store can be opened under it, and why.
    """
    place = _parse(url)
    if place is not None:
        place.look()


def open_store(url: str, *, now_ms: Callable[[], int] = wall_ms) -> Store:
    """Open the store that `url` names; `now_ms` is the clock of its entries.

    Raises:
        BadStore: `url`, or what it names, cannot be a store.
        StoreFailure: it is one, and cannot be opened now.
    """
    place = _parse(url)
    if place is None:
        return MemoryStore(now_ms=now_ms)
    if isinstance(place, SqliteFile):
        return SqliteStore(url, place, now_ms=now_ms)
    return place.open(now_ms=now_ms)


class _PostgresPlace:
    """The database that a URL names, as what can be looked at and opened."""

    def __init__(self, database: "PostgresDatabase") -> None:
        self._database = database

    def look(self) -> None:
        """Check it; create nothing."""
        self._database.look()

    def open(self, *, now_ms: Callable[[], int]) -> Store:
        """Open the store, and create its schema where there is none."""
        from actors.store_postgres import PostgresStore  # noqa: PLC0415  as below

        self._database.prepare()
        return PostgresStore(self._database, now_ms=now_ms)


def _parse(url: str) -> "SqliteFile | NatsPlace | _PostgresPlace | None":
    """Which file, bucket or database `url` names; none for the memory."""
    # By hand: urlsplit drops a `#`, which a file name may contain.
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise BadStore(
            f"store {without_secrets(url)!r} is not a URL such as "
            "sqlite:///placement.db"
        )
    place, question_mark, query = rest.partition("?")
    match scheme.lower():
        case "memory":
            if rest:
                raise BadStore(f"store {url!r}: nothing may follow memory://")
            return None
        case "sqlite":
            return _parse_sqlite(url, place, query if question_mark else None)
        case "nats":
            # Here: with it comes asyncio, which other programs need not read.
            from actors.store_nats import NatsPlace  # noqa: PLC0415

            return NatsPlace.parse(url)
        case "postgresql" | "postgres":
            return _PostgresPlace(_postgres_database(url))
    raise BadStore(
        f"store {without_secrets(url)!r}: unknown scheme {scheme!r}; "
        "known are memory://, sqlite:///, postgresql:// and nats://"
    )


def _postgres_database(url: str) -> "PostgresDatabase":
    try:
        # Here: a program that has no such store needs no psycopg.
        from actors.postgres_database import parse_postgres  # noqa: PLC0415
    except ImportError as error:
        raise BadStore(
            f"store {without_secrets(url)!r} needs psycopg: "
            "pip install 'actor-placement[postgres]'"
        ) from error
    return parse_postgres(url)


def _parse_sqlite(url: str, place: str, query: str | None) -> SqliteFile:
    if not place.startswith("/"):
        raise BadStore(
            f"store {url!r}: write sqlite:///relative.db or sqlite:////absolute.db"
        )
    try:
        name = unquote(place[1:], errors="strict")
        name.encode()
    except UnicodeError:
        raise BadStore(f"store {url!r}: the path is not valid UTF-8") from None
    if not name or name.endswith("/"):
        raise BadStore(f"store {url!r} names no file")
    if "\0" in name:
        raise BadStore(f"store {url!r}: a path cannot contain a zero byte")
    if name == ":memory:":
        raise BadStore(f"store {url!r}: a store in memory is memory://")

    def refuse(why: str) -> BadStore:
        return BadStore(f"store {url!r}: {why}")

    options = {} if query is None else read_options(query, _OPTIONS, refuse=refuse)
    given = {name: option.value for name, option in options.items()}
    synchronous = given.get("synchronous", "FULL").upper()
    if synchronous not in SYNCHRONOUS:
        raise refuse(f"synchronous must be one of {', '.join(SYNCHRONOUS)}")

    def number(name: str, default: int, largest: int) -> int:
        text = given.get(name, str(default))
        return number_of(name, text, smallest=0, largest=largest, refuse=refuse)

    return SqliteFile(
        path=Path(name),
        synchronous=synchronous,
        busy_timeout_ms=number("busy_timeout_ms", 2_000, _BUSY_TIMEOUT_MS_MAX),
        max_pages=number("max_pages", 0, _MAX_PAGES_MAX),
    )
