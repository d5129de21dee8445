"""Logs: structlog over the standard library's `placement` logger.

As a library the logger has no handler but one that drops all, so that nothing is
printed unless the program around it configures `logging`.
"""

import logging
from datetime import UTC, datetime
from typing import Any

_STANDARD = logging.getLogger("placement")
_STANDARD.addHandler(logging.NullHandler())


_LEVELS = ("debug", "info", "warning", "error", "exception")


class _Log:
    """structlog's logger, made for the first line: importing it takes a while."""

    is_json = False

    def __getattr__(self, name: str) -> Any:
        if name not in _LEVELS:
            raise AttributeError(name)
        import structlog  # noqa: PLC0415  see above

        as_text = structlog.processors.KeyValueRenderer(key_order=["event"])
        as_json = structlog.processors.JSONRenderer(default=str)

        def render(logger: Any, level: str, event: Any) -> Any:
            if not self.is_json:
                return as_text(logger, level, event)
            event["level"] = level
            event["at"] = datetime.now(UTC).isoformat()
            return as_json(logger, level, event)

        made = structlog.wrap_logger(
            _STANDARD,
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.processors.format_exc_info,
                render,
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
        )
        for each in _LEVELS:
            setattr(self, each, getattr(made, each))
        return self.__dict__[name]


log: Any = _Log()


def to_stderr(level: int, *, as_json: bool = False) -> None:
    """Print what is logged from `level` on, to standard error."""
    log.is_json = as_json
    form = "%(message)s" if as_json else "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=level, format=form, force=True)
