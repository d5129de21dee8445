"""What user code of an activation has of its surroundings."""

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from actors.future import BlockingInGrain, Future
from actors.reference import Sender, Verbs
from placement.entry import Pid
from placement.identity import Identity

if TYPE_CHECKING:
    from actors.dispatch import Timer as Scheduled

#: Ten years: what is meant to be later is meant to be never.
AFTER_MAX_S = 10 * 366 * 24 * 3_600


class Timer:
    """A call that `Context.after` has put off; `cancel` takes it back."""

    __slots__ = ("among", "call", "is_cancelled", "scheduled")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.is_cancelled = False
        self.scheduled: Scheduled | None = None
        self.among: dict[Timer, None] = {}

    def cancel(self) -> None:
        """Do not call any more; nothing happens where it was called already."""
        self.is_cancelled = True
        self.among.pop(self, None)
        if self.scheduled is not None:
            self.scheduled.cancel()


class Surroundings(Protocol):
    """What an activation offers its context."""

    pid: Pid

    @property
    def request_id(self) -> str:
        """That of the message being handled; empty where it has none."""

    @property
    def random(self) -> Random:
        """A source of chance."""

    @property
    def ask_timeout(self) -> float:
        """Seconds that an ask waits unless it says otherwise."""

    def now_s(self) -> float:
        """The wall clock, in seconds."""

    def may_block(self) -> bool:
        """Whether user code may wait for an answer."""

    def save(self, snapshot: bytes) -> None:
        """Store; what is sent afterwards waits for it."""

    def ask(
        self,
        identity: Identity,
        payload: Any,
        *,
        timeout: float | None,
        request_id: str,
    ) -> Future:
        """Ask another identity."""

    def tell(self, identity: Identity, payload: Any, *, request_id: str) -> None:
        """Tell another identity."""

    def after(self, seconds: float, timer: Timer) -> None:
        """Run `timer` later, as a turn of its own."""

    def passivate_soon(self) -> None:
        """End after this turn."""

    def kind_of(self, actor_class: type) -> str:
        """The kind under which the node knows the class."""

    def class_of(self, kind: str) -> type | None:
        """The class of that kind, where the node knows it."""


class _ContextSender:
    """Sends as the activation does: behind its guard and its output gate."""

    __slots__ = ("_around",)

    def __init__(self, around: Surroundings) -> None:
        self._around = around

    @property
    def ask_timeout(self) -> float:
        return self._around.ask_timeout

    def ask(
        self,
        identity: Identity,
        payload: Any,
        *,
        timeout: float | None,
        request_id: str,
    ) -> Future:
        return self._around.ask(
            identity, payload, timeout=timeout, request_id=request_id
        )

    def tell(self, identity: Identity, payload: Any, *, request_id: str) -> None:
        self._around.tell(identity, payload, request_id=request_id)

    def may_block(self) -> None:
        if not self._around.may_block():
            raise BlockingInGrain


class Context(Verbs):
    """Identity, token, state and verbs of one activation: `self.context`.

    `fencing_token` grows with each activation of the identity, so that user code
    can fence its own writes elsewhere. `snapshot` is what was stored when the
    activation started, none if nothing was.
    """

    __slots__ = ("_around", "_snapshot")

    def __init__(self, around: Surroundings, snapshot: bytes | None) -> None:
        self._around = around
        self._snapshot = snapshot

    @property
    def _sender(self) -> Sender:  # type: ignore[override]
        # Made when it is used: most contexts of many never send.
        return _ContextSender(self._around)

    @property
    def identity(self) -> Identity:
        """Who it is."""
        return self._around.pid.identity

    @property
    def pid(self) -> Pid:
        """The reference to this very activation."""
        return self._around.pid

    @property
    def fencing_token(self) -> int:
        """The token of this activation."""
        return self._around.pid.fencing_token

    @property
    def snapshot(self) -> bytes | None:
        """What was stored when it started."""
        return self._snapshot

    @property
    def request_id(self) -> str:
        """The id that the caller gave the message being handled; empty if none."""
        return self._around.request_id

    def now(self) -> float:
        """The time of the wall clock, in seconds since 1970."""
        return self._around.now_s()

    @property
    def random(self) -> Random:
        """A source of chance, deterministic in the simulation."""
        return self._around.random

    def save(self, snapshot: bytes) -> None:
        """Store `snapshot`. Answers and messages from now on wait for it."""
        self._around.save(snapshot)

    def after(self, seconds: float, call: Callable[[], Any]) -> Timer:
        """Call `call` in `seconds`, as a turn of its own; it may be async.

        Raises:
            ValueError: `seconds` is negative, no number, or above ten years.
        """
        if not 0 <= seconds <= AFTER_MAX_S:
            raise ValueError(
                f"after takes seconds from 0 on, at most {AFTER_MAX_S}, not {seconds}"
            )
        timer = Timer(call)
        self._around.after(seconds, timer)
        return timer

    def passivate(self) -> None:
        """End this activation after the turn under way."""
        self._around.passivate_soon()

    def _kind_of(self, actor_class: type) -> str:
        return self._around.kind_of(actor_class)

    def _class_of(self, kind: str) -> type | None:
        return self._around.class_of(kind)
