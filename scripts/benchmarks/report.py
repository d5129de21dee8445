"""Rows: what a benchmark gave, as a table, as JSON, and against its floor."""

import json
import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.benchmarks.catalogue import PEERS, Benchmark
from scripts.benchmarks.measure import Measurement, Unit, spread_of

FLOORS = Path(__file__).with_name("floors.json")
#: A floor is this share of the ratio that was measured: machines differ.
FLOOR_SHARE = 0.6
_WIDTH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One benchmark's medians. `ratio` is how near to the limit; more is better.

    Spreads are half of the distance of the quartiles, by the median. `reached` and
    `floor` are none where there is no goal, or no floor.
    """

    name: str
    unit: Unit
    ours: float
    against: str
    limit: float
    ratio: float
    spread: float
    limit_spread: float
    ratio_spread: float
    rounds: int
    goal: str
    reached: bool | None
    floor: float | None
    published: str
    note: str


def row_of(
    benchmark: Benchmark, measured: Measurement, floors: Mapping[str, float]
) -> Row:
    """The medians, and what they say of the goal."""
    ratios = measured.ratios(benchmark.unit)
    ours, ratio = statistics.median(measured.ours), statistics.median(ratios)
    goal = benchmark.goal
    return Row(
        name=benchmark.name,
        unit=benchmark.unit,
        ours=ours,
        against=benchmark.against,
        limit=statistics.median(measured.limit),
        ratio=ratio,
        spread=spread_of(measured.ours),
        limit_spread=spread_of(measured.limit),
        ratio_spread=spread_of(ratios),
        rounds=len(ratios),
        goal="" if goal is None else goal.text(benchmark.unit),
        reached=None if goal is None else goal.is_reached(ours, ratio),
        floor=floors.get(benchmark.name),
        published=benchmark.published,
        note=measured.note,
    )


def value_of(value: float, unit: Unit) -> str:
    """A value with its unit, with as many digits as say something."""
    if unit == "/s" or value >= 1_000:  # noqa: PLR2004
        return f"{value:,.0f}{unit if unit == '/s' else ' ' + unit}"
    return f"{value:.3g} {unit}"


def table_of(rows: Iterable[Row]) -> Table:
    """For a terminal."""
    table = Table(caption=PEERS, caption_justify="left")
    for heading in ("what", "ours", "±", "against", "its", "±", "ratio", "±", "goal"):
        is_text = heading in {"what", "against"}
        table.add_column(heading, justify="left" if is_text else "right")
    table.add_column("reached")
    table.add_column("published, per s")
    table.add_column("note")
    for row in rows:
        table.add_row(
            row.name,
            value_of(row.ours, row.unit),
            f"{row.spread:.0%}",
            row.against,
            value_of(row.limit, row.unit),
            f"{row.limit_spread:.0%}",
            f"{row.ratio:.3g}",
            f"{row.ratio_spread:.0%}",
            row.goal,
            {None: "", True: "yes", False: "no"}[row.reached],
            row.published,
            row.note,
        )
    return table


def print_table(rows: Sequence[Row]) -> None:
    """On standard output; as wide as the terminal, or as the table needs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(table_of(rows))


def markdown_of(rows: Iterable[Row]) -> str:
    """The table for README."""
    headings = {
        "what": "---",
        "ours": "---:",
        "against": "---",
        "its": "---:",
        "ratio": "---:",
        "goal": "---",
        "": "---",
        "published, per s": "---",
    }
    lines = [f"| {' | '.join(each)} |" for each in (headings, headings.values())]
    for row in rows:
        cells = (
            f"`{row.name}`",
            value_of(row.ours, row.unit),
            row.against,
            value_of(row.limit, row.unit),
            f"{row.ratio:.2g}",
            row.goal,
            {None: "", True: "reached", False: "not yet"}[row.reached],
            row.published,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def json_of(rows: Iterable[Row], **about: Any) -> str:
    """One object."""
    return json.dumps(
        {**about, "rows": [asdict(row) for row in rows]}, indent=1, ensure_ascii=False
    )


def read_floors(path: Path = FLOORS) -> dict[str, float]:
    """The least ratio of each benchmark, by name."""
    if not path.exists():
        return {}
    floors: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return floors


def write_floors(
    rows: Iterable[Row], without: Container[str], path: Path = FLOORS
) -> None:
    """Set the floors of these rows, but of those `without`; those of others stay."""
    floors = read_floors(path)
    for row in rows:
        if row.name not in without:
            floors[row.name] = float(f"{row.ratio * FLOOR_SHARE:.3g}")
    text = json.dumps(dict(sorted(floors.items())), indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def below_floor(row: Row) -> str | None:
    """What to say of a row whose ratio is below its floor."""
    if row.floor is None or row.ratio >= row.floor:
        return None
    return f"{row.name}: ratio {row.ratio:.3g} is below its floor {row.floor:.3g}"
