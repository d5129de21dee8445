"""The command simulate, and the trials that it performs."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from actors import simulate_command
from actors.faults import FAULTS, MUTE, BadFaults, Episode, parse_faults, plan
from actors.main import main
from actors.simulate import Witnessed, simulate
from actors.trial import Scenario, Trial

SMALL = Scenario(nodes=3, identities=20, requests=300, faults=FAULTS)
SMALL_OPTIONS = ["--nodes", "3", "--identities", "20", "--requests", "300"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *arguments])


def test_a_simulation_sums_up_under_the_fixed_names() -> None:
    done = run(*SMALL_OPTIONS, "--seed", "5", "--seeds", "3", "--jobs", "1", "--json")

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == [
        "runs",
        "messages",
        "answered",
        "refused",
        "unknown",
        "faults",
        "violations",
        "first_violation",
        "trace_hash",
        "seconds",
    ]
    assert found["runs"] == 3
    assert found["violations"] == 0
    assert found["first_violation"] is None
    assert found["answered"] > 0.5 * 900
    assert set(found["faults"]) == set(FAULTS)


def test_without_faults_every_request_is_answered() -> None:
    done = run(*SMALL_OPTIONS, "--faults", "none", "--json")

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["answered"] >= 300
    assert found["unknown"] == found["refused"] == 0
    assert found["faults"] == {}


ROOT = Path(__file__).parents[2]
TOLD_OFTEN = (
    "import actors.simulate_command as it\n"
    "it._TOLD_EVERY_S = 0.0\n"
    "from actors.main import main\n"
    "if __name__ == '__main__': main()\n"
)
HASH = (
    "from actors.simulate import simulate\n"
    "from actors.trial import Scenario\n"
    "from actors.faults import FAULTS\n"
    "if __name__ == '__main__':\n"
    "    scenario = Scenario(nodes=3, identities=20, requests=300, faults=FAULTS)\n"
    "    found = simulate(range(7, 10), scenario, jobs={jobs})\n"
    "    print(found.as_json()['trace_hash'])\n"
)


def hash_of(tmp_path: Path, hash_seed: str, jobs: int) -> str:
    program = tmp_path / f"hash_{hash_seed}_{jobs}.py"
    program.write_text(HASH.format(jobs=jobs))
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


@pytest.mark.seeds
def test_the_same_seeds_give_the_same_hash_whatever_runs_them(tmp_path: Path) -> None:
    wanted = simulate(range(7, 10), SMALL).as_json()["trace_hash"]

    assert hash_of(tmp_path, "0", 1) == wanted
    assert hash_of(tmp_path, "1", 2) == wanted
    assert hash_of(tmp_path, "random", 1) == wanted
    assert simulate(range(8, 11), SMALL).as_json()["trace_hash"] != wanted


def test_a_trial_is_repeated_with_all_its_frames(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    done = run(*SMALL_OPTIONS, "--seed", "7", "--trace", str(trace))

    assert done.exit_code == 0, done.output
    assert "trace_hash" in done.stdout
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [row["at_ns"] for row in rows] == sorted(row["at_ns"] for row in rows)
    assert {"Asked", "Ended", "Entered", "Frame", "EntryClaimed"} <= {
        row["what"] for row in rows
    }
    again = Witnessed(7, SMALL)
    assert again.result.trace_hash == Trial(7, SMALL).perform().trace_hash
    assert again.frames


def test_a_trial_without_one_episode_is_otherwise_the_same_plan() -> None:
    whole = plan(3, FAULTS, duration_s=50.0, ttl_s=2.0)
    fewer = plan(3, ("crash", "pause"), duration_s=50.0, ttl_s=2.0)

    assert {episode.kind for episode in whole} == set(FAULTS) - {"drift"}
    assert fewer == tuple(e for e in whole if e.kind in {"crash", "pause"})
    assert all(e.at_s + e.for_s <= 50.0 for e in whole)


def test_faults_are_named_and_unknown_ones_refused() -> None:
    assert parse_faults("none") == ()
    assert parse_faults("all") == FAULTS
    assert parse_faults("all, store-stale,drop") == (*FAULTS, "store-stale")
    assert parse_faults("drop, pause,drop") == ("drop", "pause")
    with pytest.raises(BadFaults, match="unknown fault 'rain'"):
        parse_faults("drop,rain")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--faults", "rain"], "unknown fault 'rain'"),
        (["--defect", "nothing"], "unknown defect 'nothing'"),
        (["--seed", "x"], "--seed 'x' is neither random nor a number"),
        (["--seed", "-1"], "--seed '-1' is neither"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--identities", "1"], "--identities must be at least 2"),
        (["--trace", "/no/such/folder/t.jsonl"], "there is no such folder"),
    ],
)
def test_what_makes_no_sense_ends_with_2(arguments: list[str], said: str) -> None:
    done = run(*arguments)

    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_a_seed_may_be_drawn_and_is_printed() -> None:
    done = run(*SMALL_OPTIONS, "--seed", "random", "--faults", "none", "--json")

    assert done.exit_code == 0, done.output
    assert "placement: seed " in done.stderr


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_trials_end_with_130_and_what_was_done(
    jobs: str, number: int
) -> None:
    command = [sys.executable, "-c", TOLD_OFTEN, "simulate", *SMALL_OPTIONS]
    command += ["--seeds", "100000", "--jobs", jobs, "--json"]
    # As a shell starts a program that Ctrl-C ends: with all its processes.
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as started:
        assert started.stderr is not None
        first = started.stderr.readline()
        if number == signal.SIGINT:
            os.killpg(started.pid, number)
        else:
            started.send_signal(number)
        out, said = started.communicate(timeout=60)

    assert re.fullmatch(r"placement: \d+ of 100000 trials, 0 violations\n", first)
    assert started.returncode == 130
    found = json.loads(out)
    assert 0 < found["runs"] < 100_000
    assert found["violations"] == 0
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        f"placement: {found['runs']} of 100000 trials were done"
    )


def test_what_was_found_before_an_interrupt_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = ("duplicate", "grain", "store-slow", "churn")
    broken = replace(SMALL, faults=faults, defect="handled-twice")
    found = simulate(range(1, 2), broken)
    assert found.violations
    monkeypatch.setattr(simulate_command, "simulate", lambda *_, **__: found)

    done = run(*SMALL_OPTIONS, "--seeds", "3", "--json")

    assert done.exit_code == 1
    assert "placement: 1 of 3 trials were done" in done.stderr
    assert "seed 1 breaks " in done.stderr


def calm(episodes: tuple[Episode, ...], *kinds: str) -> tuple[Any, ...]:
    return tuple(each for each in episodes if each.kind in kinds)


@pytest.mark.seeds
def test_clocks_beyond_the_assumed_bound_are_seen_to_break_a_rule() -> None:
    """The margin covers clocks that differ by a ninth; these differ by half."""
    scenario = Scenario(faults=(*FAULTS, "drift-beyond"), requests=2_000)
    found = simulate(range(1, 31), scenario, until_first=True)

    assert found.violations
    assert found.first is not None
    assert found.first[1].rule in {"one-activation", "closed-session", "owner-open"}


@pytest.mark.seeds
def test_where_nobody_is_told_who_has_left_no_rule_is_broken_either() -> None:
    found = Trial(2, Scenario(faults=(*FAULTS, MUTE), requests=2_000)).perform()
    assert found.violations == ()
    assert found.faults[MUTE] > 0
    # Who leaves in good order gives everything back: no outcome is unknown.
    calm = Trial(3, Scenario(faults=("churn", MUTE), requests=2_000)).perform()
    assert calm.violations == ()
    assert min(calm.faults[MUTE], calm.answered) > 0
    assert calm.unknown == calm.refused == 0


def test_a_broken_rule_ends_with_1_and_is_told_shrunk() -> None:
    done = run(
        *SMALL_OPTIONS,
        "--defect",
        "handled-twice",
        "--seeds",
        "40",
        "--jobs",
        "1",
        "--faults",
        "duplicate,grain,store-slow,churn",
        "--shrink",
        "--json",
    )

    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert found["violations"] > 0
    assert found["runs"] == 1
    assert found["first_violation"]["seed"] == 1
    assert found["first_violation"]["rule"] == "handled-once"
    assert "seed 1 breaks handled-once: " in done.stderr
    assert "Deliver" in done.stderr
    assert "1 episodes of faults are enough:\n  duplicate" in done.stderr
    assert "again: placement simulate --seed 1 " in done.stderr
    assert "--defect handled-twice --nodes 3" in done.stderr


def test_the_known_defects_are_listed() -> None:
    assert "handled-twice" in run("--defect", "list").stdout
    listed = json.loads(run("--defect", "list", "--json").stdout)
    assert len(listed) >= 16
    assert listed["handled-twice"] == ["handled-once"]
