import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest

from messages.codec import Codec
from messages.frames import ANY_NODE, FRAMES, VERSION, Envelope, Find, Number
from messages.pack import FRAMES_MAX
from messages.payload import BYTES_MAX, DEPTH_MAX
from placement.errors import REASONS, HandlerFailed, PlacementError, Rejected

PAGE = files("messages").joinpath("CLIENTS.md").read_text(encoding="utf-8")
GOLDEN = Path(__file__).parents[1] / "data" / "frames"
BY_NAME = {frame.__name__: frame for frame in FRAMES}
TYPES: dict[str, Any] = {
    "int": Number,
    "str": str,
    "any": Any,
    "array of str": tuple[str, ...],
    "map with str keys": dict[str, Any],
}
DEFAULTS = {"0": 0, "[]": ()}


def rows(heading: str) -> list[list[str]]:
    """The rows of the table under that heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines, heading
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def field_of(text: str) -> tuple[str, Any, Any]:
    found = re.fullmatch(r"`(\w+)` ([a-z ]+?)(?: = (\S+))?", text)
    assert found is not None, text
    default = msgspec.NODEFAULT if found[3] is None else DEFAULTS[found[3]]
    return found[1], TYPES[found[2]], default


@pytest.mark.parametrize(
    ("tag", "name", "fields"),
    [*rows("What a client says"), *rows("What a client hears")],
)
def test_the_fields_of_a_frame_are_those_of_the_page(
    tag: str, name: str, fields: str
) -> None:
    frame = BY_NAME[name.strip("`")]
    assert frame.__struct_config__.tag == int(tag)
    assert [field_of(text) for text in fields.split(", ")] == [
        (each.name, each.type, each.default) for each in msgspec.structs.fields(frame)
    ]


def test_the_envelope_is_that_of_the_page() -> None:
    names = [row[0].strip("`") for row in rows("Envelope")]
    assert tuple(names) == Envelope.__struct_fields__
    assert f"`[{', '.join(names)}]`" in PAGE
    assert rows("Envelope")[0][2] == str(VERSION)


def test_the_page_shows_a_golden_frame_of_each_that_it_tells_of() -> None:
    told = [
        row[1] for side in ("says", "hears") for row in rows(f"What a client {side}")
    ]
    assert sorted(row[0] for row in rows("Golden frames")) == sorted(told)


@pytest.mark.parametrize(("name", "body", "data"), rows("Golden frames"))
def test_a_golden_frame_of_the_page_is_that_of_the_codec(
    name: str, body: str, data: str
) -> None:
    plain = re.sub(r'h"([0-9a-f]*)"', r'bytes.fromhex("\1")', body.strip("`"))
    tag, *fields = eval(plain, {"nil": None, "bytes": bytes})
    frame: Any = msgspec.convert([tag, *fields], BY_NAME[name.strip("`")])
    receiver = ANY_NODE if isinstance(frame, Find) else "b.1"

    golden = bytes.fromhex((GOLDEN / f"{type(frame).__name__}.hex").read_text())

    assert bytes.fromhex(data.strip("`")) == golden
    assert Codec("default").encode("a.1", receiver, 7, frame) == golden


def test_the_reasons_of_the_page_are_those_that_there_are() -> None:
    known: dict[str, type[PlacementError]] = {
        **REASONS,
        "HandlerFailed": HandlerFailed,
        "Rejected": Rejected,
    }
    del known[PlacementError.__name__]
    assert {reason.strip("`"): may for reason, may, _ in rows("Refusals")} == {
        name: "yes" if error.may_have_happened else "no"
        for name, error in known.items()
    }


def test_the_limits_of_the_page_are_those_that_there_are() -> None:
    assert f"nested {DEPTH_MAX} deep and {BYTES_MAX >> 20} MiB in all" in PAGE
    assert f"2 to\n{FRAMES_MAX:,} frames" in PAGE
