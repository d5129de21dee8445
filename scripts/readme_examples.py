"""Runs the examples of README.md, each in a fresh interpreter.

An example is a fenced block whose info is exactly `python`; one marked
`python no-run` is for reading only. A README without an example fails too.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"

# A fence is three backticks or more, and ends with as many at least, so that a
# block may show a shorter fence inside.
FENCE = re.compile(r"^ {0,3}(?P<ticks>`{3,})(?P<info>[^`]*)$")

# A wait without an end in an example must not become one here.
SECONDS_MAX = 120


def examples(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Find the examples: the line number of each one's fence, and its source.

    The source begins with as many empty lines as the README has before it, so
    that a traceback names the README's own lines.

    Raises:
        ValueError: a fence is never closed.
    """
    opened: tuple[int, str, str] | None = None
    body: list[str] = []
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence is not None:
                opened = number, fence["ticks"], fence["info"].strip()
                body = []
            continue
        at, ticks, info = opened
        if fence is None or fence["info"].strip() or len(fence["ticks"]) < len(ticks):
            body.append(line)
            continue
        opened = None
        if info == "python":
            yield at, "\n" * at + "\n".join(body) + "\n"
    if opened is not None:
        raise ValueError(f"{README.name}:{opened[0]}: this fence is never closed")


def failure_of(source: str) -> str | None:
    """Run one example, warnings being errors; tell how it failed, if it did."""
    # An example may leave files behind: they go with its folder.
    with tempfile.TemporaryDirectory() as folder:
        example = Path(folder, "readme_example.py")
        example.write_text(source, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-W", "error", example],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            printed = (expired.output or b"").decode(errors="replace")
            return f"{printed}still running after {SECONDS_MAX} s"
    if done.returncode == 0:
        return None
    return f"{done.stdout.decode(errors='replace')}exit status {done.returncode}"


def main() -> int:
    """Run every example, the later ones also where an earlier one failed."""
    try:
        found = list(examples(README.read_text(encoding="utf-8").splitlines()))
    except ValueError as error:
        print(error)
        return 1
    if not found:
        print(f"{README.name}: no block fenced as ```python, so nothing was run")
        return 1
    failed_count = 0
    for number, source in found:
        failure = failure_of(source)
        print(f"{README.name}:{number}: {'ok' if failure is None else 'FAILED'}")
        if failure is not None:
            print(failure)
            failed_count += 1
    return 1 if failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
