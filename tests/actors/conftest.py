"""What several test modules of this folder share."""

from collections.abc import Iterator

import pytest

from tests.actors.postgres_server import PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that runs; one for all tests."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()
