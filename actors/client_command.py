"""`placement resolve`, `ask`, `tell` and `status`: talk to running nodes."""

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import click
import msgspec

from actors.engine import Settings
from actors.engine_url import open_engine
from actors.exits import FAILED, wrong
from actors.nats_connection import NatsFailure
from actors.node import PlacementNode
from placement.contracts import StoreFailure
from placement.errors import PlacementError
from placement.identity import BadIdentity, Identity

Entry = Callable[[], AbstractContextManager[PlacementNode]]


@contextmanager
def entry_to(
    engine: str, store: str | None, settings: Settings, *, name: str | None = None
) -> Iterator[PlacementNode]:
    """A client of the cluster at `engine`, by that cluster's own settings.

    Raises:
        ValueError: a name or URL makes no sense, or the cluster cannot be joined.
        NatsFailure: NATS cannot be reached, or refuses.
        StoreFailure: the store cannot be opened.
        PlacementError: the members could not be read in time.
    """
    opened = open_engine(engine, store, settings, adopts=True)
    try:
        node = PlacementNode(
            name or f"client-{secrets.token_hex(4)}",
            engine=opened,
            settings=opened.settings,
        )
        try:
            node.start_client()
            yield node
        finally:
            node.stop()
    finally:
        opened.close()


@contextmanager
def _entry(
    engine: str, store: str | None, cluster: str, limit: float, name: str | None
) -> Iterator[PlacementNode]:
    """As `entry_to`; what is wrong with the start is said in one sentence."""
    with ExitStack() as stack:
        try:
            settings = Settings(cluster=cluster, ask_timeout=limit)
            node = stack.enter_context(entry_to(engine, store, settings, name=name))
        except (ValueError, NatsFailure, StoreFailure, PlacementError) as error:
            raise wrong(str(error)) from None
        yield node


def _place_options(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object."),
        click.option("--timeout", default=10.0, show_default=True, help="Seconds."),
        click.option("--cluster", default="default", show_default=True),
        click.option("--store", help="Store URL; unless given, the engine's own."),
        click.option("--engine", required=True, help="nats://host:4222"),
    ):
        command = option(command)
    return command


def _client_options(command: Any) -> Any:
    """Options of where and as whom; the command gets `entry`, which opens it."""

    @wraps(command)
    def with_entry(
        *args: Any,
        engine: str,
        store: str | None,
        cluster: str,
        name: str | None,
        timeout: float,
        **more: Any,
    ) -> Any:
        entry = partial(_entry, engine, store, cluster, timeout, name)
        return command(*args, entry=entry, **more)

    name = click.option("--name", help="Under which it is known to the nodes.")
    return _place_options(name(with_entry))


def _say(found: dict[str, Any], *, as_json: bool) -> None:
    # msgspec's, since an answer may hold bytes.
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    for name, value in found.items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        click.echo(f"{name}: {text}")


def _refused(error: PlacementError, *, as_json: bool) -> click.exceptions.Exit:
    name = type(error).__name__
    if as_json:
        _say({"error": name, "message": str(error)}, as_json=True)
    else:
        click.echo(f"placement: {name}: {error}", err=True)
    return click.exceptions.Exit(FAILED)


def _message(identity: str, payload: str | None) -> Any:
    """What PAYLOAD says; what is wrong with it or IDENTITY is said in one sentence."""
    try:
        Identity.parse(identity)
        return None if payload is None else json.loads(payload)
    except BadIdentity as error:
        raise wrong(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise wrong(f"PAYLOAD is not JSON: {error}") from None


@click.command("resolve")
@click.argument("identity")
@_client_options
def resolve_command(
    identity: str,
    *,
    entry: Entry,
    as_json: bool,
) -> None:
    """Say where IDENTITY is; it is started if it is nowhere."""
    _message(identity, None)
    with entry() as node:
        try:
            found = node.resolve(identity)
        except PlacementError as error:
            raise _refused(error, as_json=as_json) from None
        _say(
            {
                "identity": str(found.identity),
                "pid": str(found.pid),
                "owner": found.owner,
                "locality": found.locality,
                "fencing_token": found.fencing_token,
                "epoch": found.epoch,
                "observed_at_ms": found.observed_at_ms,
            },
            as_json=as_json,
        )


@click.command("ask")
@click.argument("identity")
@click.argument("payload", required=False)
@click.option("--request-id", default="", help="The same for the same request.")
@_client_options
def ask_command(
    identity: str,
    payload: str | None,
    *,
    request_id: str,
    entry: Entry,
    as_json: bool,
) -> None:
    """Send PAYLOAD, which is JSON, to IDENTITY, and print its answer."""
    message = _message(identity, payload)
    with entry() as node:
        try:
            answer = node.ref(identity).ask(message, request_id=request_id)
        except PlacementError as error:
            raise _refused(error, as_json=as_json) from None
        # As it is known from the asking: to resolve it might start another one, or
        # be refused, and there is an answer.
        pid = node.peek(identity)
        if as_json:
            _say(
                {
                    "answer": answer,
                    "owner": None if pid is None else pid.session,
                    "fencing_token": None if pid is None else pid.fencing_token,
                },
                as_json=True,
            )
        else:
            click.echo(msgspec.json.encode(answer))


@click.command("tell")
@click.argument("identity")
@click.argument("payload", required=False)
@click.option("--request-id", default="", help="The same for the same request.")
@_client_options
def tell_command(
    identity: str,
    payload: str | None,
    *,
    request_id: str,
    entry: Entry,
    as_json: bool,
) -> None:
    """Send PAYLOAD, which is JSON, to IDENTITY, at most once."""
    message = _message(identity, payload)
    with entry() as node:
        try:
            # Before it is told: what is held when this ends would go nowhere.
            found = node.resolve(identity)
            node.ref(identity).tell(message, request_id=request_id)
        except PlacementError as error:
            raise _refused(error, as_json=as_json) from None
        _say({"told": str(found.identity), "owner": found.owner}, as_json=as_json)


@click.command("status")
@_place_options
def status_command(
    *,
    engine: str,
    store: str | None,
    cluster: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Say who the members are; what runs on each only they know."""
    try:
        settings = Settings(cluster=cluster, ask_timeout=timeout)
        opened = open_engine(engine, store, settings, adopts=True)
        try:
            view = opened.store.read_sessions()
            observed_at_ms = opened.clock.wall_ms()
            counts = opened.table(view.topology).counts()
        finally:
            opened.close()
    except (ValueError, NatsFailure, StoreFailure) as error:
        raise wrong(str(error)) from None
    # The last one that left may still be named.
    closed = {record.session for record in view.sessions if record.closed}
    members = [each for each in view.topology.members if each.session not in closed]
    _say(
        {
            "state": "running" if members else "no members",
            "epoch": view.topology.epoch,
            "members": [member.node for member in members],
            "partitions": {str(session): count for session, count in counts.items()},
            "activations": None,
            "stuck": None,
            "nodes": {
                member.node: {
                    "session": member.session,
                    "kinds": list(member.kinds),
                    "weight": member.weight,
                    "draining": member.draining,
                }
                for member in members
            },
            "observed_at_ms": observed_at_ms,
        },
        as_json=as_json,
    )
