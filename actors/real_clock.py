"""Names user code that reads the real clock or real chance inside a simulation.

While user code of a simulated Grain runs, and only then, some functions of `time`,
`random` and `uuid` refuse calls from it. The standard library and what is installed
beside it go on as ever (a log has its time), and so do other threads. What cannot be
noticed: a function imported by its name (`from time import time`), `datetime.now`, and
code that is installed as a package.
"""

import random
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable
from types import ModuleType
from typing import Any, Self

_NOW = "the time is self.context.now()"
_AFTER = "what is to happen later goes by self.context.after(seconds, call)"
_CHANCE = "chance is self.context.random, uuid.UUID(int=....getrandbits(128)) too"

_REMEDIES: dict[ModuleType, dict[str, str]] = {
    time: {
        "time": _NOW,
        "time_ns": _NOW,
        "monotonic": _NOW,
        "monotonic_ns": _NOW,
        "sleep": _AFTER,
    },
    random: dict.fromkeys(
        (
            "choice",
            "choices",
            "getrandbits",
            "randint",
            "random",
            "randrange",
            "sample",
            "shuffle",
            "uniform",
        ),
        _CHANCE,
    ),
    uuid: {"uuid1": _CHANCE, "uuid4": _CHANCE},
}
#: What was there first: where somebody has put another in its place, that stays.
_REAL = {
    (module, name): getattr(module, name)
    for module, names in _REMEDIES.items()
    for name in names
}
_OWN = ("actors", "messages", "placement")
_INSTALLED = tuple(
    {sysconfig.get_path(each) for each in ("stdlib", "purelib", "platlib")}
)


class RealClock(RuntimeError):
    """User code has read the real clock or real chance in a simulation."""


class RealClockWatch:
    """Refuses such calls in a `with` block, while `is_inside` is set.

    Only those of the thread that is in the block.
    """

    def __init__(self) -> None:
        #: What was refused first, also where the user's own code has caught it.
        self.refused: RealClock | None = None
        #: Whether user code has been entered and not been left.
        self.is_inside = False
        self._in_place = {
            (module, name): self._refusing(module, name, real)
            for (module, name), real in _REAL.items()
        }
        self._thread = 0

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        for (module, name), refusing in self._in_place.items():
            if getattr(module, name) is _REAL[module, name]:
                setattr(module, name, refusing)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Put back what was there, but where somebody else has put something."""
        self.is_inside = False
        for (module, name), refusing in self._in_place.items():
            if getattr(module, name) is refusing:
                setattr(module, name, _REAL[module, name])

    def _refusing(
        self, module: ModuleType, name: str, real: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self.is_inside or self._thread != threading.get_ident():
                return real(*arguments, **options)
            frame = sys._getframe(1)  # noqa: SLF001  who calls
            if _is_users(frame):
                error = RealClock(
                    f"{module.__name__}.{name}() was called by {frame.f_code.co_name} "
                    f"({frame.f_code.co_filename}:{frame.f_lineno}): in a simulation "
                    f"{_REMEDIES[module][name]}"
                )
                self.refused = self.refused or error
                raise error
            return real(*arguments, **options)

        return call


def _is_users(frame: Any) -> bool:
    module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    file = frame.f_code.co_filename
    return module not in _OWN and not file.startswith(("<frozen", *_INSTALLED))
