"""A trial: one seeded run of a cluster under faults, judged by the observer."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgpack
import msgspec

from actors.defects import variant_of
from actors.engine import Settings
from actors.faults import (
    DRIFT_BEYOND_PPM,
    DRIFT_PPM,
    MUTE,
    CutOff,
    Episode,
    StoreTrouble,
    WireTrouble,
    plan,
)
from actors.future import Future
from actors.kind import Kind
from actors.node import PlacementNode
from actors.observer import Bounds, Violation, observe
from actors.outcome import outcome_of
from actors.simulation import MEMORY, PARTITIONS, Process, Shared
from actors.trace import (
    Asked,
    Chosen,
    Emptying,
    Ended,
    Entered,
    FinalState,
    Healed,
    LeftBehind,
    Reached,
    Record,
    Sought,
    Told,
    WorkDone,
)
from actors.workload import Order, kinds_on, spread

TTL_S = 2.0
IDLE_S = 4 * TTL_S
REQUESTS_PER_S = 100.0
_WEIGH_S = 0.5
#: A frame, of which only who sends it and its number are looked into.
_FRAME = msgspec.msgpack.Decoder(
    tuple[msgspec.Raw, msgspec.Raw, str, msgspec.Raw, int, msgspec.Raw]
)
_STATE_HEADER = 3
_ASK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What every trial does, but for its seed."""

    nodes: int = 5
    identities: int = 200
    requests: int = 5_000
    faults: tuple[str, ...] = ()
    defect: str = ""
    store: str = MEMORY

    @property
    def duration_s(self) -> float:
        """How long requests come, in virtual seconds."""
        return max(10 * TTL_S, self.requests / REQUESTS_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one trial."""

    seed: int
    messages: int
    answered: int
    refused: int
    unknown: int
    faults: dict[str, int]
    violations: tuple[Violation, ...]
    trace_hash: str
    episodes: int


class Trial:
    """One seeded run: programs ask, faults come and go, an observer judges."""

    def __init__(
        self,
        seed: int,
        scenario: Scenario,
        *,
        episodes: Sequence[Episode] | None = None,
        tap: Callable[[int, str, str, bytes], None] | None = None,
    ) -> None:
        self.seed = seed
        self.scenario = scenario
        self.variant = variant_of(scenario.defect)
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.shared = shared = Shared(seed, PARTITIONS, scenario.store)
        self.variant.prepare(shared)
        self.world = shared.world
        self.records: list[Record] = shared.records
        self.settings = Settings(
            ttl=TTL_S, partitions=PARTITIONS, ask_timeout=_ASK_S, cache_ttl=20.0
        )
        # Elsewhere than at the partition's owner, so that starts cross the wire.
        self.is_spread = seed % _SPREAD_EVERY == 0
        self.kinds: dict[str, Kind] = kinds_on(
            self,
            idle_after=IDLE_S,
            strategy=spread if self.is_spread else None,
        )
        self.episodes = (
            plan(
                seed,
                scenario.faults,
                duration_s=scenario.duration_s,
                ttl_s=TTL_S,
            )
            if episodes is None
            else tuple(episodes)
        )
        shared.network.is_mute = MUTE in scenario.faults
        self._tap = tap
        shared.network.tap = self._see
        if self.is_spread:
            shared.network.sent = self._see_sent
        self._seeking: dict[tuple[str, int], list[int]] = {}
        self._busiest = Sought(0, "", "", 0)
        self.processes: dict[str, Process] = {}
        self.nodes: dict[str, PlacementNode] = {}
        self.clients: list[str] = []
        self._choose = self.world.stream("choices").random
        self._inside: dict[str, float] = {}
        self._grain_draws: list[Callable[[], float]] = []
        self._hanging: list[Future] = []
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._started = self._nested = 0
        self._kept_peak = self._to_come = 0
        self._drift = self.world.stream("drift").random
        if scenario.faults:
            steps = self.world.stream("steps").random
            shared.turns_at_once = lambda: (1, 2, 5, 0)[int(steps() * 4)]

    def _see(self, sender: str, to: str, data: bytes) -> None:
        """Count how often each need of an identity is asked for."""
        now_ns = self.world.now_ns
        if self._tap is not None:
            self._tap(now_ns, sender, to, data)
        _, _, asker, _, number, raw = _FRAME.decode(data)
        if bytes(raw)[1] != _RESOLVE:  # after what says how long the body is
            return
        body = msgpack.unpackb(raw)
        second = now_ns // 1_000_000_000
        counted = self._seeking.setdefault((asker, body[1]), [second, 0, 0])
        if counted[0] != second:
            counted[:2] = second, 0
        if number > counted[2]:
            # Not one that arrives twice.
            counted[1:] = counted[1] + 1, number
        if counted[1] > self._busiest.times:
            self._busiest = Sought(now_ns, asker, body[2], counted[1])

    def _see_sent(self, data: bytes) -> None:
        """Write down where starts are sent; only frames to others are seen."""
        body = msgpack.unpackb(data, strict_map_key=False)[5]
        if body[0] == _START:
            _, identity, procedure, chooser, host, _, epoch, *_ = body
            self.records.append(
                Chosen(
                    self.world.moment_ns(), chooser, procedure, identity, host, epoch
                )
            )

    # --- as a stage of the Grains ---

    def inside(self, context: Any) -> None:
        """Make the process stand still inside user code, where that was planned."""
        if not self._inside:
            return
        node = context.pid.node
        seconds = self._inside.pop(node, 0.0)
        if seconds:
            self.counts["pause"] += 1
            self.world.spend(round(seconds * 1e9))
            self.processes[node].pause(0.0)

    def grain_trouble(self) -> str:
        """What user code is to do wrong now."""
        for draw in self._grain_draws:
            if draw() < _GRAIN_RATE:
                return _GRAIN_TROUBLES[int(draw() * len(_GRAIN_TROUBLES))]
        return ""

    def nested(self, request: str) -> str:
        """A name, given to nobody before, of what is asked in handling `request`."""
        # Who handles a request twice, asks twice.
        self._nested += 1
        return f"{request}+{self._nested}"

    def hang(self, future: Future) -> None:
        """Answer `future` when the fault is over."""
        self._hanging.append(future)

    # --- nodes ---

    def start_node(self, name: str, *, is_client: bool = False) -> None:
        """Start a process and its node, and do not wait for it."""
        rate_ppm = 1_000_000
        if "drift-beyond" in self.scenario.faults:
            side = 1 if len(self.processes) % 2 else -1
            rate_ppm += side * DRIFT_BEYOND_PPM
            self.counts["drift-beyond"] += 1
        elif "drift" in self.scenario.faults:
            # Every second clock is as wrong as it may be.
            wrong = min(1.0, max(-1.0, (self._drift() * 2 - 1) * 2))
            rate_ppm += round(wrong * DRIFT_PPM)
            self.counts["drift"] += 1
        process = self.variant.process_type(self.shared, name, rate_ppm=rate_ppm)
        node = self.variant.node_type(
            name,
            kinds={} if is_client else self._kinds_of(process),
            engine=process,
            settings=self.settings,
        )
        self.processes[name], self.nodes[name] = process, node
        if is_client:
            self.clients.append(name)
            node.begin_client()
        else:
            node.begin_member()

    def _kinds_of(self, process: Process) -> dict[str, Kind]:
        """What a member knows: of a run that is spread, some know less."""
        if not self.is_spread or process.number % 4:
            return self.kinds
        return {name: kind for name, kind in self.kinds.items() if name != "log"}

    def crash_node(self, name: str) -> None:
        """End a process at once."""
        node = self.nodes.pop(name)
        self.processes[name].end("crashed")
        node.is_dead = True

    def leave_node(self, name: str) -> None:
        """Have a node leave in good order; a late one ends as by a crash."""
        node = self.nodes[name]
        if node.state == "stopping":
            return
        self._empties(node)
        node.begin_stop()
        self._await_leaving(name, node, self.world.now_ns + round(5 * TTL_S * 1e9))

    def _empties(self, node: PlacementNode) -> None:
        self.records.append(Emptying(self.world.moment_ns(), str(node.address)))

    def _await_leaving(self, name: str, node: PlacementNode, until_ns: int) -> None:
        process = self.processes[name]
        if process.is_gone or self.nodes.get(name) is not node:
            return
        if node.has_left:
            # What is sent there yet, and not known to be in vain, comes back from it.
            linger_s = process.transport.linger_s(self.settings.renew_every_s)
            if linger_s:
                self.world.after(linger_s, self._leave_wire, name, node)
            else:
                self._leave_wire(name, node)
        elif self.world.now_ns >= until_ns:
            self.crash_node(name)
        else:
            self.world.after(0.05, self._await_leaving, name, node, until_ns)

    def _leave_wire(self, name: str, node: PlacementNode) -> None:
        if self.nodes.get(name) is node:
            # What is under way to it still comes back.
            self.world.after(0.05, self._gone, name, node)
            node.leave_wire()

    def _gone(self, name: str, node: PlacementNode) -> None:
        if self.nodes.get(name) is node:
            del self.nodes[name]
            self.processes[name].end("stopped")

    def member_names(self) -> list[str]:
        """The nodes that run and host, sorted."""
        return sorted(name for name in self.nodes if name not in self.clients)

    def _picked(self, shares: Sequence[float]) -> list[str]:
        names = self.member_names()
        return [names[int(share * len(names))] for share in shares] if names else []

    # --- faults ---

    def _begin(self, episode: Episode) -> None:
        picked = self._picked(episode.nodes)
        network, store = self.shared.network, self.shared.calls
        match episode.kind:
            case "drop" | "duplicate" | "delay":
                wire = WireTrouble(episode, self.seed, self.counts)
                network.faults.append(wire)
                self._until(episode, lambda: network.faults.remove(wire))
            case "cut":
                one = frozenset(picked[:1])
                other = frozenset({*self.nodes} - one)
                if episode.rate < 0.5:  # noqa: PLR2004  from one only, or from all
                    other = frozenset(picked[1:2]) - one
                cut = CutOff(one, other, how=episode.how, counts=self.counts)
                network.faults.append(cut)
                store.faults.append(cut)

                def mend() -> None:
                    network.faults.remove(cut)
                    store.faults.remove(cut)

                self._until(episode, mend)
            case (
                "store-fail"
                | "store-lost"
                | "store-slow"
                | "store-down"
                | "store-stale"
            ):
                trouble = StoreTrouble(episode, self.seed, self.counts)
                store.faults.append(trouble)
                self._until(episode, lambda: store.faults.remove(trouble))
            case "crash":
                self._crash(episode, picked)
            case "pause":
                self._pause(episode, picked)
            case "churn":
                self._churn(episode, picked)
            case "grain":
                draw = episode.random(self.seed).random
                self._grain_draws.append(draw)

                def calm() -> None:
                    self._grain_draws.remove(draw)
                    hanging, self._hanging = self._hanging, []
                    for future in hanging:
                        future.set()

                self._until(episode, calm)

    def _until(self, episode: Episode, end: Callable[[], object]) -> None:
        self.world.after(episode.for_s, end)

    def _crash(self, episode: Episode, picked: list[str]) -> None:
        # Now and then several, or all of them.
        victims = set(picked[: 1 + (episode.rate > _MANY) * 2])
        for name in sorted(victims):
            if len(self.member_names()) == 1 and episode.how != "restart":
                continue
            self.counts["crash"] += 1
            self.crash_node(name)
            if episode.how == "restart":
                self.world.after(episode.for_s, self._restart, name)

    def _restart(self, name: str) -> None:
        if name not in self.nodes:
            self.start_node(name)

    def _pause(self, episode: Episode, picked: list[str]) -> None:
        for name in picked[:1]:
            if episode.how == "inside":
                self._inside[name] = episode.for_s
            elif episode.how == "answer":
                call = (name, "sessions" if episode.rate < _MANY else "entries")
                after_call = self.shared.calls.after_call
                process = self.processes[name]
                after_call[call] = partial(self._stand_still, process, episode)
                self._until(episode, partial(after_call.pop, call, None))
            else:
                self._stand_still(self.processes[name], episode)

    def _stand_still(self, process: Process, episode: Episode) -> None:
        self.counts["pause"] += 1
        process.pause(episode.for_s)

    def _churn(self, episode: Episode, picked: list[str]) -> None:
        self.counts["churn"] += 1
        match episode.how:
            case "join":
                self._join()
            case "leave" if len(self.member_names()) > 1:
                self.leave_node(picked[0])
                self.world.after(episode.for_s, self._join)
            case "drain" if len(self.member_names()) > 1:
                self._empties(self.nodes[picked[0]])
                self.nodes[picked[0]].drain()
                self.world.after(episode.for_s, self._leave_if_there, picked[0])
                self.world.after(episode.for_s, self._join)
            case "flap":
                for turn in range(4):
                    at_s = turn * episode.for_s / 4
                    name = f"flap-{episode.number}-{turn}"
                    self.world.after(at_s, self._restart, name)
                    self.world.after(
                        at_s + episode.for_s / 8, self._leave_if_there, name
                    )

    def _join(self) -> None:
        self._started += 1
        self.start_node(f"join-{self._started}")

    def _leave_if_there(self, name: str) -> None:
        if name in self.nodes and len(self.member_names()) > 1:
            self.leave_node(name)

    # --- programs ---

    def _issue(self, order: Order) -> None:
        self._to_come -= 1
        names = sorted(self.nodes)
        if not names:
            return
        name = names[int(order.where * len(names))]
        node = self.nodes[name]
        self.processes[name].program.post(self._speak, node, order)

    def _speak(self, node: PlacementNode, order: Order) -> None:
        """One request of a program on `node`."""
        operation = order.operation
        kind = "log" if operation in {"tell", "leave log"} else "counter"
        identity = f"{kind}/{order.identity}"
        request = f"r{order.number}"
        now_ns = self.world.moment_ns()
        address = str(node.address)
        if operation == "tell":
            self._numbers[address, identity] += 1
            number = self._numbers[address, identity]
            self.records.append(Told(now_ns, address, request, identity, number))
            node.ref(identity).tell([number], request_id=request)
            return
        message: list[Any] = [operation]
        if operation == "pass on":
            message.append(f"counter/{order.other}")
        if operation == "leave log":
            node.ref(identity).tell([0], request_id="")
            return
        deadline_ns = now_ns + round(_ASK_S * 1e9)
        self.records.append(
            Asked(now_ns, address, request, identity, operation, deadline_ns)
        )
        future = node.ref(identity).ask(message, block=False, request_id=request)
        process = self.processes[node.name]
        future.on_done(lambda done: self._ended(process, request, done))

    def _ended(self, process: Process, request: str, future: Future) -> None:
        if process.is_gone:
            return
        try:
            value, outcome, reason = future.get(timeout=0), "answered", ""
        except Exception as error:
            value = None
            outcome, reason = outcome_of(error)
        self.outcomes[outcome] += 1
        self.records.append(
            Ended(self.world.moment_ns(), request, outcome, value, reason)
        )

    # --- the whole run ---

    def perform(self) -> Result:
        """Run it from beginning to end, and judge it."""
        scenario, world = self.scenario, self.world
        for number in range(1, scenario.nodes + 1):
            self.start_node(f"node-{number}")
        self.start_node("client-1", is_client=True)
        self.start_node("client-2", is_client=True)
        world.run_until(world.now_ns + 1_000_000_000)
        began_ns = world.now_ns
        self._weigh()
        duration_s = scenario.duration_s
        orders = self._orders()
        self._to_come = len(orders)
        world.plan(
            (began_ns + round(order.at_s * 1e9), self._issue, (order,))
            for order in orders
        )
        for episode in self.episodes:
            world.after(episode.at_s, self._begin, episode)
        world.run_until(began_ns + round(duration_s * 1e9))
        self._heal()
        self._prove_reachable()
        world.run_until(world.now_ns + round((_ASK_S + 3) * 1e9))
        self._look_at_what_is_left()
        self._note_work()
        self._prove_stoppable()
        result = self._judge()
        self.close()
        return result

    def _orders(self) -> list[Order]:
        """The requests, and a quarter as many messages that want no answer."""
        scenario, draw = self.scenario, self.world.stream("requests")
        orders = []
        for number in range(scenario.requests + scenario.requests // 4):
            order = Order(draw, number, scenario.identities, scenario.duration_s)
            if number >= scenario.requests:
                order.operation = "leave log" if order.number % 25 == 0 else "tell"
            orders.append(order)
        return orders

    def _weigh(self) -> None:
        """Count now and then what is kept because it is not done yet, everywhere."""
        waiting = sum(len(node.waiting()) for node in self.nodes.values())
        kept = waiting + self.world.waiting_count - self._to_come
        self._kept_peak = max(self._kept_peak, kept)
        self.world.after(_WEIGH_S, self._weigh)

    def _heal(self) -> None:
        world = self.world
        self._inside.clear()
        # What an episode has put off (a restart, the end of a pause) comes first.
        world.run_until(world.now_ns + 1_000_000_000)
        if not self.member_names():
            self.start_node("node-1")
        self.records.append(Healed(world.now_ns))

    def _prove_reachable(self) -> None:
        """Have every identity sought from every node that runs."""
        world = self.world
        world.run_until(world.now_ns + round(TTL_S * 1e9))
        seconds = 2 * TTL_S - 0.5
        for name in sorted(self.nodes):
            node = self.nodes[name]
            if node.state == "stopping":
                continue
            for number in range(self.scenario.identities):
                identity = f"counter/{number}"
                future = node.seek(identity, timeout=seconds)
                future.on_done(partial(self._reached, node, identity))

    def _reached(self, node: PlacementNode, identity: str, future: Future) -> None:
        reason = ""
        try:
            pid = future.get(timeout=0)
            if pid.session not in self.shared.store.open_sessions:
                reason = f"it was sent to {pid}, whose session is closed"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self.records.append(
            Reached(self.world.moment_ns(), str(node.address), identity, reason)
        )

    def _look_at_what_is_left(self) -> None:
        contents = self.shared.store
        now_ns = self.world.now_ns
        hosted = {
            (node.session, pid.identity): pid
            for node in self.nodes.values()
            for pid in node.hosted()
        }
        for identity, row in sorted(contents.rows.items()):
            if identity.kind == "counter":
                self.records.append(
                    FinalState(now_ns, str(identity), _requests_in(row.snapshot))
                )
            if row.lock is not None and self._is_lost(row.lock.session):
                self._left("store", f"lock of {row.lock}", identity)
            if (
                row.owner is not None
                and (row.owner, identity) not in hosted
                and self._is_lost(row.owner)
            ):
                self._left("store", f"entry of {row.owner}, not hosted", identity)
        live = {node.session for node in self.nodes.values()}
        for session in sorted(contents.open_sessions):
            if session not in live:
                self._left("store", f"open session {session}", "")
        for _, node in sorted(self.nodes.items()):
            for what, of in node.waiting():
                self._left(node.name, what, of)

    def _is_lost(self, session: str) -> bool:
        """Whether nobody will free what `session` has in the store.

        What was written later than the store had said stays until somebody wants
        it, and asks whoever opened that session.
        """
        if session not in self.shared.store.open_sessions:
            return False
        may_be_late = any(episode.how == "late" for episode in self.episodes)
        return not may_be_late or all(
            node.session != session for node in self.nodes.values()
        )

    def _left(self, where: str, what: str, identity: str) -> None:
        self.records.append(LeftBehind(self.world.now_ns, where, what, str(identity)))

    def _prove_stoppable(self) -> None:
        """Stop all nodes in good order, while activations start everywhere."""
        world = self.world
        draw = world.stream("stops").random
        for index, name in enumerate(sorted(self.nodes)):
            node = self.nodes[name]
            # Each of them sought by two nodes or more.
            for number in range(index % 3, self.scenario.identities, 3):
                node.seek(f"log/{number}", timeout=2 * TTL_S)
            world.after(draw() * _STOPS_WITHIN_S, self._stop_now, node)
        # Sooner than what nobody ends would end by being idle.
        world.run_until(world.now_ns + round(2 * TTL_S * 1e9))
        for name, node in sorted(self.nodes.items()):
            if not node.has_left:
                self._left(name, "it was told to stop, and", "")
        for session in sorted(self.shared.store.open_sessions):
            self._left("store", f"after all have stopped open session {session}", "")

    def _stop_now(self, node: PlacementNode) -> None:
        self._empties(node)
        node.begin_stop()

    def _note_work(self) -> None:
        scenario, shared = self.scenario, self.shared
        probes = sum(isinstance(each, Reached) for each in self.records)
        self.records.append(
            WorkDone(
                self.world.now_ns,
                scenario.requests * 5 // 4 + probes,
                shared.network.frame_count,
                shared.calls.operation_count,
                self._kept_peak,
            )
        )
        self.records.append(self._busiest)

    def _judge(self) -> Result:
        shared = self.shared
        records = sorted(self.records, key=lambda each: each.at_ns)
        # Who stands still hears of an answer, and of its time, when it goes on.
        paused_s = sum(e.for_s for e in self.episodes if e.kind == "pause")
        bounds = Bounds(
            liveness_ns=round(3 * TTL_S * 1e9),
            grace_ns=round((2.5 + paused_s) * 1e9),
            # Less than it is: the clock of whoever measures it may be fast.
            idle_ns=round(0.7 * IDLE_S * 1e9),
        )
        violations = observe(records, bounds)
        violations += tuple(
            Violation("bug", "", self.world.now_ns, f"{name}: {error!r}")
            for name, error in self.world.bugs
        )
        if shared.network.is_mute:
            self.counts[MUTE] = shared.network.vanished_count
        digest = shared.network.digest().copy()
        digest.update(msgspec.msgpack.encode(records))
        return Result(
            seed=self.seed,
            messages=shared.network.frame_count
            + sum(
                isinstance(each, Entered) and each.purpose == "handle"
                for each in records
            ),
            answered=self.outcomes["answered"],
            refused=self.outcomes["refused"] + self.outcomes["failed"],
            unknown=self.outcomes["unknown"],
            faults=dict(sorted(self.counts.items())),
            violations=violations,
            trace_hash=digest.hexdigest(),
            episodes=len(self.episodes),
        )

    def close(self) -> None:
        """Forget it all."""
        for process in self.shared.processes:
            process.clock.is_gone = True


#: The tag of the frame that asks where an identity is.
_RESOLVE = 1
#: And of the one that has an activation started.
_START = 5
_MANY = 0.75
_SPREAD_EVERY = 3
_STOPS_WITHIN_S = 0.008
_GRAIN_RATE = 0.08
_GRAIN_TROUBLES = (
    "activate",
    "before",
    "after",
    "late",
    "never",
    "leave",
    "passivate",
)


def _requests_in(snapshot: bytes | None) -> tuple[str, ...]:
    if snapshot is None:
        return ()
    return tuple(msgspec.msgpack.decode(snapshot[_STATE_HEADER:])["requests"])
