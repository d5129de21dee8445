"""The simulator: messages a second of one processor."""

import heapq
from typing import Any

from actors import Grain
from actors.simulation import SimulatedCluster
from messages.codec import Codec
from messages.frames import Deliver
from scripts.benchmarks.measure import Effort, Measurement, Work, pair, placed
from scripts.benchmarks.peers import TOLD

_GRAINS = 200
_ASKS = 1_000


class Counted(Grain):
    """Counts what it has handled."""

    def on_receive(self, message: Any) -> Any:
        """Answer, and count."""
        TOLD.count += 1
        return message


def messages(effort: Effort) -> Measurement:
    """Frames delivered and messages handled, against a heap and the codec."""
    with placed(is_pinned=True):
        cluster = SimulatedCluster.start(seed=1, nodes=3, kinds={"echo": Counted})
        try:
            refs = [cluster.ref(f"echo/{number}") for number in range(_GRAINS)]
            bursts = _bursts(cluster, refs)
            each = bursts()  # starts them all
            each = bursts()
            return pair(
                Work(lambda _: _exactly(bursts(), each), each),
                Work(_steps, each),
                effort,
            )
        finally:
            cluster.stop()


def _exactly(found: int, expected: int) -> None:
    # Renewals of sessions come and go.
    assert abs(found - expected) <= expected // 5, f"{found}, not some {expected}"


def _bursts(cluster: SimulatedCluster, refs: list[Any]) -> Any:
    network = cluster.shared.network

    def burst() -> int:
        before = TOLD.count + network.frame_count
        futures = [
            refs[number % _GRAINS].ask({"n": number}, block=False)
            for number in range(_ASKS)
        ]
        while not all(future.is_done for future in futures):
            cluster.run_until(lambda: futures[-1].is_done, timeout=1.0)
            cluster.advance(0.001)
        for number, future in enumerate(futures):
            assert future.get(timeout=0) == {"n": number}
        return TOLD.count + network.frame_count - before

    return burst


def _steps(count: int) -> None:
    """What each message needs: a place in the order of time, bytes there and back."""
    codec, due = Codec("default"), list[tuple[int, bytes]]()
    for number in range(1, count + 1):
        body = Deliver("echo/1", 17, number, {"n": number}, "", 10_000, ())
        data = codec.encode("node-1.boot", "node-2.boot", number, body)
        heapq.heappush(due, ((number * 7919) % count, data))
    found = 0
    while due:
        envelope = codec.decode(heapq.heappop(due)[1], receiver="node-2.boot")
        assert isinstance(envelope.body, Deliver)
        found += envelope.body.payload["n"]
    assert found == count * (count + 1) // 2
