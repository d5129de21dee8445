"""Soaks a cluster of real processes: random faults under load, decided by a seed.

At the end all is healed, every identity is asked once more, and an observer of what
the processes did judges: no doubles, tokens that grow, and exact counts.
"""

import argparse
import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.client_command import entry_to
from actors.engine import Settings
from actors.exits import interrupts
from actors.node_command import Asked
from scripts.soaking.judge import judge
from scripts.soaking.load import Load
from scripts.soaking.processes import PATIENCE_S, SoakedCluster, SoakFailure
from scripts.soaking.schedule import schedule

FAILED, INTERRUPTED = 1, 130
NODES = ("node-1", "node-2", "node-3")
_MINUTES_MAX, _TTL_S_MAX = 10_000.0, 60.0
_CLIENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for."""

    seed: int
    seconds: float
    store: str
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """What it gave; what was refused was surely not counted.

    `in_hand` are the doubles that pauses excuse, see `judge`.
    """

    seed: int
    store: str
    seconds: float
    asks: int
    answered: int
    refused: int
    reasons: dict[str, int]
    unknown_repeated: int
    longest_wait_s: float
    faults: dict[str, int]
    activations: int
    double_activations: int
    in_hand: int
    violations: tuple[str, ...]


class Interrupted(Exception):
    """Somebody has asked to stop."""


def soak(
    plan: Plan,
    folder: Path,
    asked: Asked,
    *,
    stores: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Soaked:
    """Soak in `folder`; nothing of it runs afterwards.

    Raises:
        Interrupted: somebody asked to stop meanwhile.
        SoakFailure: it could not begin.
    """
    faults = schedule(
        plan.seed,
        seconds=plan.seconds,
        ttl_s=plan.ttl_s,
        nodes=NODES,
        has_store=plan.store == "postgres",
    )
    with ExitStack() as stack:
        cluster = stack.enter_context(
            SoakedCluster(
                folder,
                nodes=NODES,
                ttl_s=plan.ttl_s,
                on_postgres=plan.store == "postgres",
                stores=stores,
            )
        )
        say("starting")
        cluster.ensure_nodes()
        _await(lambda: cluster.is_at_rest, asked, PATIENCE_S)
        if cluster.violations:
            raise SoakFailure(cluster.violations[0])
        clients = [
            stack.enter_context(entry_to(cluster.server.url, store, Settings()))
            for store in islice(cycle(cluster.stores), _CLIENTS)
        ]
        load = stack.enter_context(Load(clients, plan.seed))
        cluster.begin_faults(faults)
        until_s = time.monotonic() + plan.seconds

        def is_over() -> bool:
            left_s = until_s - time.monotonic()
            count = cluster.faults.total()
            say(f"{left_s:.0f} s left, {load.answered:,} answered, {count} faults")
            return left_s < 0

        _await(is_over, asked, plan.seconds)
        say("healing")
        cluster.end_faults()
        cluster.ensure_nodes()
        _await(lambda: cluster.is_at_rest, asked, PATIENCE_S)
        load.finish()
        _await(lambda: load.is_finished, asked, PATIENCE_S)
        cluster.look()
        violations = cluster.violations + load.violations
        violations += [f"{each} is never answered" for each in load.unanswered]
    say("judging")
    verdict = judge(folder, cluster.pauses)
    if verdict.double_activations:
        violations.append(f"{verdict.double_activations} double activations")
    return Soaked(
        seed=plan.seed,
        store=plan.store,
        seconds=plan.seconds,
        asks=load.asks,
        answered=load.answered,
        refused=load.refused.total(),
        reasons=dict(sorted(load.refused.items())),
        unknown_repeated=load.unknown_repeated,
        longest_wait_s=round(load.longest_wait_s, 3),
        faults=dict(sorted(cluster.faults.items())),
        activations=verdict.activations,
        double_activations=verdict.double_activations,
        in_hand=verdict.in_hand,
        violations=tuple(violations),
    )


def _await(fact: Callable[[], bool], asked: Asked, within_s: float) -> None:
    """Wait until `fact` holds, or so much time has passed.

    Raises:
        Interrupted: somebody asked to stop meanwhile.
    """
    until_s = time.monotonic() + within_s
    while not fact() and time.monotonic() < until_s:
        if asked.count:
            raise Interrupted
        time.sleep(0.05)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Say on a terminal how far it is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("soak") as status:
        yield lambda text: status.update(f"soak: {text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="how long (10)")
    add("--seed", type=int, help="decides what happens to whom and when (any)")
    add("--store", choices=("nats", "postgres"), default="nats", help="(nats)")
    add("--ttl", type=float, default=2.0, help="seconds a session lives (2)")
    add("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _plan(arguments: Sequence[str] | None) -> tuple[Plan, bool]:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < _MINUTES_MAX or not 0 < options.ttl < _TTL_S_MAX:
        parser.error(f"minutes and ttl are above 0, and ttl is below {_TTL_S_MAX:g}")
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    plan = Plan(
        seed=seed,
        seconds=options.minutes * 60,
        store=options.store,
        ttl_s=options.ttl,
    )
    return plan, options.json


def _print(found: Soaked) -> None:
    table = Table(show_header=False)
    for name, value in asdict(found).items():
        match value:
            case dict():
                text = ", ".join(f"{count} {what}" for what, count in value.items())
                text = text or "none"
            case tuple():
                text = "\n".join(value) or "none"
            case _:
                text = str(value)
        table.add_row(name, text)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main(arguments: Sequence[str] | None = None, *, stores: Sequence[str] = ()) -> int:
    """Soak, and say what that gave; the exit code. Nodes have `stores` in turn."""
    plan, as_json = _plan(arguments)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    violations: Sequence[str] = ()
    try:
        asked = Asked()
        with interrupts(asked.again), _progress() as say:
            found = soak(plan, folder, asked, stores=stores, say=say)
        violations = found.violations
    except Interrupted:
        print("scripts/soak: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SoakFailure as error:
        violations = [str(error)]
    else:
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            _print(found)
    finally:
        if not violations:
            shutil.rmtree(folder)
    for each in violations:
        print(f"scripts/soak: seed {plan.seed}: {each}", file=sys.stderr)
    if violations:
        print(f"scripts/soak: what was seen is in {folder}", file=sys.stderr)
    return FAILED if violations else 0


if __name__ == "__main__":
    sys.exit(main())
