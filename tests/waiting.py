"""Waiting for what others do."""

import threading
import time
from collections.abc import Callable

_LOOK_AGAIN_S = 0.005


def eventually(
    fact: Callable[[], object],
    within_s: float = 30.0,
    *,
    or_say: Callable[[], object] = lambda: "it never came true",
) -> None:
    """Wait until `fact` holds, and not a moment longer; fail where it never does.

    For facts that other threads and processes bring about and cannot tell: a file, a
    server that answers, a count. It looks again and again, and takes nothing for true
    because some time has passed.
    """
    until_s = time.monotonic() + within_s
    pause = threading.Event()
    while not fact():
        assert time.monotonic() < until_s, or_say()
        pause.wait(_LOOK_AGAIN_S)
