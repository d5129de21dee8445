"""The plugin as pytest runs it in a user's tests."""

import subprocess
import sys
from pathlib import Path

TESTS = """
from actors import Grain


class Echo(Grain):
    def on_receive(self, message):
        return message


def test_good(placement_simulation):
    cluster = placement_simulation(nodes=2, kinds={"echo": Echo})
    assert cluster.ref("echo/1").ask(7) == 7


def test_wrong(placement_simulation):
    cluster = placement_simulation(kinds={"echo": Echo})
    assert cluster.ref("echo/1").ask(7) == 8, f"seen seed {cluster.seed}"


def test_unsafe(placement_simulation):
    cluster = placement_simulation(kinds={"echo": Echo})
    cluster.resolve("echo/1")
    cluster.process("node-1").bug(RuntimeError("a part has failed"))
"""


def run(folder: Path, *options: str) -> str:
    (folder / "test_mine.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_failure_says_its_seed_and_a_passed_test_is_checked(tmp_path: Path) -> None:
    said = run(tmp_path, "--placement-seed", "41")

    assert "2 passed" in said
    assert "1 failed" in said
    assert "1 error" in said
    assert "seen seed 41" in said
    assert said.count("seed 41; run again with --placement-seed 41") >= 2
    assert "a part has failed" in said


def test_without_an_option_the_seed_is_the_tests_own(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)

    def seed_of(said: str) -> str:
        return said.partition("seen seed ")[2].split()[0]

    assert seed_of(first) == seed_of(second) != ""
