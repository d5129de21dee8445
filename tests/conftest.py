"""What every test is held to: the same examples each time, nothing left running."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no file in the repository that would make
# one run differ from the next. A slow machine is no failure.
settings.register_profile(
    "project",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")

# A thread that is ending when its test returns may take this long, all of them
# together; a test that leaves none does not wait at all.
THREADS_END_WITHIN_S = 5.0


def threads_left(besides: set[threading.Thread]) -> list[str]:
    """Join every thread but `besides`; name those that do not end in time."""
    until_s = time.monotonic() + THREADS_END_WITHIN_S
    left = []
    for thread in sorted(set(threading.enumerate()) - besides, key=lambda t: t.name):
        thread.join(max(0.0, until_s - time.monotonic()))
        if thread.is_alive():
            left.append(f"{thread.name} (daemon)" if thread.daemon else thread.name)
    return left


def children_left() -> list[str]:
    """Describe the child processes that nobody waited for, ended ones included."""
    left = []
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            left.append(f"{pid} (ended with {os.waitstatus_to_exitcode(status)})")
    except ChildProcessError:
        return left
    return [*left, *(running_children() or ["running, names unknown"])]


def running_children() -> list[str]:
    """Describe the child processes that still run, where /proc tells."""
    running = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name in parentheses may hold anything; the parent's id is the
            # second field after it.
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue  # ended meanwhile
        if int(stat[1]) == os.getpid():
            running.append(f"{folder.name} ({command.decode(errors='replace')})")
    return running


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Have all temporary files made in a folder of this run, by child processes too.

    Other runs on this machine make their own meanwhile.
    """
    with (
        tempfile.TemporaryDirectory(prefix="placement-tests-") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        Path(name).chmod(0o755)  # some tests run as another user
        patch.setenv("TMPDIR", name)
        patch.setattr(tempfile, "tempdir", name)
        yield Path(name)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_at_the_end(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """Fail the run that leaves a thread, child process or temporary file behind."""
    tmp_path_factory.getbasetemp()  # pytest's own are made where they always are
    with temporary_folder() as folder:
        yield
        left = [
            *(f"thread {name}" for name in threads_left({threading.main_thread()})),
            *(f"process {name}" for name in children_left()),
            *(f"file {path}" for path in sorted(folder.iterdir())),
        ]
    assert not left, f"left after all tests: {', '.join(left)}"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Fail the test that leaves a thread behind, and name the thread."""
    before = set(threading.enumerate())
    yield
    left = threads_left(before)
    assert not left, f"threads left by this test: {', '.join(left)}"
