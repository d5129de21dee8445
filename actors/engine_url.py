"""Engine URLs: what carries messages between processes, named by a URL."""

from typing import TYPE_CHECKING

from actors.engine import Settings

if TYPE_CHECKING:
    from actors.engine_nats import NatsEngine

__all__ = ["BadEngine", "check_engine", "engine_text", "open_engine"]


class BadEngine(ValueError):
    """The URL names no engine, or the engine is of no use with these settings."""


def open_engine(
    url: str, store: str | None, settings: Settings, *, adopts: bool = False
) -> "NatsEngine":
    """The engine that `url` names, on its own store, or on the one that is named.

    With `adopts` the settings are those of the cluster, where there is one.

    Raises:
        BadEngine: `url` is none, or the cluster there has other settings.
        BadStore: the store cannot be one.
        NatsFailure: it cannot be reached, or does not let us in.
        StoreFailure: the store cannot be opened now.
    """
    check_engine(url)
    from actors.engine_nats import NatsEngine  # noqa: PLC0415  few have it

    return NatsEngine(url, store, settings=settings, adopts=adopts)


def check_engine(url: str) -> None:
    """Check that `url` may be an engine; its text is not shown: it may hold secrets.

    Raises:
        BadEngine: it is none.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise BadEngine("an engine is a URL such as nats://127.0.0.1:4222")
    if scheme.lower() != "nats":
        raise BadEngine(f"unknown engine {scheme!r}; known is nats://")


def engine_text(url: str) -> str:
    """The engine that `url` names, without what is secret.

    Raises:
        BadEngine: it is none.
    """
    check_engine(url)
    from actors.nats_connection import parse_nats_url  # noqa: PLC0415  few use it
    from actors.store_nats import OPTIONS  # noqa: PLC0415

    return str(parse_nats_url(url, more=OPTIONS))
