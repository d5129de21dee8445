"""One JetStream key-value bucket over one client: conditional writes, leader's reads.

Each request is one message to the server and one answer; hundreds may be on their
way at once, told apart by a number at the end of their inbox. Nothing is sent
twice from here: whoever asked decides again over what it then reads.

A key is written only on condition of its last revision (0: it is not there), so
that a write which arrives late, after another, changes nothing. Reads ask the
stream's leader (`STREAM.MSG.GET`), never a replica, and may still be stale while
the leader changes. No key is ever marked as deleted; `purge` is for keys whose
names never come back.
"""

import asyncio
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from actors.store_memory import BadStore

if TYPE_CHECKING:
    from actors.nats_client import NatsClient

#: Written into the bucket that is created; another form is refused.
FORM = "1"
_FORM_KEY = "placement_store_form"

_EXPECTED = "NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: %d\r\n\r\n"
_NOBODY = b"NATS/1.0 503"
_WRONG_REVISION = (10071, 10164)
_NO_MESSAGE = 10037
_NO_STREAM = 10059
STREAM_EXISTS = 10058
OFF = (10035, 10039, 10076)  # no JetStream: for the account, or at all
NO_PEERS = 10005  # fewer servers than replicas, of those that are seen just now
NO_REPLICAS = 10074  # more than one: this server is in no cluster
_UNAVAILABLE, _TOO_MANY = 503, 429
#: What the client may hold until it is written; what comes then waits for that.
_HELD_BYTES_MAX = 1 << 20
REPLICAS_IN_A_CLUSTER = 3

_REFUSED = re.compile(
    r'permissions violation for (publish|subscription) to "([^"]+)"', re.IGNORECASE
)


class BucketError(Exception):
    """The request was not confirmed."""


class WrongRevision(BucketError):
    """Nothing was written: the key has another revision."""


class NoAnswer(BucketError):
    """Nobody answered in time: it may have happened."""


class NotNow(BucketError):
    """Nothing happened, and the same may succeed soon: nobody was there to do it."""


class NotDone(BucketError):
    """Nothing happened: the server says why."""


class NotPermitted(NotDone):
    """Nothing happened: we are not permitted to ask for it."""


class JetStreamOff(NotDone):
    """Nothing happened: the server or the account has no JetStream."""


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Error | None = None


class _Message(msgspec.Struct):
    seq: int
    data: bytes = b""
    hdrs: bytes = b""


class _Got(msgspec.Struct):
    message: _Message | None = None
    error: _Error | None = None


class _Done(msgspec.Struct):
    error: _Error | None = None
    config: dict[str, Any] = {}
    state: dict[str, Any] = {}


_read_ack = msgspec.json.Decoder(_Ack)
_read_got = msgspec.json.Decoder(_Got)
_read_done = msgspec.json.Decoder(_Done)
_Answer = TypeVar("_Answer", _Ack, _Got, _Done)


class Bucket:
    """The bucket `name`, through one client; used on that client's own thread.

    `where` names the server in errors.
    """

    def __init__(self, client: "NatsClient", name: str, *, where: str) -> None:
        self.client = client
        self.read_count = 0
        self._name, self._stream = name, f"KV_{name}"
        self._prefix = f"$KV.{name}."
        self._where = where
        self._inbox = client.new_inbox()
        self._number = 0
        self._deaf = ""
        self._waiting: dict[str, tuple[asyncio.Future[bytes], str]] = {}
        # Until when each is waited for, and one timer for the first of them.
        self._until: dict[asyncio.Future[bytes], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes."""
        return self.client.max_payload

    async def listen(self) -> None:
        """Receive answers from now on."""
        from actors.nats_client import at_once  # noqa: PLC0415  few have nats-py

        await self.client.subscribe(f"{self._inbox}.*", cb=at_once(self._answered))

    # --- records ---

    async def write(self, key: str, data: bytes, *, expected: int, until: float) -> int:
        """Write `data` if the key's revision is `expected`; its new revision.

        Raises:
            BucketError: it was not written, or that is not known.
        """
        headers = (_EXPECTED % expected).encode()
        subject = f"{self._prefix}{key}"
        answer = await self._ask(subject, data, headers=headers, until=until)
        ack = self._read(_read_ack, answer)
        if ack.error is None:
            return ack.seq
        error = ack.error
        if error.err_code in _WRONG_REVISION:
            raise WrongRevision(f"{self._where}: {key}: {error.description}")
        is_full = error.description.startswith("maximum ")
        if error.code == _UNAVAILABLE and not is_full:
            # A leader that steps down may have handed it on already.
            raise NoAnswer(f"{self._where}: {error.description}")
        if is_full:
            raise NotDone(f"{self._where}: the bucket is full: {error.description}")
        raise self._refusal(error)

    async def read(self, key: str, *, until: float) -> tuple[int, bytes] | None:
        """The revision and data of `key` as its leader has it; none: it has none.

        Raises:
            BucketError: there is no answer, or it cannot be read.
        """
        self.read_count += 1
        wanted = {"last_by_subj": self._prefix + key}
        got = self._read(_read_got, await self._api("MSG.GET", wanted, until))
        if got.message is not None:
            return got.message.seq, got.message.data
        if got.error is None or got.error.err_code == _NO_MESSAGE:
            return None
        raise self._refusal(got.error)

    async def keys(self, key: str, *, until: float) -> list[str]:
        """The keys that `key`, which ends with a wildcard, stands for.

        Raises:
            BucketError: there is no answer.
        """
        wanted = {"subjects_filter": self._prefix + key}
        done = self._read(_read_done, await self._api("INFO", wanted, until))
        if done.error is not None:
            raise self._refusal(done.error)
        subjects = done.state.get("subjects") or {}
        return [subject.removeprefix(self._prefix) for subject in subjects]

    async def purge(self, key: str, *, until: float) -> None:
        """Remove `key`, which may end with a wildcard, without a trace.

        Raises:
            BucketError: that is not confirmed.
        """
        wanted = {"filter": self._prefix + key}
        done = self._read(_read_done, await self._api("PURGE", wanted, until))
        if done.error is not None:
            raise self._refusal(done.error)

    # --- the bucket itself ---

    async def look(self, *, replicas: int | None, until: float) -> bool:
        """Check the settings of the bucket; false where there is none.

        Raises:
            BadStore: it is none of ours, or has settings that lose what we write.
            BucketError: there is no answer, or no permission.
        """
        done = self._read(_read_done, await self._api("INFO", {}, until))
        if done.error is None:
            self._check(done.config, replicas)
            return True
        if done.error.err_code == _NO_STREAM:
            return False
        raise self._refusal(done.error)

    async def create(self, *, replicas: int | None, until: float) -> None:
        """Create the bucket, or check the one that is there.

        Raises:
            BadStore: as `look`, or it cannot be created here.
            BucketError: there is no answer, or no permission.
        """
        if await self.look(replicas=replicas, until=until):
            return
        config = self._wanted(replicas or self._replicas_by_default())
        done = self._read(_read_done, await self._api("CREATE", config, until))
        if done.error is None:
            return
        if done.error.err_code == STREAM_EXISTS:
            # Another was faster, with other replicas.
            await self.look(replicas=replicas, until=until)
            return
        raise self._refusal(done.error)

    def _replicas_by_default(self) -> int:
        # A server says the name of its cluster, where it is in one.
        in_a_cluster = bool(self.client._server_info.get("cluster"))  # noqa: SLF001
        return REPLICAS_IN_A_CLUSTER if in_a_cluster else 1

    def _wanted(self, replicas: int) -> dict[str, Any]:
        return {
            "name": self._stream,
            "description": "actor-placement: owners, snapshots, sessions, members",
            "subjects": [f"{self._prefix}>"],
            "num_replicas": replicas,
            "metadata": {_FORM_KEY: FORM},
            **_RELIED_ON,
            # Not relied on: no read of ours is a direct one, whatever it says.
            "allow_direct": False,
        }

    def _check(self, config: Mapping[str, Any], replicas: int | None) -> None:
        bucket = f"{self._where}: the bucket {self._name}"
        form = (config.get("metadata") or {}).get(_FORM_KEY)
        if form is None:
            raise BadStore(f"{bucket} is of another program")
        if form != FORM:
            raise BadStore(f"{bucket} has form {form}; this program knows form {FORM}")
        wanted = {"subjects": [f"{self._prefix}>"], **_RELIED_ON}
        if replicas is not None:
            wanted["num_replicas"] = replicas
        differences = [
            f"{name} is {json.dumps(found)}, not {json.dumps(value)}"
            for name, value in wanted.items()
            if (found := config.get(name) or _falsy(value)) != value
        ]
        differences += [f"{name} is set" for name in _UNSET if config.get(name)]
        if differences:
            raise BadStore(f"{bucket} has other settings: {'; '.join(differences)}")

    # --- requests ---

    async def _api(self, verb: str, wanted: dict[str, Any], until: float) -> bytes:
        subject = f"$JS.API.STREAM.{verb}.{self._stream}"
        return await self._ask(subject, json.dumps(wanted).encode(), until=until)

    def _read(self, decoder: "msgspec.json.Decoder[_Answer]", data: bytes) -> _Answer:
        try:
            return decoder.decode(data)
        except msgspec.MsgspecError as error:
            raise NoAnswer(f"{self._where}: not a server's answer: {error}") from error

    async def _ask(
        self,
        subject: str,
        data: bytes,
        *,
        headers: bytes = b"",
        until: float,
    ) -> bytes:
        client, loop = self.client, self._loop
        if self._deaf:
            raise NotPermitted(self._deaf)
        if not client.is_connected:
            raise NotNow(f"{self._where}: there is no connection")
        if len(data) > client.max_payload:
            raise NotDone(
                f"{self._where}: a message of {len(data)} bytes; "
                f"the server takes {client.max_payload}"
            )
        self._number += 1
        reply = f"{self._inbox}.{self._number}"
        future: asyncio.Future[bytes] = loop.create_future()
        self._waiting[reply] = (future, subject)
        self._until[future] = until
        if self._timer is None or until < self._timer.when():
            self._look_at(until)
        try:
            if client.pending_data_size > _HELD_BYTES_MAX:
                await client.flush(timeout=max(1, round(until - loop.time())))
            client.say(subject, data, reply=reply, headers=headers)
            client.write_soon()
            return await future
        except (BucketError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise NoAnswer(f"{self._where}: {error}") from error
        finally:
            del self._waiting[reply], self._until[future]

    def _nobody(self, subject: str) -> BucketError:
        if not self.client._server_info.get("jetstream"):  # noqa: SLF001
            return JetStreamOff(f"{self._where}: JetStream is off")
        return NotNow(f"{self._where}: nobody serves {subject} now")

    def _answered(self, inbox: str, data: bytes, headers: bytes) -> None:
        future, subject = self._waiting.get(inbox, (None, ""))
        if future is None or future.done():
            return
        if not data and headers.startswith(_NOBODY):
            future.set_exception(self._nobody(subject))
        else:
            future.set_result(data)

    def _look_at(self, until: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(until, self._expire)

    def _expire(self) -> None:
        """Wait no longer for what was to be answered by now."""
        self._timer = None
        now, first = self._loop.time(), math.inf
        for future, until in self._until.items():
            if future.done():
                continue
            if until <= now:
                future.set_exception(NoAnswer(f"{self._where}: no answer in time"))
            else:
                first = min(first, until)
        if first < math.inf:
            self._look_at(first)

    def refuse(self, said: str) -> None:
        """Take in what the server says that it does not permit."""
        found = _REFUSED.search(said)
        if found is None:
            return
        # nats-py has made it small letters.
        refused = found[2].lower()
        if found[1].lower() == "subscription":
            if refused == f"{self._inbox}.*".lower():
                self._deaf = f"{self._where}: it is not permitted to receive answers"
                self._fail(self._deaf, self._waiting.values())
            return
        of_it = [each for each in self._waiting.values() if each[1].lower() == refused]
        for _, subject in of_it[:1]:
            why = f"{self._where}: it is not permitted to publish to {subject}"
            self._fail(why, of_it)

    def _fail(
        self, why: str, waiting: "Iterable[tuple[asyncio.Future[bytes], str]]"
    ) -> None:
        for future, _ in tuple(waiting):
            if not future.done():
                future.set_exception(NotPermitted(why))

    def _refusal(self, error: _Error) -> BucketError:
        text = f"{self._where}: {error.description}"
        if error.err_code in OFF:
            return JetStreamOff(f"{self._where}: JetStream is off: {error.description}")
        if error.code in (_UNAVAILABLE, _TOO_MANY) or error.err_code == NO_PEERS:
            return NotNow(text)
        return NotDone(text)


_RELIED_ON: dict[str, Any] = {
    "storage": "file",
    "retention": "limits",
    "max_msgs_per_subject": 1,
    # What is full refuses, and drops nothing of what it has confirmed.
    "discard": "new",
    "max_age": 0,
    "max_msg_size": -1,
    "no_ack": False,
    "sealed": False,
    "deny_purge": False,
}
_UNSET = (
    "mirror",
    "sources",
    "subject_transform",
    "discard_new_per_subject",
    "allow_msg_ttl",
    "allow_msg_counter",
    "allow_msg_schedules",
    "subject_delete_marker_ttl",
    "persist_mode",
)


def _falsy(value: Any) -> Any:
    """What the server leaves out of its answer."""
    return False if isinstance(value, bool) else 0 if isinstance(value, int) else None
