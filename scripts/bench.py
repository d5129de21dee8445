"""Measures the ways of a message, each as a ratio to raw pykka in the same run.

The two sides of a pair alternate within one process, so that a noisy machine
disturbs both alike; the ratio of their medians is what to compare. Pairs are
measured twice: on one processor, and as the kernel places the threads, where a
thread that wakes another on another processor may cost several times as much.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pykka
from rich.console import Console
from rich.table import Table

from actors import Cluster, Grain, PlacementNode
from actors.requests import read_requests
from actors.run import Delivery, calm_collector, kinds_for
from actors.simulation import SimulatedCluster
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


@contextmanager
def one_processor() -> Iterator[None]:
    """Keep this process to one processor, where that can be asked for."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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


def messages(where: str) -> list[dict[str, Any]]:
    """Ask and tell on the same node; `where` says how threads are placed."""
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
                pair(f"ask, local, {where}", ASKS, ask_ours, ask_raw),
                pair(f"tell, local, {where}", TELLS, tell_ours, tell_raw),
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


def simulation() -> dict[str, Any]:
    """Messages that a simulated cluster delivers: frames, and those handled."""
    handled = 0

    class Counted(Grain):
        def on_receive(self, message: Any) -> Any:
            nonlocal handled
            handled += 1
            return message

    cluster = SimulatedCluster.start(seed=1, nodes=3, kinds={"echo": Counted})
    refs = [cluster.ref(f"echo/{number}") for number in range(200)]

    def burst() -> None:
        futures = [ref.ask({"n": 1}, block=False) for ref in refs for _ in range(5)]
        last = futures[-1]
        while not all(future.is_done for future in futures):
            cluster.run_until(lambda: last.is_done, timeout=1.0)
            cluster.advance(0.001)

    def bursts() -> None:
        for _ in range(5):
            burst()

    rates = []
    burst()
    for _ in range(ROUNDS):
        before = handled + cluster.shared.network.frame_count
        seconds = timed(bursts)
        messages = handled + cluster.shared.network.frame_count - before
        assert messages >= 15 * len(refs) * 5
        rates.append(messages / seconds)
    cluster.stop()
    return {
        "name": "simulation, messages",
        "per_s": round(statistics.median(rates)),
        "pykka_per_s": None,
        "ratio": None,
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    with one_processor():
        rows = [*messages("one processor"), simulation()]
    rows += [*messages("as placed"), sample()]
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
