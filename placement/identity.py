"""Identities: the names by which virtual actors are addressed."""

import re
from functools import lru_cache
from typing import Self

# Most identities: one look at a text of ASCII says all that the checks would.
_USUAL = re.compile(r"[A-Za-z0-9_.-]{1,64}/[ -~]{1,512}\Z")
_KIND = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

NAME_BYTES_MAX = 512


class BadIdentity(ValueError):
    """A text that is no identity, and why."""


class Identity(str):
    """`kind/name`: what sort of virtual actor, and which one of them.

    It is a `str`, so that it hashes, compares and travels at the speed of one;
    only a checked text becomes an `Identity`. The kind is 1 to 64 characters of
    `A-Z a-z 0-9 _ . -`; the name is 1 to 512 bytes of UTF-8 without control
    characters and may contain `/`.

    Raises:
        BadIdentity: kind or name break these rules.
    """

    __slots__ = ()

    def __new__(cls, kind: str, name: str) -> Self:
        """Check `kind` and `name`, and join them."""
        if not isinstance(kind, str) or not isinstance(name, str):
            raise BadIdentity("an identity is made of two texts, kind and name")
        if _KIND.match(kind) is None:
            raise BadIdentity(
                f"kind {kind[:80]!r} must be 1 to 64 of A-Z a-z 0-9 _ . -"
            )
        if not name:
            raise BadIdentity("the name after kind/ is empty")
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            raise BadIdentity(f"name {name[:80]!r} is not valid UTF-8") from None
        if size > NAME_BYTES_MAX:
            raise BadIdentity(f"name has {size} bytes, at most {NAME_BYTES_MAX}")
        if _CONTROL.search(name) is not None:
            raise BadIdentity(f"name {name[:80]!r} contains a control character")
        return str.__new__(cls, f"{kind}/{name}")

    @classmethod
    def parse(cls, text: str) -> "Identity":
        """Read `kind/name`; the first `/` divides.

        Raises:
            BadIdentity: `text` is not one.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise BadIdentity(f"an identity is a text, not {type(text).__name__}")
        return _parse(text)

    @property
    def kind(self) -> str:
        """What sort of virtual actor this is."""
        return self.partition("/")[0]

    @property
    def name(self) -> str:
        """Which one of its kind."""
        return self.partition("/")[2]

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """Copy and unpickle through the checks."""
        return (type(self), (self.kind, self.name))


@lru_cache(maxsize=1 << 16)
def _parse(text: str) -> Identity:
    # Each frame names its identity as text, and most name one seen before.
    if _USUAL.match(text) is not None:
        return str.__new__(Identity, text)
    kind, slash, name = text.partition("/")
    if not slash:
        raise BadIdentity(f"identity {text[:80]!r} is not of the form kind/name")
    return Identity(kind, name)
