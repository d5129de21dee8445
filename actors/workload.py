"""What a simulated run does: Grains that count, and programs that ask them.

The Grains write down themselves when their code is entered: what is judged is
what user code saw, not what the machines say of it.
"""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, Protocol

import msgspec

from actors.future import Future, running
from actors.grain import Grain
from actors.kind import Kind, Strategy
from actors.outcome import outcome_of
from actors.state import encode_state
from actors.trace import Asked, Ended, Entered, Leaving, Record
from actors.world import World
from placement.errors import PlacementError
from placement.identity import Identity
from placement.topology import Member


class Seen(msgspec.Struct):
    """The state of a counter: the requests that it has counted, in order."""

    requests: list[str] = msgspec.field(default_factory=list)


class Trouble(Exception):
    """What user code raises while the fault `grain` lasts."""


class Stage(Protocol):
    """What a run offers its Grains."""

    world: World
    records: list[Record]
    counts: Counter[str]
    is_spread: bool

    def inside(self, context: Any) -> None:
        """User code has just been entered: the process may be made to stand still."""

    def grain_trouble(self) -> str:
        """What user code is to do wrong now; empty: nothing."""

    def nested(self, request: str) -> str:
        """A name, given to nobody before, of what is asked in handling `request`."""

    def hang(self, future: Future) -> None:
        """Keep a future that is answered when the fault is over."""


class _Recorded(Grain[Seen]):
    """Writes down each entry into its code."""

    stage: Stage

    def _enter(self, purpose: str, request: str = "", number: int = 0) -> None:
        context = self.context
        stage = self.stage
        stage.records.append(
            Entered(
                stage.world.moment_ns(),
                str(context.pid.address),
                str(context.identity),
                str(context.pid.session),
                context.fencing_token,
                purpose,
                request,
                number,
            )
        )
        stage.inside(context)

    def _trouble(self, what: str) -> None:
        if self.stage.grain_trouble() == what:
            self.stage.counts["grain"] += 1
            raise Trouble(what)

    def on_activate(self) -> None:
        """Begin, or fail to."""
        self._enter("activate")
        self._trouble("activate")

    def on_passivate(self) -> bytes | None:
        """End, or fail to."""
        self._enter("passivate")
        self._trouble("passivate")
        return None

    def _flush(self) -> None:
        self._enter("timer")

    def _leave(self) -> None:
        """End after this turn, by its own wish."""
        stage, context = self.stage, self.context
        stage.records.append(
            Leaving(
                stage.world.moment_ns(), str(context.identity), context.fencing_token
            )
        )
        context.passivate()


class CounterGrain(_Recorded):
    """Counts each request once, and stores it before it answers."""

    async def on_receive(self, message: Any) -> Any:
        """Handle `[operation, ...]`."""
        request = self.context.request_id
        self._enter("handle", request)
        trouble = self.stage.grain_trouble()
        if trouble in {"before", "after", "late", "never", "leave"}:
            self.stage.counts["grain"] += 1
        if trouble == "before":
            raise Trouble(trouble)
        if trouble == "never":
            future = Future()
            future.owner = running.activation
            self.stage.hang(future)
            await future
            self._enter("resume", request)
        answer = await self._perform(message, request)
        if trouble == "after":
            raise Trouble(trouble)
        if trouble == "late":
            self.stage.world.spend(150_000_000)
        if trouble == "leave":
            self._leave()
        return answer

    async def _perform(self, message: list[Any], request: str) -> Any:
        match message[0]:
            case "add":
                if request not in self.state.requests:
                    self.state.requests.append(request)
                    self.save()
                return self.state.requests.index(request) + 1
            case "read":
                return len(self.state.requests)
            case "leave":
                self._leave()
            case "timer":
                self.context.after(0.2, self._flush)
            case "pass on":
                await self._pass_on(message[1], request)
        return None

    async def _pass_on(self, identity: str, request: str) -> None:
        """Have another count, with this mailbox held meanwhile."""
        stage = self.stage
        nested = stage.nested(request)
        ask = stage.records.append
        seconds = 4.0
        now_ns = stage.world.moment_ns()
        ask(
            Asked(
                now_ns,
                str(self.context.pid.address),
                nested,
                identity,
                "add",
                now_ns + round(seconds * 1e9),
            )
        )
        outcome, value, reason = "unknown", None, "its own handler was ended"
        try:
            value = await self.context.ref(identity).ask_async(
                ["add"], timeout=seconds, request_id=nested
            )
            outcome, reason = "answered", ""
        except PlacementError as error:
            outcome, reason = outcome_of(error)
        finally:
            ask(Ended(stage.world.moment_ns(), nested, outcome, value, reason))
        self._enter("resume", request)


class LogGrain(_Recorded):
    """Takes what is told, and keeps it when it ends in good order."""

    def on_receive(self, message: Any) -> None:
        """Handle `[number]`."""
        request = self.context.request_id
        self._enter("handle", request, message[0])
        self.state.requests.append(request)

    def on_passivate(self) -> bytes | None:
        """End, or fail to; in a run that is spread what was told is kept."""
        super().on_passivate()
        if not self.stage.is_spread:
            return None
        return encode_state(self.state, self.schema_version)


def spread(
    identity: Identity, eligible: tuple[Member, ...], _: Member | None
) -> Member:
    """A host that mostly is another than the owner of the partition."""
    return eligible[int(identity.name) % len(eligible)]


def kinds_on(
    stage: Stage, *, idle_after: float, strategy: Strategy | None = None
) -> dict[str, Kind]:
    """The kinds of a run."""

    def made(grain_class: type[_Recorded]) -> Callable[[Any], _Recorded]:
        def make(_: Any) -> _Recorded:
            grain = grain_class()
            grain.stage = stage
            return grain

        return make

    return {
        "counter": Kind(
            made(CounterGrain),
            actor_class=CounterGrain,
            idle_after=idle_after,
            strategy=strategy,
        ),
        "log": Kind(
            made(LogGrain),
            actor_class=LogGrain,
            idle_after=idle_after,
            strategy=strategy,
        ),
    }


class Order:
    """One request of the plan: when, what, of whom; `where` is a share of nodes."""

    __slots__ = ("at_s", "identity", "number", "operation", "other", "where")

    def __init__(
        self, draw: Random, number: int, identities: int, until_s: float
    ) -> None:
        self.number = number
        self.at_s = draw.random() * until_s
        # Some are asked much more often than others.
        self.identity = int(identities * draw.random() ** 1.5)
        # Another one than that, so that no call waits for itself.
        step = 1 + int((identities - 1) * draw.random())
        self.other = (self.identity + step) % identities
        self.where = draw.random()
        roll = draw.random()
        for operation, share in _SHARES:
            if roll < share:
                self.operation = operation
                break


_SHARES = (
    ("add", 0.62),
    ("read", 0.86),
    ("pass on", 0.93),
    ("timer", 0.97),
    ("leave", 1.1),
)
