"""Measures the ways of a message, each as a ratio to raw pykka in the same run.

The two sides of a pair alternate within one process, so that a noisy machine
disturbs both alike; the ratio of their medians is what to compare.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import pykka
from rich.console import Console
from rich.table import Table

from actors import Cluster, Grain, PlacementNode
from actors.requests import read_requests
from actors.run import Delivery, calm_collector, kinds_for
from actors.witness import ActivationWitness

ROUNDS = 7
ASKS = 2_000
TELLS = 20_000


class RawEcho(pykka.ThreadingActor):
    """What pykka alone does."""

    def on_receive(self, message: Any) -> Any:
        """Answer with the message; set the event that ends a round of tells."""
        if isinstance(message, threading.Event):
            message.set()
            return None
        return message


class Echo(Grain):
    """The same, placed."""

    done = threading.Event()

    def on_receive(self, message: Any) -> Any:
        """Answer with the message; set the event that ends a round of tells."""
        if message == "done":
            self.done.set()
            return None
        return message


def timed(work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pair(
    name: str, count: int, ours: Callable[[], None], raw: Callable[[], None]
) -> dict[str, Any]:
    """Both sides, alternating, and the ratio of their rates."""
    ours()
    raw()
    our_times, raw_times = [], []
    for _ in range(ROUNDS):
        our_times.append(timed(ours))
        raw_times.append(timed(raw))
    our, pykka_s = statistics.median(our_times), statistics.median(raw_times)
    return {
        "name": name,
        "per_s": round(count / our),
        "pykka_per_s": round(count / pykka_s),
        "ratio": round(pykka_s / our, 2),
    }


def messages() -> list[dict[str, Any]]:
    """Ask and tell to an activation on the same node."""
    with PlacementNode("bench", kinds={"echo": Echo}) as node:
        node.start_member()
        ref, actor = node.ref("echo/1"), RawEcho.start()
        message = {"n": 1}

        def ask_ours() -> None:
            for _ in range(ASKS):
                ref.ask(message)

        def ask_raw() -> None:
            for _ in range(ASKS):
                actor.ask(message)

        def tell_ours() -> None:
            Echo.done.clear()
            for _ in range(TELLS):
                ref.tell(message)
            ref.tell("done")
            Echo.done.wait()

        def tell_raw() -> None:
            done = threading.Event()
            for _ in range(TELLS):
                actor.tell(message)
            actor.tell(done)
            done.wait()

        try:
            return [
                pair("ask, local", ASKS, ask_ours, ask_raw),
                pair("tell, local", TELLS, tell_ours, tell_raw),
            ]
        finally:
            actor.stop()


def sample() -> dict[str, Any]:
    """The sample on three nodes over SQLite, as `placement run` delivers it."""
    requests = read_requests(None)
    calm_collector()
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster.embedded(
            nodes=3,
            kinds=kinds_for(requests, {}, is_durable=False),
            store=f"sqlite:///{folder}/bench.db",
            witness=ActivationWitness(),
        ) as cluster,
    ):
        delivery = Delivery(cluster, requests, repeatable=lambda _: True)
        outcome = delivery.run([])
    assert outcome.failed == 0
    return {
        "name": "run, sample",
        "per_s": round(outcome.answered / outcome.seconds),
        "pykka_per_s": None,
        "ratio": None,
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    rows = [*messages(), sample()]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    table = Table("what", "per second", "raw pykka per second", "ratio")
    for row in rows:
        raw, ratio = row["pykka_per_s"], row["ratio"]
        table.add_row(
            row["name"],
            f"{row['per_s']:,}",
            "" if raw is None else f"{raw:,}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
