"""The absences that no file shows: what is never imported, what no class is called."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SUFFIXES_THAT_SAY_NOTHING = (
    "Facade",
    "Helper",
    "Helpers",
    "Manager",
    "Managers",
    "Runtime",
    "Service",
    "Services",
    "Util",
    "Utils",
)


def parsed_modules(package: str) -> list[tuple[str, ast.Module]]:
    """Parse every module of a package; its path goes with each."""
    return [
        (str(path.relative_to(ROOT)), ast.parse(path.read_bytes(), path))
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def imported_packages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Name the top-level package of every import, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield node.lineno, name.name.partition(".")[0]
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module.partition(".")[0]


def test_placement_imports_the_standard_library_and_xxhash_only() -> None:
    allowed = sys.stdlib_module_names | {"placement", "xxhash"}
    modules = parsed_modules("placement")

    strangers = [
        f"{path}:{line} imports {package}"
        for path, tree in modules
        for line, package in imported_packages(tree)
        if package not in allowed
    ]

    assert modules
    assert strangers == []


@pytest.mark.parametrize("package", ["placement", "messages", "actors"])
def test_r5_no_class_has_a_suffix_that_says_nothing(package: str) -> None:
    modules = parsed_modules(package)

    nameless = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in modules
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and node.name.endswith(SUFFIXES_THAT_SAY_NOTHING)
    ]

    assert modules
    assert nameless == []
