"""How commands end: their exit codes, and what is said where the usage is wrong."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

FAILED, WRONG, INTERRUPTED = 1, 2, 130


def wrong(message: str) -> click.exceptions.Exit:
    """Say what is wrong with the usage or the place; the exit that follows."""
    click.echo(f"placement: {message}", err=True)
    return click.exceptions.Exit(WRONG)


@contextmanager
def interrupts(take: Callable[[int, object], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call `take`, in place of what they do else."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, take) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
