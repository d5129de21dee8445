"""`placement node`: one process of a cluster, until it is told to stop."""

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from actors.collector import calm_collector
from actors.engine import Settings
from actors.engine_url import engine_text
from actors.exits import FAILED, interrupts, wrong
from actors.kind import BadKind, Kind, load_kind
from actors.log import log, to_stderr
from actors.nats_connection import NatsFailure
from actors.node import PlacementNode
from actors.tally import DurableTally
from actors.witness import ActivationWitness
from placement.contracts import StoreFailure
from placement.errors import PlacementError
from placement.event import Event, PlacementEvent
from placement.identity import BadIdentity, Identity

DRAIN_S = 30.0


def parse_kinds(specs: tuple[str, ...], *, tallies: bool = False) -> dict[str, Kind]:
    """The kinds that `KIND=module:Class` name; a bare KIND is a tally, if allowed.

    Raises:
        BadKind: one of them is none.
    """
    kinds: dict[str, Kind] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals and not tallies:
            raise BadKind(f"--kind {spec!r} is not KIND=module:Class")
        try:
            Identity(name, "x")
        except BadIdentity as error:
            raise BadKind(f"--kind {spec!r}: {error}") from None
        if name in kinds:
            raise BadKind(f"--kind {name!r} is given twice")
        kinds[name] = load_kind(path) if equals else Kind(DurableTally)
    return kinds


def cluster_options(command: Any) -> Any:
    """The settings of a cluster, as options."""
    for option in (
        click.option("--ask-timeout", default=10.0, show_default=True, help="Seconds."),
        click.option("--margin", type=float, help="Seconds; a fifth of ttl."),
        click.option("--renew-every", type=float, help="Seconds; a third of ttl."),
        click.option("--ttl", default=5.0, show_default=True, help="Seconds."),
        click.option("--partitions", default=4096, show_default=True),
        click.option("--cluster", default="default", show_default=True),
    ):
        command = option(command)
    return command


class Asked:
    """Whether somebody has asked to stop, and how often."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.count = 0
        self.why_broken = ""

    def again(self, *_: object) -> None:
        """Once more; from a signal handler, on the main thread, which may hold it."""
        self.count += 1

    def broken(self, event: Event) -> None:
        """A node that is broken by a bug is of no use any more."""
        self.why_broken = event.reason

    def wait(self, count: int, *, until: threading.Event | None = None) -> None:
        """Wait until asked `count` times, or broken, or `until` is set."""
        tick = threading.Event() if until is None else until
        while self.count < count and not self.why_broken:
            # A signal handler runs on this thread, and may take no lock of it.
            if tick.wait(0.05):
                return


@click.command("node")
@click.argument("name")
@click.option("--engine", required=True, help="nats://host:4222")
@click.option("--store", help="Store URL; unless given, the engine's own.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND=module:Class",
    help="What it hosts; a bare KIND is a tally, as of `run`.",
)
@click.option("--weight", default=1.0, show_default=True, help="Its share.")
@click.option("--ready-file", metavar="FILE", help="Written when it serves.")
@click.option("--witness", "witness_file", metavar="FILE", help="What was seen.")
@click.option("--drain-timeout", default=DRAIN_S, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Ready line and logs as JSON.")
@click.option("--verbose", is_flag=True, help="Log every event, to standard error.")
@cluster_options
def node_command(
    name: str,
    *,
    engine: str,
    store: str | None,
    kinds: tuple[str, ...],
    weight: float,
    ready_file: str | None,
    witness_file: str | None,
    drain_timeout: float,
    as_json: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Run the node NAME of a cluster.

    SIGTERM drains it: what it hosts ends with its state saved, others take over. A
    second one stops it at once.
    """
    to_stderr(logging.INFO if verbose else logging.WARNING, as_json=as_json)
    sys.path.insert(0, "")
    witness: ActivationWitness | None = None
    # From now on: a signal during the start is no crash either.
    asked = Asked()
    with interrupts(asked.again):
        try:
            hosted = parse_kinds(kinds, tallies=True)
            checked = Settings(**settings)
            for each in hosted.values():
                each.check(checked.margin_s)
            if witness_file is not None:
                witness = ActivationWitness(Path(witness_file))
            node = PlacementNode(
                name,
                kinds=hosted,
                engine=engine,
                store=store,
                weight=weight,
                witness=witness,
                settings=checked,
            )
        except (ValueError, NatsFailure, StoreFailure) as error:
            raise wrong(str(error)) from None
        except OSError as error:
            raise wrong(f"{witness_file}: {error.strerror}") from None
        calm_collector()
        is_left = False
        try:
            node.events.subscribe(asked.broken, names={"Broken"})
            if verbose:
                node.events.subscribe(_log)
            node.start_member()
            ready = {
                "ready": name,
                "session": node.session,
                "engine": engine_text(engine),
                "pid": os.getpid(),
            }
            _say_ready(ready, ready_file, as_json=as_json)
            asked.wait(1)
            is_left = _leave(node, asked, drain_timeout)
        except (NatsFailure, StoreFailure, PlacementError) as error:
            raise wrong(str(error)) from None
        except OSError as error:
            raise wrong(f"{ready_file}: {error.strerror}") from None
        finally:
            if asked.count <= 1:
                node.kill()
            if ready_file is not None:
                with suppress(OSError):
                    Path(ready_file).unlink()
            if witness is not None:
                witness.close()
    if not is_left:
        why = asked.why_broken or "it was stopped before all of it had ended"
        click.echo(f"placement: {name}: {why}", err=True)
        sys.stderr.flush()
        if asked.count > 1:
            os._exit(FAILED)
        raise click.exceptions.Exit(FAILED)


def _leave(node: PlacementNode, asked: Asked, timeout_s: float) -> bool:
    """Drain and stop; whether all has ended. Where asked again, this is the end."""
    if asked.why_broken:
        return False
    done = threading.Event()

    def stop() -> None:
        try:
            node.stop(timeout=timeout_s)
        except Exception:
            log.exception("the node has not stopped", node=node.name)
        finally:
            done.set()

    threading.Thread(target=stop, name="stopping", daemon=True).start()
    asked.wait(2, until=done)
    if done.is_set():
        return node.has_left
    # Silent first, so that nothing of it takes effect any more; what does not come
    # back now would hold up the end of the interpreter too.
    node.kill(timeout=0.5)
    return False


def _log(event: Event) -> None:
    if isinstance(event, PlacementEvent):
        log.info(
            event.name,
            node=event.node,
            number=event.number,
            epoch=event.epoch,
            identity=event.identity,
            session=event.session,
            reason=event.reason,
        )


def _say_ready(found: dict[str, Any], ready_file: str | None, *, as_json: bool) -> None:
    text = json.dumps(found) if as_json else f"ready {found['ready']}"
    click.echo(text)
    sys.stdout.flush()
    if ready_file is not None:
        path = Path(ready_file)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(found) + "\n", encoding="utf-8")
        part.replace(path)
