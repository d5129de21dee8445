"""Values: what is passed on and never changed, made as cheaply as Python can."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform, overload

T = TypeVar("T")


@overload
def value(made: type[T], /) -> type[T]: ...


@overload
def value(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(
    made: type[T] | None = None, /, *, kw_only: bool = False
) -> type[T] | Callable[[type[T]], type[T]]:
    """A slotted dataclass that the type checker keeps frozen, and nothing else.

    A frozen one checks each assignment, its own first ones too: it takes three
    times as long to make, and a claim makes some twenty of them.
    """
    decorate = dataclass(slots=True, unsafe_hash=True, kw_only=kw_only)
    return decorate if made is None else decorate(made)
