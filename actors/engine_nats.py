"""The engine over NATS: nodes of many processes that are one cluster."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from actors.engine import Settings, ThreadEngine
from actors.engine_url import BadEngine
from actors.loop_thread import LoopDispatcher
from actors.nats_bucket import (
    NO_PEERS,
    NO_REPLICAS,
    OFF,
    REPLICAS_IN_A_CLUSTER,
    STREAM_EXISTS,
)
from actors.nats_connection import (
    ConnectionEvent,
    NatsConnection,
    NatsFailure,
    NatsRefused,
    NatsUnreachable,
    NatsUrl,
    parse_nats_url,
)
from actors.nats_token import token_of
from actors.store_nats import OPTIONS as OF_STORE
from actors.store_nats import NatsPlace, NatsStore
from actors.store_url import BadStore, check_store, open_store
from actors.transport_nats import NatsTransport
from messages.frames import VERSION
from messages.pack import pack
from placement.contracts import Store

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue

    from actors.nats_client import NatsClient

BUCKET = "placement_clusters"
_AGREE_S, _ANSWER_S, _PAUSE_S = 20.0, 2.0, 0.1
_CLOSE_S = 10.0


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What all nodes of a cluster have in common, as its first one wrote it."""

    cluster: str
    protocol: int
    partitions: int
    ttl_ms: int

    @classmethod
    def of(cls, settings: Settings) -> "ClusterRecord":
        """What a node with `settings` would write."""
        return cls(
            cluster=settings.cluster,
            protocol=VERSION,
            partitions=settings.partitions,
            ttl_ms=round(settings.ttl * 1_000),
        )

    def difference(self, there: "ClusterRecord") -> str:
        """How this one is not what is `there`; empty where it is."""
        pairs = (
            ("protocol version", self.protocol, there.protocol),
            ("partitions", self.partitions, there.partitions),
            ("ttl", f"{self.ttl_ms / 1e3:g} s", f"{there.ttl_ms / 1e3:g} s"),
            ("name", self.cluster, there.cluster),
        )
        return ", ".join(
            f"its {name} is {theirs}, not {ours}"
            for name, ours, theirs in pairs
            if ours != theirs
        )


class NatsEngine(ThreadEngine):
    """A process of a cluster over NATS, and over the store that is named.

    Without a store NATS holds the entries and sessions too. `settings` are the
    cluster's own where it `adopts` them.

    Raises:
        BadNatsUrl: the URL makes no sense; MissingExtra: nats-py is not there.
        BadEngine: the cluster there has other settings, or the server no JetStream.
        BadStore: the store cannot be one.
        NatsFailure: NATS cannot be reached, or refuses.
        StoreFailure: the store cannot be opened now.
    """

    def __init__(
        self,
        url: str,
        store: str | Store | None = None,
        *,
        settings: Settings,
        adopts: bool = False,
        name: str = "placement",
    ) -> None:
        parsed = parse_nats_url(url, more=OF_STORE)
        if "cluster" in parsed.options:
            raise BadEngine(
                "an engine's URL names no cluster: the setting `cluster` does"
            )
        if isinstance(store, str) and store.startswith("memory:"):
            raise BadStore(
                "store memory:// is of one process; nodes over NATS share one: "
                "leave it out, or name another"
            )
        # The URL whole: it may hold what the store needs to be let in.
        place = _store_url(url, settings.cluster) if store is None else store
        # Before anything is written.
        if store is None:
            NatsPlace.parse(str(place))
        elif isinstance(store, str):
            check_store(store)
        self.connection = connection = NatsConnection.open(
            parsed, name=f"{name} {settings.cluster}", pack=pack
        )
        opened: Store | None = None
        try:
            there = agree(connection, ClusterRecord.of(settings), adopts=adopts)
            self.settings = settings = replace(
                settings, partitions=there.partitions, ttl=there.ttl_ms / 1_000
            )
            opened = open_store(place) if isinstance(place, str) else place
            super().__init__(
                opened,
                partial(NatsTransport, connection, settings.cluster),
                partitions=settings.partitions,
                make_system=partial(LoopDispatcher, connection.thread),
            )
        except BaseException:
            if opened is not None:
                opened.close()
            connection.close()
            raise

    def _connected_for_entries(self, store: Store) -> Store:
        # On the thread that decides what is written: between two, each batch would
        # wake the other. Sessions keep theirs, for no flood to come before a renewal.
        if isinstance(store, NatsStore):
            return store.another(thread=self.connection.thread)
        return store.another()

    def close(self, *, timeout_s: float | None = None) -> None:
        """Send what was to be sent; free threads and connections, within a time."""
        until_s = time.monotonic() + (_CLOSE_S if timeout_s is None else timeout_s)

        def left_s() -> float:
            return max(0.0, until_s - time.monotonic())

        if self.connection.is_connected and not self.connection.thread.is_current():
            with suppress(NatsFailure):
                self.connection.flush(timeout_s=min(1.0, left_s()))
        super().close(timeout_s=left_s())
        self.connection.close(timeout_s=max(0.5, min(3.0, left_s())))


def _store_url(url: str, cluster: str) -> str:
    """The store of `cluster` at the engine's own servers."""
    joint = "&" if "?" in url else "?"
    return f"{url}{joint}cluster={quote(cluster, safe='')}"


def agree(
    connection: NatsConnection, ours: ClusterRecord, *, adopts: bool = False
) -> ClusterRecord:
    """What the cluster has in common; the first one that comes writes its own.

    Who `adopts` what is there writes nothing.

    Raises:
        BadEngine: the cluster has something else, or is not there for who adopts it;
            JetStream is off.
        NatsFailure: it could not be read or written, or is not permitted.
    """
    refused: list[str] = []

    def noticed(event: ConnectionEvent) -> None:
        if "permissions violation" in event.reason:
            refused.append(event.reason)

    connection.listen(noticed)
    try:
        there = connection.call(
            partial(
                _agree,
                url=connection.url,
                ours=ours,
                refused=refused,
                adopts=adopts,
            ),
            timeout_s=_AGREE_S + _ANSWER_S,
        )
    finally:
        connection.unlisten(noticed)
    if there.protocol != ours.protocol or there.cluster != ours.cluster or not adopts:
        difference = ours.difference(there)
        if difference:
            raise BadEngine(
                f"NATS {connection.url}: cluster {ours.cluster!r}: {difference}"
            )
    return there


async def _agree(
    client: "NatsClient",
    *,
    url: NatsUrl,
    ours: ClusterRecord,
    refused: list[str],
    adopts: bool,
) -> ClusterRecord:
    """Ask until there is an answer: servers that choose a leader give none."""
    import nats.errors  # noqa: PLC0415  few have it
    import nats.js.errors  # noqa: PLC0415

    js = client.jetstream(timeout=_ANSWER_S)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + _AGREE_S
    while True:
        try:
            return await _look(js, url, ours, adopts=adopts)
        except (nats.errors.TimeoutError, nats.js.errors.NoStreamResponseError):
            if refused:
                raise NatsRefused(f"NATS {url}: {refused[0]}") from None
        except nats.js.errors.APIError as error:
            if error.err_code is None or error.err_code in OFF:
                # Nobody answers for JetStream, or somebody says that it is off.
                text = error.description or "is it on? (nats-server -js)"
                raise BadEngine(f"NATS {url}: JetStream is off: {text}") from None
            is_now = isinstance(error, nats.js.errors.ServiceUnavailableError)
            # Servers that start just now do not see each other yet.
            if not is_now and error.err_code != NO_PEERS:
                raise BadEngine(f"NATS {url}: {error.description}") from None
            if loop.time() >= until_s:
                raise NatsUnreachable(f"NATS {url}: {error.description}") from None
        except msgspec.DecodeError as error:
            name = ours.cluster
            raise BadEngine(
                f"NATS {url}: what cluster {name!r} shares cannot be read: {error}"
            ) from None
        except nats.errors.Error as error:
            text = str(error).removeprefix("nats: ")
            raise NatsUnreachable(f"NATS {url}: {text}") from None
        await asyncio.sleep(_PAUSE_S)


async def _look(
    js: "JetStreamContext", url: NatsUrl, ours: ClusterRecord, *, adopts: bool
) -> ClusterRecord:
    import nats.js.errors  # noqa: PLC0415  few have it

    bucket = await _bucket(js, url)
    key = token_of(ours.cluster)
    while True:
        with suppress(nats.js.errors.KeyNotFoundError):
            found = await bucket.get(key)
            return msgspec.json.decode(found.value or b"", type=ClusterRecord)
        if adopts:
            raise BadEngine(
                f"NATS {url}: there is no cluster {ours.cluster!r}: no node was there"
            )
        # Where another was faster it is read instead.
        with suppress(nats.js.errors.KeyWrongLastSequenceError):
            await bucket.create(key, msgspec.json.encode(ours))
            return ours


async def _bucket(js: "JetStreamContext", url: NatsUrl) -> "KeyValue":
    import nats.js.errors  # noqa: PLC0415  few have it

    try:
        return await js.key_value(BUCKET)
    except nats.js.errors.BucketNotFoundError:
        pass
    given = url.options.get("replicas")
    # A single server says that it has no room for three.
    wanted = [int(given)] if given else [REPLICAS_IN_A_CLUSTER, 1]
    for replicas in wanted:
        try:
            return await js.create_key_value(
                bucket=BUCKET,
                description="actor-placement: what the nodes of a cluster share",
                replicas=replicas,
                direct=False,
            )
        except nats.js.errors.APIError as error:
            if error.err_code == STREAM_EXISTS:
                return await js.key_value(BUCKET)
            if error.err_code != NO_REPLICAS or replicas == wanted[-1]:
                raise
    raise AssertionError("the last one returns or raises")
