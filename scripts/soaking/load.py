"""The load: identities that are asked in turn, and what each must answer."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from random import Random
from typing import Self

from actors.node import PlacementNode
from placement.errors import PlacementError

IDENTITIES = 300
#: Seconds between the asks of one identity, at most.
_PAUSE_S = 2.0
_AGAIN_S = 0.1
_SAID_MAX = 10


class Load:
    """Asks each identity again and again, by one client and then the next.

    An ask whose outcome is unknown is repeated under its id until it is answered, so
    that each answer is one more than the last: a count that is lost, or counted
    twice, is seen at once.
    """

    def __init__(self, clients: Sequence[PlacementNode], seed: int) -> None:
        self._clients = clients
        self._random = Random(seed)  # noqa: S311  pauses are no secret
        self._lines = itertools.count(1)
        self._is_over = threading.Event()
        self._counts = dict.fromkeys((f"file/{n}" for n in range(IDENTITIES)), 0)
        self._waiting: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        self._asking = self._loop.create_task(self._ask_all())
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.asks = self.answered = self.unknown_repeated = 0
        self.refused: Counter[str] = Counter()
        self.longest_wait_s = 0.0
        self.violations: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._asking.cancel)
        self._thread.join()

    def finish(self) -> None:
        """Have each answer what is asked, and then each client; not awaited."""
        self._is_over.set()

    @property
    def is_finished(self) -> bool:
        """Whether each has."""
        return not self._thread.is_alive()

    @property
    def unanswered(self) -> list[str]:
        """Who was asked and has not answered."""
        return sorted(self._waiting)

    def _run(self) -> None:
        with closing(self._loop), suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._asking)

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask_on(identity) for identity in self._counts))

    async def _ask_on(self, identity: str) -> None:
        for client in itertools.cycle(self._clients):
            if self._is_over.is_set():
                break
            await asyncio.sleep(self._random.uniform(0, _PAUSE_S))
            await self._ask(identity, client)
        # By each: none may have lost its way.
        for client in self._clients:
            while not await self._ask(identity, client):
                pass

    async def _ask(self, identity: str, client: PlacementNode) -> bool:
        """Whether it was answered; else it was surely not counted."""
        line = next(self._lines)
        self.asks += 1
        began_s = self._waiting[identity] = time.monotonic()
        is_unknown = False
        while True:
            try:
                answer = await client.ref(identity).ask_async(
                    None, request_id=f"soak:{line}"
                )
            except PlacementError as error:
                await asyncio.sleep(_AGAIN_S)
                is_unknown |= error.may_have_happened
                self.unknown_repeated += error.may_have_happened
                if not is_unknown:
                    self.refused[type(error).__name__] += 1
                    del self._waiting[identity]
                    return False
            else:
                self._answered(identity, answer["count"], began_s)
                return True

    def _answered(self, identity: str, count: int, began_s: float) -> None:
        del self._waiting[identity]
        self.answered += 1
        self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - began_s)
        expected = self._counts[identity] + 1
        self._counts[identity] = count
        if count != expected and len(self.violations) < _SAID_MAX:
            self.violations.append(f"{identity} counted {count}, not {expected}")
