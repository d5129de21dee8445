import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent
NAME = re.compile(r"_r([1-4])_(\d)")
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
