"""Several processes at one store, for tests."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from placement.identity import Identity
from placement.topology import SessionId

ROOT = Path(__file__).parents[2]

CLAIMING = """
import sys
from actors.store_url import open_store
from placement.contracts import *
from placement.entry import Acquisition
from placement.identity import Identity
print("ready", flush=True)
sys.stdin.readline()
store, me = open_store(sys.argv[1]), sys.argv[2]
store.open_session(SessionRecord(session=me, ttl_ms=5000))
for number in range(int(sys.argv[3])):
    identity, mine = Identity("race", str(number)), Acquisition(me, number)
    (acquired,) = store.try_acquire([Acquire(identity, mine)])
    # Also without the lock: the claim alone has to exclude the others.
    revision = acquired.entry.revision if isinstance(acquired, Acquired) else 0
    (claimed,) = store.claim([Claim(identity, me, number, mine, revision)])
    store.release([Release(identity, mine)])
    if isinstance(claimed, Claimed):
        print(number, claimed.entry.fencing_token)
store.close()
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process of this project; it says how far it is by lines."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_all(processes: Sequence[subprocess.Popen[str]]) -> list[list[str]]:
    """Wait for processes that all do the same at once; the lines of each."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


def race(url: str) -> dict[Identity, SessionId]:
    """Let four processes claim the same identities; who claimed each, alone."""
    sessions = [SessionId(f"node-{name}.1#1") for name in "abcd"]

    said = run_all([start(CLAIMING, url, session, 100) for session in sessions])

    won = [line.split() for lines in said for line in lines]
    assert sorted(int(number) for number, _ in won) == list(range(100))
    assert len({token for _, token in won}) == 100
    return {
        Identity("race", line.split()[0]): session
        for session, lines in zip(sessions, said, strict=True)
        for line in lines
    }
