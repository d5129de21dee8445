"""The soak of real processes: its schedule, its verdict, its ends."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scripts.soak import NODES, main
from scripts.soaking.judge import Pause, judge
from scripts.soaking.schedule import Fault, schedule
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
SHORT = ("--minutes", "0.1", "--ttl", "1", "--json")


def scheduled(seed: int, *, seconds: float = 60.0) -> dict[str, tuple[Fault, ...]]:
    return schedule(seed, seconds=seconds, ttl_s=2.0, nodes=NODES, has_store=True)


# --- the schedule ---


def test_a_seed_is_one_schedule_and_another_seed_another() -> None:
    assert scheduled(1) == scheduled(1)
    assert scheduled(1) != scheduled(2)


def test_a_minute_has_every_fault_and_ends_all_in_time() -> None:
    for seed in range(50):
        faults = [fault for each in scheduled(seed).values() for fault in each]

        assert {fault.what for fault in faults} == {
            *("kill", "pause", "drain"),
            *("server-kill", "server-pause", "store-cut", "store-crash"),
        }
        assert all(0 < each.at_s <= each.at_s + each.lasts_s <= 60 for each in faults)
        assert all(each.lasts_s <= 6 for each in faults)


def test_faults_of_one_target_do_not_overlap() -> None:
    for faults in scheduled(3, seconds=600.0).values():
        assert len({fault.target for fault in faults}) == 1
        for former, later in pairwise(faults):
            assert former.at_s + former.lasts_s <= later.at_s


# --- the verdict ---


def written(path: Path, *seen: tuple[int, str, int]) -> Path:
    lines = [
        {
            "at_ns": at_ns,
            "what": what,
            "identity": "file/1",
            "session": f"{path.stem}.1#1",
            "fencing_token": token,
        }
        for at_ns, what, token in seen
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def test_what_was_in_hand_when_a_process_was_stopped_is_excused_once(
    tmp_path: Path,
) -> None:
    one = written(
        tmp_path / "one.witness", (1, "started", 1), (10, "handled", 1), (11, "x", 1)
    )
    written(tmp_path / "two.witness", (5, "started", 2), (6, "handled", 2))

    unexcused = judge(tmp_path, [])
    assert (unexcused.double_activations, unexcused.in_hand) == (1, 0)
    excused = judge(tmp_path, [Pause(one, 9)])
    assert (excused.double_activations, excused.in_hand) == (0, 1)
    assert excused.activations == 2

    written(one, (1, "started", 1), (10, "handled", 1), (11, "handled", 1))
    assert judge(tmp_path, [Pause(one, 9)]).double_activations == 1


def test_a_line_that_its_writer_was_killed_in_is_not_read(tmp_path: Path) -> None:
    one = written(tmp_path / "one.witness", (1, "started", 1))
    one.write_text(one.read_text() + '{"at_ns": 2')
    written(tmp_path / "two.witness", (3, "started", 2))

    assert judge(tmp_path, []).activations == 2


# --- whole soaks ---


@pytest.mark.parametrize(
    "arguments",
    [
        ("--minutes", "0"),
        ("--minutes", "x"),
        ("--ttl", "0"),
        ("--seed", "x"),
        ("--store", "memory"),
        ("leftover",),
    ],
)
def test_wrong_arguments_end_with_exit_code_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert "scripts/soak" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.servers
@pytest.mark.parametrize("store", ["nats", "postgres"])
def test_r2_5_some_seconds_of_faults_lose_no_count_and_have_no_double(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*SHORT, "--seed", "1", "--store", store])

    printed = capsys.readouterr()
    assert code == 0, printed.err
    found = json.loads(printed.out)
    assert found["seed"] == 1
    assert found["store"] == store
    assert found["violations"] == []
    assert found["double_activations"] == 0
    # Each at least once, at the end.
    assert found["answered"] >= 300
    assert found["asks"] == found["answered"] + found["refused"]
    assert found["activations"] >= 300
    assert found["longest_wait_s"] > 0
    assert sum(found["faults"].values()) >= 1
    assert printed.err == ""


@pytest.mark.long
@pytest.mark.servers
def test_r2_5_nodes_that_share_no_truth_end_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    stores = [f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "two")]

    assert main([*SHORT, "--seed", "7"], stores=stores) == 1

    printed = capsys.readouterr()
    assert json.loads(printed.out)["double_activations"] > 0
    assert "seed 7: file/" in printed.err
    assert "double activations" in printed.err


@pytest.mark.servers
def test_ctrl_c_ends_a_soak_and_leaves_no_process_behind(tmp_path: Path) -> None:
    def processes() -> list[str]:
        found: list[str] = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().decode(errors="replace")
            except OSError:
                continue  # it has ended meanwhile
            found += [text] if str(tmp_path) in text else []
        return found

    def has_seen(witness: Path) -> bool:
        return "handled" in witness.read_text()

    soak = subprocess.Popen(
        [sys.executable, "scripts/soak.py", "--seed", "1", "--ttl", "1"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # Not in all folders: the server's own come and go.
        witnesses = "soak-*/*.witness"
        eventually(lambda: any(has_seen(each) for each in tmp_path.glob(witnesses)))
        assert len(processes()) >= 1 + len(NODES)
        soak.send_signal(signal.SIGINT)
        said: Any = soak.communicate(timeout=60)
    finally:
        soak.kill()
        soak.wait()

    assert soak.returncode == 130, said
    assert said == ("", "scripts/soak: interrupted\n")
    assert processes() == []
    assert list(tmp_path.iterdir()) == []
