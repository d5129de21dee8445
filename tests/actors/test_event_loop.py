"""The measure of an event loop's gaps finds what stops a loop, whoever does."""

import asyncio
import time

import pykka
import pytest

from tests.actors import event_loop
from tests.actors.event_loop import run_and_watch


def keep_the_interpreter(at_least_s: float) -> None:
    """Compute without giving the interpreter's lock to another thread."""
    until = time.process_time() + at_least_s
    number = 1_000_000
    while time.process_time() < until:
        sum(range(number))
        number *= 2


def test_a_callback_that_blocks_is_a_gap() -> None:
    async def main() -> str:
        await asyncio.sleep(0.01)
        # pykka's own wait for an answer, which is what must never be on a loop.
        with pytest.raises(pykka.Timeout):
            pykka.ThreadingFuture[None]().get(timeout=0.05)
        return "done"

    result, gap_s = run_and_watch(main())
    assert result == "done"
    assert gap_s >= 0.045


def test_another_thread_that_keeps_the_interpreter_is_a_gap() -> None:
    async def main() -> None:
        await asyncio.to_thread(keep_the_interpreter, 0.1)

    _, gap_s = run_and_watch(main())
    assert gap_s >= 0.02


def test_the_interpreter_kept_while_the_measure_reads_is_a_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = event_loop._without_processor_s
    count = 0

    def taken_from() -> dict[str, float]:
        nonlocal count
        count += 1
        if count == 3:
            keep_the_interpreter(0.05)
        return read()

    monkeypatch.setattr(event_loop, "_without_processor_s", taken_from)
    _, gap_s = run_and_watch(asyncio.sleep(0.05))
    assert count > 3
    assert gap_s >= 0.04


def test_waiting_is_no_gap() -> None:
    _, gap_s = run_and_watch(asyncio.sleep(0.2))
    assert gap_s <= 0.02
