"""Stores that are watched: what was called, how large the batches were."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, cast

from placement.contracts import Store

_SCHEMA = "CREATE TABLE rows (identity TEXT PRIMARY KEY NOT NULL, value INTEGER)"
_WRITE = (
    "INSERT INTO rows VALUES (?, ?) "
    "ON CONFLICT (identity) DO UPDATE SET value = excluded.value"
)


class CountedStore:
    """A store whose calls are counted by name, transactions among them.

    All its connections count together; `requests` are those of calls that take
    several.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    @classmethod
    def of(cls, store: Store) -> tuple["CountedStore", Store]:
        """It, and the same as a store."""
        counted = cls(store)
        return counted, cast("Store", counted)

    def another(self) -> "CountedStore":
        """Another connection."""
        made = type(self)(self._store.another())
        made.calls, made.requests = self.calls, self.requests
        return made

    def transaction(self) -> AbstractContextManager[None]:
        """As the store's."""
        self.calls["transaction"] += 1
        return self._store.transaction()

    @property
    def url(self) -> str:
        """As the store's."""
        return self._store.url

    def close(self) -> None:
        """Free what it holds."""
        self._store.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._store, name)

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            if arguments and isinstance(arguments[0], list):
                self.requests[name] += len(arguments[0])
            return method(*arguments)

        return counted


class Commits:
    """SQLite's own group commit: one table, one transaction for so many rows."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._number = 0

    def fresh(self, count: int) -> None:
        """Commit `count` rows that were not there."""
        first = self._number
        self._number += count
        self._write([(f"echo/{first + n}", n) for n in range(count)])
        assert self._count() == self._number

    def again(self, count: int) -> None:
        """Commit `count` rows that may be there already."""
        self._number += 1
        self._write([(f"echo/{n}", self._number) for n in range(count)])
        found = self._connection.execute(
            "SELECT sum(value = ?) FROM rows", [self._number]
        )
        assert found.fetchone()[0] == count

    def _count(self) -> int:
        query = "SELECT max(rowid) FROM rows"
        return int(self._connection.execute(query).fetchone()[0])

    def _write(self, rows: list[tuple[str, int]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(_WRITE, rows)
        self._connection.execute("COMMIT")


@contextmanager
def commits(folder: Path) -> Iterator[Commits]:
    """A file of SQLite's own, written as ours is: WAL, every commit synced."""
    with closing(sqlite3.connect(folder / "raw.db", isolation_level=None)) as opened:
        opened.execute("PRAGMA journal_mode = WAL")
        opened.execute("PRAGMA synchronous = FULL")
        opened.execute(_SCHEMA)
        yield Commits(opened)
