"""Clients, as a node bears them: so much that is not answered yet, and no more."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from messages.frames import (
    Answer,
    Bounce,
    Deliver,
    Failure,
    Find,
    FindRefused,
    Frame,
    Redirect,
    Refused,
    Resolve,
    Resolved,
)
from placement.topology import Address, node_of

#: What one client may have asked without an answer, in requests and in bytes.
REQUESTS_MAX = 10_000
BYTES_MAX = 32 << 20

#: And of these, so many resolutions: each is work for the store. More are asked to
#: come again.
RESOLUTIONS_MAX = 1_000

#: Where nothing binds names there may be any number of them.
NAMES_MAX = 1_000

#: A client that speaks of a newer epoch is believed this often.
BELIEVED_EVERY_NS = 100_000_000

#: What it has given up by itself is looked for this often: that is a walk over all.
FORGET_EVERY_NS = 100_000_000

#: How often a client is told the members, in each second; they are many.
FINDS_MAX = 100
_SECOND_NS = 1_000_000_000

_Key = tuple[Address, bool, int]
#: What ends a wait, and where it says whose: resolutions are numbered as requests.
_NUMBER_OF: dict[type[Frame], str] = {
    **dict.fromkeys((Answer, Failure, Bounce), "message_id"),
    **dict.fromkeys((Resolved, Redirect, Refused), "request"),
}


@dataclass(slots=True)
class _Client:
    """One client: what it waits for, until when, and how large it is."""

    asked: dict[_Key, tuple[int, int]] = field(default_factory=dict)
    resolutions: int = 0
    size: int = 0
    #: Before this nothing of it is over, and nothing is looked for.
    first_until_ns: float = math.inf
    forget_after_ns: float = -math.inf

    def has_room(self, key: _Key, size: int) -> bool:
        """Whether so much may be added."""
        if key[1] and self.resolutions >= RESOLUTIONS_MAX:
            return False
        return len(self.asked) < REQUESTS_MAX and self.size + size <= BYTES_MAX

    def add(self, key: _Key, until_ns: int, size: int) -> None:
        """It waits for one answer more."""
        if key in self.asked:
            self.remove(key)
        self.asked[key] = (until_ns, size)
        if until_ns < self.first_until_ns:  # noqa: PLR1730  min() is called
            self.first_until_ns = until_ns
        self.size += size
        self.resolutions += key[1]

    def remove(self, key: _Key) -> None:
        """It has that answer, if it was waiting for it."""
        found = self.asked.pop(key, None)
        if found is not None:
            self.size -= found[1]
            self.resolutions -= key[1]

    def forget(self, now_ns: int) -> None:
        """It has given up by itself what should have been answered by now."""
        if now_ns < self.first_until_ns or now_ns < self.forget_after_ns:
            return
        for key in [
            key for key, (until_ns, _) in self.asked.items() if until_ns <= now_ns
        ]:
            self.remove(key)
        self.first_until_ns = min(
            (until_ns for until_ns, _ in self.asked.values()), default=math.inf
        )
        self.forget_after_ns = now_ns + FORGET_EVERY_NS


class Clients:
    """What clients wait for, by name: a name is what permissions can bind.

    For any thread. What is never answered is forgotten when its own time is over.
    """

    def __init__(self, epoch: Callable[[], int]) -> None:
        self._epoch = epoch
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}
        self._believed_ns = 0
        self._finds: dict[str, int] = {}
        self._finds_since_ns = 0

    def refuse(
        self, sender: Address, body: Frame, *, size: int, now_ns: int
    ) -> Frame | None:
        """What to answer where that is too much; none: it is taken in."""
        if isinstance(body, Resolve):
            key = (sender, True, body.request)
        elif isinstance(body, Deliver) and body.message_id:
            key = (sender, False, body.message_id)
        elif isinstance(body, Find):
            return self._refuse_find(sender, body, now_ns)
        else:
            return None
        name = node_of(sender)
        with self._lock:
            client = self._clients.get(name)
            if client is None:
                client = self._clients[name] = _Client()
                if len(self._clients) > NAMES_MAX:
                    del self._clients[next(iter(self._clients))]
            has_room = client.has_room(key, size)
            if not has_room:
                client.forget(now_ns)
                has_room = client.has_room(key, size)
            if has_room:
                client.add(key, now_ns + body.remaining_ms * 1_000_000, size)
                return None
            waiting = len(client.asked)
        why = f"{name} waits for {waiting} answers already"
        if isinstance(body, Resolve):
            return Refused(body.request, body.identity, "Pending", why)
        return Failure(body.message_id, "Overloaded", why, "", {})

    def _refuse_find(
        self, sender: Address, body: Find, now_ns: int
    ) -> FindRefused | None:
        name = node_of(sender)
        with self._lock:
            if now_ns - self._finds_since_ns >= _SECOND_NS:
                self._finds.clear()
                self._finds_since_ns = now_ns
            count = self._finds.get(name, 0)
            if count < FINDS_MAX and (count or len(self._finds) < NAMES_MAX):
                self._finds[name] = count + 1
                return None
        why = f"{name} asks for the members too often"
        return FindRefused(body.request, "Overloaded", why)

    def answered(self, to: Address, body: Frame) -> None:
        """Something is sent to `to`: perhaps what it waits for."""
        if not self._clients:
            return
        number = _NUMBER_OF.get(type(body))
        if number is None:
            return
        key = (to, number == "request", getattr(body, number))
        name = node_of(to)
        with self._lock:
            client = self._clients.get(name)
            if client is None:
                return
            client.remove(key)
            if not client.asked:
                del self._clients[name]

    def tame(self, body: Frame, now_ns: int) -> Frame:
        """As it is, or without an epoch that we do not know.

        Whoever speaks of a newer one has the members read: no client may have that
        done as often as it likes.
        """
        if not isinstance(body, Resolve) or body.epoch <= self._epoch():
            return body
        if now_ns - self._believed_ns >= BELIEVED_EVERY_NS:
            self._believed_ns = now_ns
            return body
        return replace(body, epoch=self._epoch())
