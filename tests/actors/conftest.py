"""What several test modules of this folder share."""

from collections.abc import Iterator

import pytest

from tests.actors.postgres_server import PostgresServer, Wire


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that runs; one for all tests."""
    server = PostgresServer()
    try:
        server.start()
        server.run("CREATE ROLE careful")
        yield server
    finally:
        server.remove()


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
