"""Measures this project beside its limits and peers: see `scripts/benchmarks`."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from actors.collector import calm_collector
from scripts.benchmarks import over_nats
from scripts.benchmarks.catalogue import BENCHMARKS, Benchmark
from scripts.benchmarks.curves import CURVES, Point
from scripts.benchmarks.measure import FULL, QUICK, Effort
from scripts.benchmarks.plot import svg_of
from scripts.benchmarks.report import (
    FLOORS,
    Row,
    below_floor,
    json_of,
    markdown_of,
    print_table,
    read_floors,
    row_of,
    write_floors,
)
from scripts.benchmarks.soak import soak
from scripts.benchmarks.steps import markdown_of_steps, steps, table_of_steps

_SOAK_MAX = 10_000.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    add = parser.add_argument
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="one JSON object, into FILE, or on standard output and nothing else there",
    )
    add(
        "--markdown",
        metavar="FILE",
        help="the table, or that of the steps, as Markdown too",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only those whose name begins so; may be repeated",
    )
    add("--quick", action="store_true", help="fewer and shorter rounds")
    add("--list", action="store_true", help="the names, and nothing is measured")
    add(
        "--check",
        action="store_true",
        help="only what has a floor; exit code 1 where a ratio is below it",
    )
    add(
        "--plot",
        metavar="FILE",
        help="measure scaling too, and draw it as SVG into FILE",
    )
    add(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="instead: churn for so long; memory and latency at its end",
    )
    add(
        "--grains",
        type=int,
        default=1_000_000,
        metavar="N",
        help="how many Grains a soak has (1,000,000)",
    )
    add(
        "--steps",
        action="store_true",
        help="instead: what each step of a way takes, in nanoseconds",
    )
    add("--write-floors", action="store_true", help="set the floors from this run")
    return parser


def chosen(
    benchmarks: Sequence[Benchmark], only: Sequence[str]
) -> tuple[Benchmark, ...]:
    """Those whose names begin as one of `only`, all where that is empty.

    Raises:
        ValueError: nothing begins so.
    """
    for prefix in only:
        if not any(each.name.startswith(prefix) for each in benchmarks):
            raise ValueError(f"no benchmark is named {prefix}...; see --list")
    return tuple(
        each
        for each in benchmarks
        if not only or any(each.name.startswith(prefix) for prefix in only)
    )


@contextmanager
def _progress(text: str) -> Iterator[Callable[[str], None]]:
    """Say `text` on a terminal while the body runs, and what else it says."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(text) as status:
        yield lambda more: status.update(f"{text}: {more}")


def measure(
    benchmarks: Sequence[Benchmark],
    effort: Effort,
    floors: dict[str, float],
    *,
    tries: int = 1,
) -> list[Row]:
    """Each in turn; one that is below its floor so many times."""
    rows = []
    for number, benchmark in enumerate(benchmarks, start=1):
        with _progress(f"{benchmark.name} ({number} of {len(benchmarks)})"):
            row = _measured(benchmark, effort, floors)
            for _ in range(tries - 1):
                if below_floor(row) is None:
                    break
                row = _measured(benchmark, effort, floors)
        rows.append(row)
    return rows


def _measured(benchmark: Benchmark, effort: Effort, floors: dict[str, float]) -> Row:
    try:
        return row_of(benchmark, benchmark.measure(effort), floors)
    except Exception as error:
        error.add_note(f"while {benchmark.name} was measured")
        raise


def soaked(minutes: float, grains: int, json_to: str | None) -> int:
    """Soak, and print what that gave; the exit code."""
    with _progress("soak") as say:
        found = soak(seconds=minutes * 60, grains=grains, say=say)
    if json_to is not None:
        _put(json.dumps(found.as_dict(), indent=1), json_to)
    if json_to != "-":
        for name, value in asdict(found).items():
            print(f"{name:16} {value:,}")
    for each in found.broken():
        print(each, file=sys.stderr)
    return 1 if found.broken() else 0


def stepped(json_to: str | None, markdown_to: str | None) -> int:
    """Measure the steps, and print what each takes; the exit code."""
    with _progress("steps") as say:
        found = []
        for step in steps():
            say(f"{step.way}: {step.name}")
            found.append(step)
    if json_to is not None:
        _put(json.dumps([step._asdict() for step in found], indent=1), json_to)
    if markdown_to is not None:
        _put(markdown_of_steps(found), markdown_to)
    if json_to != "-":
        Console(width=None if sys.stdout.isatty() else 100).print(table_of_steps(found))
    return 0


def _put(text: str, where: str) -> None:
    """Write into the file, or on standard output."""
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n", encoding="utf-8")


def draw(path: Path, effort: Effort) -> list[Point]:
    """Measure how costs grow, and draw that."""
    points = []
    for number, curve in enumerate(CURVES, start=1):
        with _progress(f"{curve.__name__} ({number} of {len(CURVES)})"):
            points += list(curve(effort))
    path.write_text(svg_of(points), encoding="utf-8")
    return points


def main(
    arguments: Sequence[str] | None = None,
    *,
    benchmarks: Sequence[Benchmark] = BENCHMARKS,
    effort: Effort | None = None,
    floors_at: Path = FLOORS,
) -> int:
    """Measure, and print; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        wanted = chosen(benchmarks, options.only)
    except ValueError as error:
        parser.error(str(error))
    for path in (options.json, options.plot, options.markdown):
        # Before anything is measured: it would be lost.
        if path not in {None, "-"} and not Path(path).absolute().parent.is_dir():
            parser.error(f"there is no folder for {path}")
    if options.soak is not None:
        if not 0 < options.soak < _SOAK_MAX or options.grains < 1:
            parser.error("a soak takes minutes above 0, and a Grain at least")
        return soaked(options.soak, options.grains, options.json)
    if options.steps:
        return stepped(options.json, options.markdown)
    if options.list:
        for each in wanted:
            print(f"{each.name:32} against {each.against}")
        return 0
    effort = effort or (QUICK if options.quick else FULL)
    for each in wanted:
        if each.needs > effort.size:
            print(f"{each.name}: left out, it needs more", file=sys.stderr)
    wanted = tuple(each for each in wanted if each.needs <= effort.size)
    if not over_nats.is_installed():
        for each in wanted:
            if each.is_over_nats:
                print(f"{each.name}: left out: {over_nats.MORE}", file=sys.stderr)
        wanted = tuple(each for each in wanted if not each.is_over_nats)
    floors = read_floors(floors_at)
    tries = 1
    if options.check:
        wanted = tuple(each for each in wanted if each.name in floors)
        # A neighbour that disturbs one side only must be there each time.
        tries = 3
    rows = measure(wanted, effort, floors, tries=tries)
    if options.json != "-":
        print_table(rows)
    if options.write_floors:
        without = {each.name for each in wanted if not each.has_floor}
        write_floors(rows, without, floors_at)
    points = [] if options.plot is None else draw(Path(options.plot), effort)
    if options.json is not None:
        text = json_of(
            rows,
            quick=options.quick,
            processors=os.cpu_count(),
            python=platform.python_version(),
            curves=[asdict(point) for point in points],
        )
        _put(text, options.json)
    if options.markdown is not None:
        _put(markdown_of(rows), options.markdown)
    failures = [said for row in rows if (said := below_floor(row)) is not None]
    if not options.check:
        return 0
    for said in failures:
        print(said, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    # As a program does that hosts many; what is measured beside ours has it too.
    calm_collector()
    sys.exit(main())
