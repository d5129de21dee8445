"""`placement up`: a NATS server and some node processes on this machine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from actors.cluster import names_of
from actors.engine import Settings
from actors.exits import FAILED, interrupts, wrong
from actors.nats_server import find_server
from actors.node_command import (
    DRAIN_S,
    Asked,
    cluster_options,
    parse_kinds,
)
from actors.store_url import check_store

START_S = 30.0
#: The kind of the sample that `run` delivers.
_SAMPLE_KIND = "file"
_CONFIG = """\
# Written by `placement up`.
listen: "127.0.0.1:{port}"
max_payload: 8MB
ports_file_dir: "{folder}"
jetstream {{ store_dir: "{folder}/jetstream" }}
"""


class NotUp(Exception):
    """Something did not start, and why."""


@dataclass(slots=True)
class Processes:
    """The server and the nodes: sessions of their own, so that Ctrl-C is ours."""

    server: "subprocess.Popen[bytes] | None" = None
    nodes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def start_server(self, folder: Path, port: int) -> str:
        """Start it on `folder`; its URL.

        Raises:
            NotUp: it does not.
        """
        for old in folder.glob("*.ports"):
            old.unlink()
        config, log = folder / "nats-server.conf", folder / "nats-server.log"
        config.write_text(
            _CONFIG.format(port=port or -1, folder=folder), encoding="utf-8"
        )
        with log.open("wb") as out:
            server = self.server = subprocess.Popen(  # noqa: S603  found, not given
                [find_server(), "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        ports = folder / f"nats-server_{server.pid}.ports"
        until_s = time.monotonic() + START_S
        while not ports.exists() or not ports.stat().st_size:
            if server.poll() is not None or time.monotonic() > until_s:
                raise NotUp(f"nats-server does not start: {_last_line(log)}")
            time.sleep(0.02)
        found = json.loads(ports.read_text(encoding="utf-8"))
        return str(found["nats"][0])

    def start_node(self, name: str, options: Sequence[str], ready: Path) -> None:
        """Start a node, which writes `ready` when it serves."""
        program = "from actors.main import main; main()"
        self.nodes[name] = subprocess.Popen(  # noqa: S603  our own program
            [
                sys.executable,
                "-c",
                program,
                "node",
                name,
                "--ready-file",
                str(ready),
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def await_ready(self, files: dict[str, Path], asked: Asked) -> None:
        """Wait until all nodes serve, or somebody asks to stop.

        Raises:
            NotUp: one does not.
        """
        until_s = time.monotonic() + START_S
        for name, path in files.items():
            while not path.exists() and not asked.count:
                code = self.nodes[name].poll()
                if code is not None:
                    raise NotUp(f"{name} does not start: exit code {code}")
                if time.monotonic() > until_s:
                    raise NotUp(f"{name} does not start within {START_S:g} s")
                time.sleep(0.02)

    def watch(self, asked: Asked) -> bool:
        """Look after them until somebody asks to stop; false: the server ended."""
        while not asked.count:
            if self.server is not None and self.server.poll() is not None:
                return False
            for name, node in self.nodes.items():
                if name not in self.gone and node.poll() is not None:
                    self.gone.add(name)
                    click.echo(
                        f"placement: {name} has ended: exit code {node.returncode}",
                        err=True,
                    )
            time.sleep(0.1)
        return True

    def stop(self, asked: Asked) -> bool:
        """Drain the nodes, then end the server; whether all ended in good order."""
        running = [node for node in self.nodes.values() if node.poll() is None]
        for node in running:
            node.terminate()
        until_s = time.monotonic() + DRAIN_S + 5.0
        is_hurried = False
        while any(node.poll() is None for node in running):
            if time.monotonic() > until_s or (asked.count > 1 and not is_hurried):
                is_hurried = True
                until_s = time.monotonic() + 5.0
                for node in running:
                    with suppress(OSError):
                        node.kill()
            time.sleep(0.02)
        if self.server is not None and self.server.poll() is None:
            self.server.terminate()
            try:
                self.server.wait(10)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
        return all(node.returncode == 0 for node in running)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if "[FTL]" in line or "[ERR]" in line] or lines
    return said[-1].rpartition("] ")[2] if said else "it said nothing"


@click.command("up")
@click.option("--nodes", default=3, show_default=True, help="How many.")
@click.option("--port", default=4222, show_default=True, help="0: any that is free.")
@click.option("--data", metavar="FOLDER", help="Kept; unless given, a temporary one.")
@click.option("--store", help="Store URL; unless given, NATS keeps all.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND=module:Class")
@click.option("--witness", metavar="FILE", help="What was seen, by all nodes.")
@click.option("--json", "as_json", is_flag=True, help="The ready line as JSON.")
@cluster_options
def up_command(
    *,
    nodes: int,
    port: int,
    data: str | None,
    store: str | None,
    kinds: tuple[str, ...],
    witness: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Start a NATS server and nodes here; Ctrl-C stops all.

    Without --kind the nodes host the tally of the sample that `run` delivers.
    """
    with ExitStack() as stack:
        asked = Asked()
        stack.enter_context(interrupts(asked.again))
        try:
            names = names_of(nodes)
            checked = Settings(**settings)
            sys.path.insert(0, "")
            for each in parse_kinds(kinds, tallies=True).values():
                each.check(checked.margin_s)
            if store is not None:
                check_store(store)
            find_server()
            folder = _folder(stack, data)
        except ValueError as error:
            raise wrong(str(error)) from None
        except OSError as error:
            raise wrong(f"--data {data}: {error.strerror}") from None
        processes = Processes()
        try:
            url = processes.start_server(folder, port)
            options = ["--engine", url]
            for name, value in (("store", store), ("witness", witness)):
                options += [f"--{name}", value] if value is not None else []
            for kind in kinds or (_SAMPLE_KIND,):
                options += ["--kind", kind]
            for name, value in settings.items():
                if value is not None:
                    options += [f"--{name.replace('_', '-')}", str(value)]
            ready = {name: folder / f"{name}.ready" for name in names}
            for name, path in ready.items():
                path.unlink(missing_ok=True)
                processes.start_node(name, options, path)
            processes.await_ready(ready, asked)
            if not asked.count:
                _say(url, processes, folder, as_json=as_json)
            is_served = processes.watch(asked)
        except NotUp as error:
            raise wrong(str(error)) from None
        finally:
            is_ended = processes.stop(asked)
    if not is_served:
        click.echo("placement: nats-server has ended", err=True)
    if not is_served or not is_ended:
        raise click.exceptions.Exit(FAILED)


def _folder(stack: ExitStack, data: str | None) -> Path:
    if data is None:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="placement-"))
        return Path(name)
    folder = Path(data).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(0, "it may not be written", str(folder))
    return folder


def _say(url: str, processes: Processes, folder: Path, *, as_json: bool) -> None:
    pids = {name: node.pid for name, node in processes.nodes.items()}
    if as_json:
        click.echo(json.dumps({"ready": url, "nodes": pids, "data": str(folder)}))
    else:
        click.echo(f"ready {url}  ({', '.join(pids)}); Ctrl-C stops all")
        click.echo(f"try   placement run --engine {url}")
    sys.stdout.flush()
