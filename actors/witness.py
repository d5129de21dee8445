"""The witness: sees every start, handled message and stop, and counts doubles.

It knows nothing of leases or tokens' rules. An activation lives from its start
to its stop, or to the killing of its node; whatever an activation does while
another of the same identity, started later, has begun, is a double.
"""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from placement.entry import Pid


@dataclass(slots=True)
class Witnessed:
    """What was seen of one identity."""

    living: dict[Pid, None] = field(default_factory=dict)
    activations: int = 0
    handled: int = 0
    last: Pid | None = None


class ActivationWitness:
    """Counts, over all nodes of a process; to a file too where one is given.

    Called from many threads.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, Witnessed] = {}
        self._file = None if path is None else path.open("a", encoding="utf-8")
        self.double_count = 0
        self.activations: Counter[str] = Counter()
        self.handled_by: Counter[str] = Counter()

    def started(self, pid: Pid) -> None:
        """A new activation: a double where another lives."""
        with self._lock:
            seen = self._seen.setdefault(pid.identity, Witnessed())
            if seen.living:
                self.double_count += 1
            seen.living[pid] = None
            seen.activations += 1
            seen.last = pid
            self.activations[pid.node] += 1
            self._write("started", pid)

    def handled(self, pid: Pid) -> None:
        """A message handled: a double where a later one has been started."""
        with self._lock:
            seen = self._seen.setdefault(pid.identity, Witnessed())
            if seen.last != pid:
                self.double_count += 1
            seen.handled += 1
            self.handled_by[pid.node] += 1
            self._write("handled", pid)

    def stopped(self, pid: Pid) -> None:
        """It is over."""
        with self._lock:
            seen = self._seen.get(pid.identity)
            if seen is not None:
                seen.living.pop(pid, None)
            self._write("stopped", pid)

    def killed(self, node: str) -> None:
        """All that lived on `node` is over."""
        with self._lock:
            for seen in self._seen.values():
                for pid in [each for each in seen.living if each.node == node]:
                    del seen.living[pid]
                    self._write("stopped", pid)

    def of(self, identity: str) -> Witnessed:
        """What was seen of `identity`."""
        with self._lock:
            return self._seen.get(identity, Witnessed())

    @property
    def identity_count(self) -> int:
        """How many identities were started."""
        return len(self._seen)

    @property
    def activation_count(self) -> int:
        """How many activations were started."""
        return sum(self.activations.values())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, what: str, pid: Pid) -> None:
        if self._file is None:
            return
        line = {
            "at_ns": time.clock_gettime_ns(
                getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
            ),
            "what": what,
            "identity": pid.identity,
            "session": pid.session,
            "fencing_token": pid.fencing_token,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
