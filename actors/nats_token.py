"""Tokens: a text as one part of a subject or key of NATS, and back.

What a token cannot hold is written as `=` and two hexadecimal digits for each byte.
"""

import re

from messages.codec import BadFrame

_PLAIN = re.compile(rb"[^A-Za-z0-9_-]")
_PLAIN_KEY = re.compile(rb"[^A-Za-z0-9_/-]")
_ALL_PLAIN_KEY = re.compile(r"[A-Za-z0-9_/-]+\Z")
_ESCAPED = re.compile(rb"=([0-9A-F]{2})")


def token_of(text: str) -> str:
    """`text` as one token of a subject; no two texts have the same.

    Raises:
        UnicodeEncodeError: `text` is not valid UTF-8.
    """
    return _escaped(_PLAIN, text)


def key_token_of(text: str) -> str:
    """The same for a key, in which the / of an identity stays as it is."""
    return text if _ALL_PLAIN_KEY.match(text) else _escaped(_PLAIN_KEY, text)


def text_of_token(token: str) -> str:
    """The text of which `token_of` makes `token`.

    Raises:
        BadFrame: it makes that of none.
    """
    try:
        text = text_of_key_token(token)
    except UnicodeError:
        text = ""
    if not text or token_of(text) != token:
        raise BadFrame(f"{token!r} is no name in a subject")
    return text


def text_of_key_token(token: str) -> str:
    """The text of which `key_token_of` has made `token`."""
    return _ESCAPED.sub(
        lambda found: bytes.fromhex(found[1].decode()), token.encode()
    ).decode()


def _escaped(others: "re.Pattern[bytes]", text: str) -> str:
    return others.sub(lambda found: b"=%02X" % found[0][0], text.encode()).decode()
