"""The benchmark suite's own machinery, with tiny counts: nothing here is a speed."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import scripts.benchmarks.steps as steps_module
from scripts.bench import main
from scripts.benchmarks.catalogue import BENCHMARKS, Benchmark, most, rate, ratio
from scripts.benchmarks.curves import Point
from scripts.benchmarks.measure import Effort, Measurement, Work, pair, spread_of
from scripts.benchmarks.plot import svg_of
from scripts.benchmarks.report import read_floors
from scripts.benchmarks.soak import percentile, soak

TINY = Effort(rounds=1, run_in_s=0.0, round_s=0.001, runs=1, size=1_000)

# Whole processes, and tables of a thousand members: too slow for a test.
SLOW = ("run/", "start/", "topology/join", "topology/leave", "failover/10s")

ROW_KEYS = {
    "name",
    "unit",
    "ours",
    "against",
    "limit",
    "ratio",
    "spread",
    "limit_spread",
    "ratio_spread",
    "rounds",
    "goal",
    "reached",
    "floor",
    "published",
    "note",
}


def fixed(name: str, ours: float, limit: float, **options: object) -> Benchmark:
    measured = Measurement(ours=(ours,) * 3, limit=(limit,) * 3, note="as given")
    return Benchmark(
        name=name,
        against="what was given",
        measure=lambda _: measured,
        **options,  # type: ignore[arg-type]
    )


FIXED = (
    fixed("ask/a", 50.0, 100.0, goal=rate(60)),
    fixed("ask/b", 80.0, 100.0, goal=ratio(0.75), published="somebody 7"),
    fixed("idle/c", 200.0, 50.0, unit="B", goal=most(1_024)),
    fixed("large/d", 1.0, 1.0, needs=1_000_000),
)


def run(*arguments: str, floors: Path = Path("none")) -> int:
    return main(arguments, benchmarks=FIXED, effort=TINY, floors_at=floors)


def test_json_on_standard_output_is_all_that_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--json") == 0

    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == ["ask/a", "ask/b", "idle/c"]
    assert all(set(row) == ROW_KEYS for row in found["rows"])
    assert set(found) == {"quick", "processors", "python", "curves", "rows"}


def test_a_ratio_is_how_near_to_the_limit_whatever_the_unit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--json")

    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["ratio"] for row in rows] == [0.5, 0.8, 0.25]
    assert [row["reached"] for row in rows] == [False, True, True]


def test_json_into_a_file_leaves_the_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--json", str(tmp_path / "b.json")) == 0

    assert len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 3
    printed = capsys.readouterr().out
    assert "ask/a" in printed
    assert "somebody 7" in printed


def test_markdown_has_a_row_for_each(tmp_path: Path) -> None:
    assert run("--markdown", str(tmp_path / "b.md")) == 0

    lines = (tmp_path / "b.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| `ask/a` | 50/s | what was given | 100/s | 0.5 |")
    assert [line.split("|")[7].strip() for line in lines[2:]] == [
        "not yet",
        "reached",
        "reached",
    ]
    with pytest.raises(SystemExit):
        run("--markdown", str(tmp_path / "no" / "b.md"))


def test_only_chooses_by_how_names_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", "-", "--only", "ask/b", "--only", "idle") == 0

    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["ask/b", "idle/c"]


def test_a_benchmark_that_needs_more_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--json")

    assert "large/d" in capsys.readouterr().err


def test_what_is_over_nats_is_left_out_where_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.benchmarks.over_nats.is_installed", lambda: False)
    both = [fixed("ask/a", 1.0, 1.0), fixed("nats/b", 1.0, 1.0, is_over_nats=True)]

    assert main(["--json"], benchmarks=both, effort=TINY) == 0

    printed = capsys.readouterr()
    assert [row["name"] for row in json.loads(printed.out)["rows"]] == ["ask/a"]
    assert "nats/b: left out: pip install 'actor-placement[nats]'" in printed.err


def test_list_names_all_and_measures_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(effort: Effort) -> Measurement:
        raise AssertionError

    named = Benchmark(name="never/run", against="nothing", measure=never)

    assert main(["--list"], benchmarks=[named]) == 0
    assert "never/run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--only", "nothing-begins-so"),
        ("--json", "/nowhere/at/all/b.json"),
        ("--plot", "/nowhere/at/all/b.svg"),
        ("--soak", "0"),
        ("--soak", "1", "--grains", "0"),
        ("--unknown",),
        ("leftover",),
    ],
)
def test_wrong_arguments_end_with_exit_code_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)

    assert ended.value.code == 2
    assert "scripts/bench" in capsys.readouterr().err


def test_floors_are_a_share_of_what_was_reached(tmp_path: Path) -> None:
    floors = tmp_path / "floors.json"
    floors.write_text('{"other": 7.0, "ask/a": 9.0}')

    assert run("--write-floors", floors=floors) == 0

    assert json.loads(floors.read_text()) == {
        "ask/a": 0.3,
        "ask/b": 0.48,
        "idle/c": 0.15,
        "other": 7.0,
    }
    assert run("--check", floors=floors) == 0


def test_a_ratio_below_its_floor_is_named_and_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floors = tmp_path / "floors.json"
    floors.write_text('{"ask/a": 0.4, "ask/b": 0.81}')

    assert run("--check", "--json", floors=floors) == 1
    assert run("--json", floors=floors) == 0

    out, said = capsys.readouterr()
    assert "ask/b: ratio 0.8 is below its floor 0.81" in said
    assert "ask/a: ratio" not in said
    # What has no floor is not measured where only floors are asked for.
    assert out.count("idle/c") == 1


@pytest.mark.parametrize(
    ("values", "code", "left"),
    [
        ([10.0, 10.0, 60.0, 1.0], 0, [1.0]),
        ([60.0, 10.0], 0, [10.0]),
        ([10.0, 10.0, 10.0, 60.0], 1, [60.0]),
    ],
)
def test_what_is_below_its_floor_is_measured_twice_more(
    tmp_path: Path, values: list[float], code: int, left: list[float]
) -> None:
    floors = tmp_path / "floors.json"
    floors.write_text('{"ask/a": 0.5}')
    values = values.copy()

    def disturbed(effort: Effort) -> Measurement:
        return Measurement(ours=(values.pop(0),), limit=(100.0,))

    named = Benchmark(name="ask/a", against="a neighbour", measure=disturbed)

    assert main(["--check"], benchmarks=[named], effort=TINY, floors_at=floors) == code
    assert values == left


def test_every_row_has_a_floor_but_those_that_say_not(tmp_path: Path) -> None:
    without = [replace(each, has_floor=each.name != "ask/a") for each in FIXED]
    floors = tmp_path / "floors.json"

    main(["--write-floors"], benchmarks=without, effort=TINY, floors_at=floors)

    assert set(json.loads(floors.read_text())) == {"ask/b", "idle/c"}


def test_the_floors_are_those_of_the_benchmarks_there_are() -> None:
    names = [each.name for each in BENCHMARKS]

    assert len(set(names)) == len(names)
    assert set(read_floors()) == {each.name for each in BENCHMARKS if each.has_floor}


def test_sides_alternate_and_a_run_in_is_not_timed() -> None:
    seen: list[str] = []

    def side(name: str) -> Work:
        return Work(lambda count: seen.extend([name] * count), 1)

    effort = Effort(rounds=2, run_in_s=0.0, round_s=0.0, runs=1, size=1)
    measured = pair(side("a"), side("b"), effort)

    assert seen == ["a", "b", "a", "b"]
    assert len(measured.ours) == len(measured.limit) == 2


def test_a_side_with_wrong_results_fails() -> None:
    def wrong(count: int) -> None:
        raise AssertionError("lost")

    with pytest.raises(AssertionError, match="lost"):
        pair(Work(wrong, 1), Work(lambda _: None, 1), TINY)


def test_a_spread_is_half_the_distance_of_the_quartiles() -> None:
    assert spread_of((90.0, 95.0, 100.0, 105.0, 1_000.0)) == 0.05
    assert spread_of((7.0,)) == 0.0


def test_curves_are_drawn_as_an_image() -> None:
    points = [Point("nodes", line, x, 10.0) for line in "ab" for x in (1, 32)]

    root = ET.fromstring(svg_of([*points, Point("flight", "a", 1, 1.0)]))

    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3


def test_a_soak_counts_what_it_did_and_judges_that() -> None:
    found = soak(seconds=0.5, grains=60)

    assert found.failed == 0
    assert found.changes >= 2
    assert found.ended > 0
    assert found.calm_asks + found.asks > found.ended
    worse = replace(found, memory_off=0.04, calm_999_ms=51.0, failed=1)
    assert len(worse.broken()) == 3


def test_steps_are_told_each_with_its_way(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for name, value in (("_ROUNDS", 1), ("_TIMES", 10), ("_WAYS", 100)):
        monkeypatch.setattr(steps_module, name, value)

    assert main(["--steps", "--json", "--markdown", str(tmp_path / "s.md")]) == 0

    found = [steps_module.Step(**each) for each in json.loads(capsys.readouterr().out)]
    ways = dict.fromkeys(step.way for step in found)
    wholes = [step.way for step in found if step.name == steps_module.WHOLE]
    assert wholes == list(ways)
    assert all(step.ns > 0 for step in found if step.name == steps_module.WHOLE)
    assert len((tmp_path / "s.md").read_text().splitlines()) == len(found) + 2
    assert "encode a frame" in str(steps_module.table_of_steps(found).columns[1]._cells)


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 1.0) == 3.0
    assert percentile([], 0.999) == 0.0


@pytest.mark.parametrize(
    "benchmark",
    [
        pytest.param(each, marks=[pytest.mark.servers] if each.is_over_nats else [])
        for each in BENCHMARKS
        if each.needs <= TINY.size and not each.name.startswith(SLOW)
    ],
    ids=lambda each: each.name,
)
def test_each_benchmark_checks_its_results(benchmark: Benchmark) -> None:
    measured = benchmark.measure(TINY)

    assert len(measured.ours) == len(measured.limit) >= 1
    assert all(value > 0 for value in (*measured.ours, *measured.limit))
