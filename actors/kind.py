"""Kinds: what sort of actor an identity's kind stands for, and how it is hosted."""

import importlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import pykka

from actors.grain import Grain
from placement.identity import Identity
from placement.topology import Member

Strategy: TypeAlias = Callable[[Identity, tuple[Member, ...], Member | None], Member]
"""Chooses a host: of the eligible members, sorted; and the partition's owner."""


#: Thirty years: who means longer means none.
SECONDS_MAX = 1_000_000_000


class BadKind(ValueError):
    """Something that cannot be a kind, and why."""


class Kind:
    """How the actors of a kind are made and hosted.

    `factory` is a Grain or `pykka.ThreadingActor` class, or a function of the
    context that makes one. With an `actor_class` the function runs where its
    actors do; without, on the dispatcher of the node's Grains.

    `idle_after` seconds without a message end an activation; none never does.
    `handler_max` seconds are the longest that a handler takes; it must fit into
    the safety margin. None, for a ThreadingActor, says that beyond the margin
    only the fencing token protects.

    Raises:
        BadKind: an option or the class is not one.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *,
        actor_class: type | None = None,
        idle_after: float | None = 60.0,
        on_error: Literal["continue", "stop"] = "continue",
        strategy: Strategy | None = None,
        handler_max: float | None = None,
        inbox_max: int = 10_000,
    ) -> None:
        if isinstance(factory, type):
            check_class(factory)
            actor_class = factory
        elif not callable(factory):
            raise BadKind(f"a kind is made by a class or a function, not {factory!r}")
        elif actor_class is not None:
            check_class(actor_class)
        self.factory = factory
        self.actor_class = actor_class
        #: None where only what the function makes will tell.
        self.is_threaded = (
            None
            if actor_class is None
            else issubclass(actor_class, pykka.ThreadingActor)
        )
        if on_error not in {"continue", "stop"}:
            raise BadKind(f"on_error is 'continue' or 'stop', not {on_error!r}")
        if inbox_max < 1:
            raise BadKind(f"inbox_max must be at least 1, not {inbox_max}")
        for name, seconds in (("idle_after", idle_after), ("handler_max", handler_max)):
            if seconds is not None and not (0 < seconds <= SECONDS_MAX):
                raise BadKind(
                    f"{name} must be above 0 seconds, and {SECONDS_MAX:,} at most, "
                    f"not {seconds}"
                )
        self.idle_after = idle_after
        #: The same, in nanoseconds: one number for all of the kind.
        self.idle_after_ns = (
            None if idle_after is None else max(1, round(idle_after * 1e9))
        )
        self.on_error = on_error
        self.strategy = strategy
        self.handler_max = handler_max
        self.inbox_max = inbox_max

    @classmethod
    def of(cls, kind: "Kind | type") -> "Kind":
        """`kind` itself, or that of a class with all defaults."""
        return kind if isinstance(kind, Kind) else cls(kind)

    def check(self, margin: float) -> None:
        """Refuse a handler that may take longer than the margin.

        Raises:
            BadKind: it may.
        """
        if self.handler_max is not None and self.handler_max > margin:
            raise BadKind(
                f"handler_max of {self.handler_max} s is above the safety margin of "
                f"{margin} s: a handler could still run when the lease is over"
            )

    def make(self, context: Any) -> Any:
        """A new instance for `context`.

        Raises:
            BadKind: it is not what the kind said that it makes.
        """
        if isinstance(self.factory, type):
            return self.factory()
        made = self.factory(context)
        if self.is_threaded is not True and isinstance(made, Grain):
            return made
        if self.is_threaded is not False and isinstance(made, pykka.ThreadingActor):
            return made
        wanted = {
            None: "a Grain or a pykka.ThreadingActor",
            True: "a pykka.ThreadingActor",
            False: "a Grain",
        }[self.is_threaded]
        raise BadKind(f"the factory made a {type(made).__name__}, not {wanted}")


def check_class(actor_class: type) -> None:
    """Refuse a class that is neither a Grain nor a ThreadingActor.

    Raises:
        BadKind: it is neither.
    """
    if not issubclass(actor_class, Grain | pykka.ThreadingActor):
        raise BadKind(
            f"{actor_class.__module__}.{actor_class.__qualname__} is neither a Grain "
            "nor a pykka.ThreadingActor"
        )


def load_kind(path: str) -> Kind:
    """The kind that `module:Class` names.

    Raises:
        BadKind: there is no such module or class, or it is no kind.
    """
    module_name, colon, class_name = path.partition(":")
    if not colon or not module_name or not class_name:
        raise BadKind(f"{path!r} is not of the form module:Class")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise BadKind(f"module {module_name!r} cannot be imported: {error}") from None
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise BadKind(
            f"module {module_name!r} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    for part in class_name.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise BadKind(f"module {module_name!r} has no class {class_name!r}")
    if isinstance(found, Kind):
        return found
    if not isinstance(found, type):
        raise BadKind(f"{path} is a {type(found).__name__}, not a class")
    return Kind(found)
