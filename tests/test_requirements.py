import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent
# A word of its own: in `test_r2_5_a_lease`, not in `test_four_2_5` or `_r2_50`.
NAME = re.compile(r"(?<=_)r([1-4])_(\d)(?=_)")
WANTED = {
    *((1, number) for number in range(1, 6)),
    *((2, number) for number in range(1, 6)),
    *((3, number) for number in range(1, 7)),
    *((4, number) for number in range(1, 6)),
}


def test_every_requirement_is_named_by_a_test() -> None:
    found = {
        (int(part), int(number))
        for path in ROOT.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for part, number in NAME.findall(node.name)
    }

    assert WANTED - found == set()


def test_only_a_whole_word_of_a_name_is_a_requirement() -> None:
    assert NAME.findall("test_r2_5_two_never_host_it_r3_1_nor_lock_it") == [
        ("2", "5"),
        ("3", "1"),
    ]
    for name in ("test_r2_5", "test_r2_50_times", "test_for2_5_times", "test_r5_1_x"):
        assert NAME.findall(name) == []
