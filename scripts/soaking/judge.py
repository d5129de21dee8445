"""The verdict: the witness of all processes together, and what a pause excuses."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.witness import FileWitness


@dataclass(frozen=True, slots=True)
class Pause:
    """A process stood still until `continued_ns`; it writes `witness`."""

    witness: Path
    continued_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Doubles, but those that were `in_hand`.

    A message that had passed the guard when its process was stopped is handled when
    it goes on: one for each pause, which no guard can prevent. Its save is refused.
    """

    activations: int
    double_activations: int
    in_hand: int


def judge(folder: Path, pauses: Sequence[Pause]) -> Verdict:
    """Judge what the processes have written to `folder`."""
    lines = [line for path in sorted(folder.glob("*.witness")) for line in _whole(path)]
    merged = FileWitness(_written(folder, lines))
    in_hand = 0
    for pause in pauses if merged.double_count else ():
        first = _first_after(pause)
        if first is not None:
            in_hand += _is_double(folder, first, lines)
    return Verdict(
        activations=merged.activation_count,
        double_activations=merged.double_count - in_hand,
        in_hand=in_hand,
    )


def _first_after(pause: Pause) -> str | None:
    for line in _whole(pause.witness):
        found = json.loads(line)
        if found["at_ns"] >= pause.continued_ns and found["what"] != "stopped":
            return line
    return None


def _is_double(folder: Path, line: str, lines: Iterable[str]) -> bool:
    """Whether there are fewer doubles without `line`."""
    identity: Any = json.loads(line)["identity"]
    of_it = [each for each in lines if f'"{identity}"' in each]
    without = [each for each in of_it if each != line]
    counts = [
        FileWitness(_written(folder, each)).double_count for each in (of_it, without)
    ]
    return counts[0] > counts[1]


def _whole(path: Path) -> list[str]:
    """The lines of a file, but a last one that its writer was killed in."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _written(folder: Path, lines: Iterable[str]) -> Path:
    path = folder / "witness"
    path.write_text("".join(lines), encoding="utf-8")
    return path
