"""Requests: JSON lines of an identity and a payload, all checked before any is sent."""

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from messages.payload import copy
from placement.errors import BadMessage
from placement.identity import BadIdentity, Identity

SAMPLE = "commit-touches.jsonl.gz"
_GZIP_MAGIC = b"\x1f\x8b"


class BadRequests(ValueError):
    """Input that is not requests: which line, which field, and why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `number` is its line, from 1."""

    number: int
    identity: Identity
    payload: Any


@dataclass(frozen=True, slots=True)
class Requests:
    """All requests of an input, and the digest of its bytes (uncompressed)."""

    name: str
    digest: str
    requests: tuple[Request, ...]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def id_of(self, request: Request) -> str:
        """The id of a request: the same for the same line of the same input."""
        return f"{self.digest}:{request.number}"


def read_requests(path: str | None) -> Requests:
    """Read and check a file (plain or .gz), `-` for standard input, or the sample.

    Raises:
        BadRequests: it cannot be read, is empty, or a line is no request.
    """
    if path is None:
        sample = resources.files("actors").joinpath("data", SAMPLE)
        name, data = "the sample", sample.read_bytes()
    elif path == "-":
        name, data = "standard input", sys.stdin.buffer.read()
    else:
        name = path
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadRequests(f"{path}: {error.strerror or error}") from None
    if data.startswith(_GZIP_MAGIC) or name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise BadRequests(f"{name}: not a whole .gz file: {error}") from None
    requests = tuple(_parse(name, data))
    if not requests:
        raise BadRequests(f"{name}: there is no request in it")
    return Requests(name, hashlib.sha256(data).hexdigest()[:24], requests)


def _parse(name: str, data: bytes) -> Iterator[Request]:
    decode = msgspec.json.decode
    for number, line in enumerate(io.BytesIO(data), start=1):
        text = line.strip()
        if not text:
            continue
        where = f"{name}, line {number}"
        try:
            found = decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequests(f"{where}: not JSON: {error}") from None
        if not isinstance(found, dict):
            raise BadRequests(f"{where}: not an object with an identity")
        if "identity" not in found:
            raise BadRequests(f"{where}: field identity is missing")
        try:
            identity = Identity.parse(found["identity"])
        except BadIdentity as error:
            raise BadRequests(f"{where}: field identity: {error}") from None
        try:
            payload = copy(found.get("payload"))
        except BadMessage as error:
            raise BadRequests(f"{where}: field payload: {error}") from None
        yield Request(number, identity, payload)
