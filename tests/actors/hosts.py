"""Hosts of their own for processes: network namespaces, and cables that can be cut.

    hub       198.18.1.1 what peers hear each other by    198.18.2.1 the store
    host N    198.18.1.(10 + N)                           198.18.2.(10 + N)

Nothing else can be reached from within, and nothing of it from outside.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.actors.system_needs import lacking

LANES = {"peers": "198.18.1", "store": "198.18.2"}


class Hosts:
    """A hub and hosts, each with a cable to it for each lane."""

    def __init__(self) -> None:
        self._name = f"pl{secrets.token_hex(2)}"
        self._made: list[str] = []

    @property
    def hub(self) -> list[str]:
        """What begins a command line that is to run in the hub."""
        return self.within(0)

    def within(self, number: int) -> list[str]:
        """What begins a command line that is to run in that host."""
        return ["ip", "netns", "exec", self._space(number)]

    def address(self, lane: str) -> str:
        """That of the hub."""
        return f"{LANES[lane]}.1"

    def make(self, count: int) -> None:
        """Make the hub, and so many hosts, numbered from 1 on."""
        self._make_space(0)
        for lane in LANES:
            _in(self._space(0), "link", "add", lane, "type", "bridge")
            self._connect(0, lane, lane, 1)
        for number in range(1, count + 1):
            self._make_space(number)
            for lane in LANES:
                cable, space = self._cable(number, lane), self._space(number)
                far = ("name", lane, "netns", space)
                _in(self._space(0), "link", "add", cable, "type", "veth", "peer", *far)
                _in(self._space(0), "link", "set", cable, "master", lane, "up")
                self._connect(number, lane, lane, 10 + number)

    def cut(self, number: int, lane: str) -> None:
        """Let nothing pass between that host and the hub, nor say so."""
        _in(self._space(0), "link", "set", self._cable(number, lane), "down")

    def heal(self, number: int, lane: str) -> None:
        """Let everything pass again."""
        _in(self._space(0), "link", "set", self._cable(number, lane), "up")

    def remove(self) -> None:
        """Leave nothing; what ran within has ended."""
        for space in self._made:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", space)

    def _make_space(self, number: int) -> None:
        _ip("netns", "add", self._space(number))
        self._made.append(self._space(number))
        _in(self._space(number), "link", "set", "lo", "up")

    def _connect(self, number: int, lane: str, device: str, last: int) -> None:
        address = f"{LANES[lane]}.{last}/24"
        _in(self._space(number), "address", "add", address, "dev", device)
        _in(self._space(number), "link", "set", device, "up")

    def _space(self, number: int) -> str:
        return f"{self._name}-{number}"

    def _cable(self, number: int, lane: str) -> str:
        return f"{lane}-{number}"


def _in(space: str, *args: str) -> None:
    _ip("-n", space, *args)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@contextmanager
def network_hosts(count: int) -> Iterator[Hosts]:
    """Have that many hosts; nothing of them is left afterwards."""
    if shutil.which("ip") is None:
        lacking(
            "network namespaces need the program ip (Debian: apt-get install iproute2)"
        )
    if os.geteuid() != 0:
        lacking("network namespaces need root")
    hosts = Hosts()
    try:
        try:
            hosts.make(count)
        except subprocess.CalledProcessError as error:
            lacking(
                f"network namespaces are not permitted here: {error.stderr.strip()}"
            )
        yield hosts
    finally:
        hosts.remove()
