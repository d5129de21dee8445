"""One connection to NATS: an asyncio client in one thread that nobody waits for.

nats-py needs `pip install 'actor-placement[nats]'`, and is imported at the first
connection.

Each connection is a client of its own: what was on its way when one is lost is
never sent again by the next, and whoever waits for it hears so at once. Reconnecting
goes on until `close`.
"""

import asyncio
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from actors.log import log
from actors.loop_thread import LoopThread
from actors.nats_failure import NatsFailure, NatsLost, NatsRefused, NatsUnreachable
from actors.nats_url import BadNatsUrl, NatsUrl, parse_nats_url

if TYPE_CHECKING:
    from actors.nats_client import NatsClient

__all__ = [
    "BadNatsUrl",
    "ConnectionEvent",
    "MissingExtra",
    "NatsConnection",
    "NatsFailure",
    "NatsLost",
    "NatsRefused",
    "NatsUnreachable",
    "NatsUrl",
    "Subscription",
    "parse_nats_url",
]

T = TypeVar("T")
Work: TypeAlias = "Callable[[NatsClient], Coroutine[Any, Any, T]]"
"""What is done with the client of a connection, on its thread."""

CONNECT_S = 3.0
PING_EVERY_S = 1.0
PINGS_OUT_MAX = 2
CLOSE_S = 3.0
FLUSH_S = 2.0
#: What waits for the loop, besides what the client and the system's socket hold.
OUTBOUND_BYTES_MAX = 16 << 20
_CLIENT_BYTES_MAX = 2 << 20
#: What no other frame was published before for so long is written at once.
_LONELY_NS = 200_000
_STRAIGHT_BYTES_MAX = 4_096
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.05, 1.0

_SUBSCRIPTION = re.compile(
    r'permissions violation for subscription to "([^"]+)"', re.IGNORECASE
)


class MissingExtra(ValueError):
    """What NATS needs is not installed."""

    def __init__(self, module: str) -> None:
        super().__init__(
            f"NATS needs the module {module}: pip install 'actor-placement[nats]'"
        )


@dataclass(frozen=True, slots=True)
class ConnectionEvent:
    """What happened to a connection.

    `name` is Disconnected, Reconnected, ReconnectFailed, SubscriptionLost,
    OutboundFull, OutboundLost or ServerError; `count` how many frames were lost with
    it. A connection that is read too slowly is ended by its server, which says so.
    """

    name: str
    reason: str
    count: int = 0


@dataclass(slots=True, eq=False)
class Subscription:
    """A subject that is subscribed to on every connection, until it is ended.

    Of those that name one `queue`, each message comes to one only.
    """

    subject: str
    callback: Callable[[str, bytes], None]
    queue: str = ""
    held: Any = None


class NatsConnection:
    """A connection to NATS that heals by itself; all methods are for any thread.

    It runs on a thread of its own, or with others on `thread`, which outlives it.
    Callbacks are called on its thread and return at once. `publish`, `submit` and
    `unsubscribe` wait for nothing; `open`, `call`, `subscribe`, `flush` and `close` do,
    each only within its time, and so not on that thread.
    """

    def __init__(
        self,
        url: NatsUrl,
        *,
        name: str = "placement",
        pack: Callable[[Sequence[bytes], int], Sequence[bytes]] | None = None,
        outbound_bytes_max: int = OUTBOUND_BYTES_MAX,
        thread: LoopThread | None = None,
    ) -> None:
        url.check()
        self.url = url
        self.counts: Counter[str] = Counter()
        """How often each event has been, and each kind of frame lost."""
        self.max_payload = 1 << 20
        """The largest message that the server takes."""
        self._name = name
        self._pack = pack or (lambda frames, _limit: frames)
        self._outbound_bytes_max = outbound_bytes_max
        self._listeners: list[Callable[[ConnectionEvent], None]] = []
        # Of the loop's thread, but for reading.
        self._client: NatsClient | None = None
        self._wanted: dict[Subscription, None] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._refused: set[str] = set()
        self._is_closing = False
        self._keeper: asyncio.Task[None] | None = None
        # Shared with those who publish.
        self._lock = threading.Lock()
        self._outbound: deque[tuple[str, bytes]] = deque()
        self._outbound_bytes = 0
        self._is_draining = False
        self._is_full = False
        self._published_ns = 0
        self._is_over = threading.Event()
        self._owns_thread = thread is None
        self._thread = thread or LoopThread(f"nats-{name}")
        self._loop = self._thread.loop
        self._lost = asyncio.Event()
        self._drain_lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<NatsConnection {self.url}>"

    @classmethod
    def open(
        cls, url: NatsUrl, *, timeout_s: float = 2 * CONNECT_S, **more: Any
    ) -> "NatsConnection":
        """Connect; the first connection must succeed.

        Raises:
            MissingExtra: nats-py is not installed.
            BadNatsUrl: a file that the URL names cannot be read.
            NatsUnreachable: no server answers.
            NatsRefused: the server does not let us in, and why.
        """
        _client_type(url)
        connection = cls(url, **more)
        try:
            connection._wait(connection._first(), timeout_s, "connecting")
        except BaseException:
            connection.close()
            raise
        return connection

    # --- for any thread ---

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        client = self._client
        return client is not None and client.is_connected

    @property
    def client(self) -> "NatsClient":
        """The client of the connection there is now. For its own thread.

        Raises:
            NatsLost: there is none.
        """
        client = self._client
        if client is None or not client.is_connected:
            raise self._is_not_there()
        return client

    @property
    def thread(self) -> LoopThread:
        """The thread that it runs on."""
        return self._thread

    def listen(self, listener: Callable[[ConnectionEvent], None]) -> None:
        """Have `listener` called with every event, on the connection's thread."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[ConnectionEvent], None]) -> None:
        """Call it no more."""
        with suppress(ValueError):
            self._listeners.remove(listener)

    def submit(
        self,
        work: "Work[T]",
        *,
        timeout_s: float,
    ) -> Future[T]:
        """Run `work` with the client on the connection's thread; waits for nothing.

        The future fails with `NatsLost` when the connection is lost meanwhile, with
        `NatsUnreachable` when the time is over, and with what `work` raised.
        """
        done: Future[T] = Future()

        def begin() -> None:
            try:
                client = self.client
            except NatsLost as error:
                done.set_exception(error)
                return
            task = self._begin(self._perform(work, client, timeout_s, done))
            task.add_done_callback(ended)

        def ended(_: object) -> None:
            # A task that is ended before its first step says nothing itself.
            if not done.done():
                with suppress(InvalidStateError):
                    done.set_exception(self._is_not_there())

        # Under the lock: what is posted before the end is posted hears of it.
        with self._lock:
            is_posted = not self._is_closing and self._thread.soon(begin)
        if not is_posted:
            done.set_exception(self._is_closed())
        return done

    def call(
        self,
        work: "Work[T]",
        *,
        timeout_s: float,
    ) -> T:
        """What `work` returns; waits, so not for the connection's own thread.

        Raises:
            NatsFailure: as `submit`'s future.
        """
        done = self.submit(work, timeout_s=timeout_s)
        try:
            return done.result(timeout_s + CLOSE_S)
        except TimeoutError:
            raise NatsUnreachable(f"NATS {self.url}: no answer in time") from None

    def publish(self, subject: str, data: bytes) -> bool:
        """Hand over a frame to be published; false: it surely never will be.

        It is not where there is no connection, or too much waits already. One that
        was handed over may still be lost, with its connection: that is counted.
        """
        size = len(data)
        with self._lock:
            if self._client is None or self._is_closing:
                self.counts["frames refused: no connection"] += 1
                return False
            if self._outbound_bytes + size > self._outbound_bytes_max:
                self.counts["frames refused: outbound buffer full"] += 1
                if not self._is_full:
                    self._is_full = True
                    self._thread.soon(self._say_full)
                return False
            if self._is_lonely(size) and self._client.say_straight(subject, data):
                return True
            self._outbound.append((subject, data))
            self._outbound_bytes += size
            if self._is_draining:
                return True
            self._is_draining = True
        # One wake-up for all that is handed over until the loop has come to it.
        return self._thread.soon(self._drain_soon)

    def _is_lonely(self, size: int) -> bool:
        """Whether a frame is best written at once, by whoever publishes it.

        One that follows another closely is not: those that the loop publishes go out
        together. Under the lock.
        """
        now_ns = time.monotonic_ns()
        since_ns, self._published_ns = now_ns - self._published_ns, now_ns
        return (
            since_ns > _LONELY_NS
            and size <= min(_STRAIGHT_BYTES_MAX, self.max_payload)
            and not self._is_draining
            and not self._thread.is_current()
        )

    def subscribe(
        self,
        subject: str,
        callback: Callable[[str, bytes], None],
        *,
        queue: str = "",
        timeout_s: float = CONNECT_S,
    ) -> Subscription:
        """Have `callback` called with subject and data, on every connection.

        Raises:
            NatsRefused: the server does not permit it.
            NatsFailure: it is not known whether it was done; it is not any more.
        """
        wanted = Subscription(subject, callback, queue)

        async def work(client: "NatsClient") -> None:
            self._wanted[wanted] = None
            await self._subscribe(client, wanted)
            await _flush(client, timeout_s)
            if subject.lower() in self._refused:
                raise NatsRefused(
                    f"NATS {self.url}: it is not permitted to subscribe to {subject}"
                )

        try:
            self.call(work, timeout_s=timeout_s)
        except BaseException:
            self.unsubscribe(wanted)
            raise
        return wanted

    def unsubscribe(self, wanted: Subscription) -> None:
        """Receive nothing more of it; waits for nothing."""

        def end() -> None:
            self._wanted.pop(wanted, None)
            if wanted.held is not None and self.is_connected:
                self._spawn(_quietly(wanted.held.unsubscribe()))

        self._thread.soon(end)

    def flush(self, *, timeout_s: float = FLUSH_S) -> None:
        """Wait until the server has all that was published until now.

        Raises:
            NatsFailure: it has not, or that is not known.
        """

        async def work(client: "NatsClient") -> None:
            async with self._drain_lock:
                pass  # what was handed over before has been published
            await _flush(client, timeout_s)

        self.call(work, timeout_s=timeout_s)

    def close(self, *, timeout_s: float = CLOSE_S) -> None:
        """End the connection and its own thread, within the time, whatever hangs."""
        with self._lock:
            is_first, self._is_closing = not self._is_closing, True
        if is_first:
            self._thread.soon(lambda: self._spawn(self._end(timeout_s)))
        if self._thread.is_current():
            return
        if self._owns_thread:
            self._thread.join(timeout_s + 1.0)
        else:
            self._is_over.wait(timeout_s + 1.0)

    # --- the thread ---

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return self._loop.create_task(work)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Have `work` done, until the connection is lost."""
        task = self._spawn(work)
        self._tasks[task] = None
        task.add_done_callback(lambda each: self._tasks.pop(each, None))
        return task

    def _begin_now(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have `work` done as by `_begin`, up to where it first waits at once.

        A task would begin with the loop's next round, each of which asks the system
        what has arrived: what this saves is a third of the time of a short message.
        """
        try:
            awaited = work.send(None)
        except StopIteration:
            return
        self._begin(_left_of(work, awaited))

    def _is_closed(self) -> NatsLost:
        return NatsLost(
            f"NATS {self.url}: the connection has been closed", may_have_happened=False
        )

    def _is_not_there(self) -> NatsLost:
        return NatsLost(
            f"NATS {self.url}: there is no connection", may_have_happened=False
        )

    def _wait(
        self, work: Coroutine[Any, Any, None], timeout_s: float, doing: str
    ) -> None:
        done = asyncio.run_coroutine_threadsafe(
            asyncio.wait_for(work, timeout_s), self._loop
        )
        try:
            done.result(timeout_s + CLOSE_S)
        except TimeoutError:
            done.cancel()
            raise NatsUnreachable(
                f"NATS {self.url}: {doing} took longer than {timeout_s:g} s",
                may_have_happened=False,
            ) from None

    async def _perform(
        self,
        work: "Work[T]",
        client: "NatsClient",
        timeout_s: float,
        done: Future[T],
    ) -> None:
        try:
            result = await asyncio.wait_for(work(client), timeout_s)
        except TimeoutError:
            error: BaseException = NatsUnreachable(
                f"NATS {self.url}: no answer within {timeout_s:g} s"
            )
        except asyncio.CancelledError:
            error = NatsLost(f"NATS {self.url}: the connection was lost meanwhile")
        except BaseException as raised:  # whoever waits for it decides
            error = raised
        else:
            with suppress(Exception):  # cancelled by whoever wanted it
                done.set_result(result)
            return
        with suppress(Exception):
            done.set_exception(error)

    # --- connecting ---

    async def _first(self) -> None:
        await self._connect()
        self._keeper = self._spawn(self._keep())

    async def _connect(self) -> None:
        """Make a client and connect it; its subscriptions are there then.

        Raises:
            NatsFailure: it could not be.
        """
        client = _client_type(self.url)(self.url, self._thread.heard)
        errors: list[BaseException] = []
        is_up = False

        async def error(raised: Exception) -> None:
            if is_up:
                self._on_error(client, raised)
            else:
                errors.append(raised)

        async def lost() -> None:
            self._lose(client)

        try:
            await asyncio.wait_for(
                client.connect(
                    servers=[f"nats://{server}" for server in self.url.servers],
                    error_cb=error,
                    closed_cb=lost,
                    name=self._name,
                    # What the client would keep for its next connection is "may
                    # have been sent": each connection is a client of its own.
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=round(CONNECT_S),
                    ping_interval=round(PING_EVERY_S),
                    max_outstanding_pings=PINGS_OUT_MAX,
                    pending_size=_CLIENT_BYTES_MAX,
                    **_credentials(self.url),
                ),
                CONNECT_S * len(self.url.servers),
            )
            is_up = True
            self._refused.clear()
            for wanted in tuple(self._wanted):
                await self._subscribe(client, wanted)
            if self._wanted:
                # Who hears that it is connected again may be sent something at once.
                await _flush(client, CONNECT_S)
        except asyncio.CancelledError:
            await _end_client(client)
            raise
        except BaseException as raised:
            await _end_client(client)
            # The last of the client's own says why no server was left.
            cause = errors[-1] if errors else raised
            raise self._failure(cause) from cause
        self.max_payload = client.max_payload
        client.open_straight()
        client.open_ears()
        self._lost.clear()
        with self._lock:
            self._client = client
        reading = getattr(client, "_reading_task", None)
        if reading is not None:
            # Its end is the first sign of a loss, whatever else then hangs.
            reading.add_done_callback(lambda _: self._lose(client))

    def _failure(self, raised: BaseException) -> NatsFailure:
        text = str(raised).removeprefix("nats: ").strip("'\" ")
        where = f"NATS {self.url}"
        if isinstance(raised, NatsFailure):
            return raised
        if isinstance(raised, ssl.SSLError):
            why = getattr(raised, "verify_message", "") or raised.reason or text
            return NatsRefused(
                f"{where}: no trust by TLS: {why}", may_have_happened=False
            )
        if "authorization" in text.lower() or "authentication" in text.lower():
            return NatsRefused(
                f"{where}: the server refuses the credentials: {text}",
                may_have_happened=False,
            )
        if isinstance(raised, TimeoutError):
            text = "no answer in time"
        elif isinstance(raised, OSError) and not isinstance(raised, socket.gaierror):
            text = os.strerror(raised.errno) if raised.errno else text
        return NatsUnreachable(
            f"{where}: no connection: {text or type(raised).__name__}",
            may_have_happened=False,
        )

    def _lose(self, client: "NatsClient") -> None:
        """A connection is over."""
        if self._client is not client:
            return
        with self._lock:
            self._client = None
            lost, self._outbound_bytes = len(self._outbound), 0
            self._outbound.clear()
            # Here, since a task that is ended before its first step says nothing.
            self._is_draining = False
        client.hear_no_more()
        why = client.last_error
        for task in tuple(self._tasks):
            task.cancel()
        for wanted in self._wanted:
            wanted.held = None
        self._spawn(_end_client(client))
        if self._is_closing:
            return
        text = "" if why is None else str(why)
        self._tell("Disconnected", text or "the server has gone", lost)
        if lost:
            self._tell("OutboundLost", "with their connection", lost)
        self._lost.set()

    async def _keep(self) -> None:
        """Connect again whenever a connection is lost."""
        while True:
            await self._lost.wait()
            pause_s, said = _PAUSE_MIN_S, ""
            while self._client is None:
                # Not all at once, after a server that all had has gone.
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
                try:
                    await self._connect()
                except NatsFailure as error:
                    if said != str(error):
                        self._tell("ReconnectFailed", said := str(error))
            self._tell("Reconnected", "")

    async def _subscribe(self, client: "NatsClient", wanted: Subscription) -> None:
        from actors.nats_client import at_once  # noqa: PLC0415  few have nats-py

        def hear(subject: str, data: bytes, _: bytes) -> None:
            self._thread.hear(wanted.callback, subject, data)

        wanted.held = await client.subscribe(
            wanted.subject, wanted.queue, cb=at_once(hear)
        )

    def _on_error(self, client: "NatsClient", raised: Exception) -> None:
        text = str(raised).removeprefix("nats: ")
        found = _SUBSCRIPTION.search(text)
        if found is not None:
            self._refused.add(found[1].lower())
            self._tell("SubscriptionLost", text)
        elif not client.is_closed:
            self._tell("ServerError", text or type(raised).__name__)

    def _tell(self, name: str, reason: str, count: int = 0) -> None:
        self.counts[name] += count or 1
        event = ConnectionEvent(name, reason, count)
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener of a connection raised")

    # --- out ---

    def _say_full(self) -> None:
        self._tell("OutboundFull", f"{self._outbound_bytes_max} bytes wait already")

    def _drain_soon(self) -> None:
        """Publish all that waits: now, where the client has room for it."""
        client = self._client
        room = _CLIENT_BYTES_MAX - (0 if client is None else client.pending_data_size)
        if self._outbound_bytes * 2 < room:
            self._begin_now(self._drain())
        else:
            self._begin(self._drain())

    async def _drain(self) -> None:
        """Publish all that waits, frames of one subject together."""
        async with self._drain_lock:
            left = 0
            try:
                while True:
                    with self._lock:
                        waiting, client = tuple(self._outbound), self._client
                        self._outbound.clear()
                        self._is_full = False
                        if not waiting or client is None:
                            self._is_draining = False
                            return
                    left = len(waiting)
                    await self._publish_all(client, waiting)
                    left = 0
                    size = sum(len(data) for _, data in waiting)
                    with self._lock:
                        # Else what waits now is of the next connection.
                        if client is self._client:
                            self._outbound_bytes -= size
                        if not self._outbound and client is self._client:
                            self._is_draining = self._is_full = False
                            return
                    # Who publishes as fast as this does must not keep the loop.
                    await asyncio.sleep(0)
            except BaseException as error:
                with self._lock:
                    self.counts["frames lost with their connection"] += left
                    if not isinstance(error, asyncio.CancelledError):
                        # A bug, told by whoever runs this: what comes goes on.
                        self._is_draining = False
                        self._outbound_bytes = sum(
                            len(data) for _, data in self._outbound
                        )
                raise

    async def _publish_all(
        self, client: "NatsClient", waiting: Sequence[tuple[str, bytes]]
    ) -> None:
        by_subject: dict[str, list[bytes]] = {}
        for subject, data in waiting:
            by_subject.setdefault(subject, []).append(data)
        for subject, frames in by_subject.items():
            for message in self._pack(frames, self.max_payload):
                size = len(message)
                has_room = client.pending_data_size + size < _CLIENT_BYTES_MAX
                if has_room and size <= client.max_payload and client.is_connected:
                    client.say(subject, message)
                    continue
                try:
                    await client.publish(subject, message)
                except Exception as error:  # too large, or the connection is over
                    text = str(error).removeprefix("nats: ")
                    self._tell("OutboundLost", text or type(error).__name__, 1)
        client.write()

    # --- the end ---

    async def _end(self, timeout_s: float) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        client, self._client = self._client, None
        for task in tuple(self._tasks):
            task.cancel()
        if client is not None:
            await _end_client(client, timeout_s=timeout_s / 2)
        self._is_over.set()
        if self._owns_thread:
            self._thread.stop()


def _client_type(url: NatsUrl) -> "type[NatsClient]":
    """The client, where nats-py is there.

    Raises:
        MissingExtra: nats-py is not installed, or what signs for it.
    """
    try:
        from actors.nats_client import NatsClient  # noqa: PLC0415  few have nats-py

        if url.creds is not None or url.nkey is not None:
            import nkeys  # noqa: F401, PLC0415  nats-py imports it when it signs
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "nats") from None

    return NatsClient


def _credentials(url: NatsUrl) -> dict[str, Any]:
    found: dict[str, Any] = {
        "user": url.user,
        "password": url.password,
        "token": url.token,
        "user_credentials": None if url.creds is None else str(url.creds),
        "nkeys_seed": None if url.nkey is None else str(url.nkey),
        "tls": url.tls_context(),
        "tls_hostname": url.tls_hostname,
        "inbox_prefix": url.inbox,
    }
    if url.tls_first:
        found["tls_handshake_first"] = True
    return {name: value for name, value in found.items() if value is not None}


async def _end_client(client: "NatsClient", *, timeout_s: float = 1.0) -> None:
    """Close it, or at least its socket: a peer that reads nothing holds up nobody."""
    client.close_straight()
    with suppress(Exception):
        await asyncio.wait_for(client.close(), timeout_s)
    wire = getattr(client, "_transport", None)
    for name in ("_io_writer", "_bare_io_writer"):
        writer = getattr(wire, name, None)
        if writer is not None:
            writer.transport.abort()


async def _flush(client: "NatsClient", timeout_s: float) -> None:
    """Wait until the server has had all that was sent before."""
    # nats-py writes its ping at once, before what waits for its flusher. When the
    # first is back that has been written; the second surely comes after it.
    for _ in range(2):
        await client.flush(timeout=max(1, round(timeout_s)))


class _Left:
    """What is left of a coroutine that has begun, and waits for `awaited`."""

    def __init__(self, work: Coroutine[Any, Any, Any], awaited: Any) -> None:
        self._work = work
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, Any]:
        work, awaited = self._work, self._awaited
        while True:
            try:
                value = yield awaited
            except BaseException as error:  # the coroutine's own to handle
                step = partial(work.throw, error)
            else:
                step = partial(work.send, value)
            try:
                awaited = step()
            except StopIteration as stop:
                return stop.value


async def _left_of(work: Coroutine[Any, Any, T], awaited: Any) -> T:
    result: T = await _Left(work, awaited)
    return result


async def _quietly(work: Coroutine[Any, Any, Any]) -> None:
    with suppress(Exception):
        await work
