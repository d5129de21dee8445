"""Values: what is passed on and never changed, made as cheaply as Python can.

`dataclasses` write the methods of a class, and compile each, when it is defined: of
the time in which this package is imported that was more than half. Here a class gets
a method when that is called first.
"""

import reprlib
from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from typing import Any, NoReturn, TypeVar, dataclass_transform, overload

T = TypeVar("T")


@overload
def value(made: type[T], /) -> type[T]: ...


@overload
def value(
    *, kw_only: bool = False, sealed: bool = False
) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(
    made: type[T] | None = None, /, *, kw_only: bool = False, sealed: bool = False
) -> type[T] | Callable[[type[T]], type[T]]:
    """A slotted dataclass that the type checker keeps frozen.

    `sealed` for what programs get to see: each assignment is refused. Its own first
    ones are looked at too then, so that it takes three times as long to make; a claim
    makes some twenty that are not.
    """

    def decorate(each: type[T]) -> type[T]:
        whole = _slotted(each, kw_only=kw_only)
        _add(whole, "__init__", _init_of(sealed=sealed))
        _add(whole, "__eq__", _eq_of)
        _add(whole, "__hash__", _hash_of)
        if sealed:
            for name, method in _SEALED.items():
                setattr(whole, name, method)
        return whole

    return decorate if made is None else decorate(made)


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def record(made: type[T], /) -> type[T]:
    """A slotted dataclass that changes, and is equal to itself alone."""
    whole = _slotted(made, kw_only=False)
    _add(whole, "__init__", _init_of(sealed=False))
    return whole


def _slotted(made: type[T], *, kw_only: bool) -> type[T]:
    plain: Any = dataclass(
        init=False, repr=False, eq=False, slots=True, kw_only=kw_only
    )
    whole: type[T] = plain(made)
    if "__repr__" not in vars(made):
        whole.__repr__ = _repr  # type: ignore[method-assign]
    return whole


# --- methods, written when they are called first ------------------------------


def _add(made: type, name: str, write: Callable[[type], Callable[..., Any]]) -> None:
    """Let `made` have a method, unless it has one of its own."""
    own = vars(made)
    # A class that says what is equal has no hash, unless it says that too.
    if name in own and not (name == "__hash__" and own[name] is None):
        return

    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Two threads may do so at once: either's is as good.
        written = write(made)
        setattr(made, name, written)
        return written(self, *args, **kwargs)

    method.__name__, method.__qualname__ = name, f"{made.__qualname__}.{name}"
    setattr(made, name, method)


def _written(
    made: type, name: str, arguments: str, lines: list[str], known: dict[str, Any]
) -> Callable[..., Any]:
    text = f"def {name}({arguments}):\n" + "".join(f" {line}\n" for line in lines)
    exec(text, known)  # noqa: S102  of names of fields only
    method: Callable[..., Any] = known[name]
    method.__qualname__ = f"{made.__qualname__}.{name}"
    method.__module__ = made.__module__
    return method


def _init_of(*, sealed: bool) -> Callable[[type], Callable[..., Any]]:
    """How a class gets its `__init__`, of which errors name the class."""

    def write(made: type) -> Callable[..., Any]:
        known: dict[str, Any] = {"_set": object.__setattr__, "_none": MISSING}
        by_place, by_name, lines = ["self"], list[str](), list[str]()
        for each in fields(made):
            given = _given(each, known)
            if each.init:
                taken = by_name if each.kw_only else by_place
                taken.append(each.name + _default(each))
            if given is not None:
                sets = f"_set(self, {each.name!r}, {given})"
                lines.append(sets if sealed else f"self.{each.name} = {given}")
        if hasattr(made, "__post_init__"):
            lines.append("self.__post_init__()")
        arguments = ", ".join([*by_place, *(["*", *by_name] if by_name else [])])
        return _written(made, "__init__", arguments, lines or ["pass"], known)

    return write


def _default(each: "Field[Any]") -> str:
    if each.default is not MISSING:
        return f"=_of_{each.name}"
    return "" if each.default_factory is MISSING else "=_none"


def _given(each: "Field[Any]", known: dict[str, Any]) -> str | None:
    """What the field is set to, as Python text; none: it is not."""
    name = each.name
    if each.default_factory is not MISSING:
        known[f"_made_{name}"] = each.default_factory
        made = f"_made_{name}()"
        return f"{made} if {name} is _none else {name}" if each.init else made
    if each.default is not MISSING:
        known[f"_of_{name}"] = each.default
        return name if each.init else f"_of_{name}"
    return name if each.init else None


def _tuple_of(made: type, owner: str, wanted: Callable[["Field[Any]"], Any]) -> str:
    names = [each.name for each in fields(made) if wanted(each)]
    return "(" + "".join(f"{owner}.{name}," for name in names) + ")"


def _eq_of(made: type) -> Callable[..., Any]:
    ours, theirs = (
        _tuple_of(made, owner, lambda each: each.compare) for owner in ("self", "other")
    )
    lines = [
        "if other.__class__ is self.__class__:",
        f" return {ours} == {theirs}",
        "return NotImplemented",
    ]
    return _written(made, "__eq__", "self, other", lines, {})


def _hash_of(made: type) -> Callable[..., Any]:
    def is_hashed(each: "Field[Any]") -> bool:
        return each.compare if each.hash is None else each.hash

    lines = [f"return hash({_tuple_of(made, 'self', is_hashed)})"]
    return _written(made, "__hash__", "self", lines, {})


# --- methods that are the same for all ----------------------------------------


@reprlib.recursive_repr()
def _repr(self: Any) -> str:
    said = ", ".join(
        f"{each.name}={getattr(self, each.name)!r}"
        for each in fields(self)
        if each.repr
    )
    return f"{type(self).__qualname__}({said})"


def _refuse_set(_: Any, name: str, __: Any) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_del(_: Any, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _get_state(self: Any) -> list[Any]:
    return [getattr(self, each.name) for each in fields(self)]


def _set_state(self: Any, state: list[Any]) -> None:
    for each, item in zip(fields(self), state, strict=True):
        object.__setattr__(self, each.name, item)


_SEALED = {
    "__setattr__": _refuse_set,
    "__delattr__": _refuse_del,
    "__getstate__": _get_state,
    "__setstate__": _set_state,
}
