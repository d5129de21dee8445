"""References and proxies: how a program speaks to an identity."""

from collections.abc import Coroutine, Generator
from typing import Any, Protocol, TypeVar, cast, overload

from actors.future import Future
from actors.grain import Surface
from messages.payload import request_id_of
from placement.errors import BadMessage
from placement.identity import BadIdentity, Identity

T = TypeVar("T")
A = TypeVar("A")

#: Seconds that a blocking caller grants beyond the deadline, for the answer that
#: says that there is none.
_GRACE_S = 2.0


TIMEOUT_MAX_S = 365 * 86_400.0


def timeout_of(seconds: Any) -> float | None:
    """How long to wait, at most a year; none is whatever is usual.

    Raises:
        ValueError: it is no number of seconds above 0.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ValueError(f"timeout is seconds, not a {type(seconds).__name__}")  # noqa: TRY004
    if not seconds > 0:  # also where it is not a number
        raise ValueError(f"timeout must be above 0 seconds, not {seconds}")
    return float(min(seconds, TIMEOUT_MAX_S))


class Sender(Protocol):
    """Who sends: a node, a cluster, or the context of an activation."""

    @property
    def ask_timeout(self) -> float:
        """Seconds that an ask waits unless it says otherwise."""

    def ask(
        self,
        identity: Identity,
        payload: Any,
        *,
        timeout: float | None,
        request_id: str,
    ) -> Future:
        """Send, and promise the answer."""

    def tell(self, identity: Identity, payload: Any, *, request_id: str) -> None:
        """Send."""

    def may_block(self) -> None:
        """Raise where waiting is not allowed."""


class Ref:
    """One identity, for untyped messages: any plain value in, any out."""

    __slots__ = ("_sender", "identity")

    def __init__(self, sender: Sender, identity: Identity) -> None:
        self._sender = sender
        self.identity = identity

    def __repr__(self) -> str:
        return f"Ref({str(self.identity)!r})"

    def ask(
        self,
        message: Any,
        *,
        block: bool = True,
        timeout: float | None = None,
        request_id: str = "",
    ) -> Any:
        """Ask and wait; with `block=False`, a Future of the answer at once.

        `timeout` is in seconds; none is the node's `ask_timeout`.

        Raises:
            PlacementError: it was refused or failed, by the reason's own class.
            BadMessage: `message` or `request_id` cannot be carried.
            ValueError: `timeout` is none.
        """
        request_id, timeout = request_id_of(request_id), timeout_of(timeout)
        if not block:
            return self._sender.ask(
                self.identity, message, timeout=timeout, request_id=request_id
            )
        self._sender.may_block()
        future = self._sender.ask(
            self.identity, message, timeout=timeout, request_id=request_id
        )
        return wait(self._sender, future, timeout)

    async def ask_async(
        self,
        message: Any,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  it travels with the message
        request_id: str = "",
    ) -> Any:
        """Ask; awaiting it blocks neither an event loop nor a Grain's dispatcher."""
        request_id, timeout = request_id_of(request_id), timeout_of(timeout)
        return await self._sender.ask(
            self.identity, message, timeout=timeout, request_id=request_id
        )

    def tell(self, message: Any, *, request_id: str = "") -> None:
        """Send, at most once, without an answer."""
        if request_id != "":
            request_id = request_id_of(request_id)
        self._sender.tell(self.identity, message, request_id=request_id)


def wait(sender: Sender, future: Future, timeout: float | None) -> Any:
    """Wait for the answer that the sender promises by its deadline."""
    limit = sender.ask_timeout if timeout is None else timeout
    return future.get(timeout=limit + _GRACE_S)


class Call:
    """A call of a handler, not yet sent: ask it, tell it, or await it."""

    __slots__ = ("identity", "name", "payload", "sender", "surface")

    def __init__(
        self,
        sender: Sender,
        identity: Identity,
        surface: Surface,
        name: str,
        payload: Any,
    ) -> None:
        self.sender = sender
        self.identity = identity
        self.surface = surface
        self.name = name
        self.payload = payload

    def __repr__(self) -> str:
        return f"<call of {self.name} of {self.identity}, not sent>"

    def __await__(self) -> Generator[Any, Any, Any]:
        future = self.sender.ask(
            self.identity, self.payload, timeout=None, request_id=""
        )
        answer = yield from future.__await__()
        return self.decode(answer)

    def decode(self, answer: Any) -> Any:
        """The answer as the handler's annotation says."""
        return self.surface.decode_answer(self.name, answer)


class _Method:
    __slots__ = ("_name", "_proxy")

    def __init__(self, proxy: "Proxy", name: str) -> None:
        self._proxy = proxy
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        proxy = self._proxy
        payload = proxy._surface.encode_call(self._name, args, kwargs)  # noqa: SLF001
        return Call(
            proxy._sender,  # noqa: SLF001
            proxy._identity,  # noqa: SLF001
            proxy._surface,  # noqa: SLF001
            self._name,
            payload,
        )


class Proxy:
    """Stands for an activation: its handlers, and nothing else of its class."""

    __slots__ = ("_identity", "_sender", "_surface")

    def __init__(self, sender: Sender, identity: Identity, surface: Surface) -> None:
        self._sender = sender
        self._identity = identity
        self._surface = surface

    def __repr__(self) -> str:
        return f"Proxy({str(self._identity)!r})"

    def __getattr__(self, name: str) -> _Method:
        if name in self._surface.handlers:
            return _Method(self, name)
        known = ", ".join(sorted(self._surface.handlers)) or "none"
        raise AttributeError(
            f"{self._surface.name} has no handler {name!r}; it has: {known}"
        )


class Verbs:
    """What a cluster, a node and a context offer alike: refs, proxies, calls."""

    __slots__ = ()

    _sender: Sender

    def ref(self, identity: str) -> Ref:
        """The reference to `kind/name`.

        Raises:
            BadIdentity: it is not one.
        """
        return Ref(self._sender, Identity.parse(identity))

    def proxy(self, actor_class: type[A], name: str) -> A:
        """A typed stand-in for the actor `name` of that class.

        `name` is without its kind; with it (`kind/name`) where the class is
        known under several kinds.

        Raises:
            BadIdentity: the name is none, or the kind is not to be told.
        """
        kind, slash, _ = name.partition("/")
        if slash and self._class_of(kind) is actor_class:
            identity = Identity.parse(name)
        else:
            identity = Identity(self._kind_of(actor_class), name)
        return cast("A", Proxy(self._sender, identity, Surface.of(actor_class)))

    @overload
    def ask(
        self,
        call: Coroutine[Any, Any, T],
        *,
        timeout: float | None = None,
        request_id: str = "",
    ) -> T: ...

    @overload
    def ask(
        self, call: T, *, timeout: float | None = None, request_id: str = ""
    ) -> T: ...

    def ask(
        self, call: Any, *, timeout: float | None = None, request_id: str = ""
    ) -> Any:
        """Send the call of a proxy's handler, and wait for its answer.

        Raises:
            PlacementError: it was refused or failed, by the reason's own class.
        """
        call, request_id = _call(call), request_id_of(request_id)
        timeout = timeout_of(timeout)
        self._sender.may_block()
        future = self._sender.ask(
            call.identity, call.payload, timeout=timeout, request_id=request_id
        )
        return call.decode(wait(self._sender, future, timeout))

    def tell(self, call: Any, *, request_id: str = "") -> None:
        """Send the call of a proxy's handler, at most once, without an answer."""
        call, request_id = _call(call), request_id_of(request_id)
        self._sender.tell(call.identity, call.payload, request_id=request_id)

    def _kind_of(self, actor_class: type) -> str:
        raise NotImplementedError

    def _class_of(self, kind: str) -> type | None:
        raise NotImplementedError


def _call(value: Any) -> Call:
    if not isinstance(value, Call):
        raise BadMessage(
            f"a call of a proxy is asked and told, not a {type(value).__name__}; "
            "other messages go by ref(...).ask and tell"
        )
    return value


def kind_among(kinds: dict[str, type | None], actor_class: type) -> str:
    """The one kind under which `actor_class` is known.

    Raises:
        BadIdentity: none or several.
    """
    found = sorted(kind for kind, each in kinds.items() if each is actor_class)
    if len(found) == 1:
        return found[0]
    name = actor_class.__name__
    if not found:
        raise BadIdentity(f"{name} is no kind here; known are {sorted(kinds)}")
    raise BadIdentity(f"{name} is of several kinds, write one of {found} before /")
