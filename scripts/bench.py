"""Measures this project beside its limits and peers: see `scripts/benchmarks`."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from scripts.benchmarks.catalogue import BENCHMARKS, Benchmark
from scripts.benchmarks.measure import FULL, QUICK, Effort
from scripts.benchmarks.report import (
    FLOORS,
    Row,
    below_floor,
    json_of,
    print_table,
    read_floors,
    row_of,
    write_floors,
)


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
        help="exit code 1 where a ratio is below its floor",
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
def _progress(text: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def measure(
    benchmarks: Sequence[Benchmark], effort: Effort, floors: dict[str, float]
) -> list[Row]:
    """Each in turn."""
    rows = []
    for number, benchmark in enumerate(benchmarks, start=1):
        with _progress(f"{benchmark.name} ({number} of {len(benchmarks)})"):
            rows.append(row_of(benchmark, benchmark.measure(effort), floors))
    return rows


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
    if options.list:
        for each in wanted:
            print(f"{each.name:32} against {each.against}")
        return 0
    effort = effort or (QUICK if options.quick else FULL)
    rows = measure(wanted, effort, read_floors(floors_at))
    if options.json is not None:
        text = json_of(
            rows,
            quick=options.quick,
            processors=os.cpu_count(),
            python=platform.python_version(),
        )
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.json != "-":
        print_table(rows)
    if options.write_floors:
        write_floors(rows, floors_at)
    failures = below_floor(rows) if options.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
