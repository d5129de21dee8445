"""Logs: structlog over the standard library's `placement` logger.

As a library the logger has no handler but one that drops all, so that nothing is
printed unless the program around it configures `logging`.
"""

import logging
from typing import Any

import structlog

_STANDARD = logging.getLogger("placement")
_STANDARD.addHandler(logging.NullHandler())

log: Any = structlog.wrap_logger(
    _STANDARD,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=["event"]),
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
)


def to_stderr(level: int) -> None:
    """Print what is logged from `level` on, to standard error."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
