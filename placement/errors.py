"""Why a request was refused, or ended without an answer.

A refusal always says why. State machines return it as a value (`Refusal`), the
wire carries it as one, and the public entry raises it under the same name.
"""

import inspect
import typing
from typing import Any, ClassVar, dataclass_transform

from placement.value import value

TEXT_MAX = 4096


def text_of(value: object) -> str:
    """What an error says, fit to travel: valid UTF-8 of at most `TEXT_MAX` characters.

    What cannot be encoded is escaped: the name of a file may hold any byte.
    """
    text = str(value)
    if len(text) > TEXT_MAX:
        text = f"{text[: TEXT_MAX - 1]}…"
    clean = text.encode("utf-8", "backslashreplace").decode()
    return clean if len(clean) <= TEXT_MAX else clean[:TEXT_MAX]


def describe(error: BaseException) -> tuple[str, str]:
    """The name of the type and the text of `error`, which user code has raised.

    Its own `__str__` may raise too, and what it says may be of any length.
    """
    try:
        text = str.__str__(str(error))
    except BaseException as raised:  # noqa: BLE001  user code may raise anything
        text = f"its text cannot be had, {type(raised).__name__} was raised"
    return text_of(type(error).__name__), text_of(text)


class PlacementError(Exception):
    """A refused or unfinished request; each subclass is named by its reason.

    `may_have_happened` tells whether the message may have reached user code: it
    is false where it is certain that it did not.
    """

    may_have_happened: ClassVar[bool] = False

    @property
    def message(self) -> str:
        """The reason, as a sentence."""
        return str(self.args[0]) if self.args else type(self).__name__


class NotReady(PlacementError):
    """Placement is undetermined: not started, stopped, or no topology yet."""


class NoAuthority(PlacementError):
    """Nobody may host it: no eligible member, or this node is none."""


class Pending(PlacementError):
    """The identity is being claimed, started or ended: ask again."""


class LockDenied(PlacementError):
    """Another procedure holds the placement lock of the identity."""


class ActivationFailed(PlacementError):
    """The activation did not start; the message says why."""


class StaleToken(PlacementError):
    """A newer fencing token than the presented one has been seen."""


class StoreFailed(PlacementError):
    """The store refused or could not perform what the request needs."""


class SaveFailed(StoreFailed):
    """The handler ran, and the store refused what it saved.

    A save of a later message may yet have stored what this one did.
    """

    may_have_happened: ClassVar[bool] = True


class NotHere(PlacementError):
    """The addressed activation is not, or no longer, where it was sought."""


class Overloaded(PlacementError):
    """The activation's inbox is full; nothing was queued."""


class Deadlock(PlacementError):
    """The chain of calls comes back to an identity that is waiting in it.

    It passes through the handlers of the chain, which had begun, to their callers.
    """

    may_have_happened: ClassVar[bool] = True


class BadMessage(PlacementError, ValueError):
    """A payload or call that cannot be carried or is not understood.

    It names the place in the value, or the method and argument.
    """


class OutcomeUnknown(PlacementError, TimeoutError):
    """No answer in time: the message may or may not have been handled."""

    may_have_happened: ClassVar[bool] = True


class HandlerFailed(PlacementError):
    """User code raised while it handled the message.

    `type_name` and `text` are the exception's; the same whichever node it ran on.
    """

    may_have_happened: ClassVar[bool] = True

    def __init__(self, type_name: str, text: str) -> None:
        # Cleaned here, so that it says the same where it does not travel.
        self.type_name = text_of(type_name)
        self.text = text_of(text)
        super().__init__(f"{self.type_name}: {self.text}")

    @property
    def message(self) -> str:
        """What the exception said."""
        return self.text


_MISSING = object()


@dataclass_transform(kw_only_default=True)
class Rejected(PlacementError):
    """A refusal that user code declares, with fields, and the caller catches.

    Subclasses annotate their fields, as a dataclass does; they are keyword
    arguments of the constructor. It reaches the caller as the same class from
    whichever node, where the caller's process has defined it, and as a plain
    `Rejected` with `type_name` and `fields` where it has not.
    """

    may_have_happened: ClassVar[bool] = True
    _declared: ClassVar[dict[str, type["Rejected"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Rejected._declared[cls.declared_name()] = cls

    def __init__(self, text: str = "", /, **fields: object) -> None:
        cls = type(self)
        if cls is not Rejected:
            known = cls.field_types()
            unknown = sorted(set(fields) - set(known))
            missing = [
                name
                for name in known
                if name not in fields and getattr(cls, name, _MISSING) is _MISSING
            ]
            if unknown or missing:
                raise TypeError(
                    f"{cls.__name__}: unknown fields {unknown}, missing {missing}"
                )
        said = text or ", ".join(f"{name}={value}" for name, value in fields.items())
        super().__init__(said)
        self.fields = fields
        self.type_name = cls.declared_name()
        for name, given in fields.items():
            if cls is not Rejected:
                setattr(self, name, given)

    @classmethod
    def declared_name(cls) -> str:
        """The name under which the class travels."""
        return f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """The declared fields and their types, in order of declaration."""
        found: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Rejected) and base is not Rejected:
                hints = typing.get_type_hints(base)
                own = inspect.get_annotations(base)
                found.update(
                    (name, hints[name])
                    for name in own
                    if typing.get_origin(hints[name]) is not ClassVar
                )
        return found

    @classmethod
    def find(cls, type_name: str) -> type["Rejected"] | None:
        """The class that this process has declared under `type_name`."""
        return cls._declared.get(type_name)


@value(sealed=True)
class Refusal:
    """A refusal as a value: the name of its error, and why."""

    reason: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", text_of(self.message))

    def error(self) -> PlacementError:
        """The exception that the public entry raises for it."""
        if self.reason == "HandlerFailed":
            type_name, _, text = self.message.partition(": ")
            return HandlerFailed(type_name, text)
        return REASONS.get(self.reason, PlacementError)(self.message)

    @classmethod
    def of(cls, error: PlacementError) -> "Refusal":
        """The value of `error`."""
        return cls(type(error).__name__, str(error))


REASONS: dict[str, type[PlacementError]] = {
    error.__name__: error
    for error in (
        PlacementError,
        NotReady,
        NoAuthority,
        Pending,
        LockDenied,
        ActivationFailed,
        StaleToken,
        StoreFailed,
        SaveFailed,
        NotHere,
        Overloaded,
        Deadlock,
        BadMessage,
        OutcomeUnknown,
    )
}
