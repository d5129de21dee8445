"""Logs: structlog over the standard library's `placement` logger.

As a library the logger has no handler but one that drops all, so that nothing is
printed unless the program around it configures `logging`.
"""

import logging
from datetime import UTC, datetime
from typing import Any

import structlog

_STANDARD = logging.getLogger("placement")
_STANDARD.addHandler(logging.NullHandler())

_TEXT = structlog.processors.KeyValueRenderer(key_order=["event"])
_JSON = structlog.processors.JSONRenderer(default=str)
_is_json = False


def _render(logger: Any, name: str, event: Any) -> Any:
    if not _is_json:
        return _TEXT(logger, name, event)
    event["level"] = name
    event["at"] = datetime.now(UTC).isoformat()
    return _JSON(logger, name, event)


log: Any = structlog.wrap_logger(
    _STANDARD,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.processors.format_exc_info,
        _render,
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
)


def to_stderr(level: int, *, as_json: bool = False) -> None:
    """Print what is logged from `level` on, to standard error."""
    global _is_json  # noqa: PLW0603  one program, one standard error
    _is_json = as_json
    form = "%(message)s" if as_json else "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=level, format=form, force=True)
