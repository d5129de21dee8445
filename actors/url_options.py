"""Options of URLs: what follows the `?`, as name=value and joined by `&`."""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote

#: What to raise, from what is wrong.
Refuse: TypeAlias = Callable[[str], Exception]

_NUMBER = re.compile(r"[0-9]{1,10}")


class Option(NamedTuple):
    """The value of an option; and the whole of it, as it is written."""

    value: str
    written: str


def read_options(
    query: str, known: Collection[str], *, names: str = "", refuse: Refuse
) -> dict[str, Option]:
    """The options of `query` by their names, which must be `known` ones.

    `names` says which these are; unless given, it is all of them. No value is shown
    by what is refused: it may be a secret, or a part of one that holds an `&`.
    """
    options: dict[str, Option] = {}
    for written in query.split("&"):
        name, _, value = written.partition("=")
        name = unquote(name)
        if not name or not value:
            what = f"option {name} has no value" if name in known else _NOT_AN_OPTION
            raise refuse(what)
        if name not in known:
            raise refuse(
                f"unknown option {name!r}; known are {names or ', '.join(known)}"
            )
        if name in options:
            raise refuse(f"option {name} is given twice")
        options[name] = Option(unquote(value), written)
    return options


_NOT_AN_OPTION = "an option is not name=value"


def number_of(
    name: str, text: str, *, smallest: int = 1, largest: int, refuse: Refuse
) -> int:
    """The number that an option is given as."""
    if not _NUMBER.fullmatch(text) or not smallest <= int(text) <= largest:
        raise refuse(f"{name} must be a number from {smallest} to {largest}")
    return int(text)
