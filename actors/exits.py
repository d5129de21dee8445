"""How commands end: their exit codes, and what is said where the usage is wrong."""

import click

FAILED, WRONG, INTERRUPTED = 1, 2, 130


def wrong(message: str) -> click.exceptions.Exit:
    """Say what is wrong with the usage or the place; the exit that follows."""
    click.echo(f"placement: {message}", err=True)
    return click.exceptions.Exit(WRONG)
