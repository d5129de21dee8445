"""The command `placement`."""

import errno
import json
import logging
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from actors.client_command import (
    ask_command,
    entry_to,
    resolve_command,
    status_command,
    tell_command,
)
from actors.cluster import Cluster, StoreInUse
from actors.collector import calm_collector
from actors.engine import Settings
from actors.exits import FAILED, INTERRUPTED, interrupts, wrong
from actors.kind import BadKind, Kind
from actors.log import to_stderr
from actors.nats_connection import NatsFailure
from actors.node_command import node_command, parse_kinds
from actors.requests import Requests, read_requests
from actors.run import (
    BadRun,
    Change,
    Delivery,
    Outcome,
    RunningNodes,
    Target,
    check_changes,
    check_kinds,
    kinds_for,
    parse_change,
    summary,
    summary_of_running,
    write_report,
)
from actors.simulate_command import simulate_command
from actors.store_url import BadStore, check_store
from actors.up_command import up_command
from actors.witness import ActivationWitness, BadWitness, FileWitness, machine_ns
from placement.contracts import StoreFailure
from placement.errors import PlacementError
from placement.identity import BadIdentity


@click.group()
@click.version_option(package_name="actor-placement", prog_name="placement")
def main() -> None:
    """Virtual actors: addressed by identity, at most one activation of each."""


for each_command in (
    simulate_command,
    node_command,
    up_command,
    resolve_command,
    ask_command,
    tell_command,
    status_command,
):
    main.add_command(each_command)


def _check(
    nodes: int,
    store: str | None,
    files: tuple[str | None, ...],
    kinds: dict[str, Kind],
    settings: Settings,
) -> None:
    """Refuse what cannot work, before anything is opened or made."""
    if nodes < 1:
        raise BadRun(f"--nodes must be at least 1, not {nodes}")
    for each in kinds.values():
        each.check(settings.margin_s)
    if store is not None:
        check_store(store)
    for path in files:
        if path is not None:
            _check_file(path)


def _check_file(name: str) -> None:
    """Refuse what cannot be written as a file, and make nothing."""
    path = Path(name).absolute()
    try:
        if not path.parent.is_dir():
            raise BadRun(f"{name}: there is no such folder")
        if path.is_dir():
            raise BadRun(f"{name}: it is a folder, not a file")
        is_there = path.exists()
    except OSError as error:
        raise BadRun(f"{name}: {error.strerror}") from None
    if is_there and not _may_write(path):
        raise BadRun(f"{name}: it may not be written")
    if not is_there and not _may_write(path.parent):
        raise BadRun(f"{name}: nothing may be made in its folder")


def _may_write(path: Path) -> bool:
    # With the rights by which it will be opened.
    effective = os.access in os.supports_effective_ids
    return os.access(path, os.W_OK, effective_ids=effective)


def _deliver(
    cluster: Target,
    read: Requests,
    given: dict[str, Kind],
    changes: tuple[Change, ...],
    began: float,
) -> tuple[Outcome, bool]:
    """Deliver all, with a progress line on a terminal; whether it was interrupted."""
    console = Console(stderr=True)
    taken: list[int] = []
    with Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("requests", total=len(read))
        delivery = Delivery(
            cluster,
            read,
            repeatable=lambda kind: kind not in given,
            progress=lambda done, failed: bar.update(task, completed=done + failed),
        )

        def interrupt(number: int, _: object) -> None:
            taken.append(number)
            delivery.stop()

        with interrupts(interrupt):
            return delivery.run(changes, began=began), bool(taken)


@main.command()
@click.argument("requests", required=False)
@click.option("--nodes", default=3, show_default=True, help="How many nodes.")
@click.option("--store", help="Store URL; a temporary SQLite file unless given.")
@click.option("--engine", help="Nodes that run already: nats://host:4222")
@click.option("--kind", "kinds", multiple=True, metavar="KIND=module:Class")
@click.option("--durable", is_flag=True, help="Store each count before its answer.")
@click.option("--kill", multiple=True, metavar="NODE@N", help="Crash it after N.")
@click.option("--join", multiple=True, metavar="NODE@N", help="Start it after N.")
@click.option("--leave", multiple=True, metavar="NODE@N", help="Stop it after N.")
@click.option("--report", metavar="FILE", help="JSON lines, one an identity.")
@click.option("--witness", "witness_file", metavar="FILE", help="What was seen.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, no table.")
@click.option("--verbose", is_flag=True, help="Log more, to standard error.")
@click.option("--cluster", default="default", show_default=True)
@click.option("--partitions", default=4096, show_default=True)
@click.option("--ttl", default=5.0, show_default=True, help="Seconds.")
@click.option("--renew-every", type=float, help="Seconds; a third of ttl.")
@click.option("--margin", type=float, help="Seconds; a fifth of ttl.")
@click.option("--ask-timeout", default=10.0, show_default=True, help="Seconds.")
def run(
    requests: str | None,
    nodes: int,
    store: str | None,
    engine: str | None,
    kinds: tuple[str, ...],
    *,
    durable: bool,
    kill: tuple[str, ...],
    join: tuple[str, ...],
    leave: tuple[str, ...],
    report: str | None,
    witness_file: str | None,
    as_json: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Deliver every request of REQUESTS to its identity's activation.

    REQUESTS is a file of JSON lines, plain or .gz, or - for standard input;
    without it, a sample that comes along. With --engine they go to nodes that run
    already, whose kinds are their own.
    """
    to_stderr(logging.INFO if verbose else logging.CRITICAL)
    sys.path.insert(0, "")
    names = [f"node-{number}" for number in range(1, nodes + 1)]
    try:
        given = parse_kinds(kinds)
        checked = Settings(**settings)
        # With an engine, that looks at the store.
        place = store if engine is None else None
        _check(nodes, place, (report, witness_file), given, checked)
        changes: list[Change] = [
            *(parse_change("kill", text) for text in kill),
            *(parse_change("join", text) for text in join),
            *(parse_change("leave", text) for text in leave),
        ]
        began = time.monotonic()
        read = read_requests(requests)
        check_kinds(read, given)
        if engine is not None and changes:
            raise BadRun("--kill, --join and --leave are for embedded nodes")
        ordered = check_changes(changes, names, len(read))
        calm_collector()
    except ValueError as error:
        raise wrong(str(error)) from None
    if engine is not None:
        witnessed = None if witness_file is None else Path(witness_file)
        _run_on(
            engine,
            store,
            read,
            given,
            checked,
            report=report,
            witness_file=witnessed,
            as_json=as_json,
            began=began,
        )
        return
    with tempfile.TemporaryDirectory(prefix="placement-") as folder:
        url = store if store is not None else f"sqlite:///{folder}/run.db"
        try:
            witness = ActivationWitness(
                None if witness_file is None else Path(witness_file)
            )
        except OSError as error:
            raise wrong(f"{witness_file}: {error.strerror}") from None
        try:
            cluster = Cluster.embedded(
                nodes=names,
                kinds=kinds_for(read, given, is_durable=durable),
                store=url,
                witness=witness,
                **settings,
            )
        except (StoreInUse, BadStore, BadKind, BadIdentity) as error:
            raise wrong(str(error)) from None
        except (StoreFailure, PlacementError) as error:
            click.echo(f"placement: {error}", err=True)
            raise click.exceptions.Exit(FAILED) from None
        with cluster:
            outcome, is_interrupted = _deliver(cluster, read, given, ordered, began)
        witness.close()
        joined = [change.node for change in ordered if change.verb == "join"]
        found = summary(outcome, witness, [*names, *joined])
        found["nodes"] = nodes
        if report is not None:
            try:
                write_report(Path(report), read, outcome, witness)
            except OSError as error:
                click.echo(f"placement: {report}: {error.strerror}", err=True)
                raise click.exceptions.Exit(FAILED) from None
    _end(outcome, found, as_json=as_json, is_interrupted=is_interrupted)


def _run_on(
    engine: str,
    store: str | None,
    read: Requests,
    given: dict[str, Kind],
    settings: Settings,
    *,
    report: str | None,
    witness_file: Path | None,
    as_json: bool,
    began: float,
) -> None:
    """Deliver all to nodes that run already."""
    since_ns = machine_ns()
    with ExitStack() as stack:
        try:
            entry = stack.enter_context(entry_to(engine, store, settings))
        except (ValueError, NatsFailure, StoreFailure, PlacementError) as error:
            raise wrong(str(error)) from None
        target = RunningNodes(entry)
        outcome, is_interrupted = _deliver(target, read, given, (), began)
        names = target.nodes
        try:
            witness = (
                None
                if witness_file is None
                else FileWitness(witness_file, since_ns=since_ns)
            )
            found = summary_of_running(outcome, read, witness, names)
            if report is not None:
                write_report(
                    Path(report),
                    read,
                    outcome,
                    witness,
                    where=lambda identity: entry.resolve(identity).pid,
                )
        except (OSError, BadWitness, PlacementError) as error:
            text = getattr(error, "strerror", None) or str(error)
            click.echo(f"placement: {text}", err=True)
            raise click.exceptions.Exit(FAILED) from None
    _end(outcome, found, as_json=as_json, is_interrupted=is_interrupted)


def _end(
    outcome: Outcome, found: dict[str, Any], *, as_json: bool, is_interrupted: bool
) -> None:
    """Say how it went; the exit code is part of that."""
    is_said = _say(found, as_json=as_json)
    for reason, count in sorted(outcome.reasons.items()):
        click.echo(
            f"placement: {count} failed: {reason}, first {outcome.examples[reason]}",
            err=True,
        )
    if is_interrupted:
        raise click.exceptions.Exit(INTERRUPTED)
    if outcome.failed or found["double_activations"] or not is_said:
        raise click.exceptions.Exit(FAILED)


def _say(found: dict[str, Any], *, as_json: bool) -> bool:
    """Print the sum to standard output; false, and why, where that is full."""
    try:
        if as_json:
            click.echo(json.dumps(found))
        else:
            _print(found)
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # whoever read it has enough; click ends quietly
        click.echo(f"placement: standard output: {error.strerror}", err=True)
        # What is left in its buffer would raise once more at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return False
    return True


def _print(found: dict[str, Any]) -> None:
    console = Console()
    sums = Table(show_header=False)
    for name, value in found.items():
        if name != "per_node":
            sums.add_row(name, str(value))
    console.print(sums)
    nodes = Table("node", "activations", "requests")
    for name, each in found["per_node"].items():
        nodes.add_row(name, str(each["activations"]), str(each["requests"]))
    console.print(nodes)
