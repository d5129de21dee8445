"""Grains: light actors with typed handlers and state.

A call is a message: the handler's name and a map of its arguments, so that
parameters can be added with defaults. Values are converted by the annotations,
and refused before user code runs where they do not fit.
"""

import inspect
import typing
from collections.abc import Callable
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import msgspec
from typing_extensions import TypeVar

from actors.log import log
from actors.state import SCHEMA_MAX, decode_state, encode_state
from messages import payload as payloads
from placement.errors import BadMessage, Rejected, describe

if TYPE_CHECKING:
    from actors.context import Context

State = TypeVar("State", default=None)
F = typing.TypeVar("F", bound=Callable[..., Any])

#: The keys of a call. No one names a field of a message by nothing.
CALL, ARGUMENTS = "", "args"
_CALL_SIZE = 2


def handler(function: F) -> F:
    """Let the method be called from outside.

    Raises:
        TypeError: its name begins with `_`, or it takes `*args` or `**kwargs`.
    """
    name = function.__name__
    if name.startswith("_"):
        raise TypeError(f"handler {name}: a name that begins with _ is not public")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in {
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        }:
            raise TypeError(
                f"handler {name}: parameter {parameter} has no name of its own"
            )
    function.__placement_handler__ = True  # type: ignore[attr-defined]
    return function


class Grain(Generic[State]):
    """An actor that its node's dispatcher runs: it must not block.

    Hooks and handlers may be coroutines; these await what `self.context` gives,
    and nothing else. `state` is of the type in brackets, begins as `State()`, and
    is stored by `save`. Raise `schema_version` when the type changes, and turn
    older plain values in `upgrade`.
    """

    schema_version: ClassVar[int] = 1
    context: "Context"
    # None where no type is in brackets; what such a class keeps in it is its own.
    state: State = None  # type: ignore[assignment]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Surface.of(cls)

    def on_activate(self) -> Any:
        """Begin; an exception fails the activation."""

    def on_receive(self, message: Any) -> Any:
        """Handle a message that is no call; what it returns is the answer."""
        raise BadMessage(f"{type(self).__name__} takes calls of its handlers only")

    def on_passivate(self) -> Any:
        """End; bytes returned are kept as the snapshot, None keeps the last one."""

    def save(self) -> None:
        """Store `state`; the answer waits until the store has confirmed it."""
        self.context.save(encode_state(self.state, self.schema_version))

    @classmethod
    def upgrade(cls, stored: Any, version: int) -> Any:
        """Turn the plain value of schema `version` into one of this schema."""
        raise ValueError(
            f"{cls.__name__} cannot read the schema {version} of its state, "
            f"a {type(stored).__name__}"
        )


class _Handler:
    """One handler's signature, as what is converted."""

    __slots__ = (
        "answer_type",
        "function",
        "name",
        "parameters",
        "positional",
        "required",
        "signature",
    )

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.signature = inspect.signature(function)
        hints = typing.get_type_hints(function)
        parameters = list(self.signature.parameters.values())[1:]
        self.parameters = {each.name: hints.get(each.name, Any) for each in parameters}
        self.required = frozenset(
            each.name for each in parameters if each.default is inspect.Parameter.empty
        )
        self.answer_type = hints.get("return", Any)
        #: The names by which arguments without any are bound; none: ask the signature.
        self.positional: tuple[str, ...] | None = None
        if all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters):
            self.positional = tuple(self.parameters)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            TypeError: they do not fit the signature.
        """
        names = self.positional
        # The signature takes longer than all the rest of a call.
        if names is not None and not kwargs and len(args) == len(names):
            return dict(zip(names, args, strict=True))
        bound = self.signature.bind(None, *args, **kwargs).arguments
        return dict(list(bound.items())[1:])


class Surface:
    """What of a class can be called from outside, and how values travel."""

    _known: ClassVar[dict[type, "Surface"]] = {}

    def __init__(self, actor_class: type) -> None:
        self.name = actor_class.__name__
        self._class = actor_class
        self._functions = {
            name: function
            for name in dir(actor_class)
            if getattr(
                function := inspect.getattr_static(actor_class, name, None),
                "__placement_handler__",
                False,
            )
        }
        for name in self._functions:
            if issubclass(actor_class, Grain) and hasattr(Grain, name):
                raise TypeError(f"{self.name}.{name} is no name for a handler")
        self.handlers = frozenset(self._functions)
        self._read: dict[str, _Handler] = {}
        self._state_type: Any = _NOT_READ
        if not 1 <= getattr(actor_class, "schema_version", 1) <= SCHEMA_MAX:
            raise TypeError(f"{self.name}.schema_version must be 1 to {SCHEMA_MAX}")

    @classmethod
    def of(cls, actor_class: type) -> "Surface":
        """That of `actor_class`."""
        found = cls._known.get(actor_class)
        if found is None:
            found = cls._known[actor_class] = cls(actor_class)
        return found

    def _handler(self, name: str) -> _Handler:
        # Annotations are read at the first use: they may name what comes later.
        found = self._read.get(name)
        if found is None:
            try:
                found = self._read[name] = _Handler(name, self._functions[name])
            except Exception as error:
                raise BadMessage(
                    f"{self.name}.{name}: its annotations cannot be read: "
                    f"{_said(error)}"
                ) from None
        return found

    # --- calls ---

    def encode_call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The message that calls `name` so.

        Raises:
            BadMessage: the arguments do not fit the signature, or cannot travel.
        """
        found = self._handler(name)
        try:
            bound = found.bind(args, kwargs)
        except TypeError as error:
            raise BadMessage(f"{self.name}.{name}: {error}") from None
        plain = {}
        for parameter, value in bound.items():
            try:
                plain[parameter] = _to_plain(value)
            except Exception as error:
                raise BadMessage(
                    f"{self.name}.{name}: argument {parameter!r}: {_said(error)}"
                ) from None
        return {CALL: name, ARGUMENTS: plain}

    @staticmethod
    def is_call(payload: Any) -> bool:
        """Tell whether a message is a call."""
        return (
            type(payload) is dict
            and len(payload) == _CALL_SIZE
            and CALL in payload
            and ARGUMENTS in payload
        )

    def decode_call(
        self, payload: dict[Any, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any], str]:
        """The function, its keyword arguments, and its name.

        Raises:
            BadMessage: no such handler, or an argument that does not fit.
        """
        name, plain = payload[CALL], payload[ARGUMENTS]
        if not isinstance(name, str) or name not in self.handlers:
            known = ", ".join(sorted(self.handlers)) or "none"
            raise BadMessage(f"{self.name} has no handler {name!r}; it has: {known}")
        if not isinstance(plain, dict):
            raise BadMessage(f"{self.name}.{name}: its arguments are not a map")
        found = self._handler(name)
        given = plain.keys()
        if not (given <= found.parameters.keys() and given >= found.required):
            unknown = sorted(str(key) for key in given - found.parameters.keys())
            missing = sorted(found.required - given)
            raise BadMessage(
                f"{self.name}.{name}: unknown arguments {unknown}, missing {missing}"
            )
        arguments = {}
        for parameter, value in plain.items():
            try:
                arguments[parameter] = _from_plain(value, found.parameters[parameter])
            except BaseException as error:  # the types are user code too
                raise BadMessage(
                    f"{self.name}.{name}: argument {parameter!r}: {_said(error)}"
                ) from None
        return found.function, arguments, name

    def encode_answer(self, name: str, value: Any) -> Any:
        """The plain value of an answer.

        Raises:
            BadMessage: it cannot travel.
        """
        try:
            return _to_plain(value)
        except BaseException as error:  # the types are user code too
            raise BadMessage(f"{self.name}.{name} answered: {_said(error)}") from None

    def decode_answer(self, name: str, plain: Any) -> Any:
        """The answer as annotated.

        Raises:
            BadMessage: it does not fit the annotation.
        """
        try:
            return _from_plain(plain, self._handler(name).answer_type)
        except Exception as error:
            raise BadMessage(f"{self.name}.{name} answered: {_said(error)}") from None

    # --- state ---

    def state_type(self) -> Any:
        """The type in the brackets of `Grain[...]`; NoneType without."""
        if self._state_type is _NOT_READ:
            self._state_type = _state_type_of(self._class)
        return self._state_type

    def load(self, grain: Any, stored: bytes | None) -> None:
        """Give the grain its state: what is stored, or a new one.

        Raises:
            BadState: it cannot be read, and is left as it is.
        """
        state_type = self.state_type()
        grain_class: Any = self._class
        if state_type is NoneType:
            return
        if stored is None:
            grain.state = (typing.get_origin(state_type) or state_type)()
        else:
            grain.state = decode_state(
                stored,
                state_type,
                grain_class.schema_version,
                grain_class.upgrade,
            )


_NOT_READ = object()


def _state_type_of(actor_class: type) -> Any:
    for base in actor_class.__mro__:
        for generic in getattr(base, "__orig_bases__", ()):
            origin = typing.get_origin(generic)
            if isinstance(origin, type) and issubclass(origin, Grain):
                state_type = typing.get_args(generic)[0]
                if not isinstance(state_type, TypeVar | typing.TypeVar):
                    return NoneType if state_type is None else state_type
    return NoneType


def _to_plain(value: Any) -> Any:
    return msgspec.to_builtins(value, builtin_types=(bytes,))


def _from_plain(value: Any, wanted: Any) -> Any:
    if wanted is Any:
        return value
    return msgspec.convert(value, wanted, builtin_types=(bytes,))


def _said(error: BaseException) -> str:
    """What is wrong with a value, by whoever has found it."""
    type_name, text = describe(error)
    if isinstance(error, msgspec.ValidationError | TypeError | ValueError):
        return text
    return f"{type_name}: {text}"


def encode_rejected(error: Rejected) -> tuple[str, str, dict[str, Any]]:
    """The name, text and plain fields under which a declared error travels.

    Raises:
        BadMessage: a field cannot travel.
    """
    _, text = describe(error)
    fields = {}
    for name, value in error.fields.items():
        try:
            fields[name] = _to_plain(value)
        except BaseException as raised:  # the types are user code too
            raise BadMessage(f"field {name!r}: {_said(raised)}") from None
    return payloads.copy(error.type_name), text, payloads.copy(fields)


def decode_rejected(type_name: str, text: str, fields: dict[str, Any]) -> Rejected:
    """The declared error; a plain `Rejected` where this process does not know it."""
    found = Rejected.find(type_name)
    if found is not None:
        try:
            types = found.field_types()
            return found(
                text,
                **{
                    name: _from_plain(value, types[name])
                    for name, value in fields.items()
                },
            )
        except BaseException as error:
            # Declared otherwise here: then as one that is not known.
            log.warning("not the error declared", type=type_name, why=_said(error))
    unknown = Rejected(text, **fields)
    unknown.type_name = type_name
    return unknown
