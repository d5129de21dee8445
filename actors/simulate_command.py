"""`placement simulate`: seeded trials of a whole cluster, and what broke in them."""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from actors.defects import DEFECTS
from actors.exits import FAILED, INTERRUPTED, interrupts, wrong
from actors.faults import BadFaults, parse_faults
from actors.simulate import Sum, Witnessed, shrink, simulate
from actors.simulation import MEMORY, STORES
from actors.trial import Scenario

_SEED_MAX = 2**63 - 1
#: How often a file or a pipe is told how far the trials are.
_TOLD_EVERY_S = 10.0


def _seed_of(text: str) -> int:
    """Read a number, or draw one for `random`, and say which."""
    if text == "random":
        seed = secrets.randbelow(1_000_000_000)
        click.echo(f"placement: seed {seed}", err=True)
        return seed
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed <= _SEED_MAX:
        raise wrong(f"--seed {text!r} is neither random nor a number from 0 on")
    return seed


def _list_defects() -> None:
    table = Table("defect", "what is wrong", "rules that see it")
    for name, defect in DEFECTS.items():
        table.add_row(name, defect.description, ", ".join(defect.rules))
    Console().print(table)


@click.command("simulate")
@click.option("--nodes", default=5, show_default=True, help="Members at the start.")
@click.option("--identities", default=200, show_default=True)
@click.option("--requests", default=5_000, show_default=True, help="Asks of a trial.")
@click.option("--seed", default="1", show_default=True, help="A number, or random.")
@click.option("--seeds", default=1, show_default=True, help="How many, from it on.")
@click.option("--faults", default="all", show_default=True, help="none, or all,a,b.")
@click.option(
    "--defect", default="", help="A broken variant, until found; list: which."
)
@click.option(
    "--store",
    type=click.Choice(STORES),
    default=MEMORY,
    show_default=True,
    help="nats: old readings, keys that change one by one.",
)
@click.option("--jobs", default=2, show_default=True, help="Trials at once.")
@click.option("--trace", metavar="FILE", help="Everything of a trial, as JSON lines.")
@click.option("--shrink", "is_shrunk", is_flag=True, help="Find fewer faults that do.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, no table.")
def simulate_command(
    *,
    nodes: int,
    identities: int,
    requests: int,
    seed: str,
    seeds: int,
    faults: str,
    defect: str,
    store: str,
    jobs: int,
    trace: str | None,
    is_shrunk: bool,
    as_json: bool,
) -> None:
    """Run whole clusters under faults drawn from seeds, and judge what they did.

    The same seed gives the same trial. Exit code 1: a rule was broken; the first
    trial in which one was is told. --trace keeps that trial, else the first.
    Ctrl-C ends with the sum of the trials that were done, and with code 130 where
    none of them broke a rule.
    """
    if defect == "list":
        if as_json:
            click.echo(json.dumps({name: DEFECTS[name].rules for name in DEFECTS}))
        else:
            _list_defects()
        return
    if defect and defect not in DEFECTS:
        raise wrong(f"unknown defect {defect!r}; known are {', '.join(DEFECTS)}")
    if defect and store != MEMORY:
        raise wrong(f"--defect {defect} has the store memory, not {store}")
    for name, number in (
        ("--nodes", nodes),
        ("--requests", requests),
        ("--seeds", seeds),
        ("--jobs", jobs),
    ):
        if number < 1:
            raise wrong(f"{name} must be at least 1, not {number}")
    if identities < 2:  # noqa: PLR2004  one calls another
        raise wrong(f"--identities must be at least 2, not {identities}")
    if trace is not None and not Path(trace).absolute().parent.is_dir():
        raise wrong(f"{trace}: there is no such folder")
    try:
        named = parse_faults(faults)
    except BadFaults as error:
        raise wrong(f"--faults: {error}") from None
    first = _seed_of(seed)
    scenario = Scenario(
        nodes=nodes,
        identities=identities,
        requests=requests,
        faults=named,
        defect=defect,
        store=store,
    )
    found = _perform(range(first, first + seeds), scenario, jobs)
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        _print(found)
    if found.runs < seeds and not (defect and found.violations):
        click.echo(f"placement: {found.runs} of {seeds} trials were done", err=True)
        # What was found is told all the same.
        if found.first is None:
            raise click.exceptions.Exit(INTERRUPTED)
    told = first if found.first is None else found.first[0]
    if found.first is not None:
        _tell(told, scenario, is_shrunk=is_shrunk)
    if trace is not None:
        try:
            Witnessed(told, scenario).write(Path(trace))
        except OSError as error:
            click.echo(f"placement: {trace}: {error.strerror}", err=True)
            raise click.exceptions.Exit(FAILED) from None
    if found.first is not None:
        raise click.exceptions.Exit(FAILED)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _perform(seeds: range, scenario: Scenario, jobs: int) -> Sum:
    console = Console(stderr=True)
    taken: list[int] = []
    with _bar(console) as bar, interrupts(lambda number, _: taken.append(number)):
        task = bar.add_task("trials", total=len(seeds))

        def show(runs: int, violations: int) -> None:
            said = f"trials, {violations} violations" if violations else "trials"
            bar.update(task, completed=runs, description=said)

        return simulate(
            seeds,
            scenario,
            jobs=jobs,
            progress=show if console.is_terminal else _now_and_then(len(seeds)),
            # A broken variant is found or not; the sound cluster is tried to the end.
            until_first=bool(scenario.defect),
            is_stopped=lambda: bool(taken),
        )


def _now_and_then(total: int) -> Callable[[int, int], None]:
    """Lines for who reads no terminal, and none about what is soon over."""
    told_s = time.monotonic()

    def tell(runs: int, violations: int) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= _TOLD_EVERY_S and runs < total:
            told_s = now_s
            said = f"placement: {runs} of {total} trials, {violations} violations"
            click.echo(said, err=True)

    return tell


def _tell(seed: int, scenario: Scenario, *, is_shrunk: bool) -> None:
    """Say what broke first in a trial, and what happened around it."""
    episodes = None
    if is_shrunk:
        with _bar(Console(stderr=True)) as bar:
            task = bar.add_task("shrinking", total=None)
            episodes, scenario = shrink(
                seed,
                scenario,
                progress=lambda tried, left: bar.update(
                    task, completed=tried, description=f"shrinking, {left} episodes"
                ),
            )
    witnessed = Witnessed(seed, scenario, episodes)
    if not witnessed.result.violations:
        click.echo(f"placement: seed {seed} breaks no rule when repeated", err=True)
        return
    violation = witnessed.result.violations[0]
    lines = [
        f"seed {seed} breaks {violation.rule}: {violation.identity}",
        f"  {violation.what}",
        *(f"  {line}" for line in witnessed.concerning(violation)),
    ]
    if episodes is not None:
        lines.append(f"{len(episodes)} episodes of faults are enough:")
        lines += [
            f"  {each.kind} {each.how} at {each.at_s:.3f} s for {each.for_s:.3f} s"
            for each in episodes
        ]
    faults = ",".join(scenario.faults) or "none"
    again = f"placement simulate --seed {seed} --faults {faults}"
    if scenario.defect:
        again += f" --defect {scenario.defect}"
    defaults = Scenario()
    for name in ("nodes", "identities", "requests", "store"):
        if getattr(scenario, name) != getattr(defaults, name):
            again += f" --{name} {getattr(scenario, name)}"
    lines.append(f"again: {again}")
    click.echo("\n".join(lines), err=True)


def _print(found: Sum) -> None:
    table = Table(show_header=False)
    for name, value in found.as_json().items():
        if name == "faults":
            for fault, count in value.items():
                table.add_row(f"fault {fault}", str(count))
        else:
            table.add_row(name, str(value))
    Console().print(table)
