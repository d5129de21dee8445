"""The witness: sees every start, handled message and stop, and counts doubles.

It knows nothing of leases or tokens' rules. An activation lives from its start
to its stop, or to the killing of its node; whatever an activation does while
another of the same identity, started later, has begun, is a double.
"""

import json
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from placement.entry import Pid
from placement.identity import Identity
from placement.topology import SessionId

_NOTED_MAX = 1_000_000


def machine_ns() -> int:
    """The clock that all processes of a machine share."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(slots=True)
class Witnessed:
    """What was seen of one identity."""

    living: dict[Pid, None] = field(default_factory=dict)
    activations: int = 0
    handled: int = 0
    last: Pid | None = None


class BadWitness(ValueError):
    """A file that witnesses have not written."""


class ActivationWitness:
    """Counts, over all nodes of a process; to a file too where one is given.

    Called from many threads: each call appends to one list, in the order of the
    calls, and what was seen is worked out when somebody asks.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._noted: deque[tuple[str, Pid | str]] = deque()
        self._seen: dict[str, Witnessed] = {}
        self._file = None if path is None else path.open("a", encoding="utf-8")
        self._double_count = 0
        self._activations: Counter[str] = Counter()
        self._handled_by: Counter[str] = Counter()

    def started(self, pid: Pid) -> None:
        """A new activation: a double where another lives."""
        self._note("started", pid)

    def handled(self, pid: Pid) -> None:
        """A message handled: a double where a later one has been started."""
        self._note("handled", pid)

    def stopped(self, pid: Pid) -> None:
        """It is over."""
        self._note("stopped", pid)

    def killed(self, node: str) -> None:
        """All that lived on `node` is over."""
        self._noted.append(("killed", node))

    def _note(self, what: str, pid: Pid) -> None:
        self._noted.append((what, pid))
        if self._file is not None:
            self._write(what, pid)
        if len(self._noted) > _NOTED_MAX:
            self._work_out()

    def _work_out(self) -> None:
        with self._lock:
            while self._noted:
                what, whom = self._noted.popleft()
                if isinstance(whom, Pid):
                    self._take_in(what, whom)
                else:
                    for seen in self._seen.values():
                        for pid in [p for p in seen.living if p.node == whom]:
                            del seen.living[pid]

    def _take_in(self, what: str, pid: Pid) -> None:
        seen = self._seen.setdefault(pid.identity, Witnessed())
        match what:
            case "started":
                self._double_count += bool(seen.living)
                seen.living[pid] = None
                seen.activations += 1
                seen.last = pid
                self._activations[pid.node] += 1
            case "handled":
                self._double_count += seen.last != pid
                seen.handled += 1
                self._handled_by[pid.node] += 1
            case _:
                seen.living.pop(pid, None)

    def of(self, identity: str) -> Witnessed:
        """What was seen of `identity`."""
        self._work_out()
        return self._seen.get(identity, Witnessed())

    @property
    def double_count(self) -> int:
        """How often an activation did something while a later one had begun."""
        self._work_out()
        return self._double_count

    @property
    def activations(self) -> Counter[str]:
        """How many activations each node started."""
        self._work_out()
        return self._activations

    @property
    def handled_by(self) -> Counter[str]:
        """How many messages each node handled."""
        self._work_out()
        return self._handled_by

    @property
    def identity_count(self) -> int:
        """How many identities were started."""
        self._work_out()
        return sum(1 for seen in self._seen.values() if seen.activations)

    @property
    def activation_count(self) -> int:
        """How many activations were started."""
        return sum(self.activations.values())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, what: str, pid: Pid) -> None:
        assert self._file is not None
        line = {
            "at_ns": machine_ns(),
            "what": what,
            "identity": pid.identity,
            "session": pid.session,
            "fencing_token": pid.fencing_token,
        }
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


class FileWitness(ActivationWitness):
    """What the processes of a machine have written to one file, in its order of time.

    Counts what was seen from `since_ns` of the machine's clock on; doubles, of all
    that is there. A process that was killed says so to nobody: its activations are
    over when a later one starts, and doubles if they handle a message after that;
    so is one that starts under a token that is not greater.

    Raises:
        BadWitness: it is not such a file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, *, since_ns: int = 0) -> None:
        super().__init__()
        self._is_counted = False
        lines: list[tuple[int, str, Pid]] = []
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    break  # whoever wrote it was killed meanwhile
                try:
                    found = json.loads(line)
                    pid = Pid(
                        Identity.parse(found["identity"]),
                        SessionId(found["session"]),
                        found["fencing_token"],
                    )
                    lines.append((found["at_ns"], found["what"], pid))
                except (ValueError, KeyError, TypeError):
                    raise BadWitness(f"{path}, line {number}: no witness") from None
        for at_ns, what, pid in sorted(lines, key=lambda each: each[0]):
            self._is_counted = at_ns >= since_ns
            self._take_in(what, pid)

    def _take_in(self, what: str, pid: Pid) -> None:
        seen = self._seen.setdefault(pid.identity, Witnessed())
        last = seen.last
        match what:
            case "started":
                is_later = last is None or pid.fencing_token > last.fencing_token
                self._double_count += not is_later
                seen.last = pid
                seen.activations += self._is_counted
                self._activations[pid.node] += self._is_counted
            case "handled":
                self._double_count += last is not None and pid != last
                seen.handled += self._is_counted
                self._handled_by[pid.node] += self._is_counted
