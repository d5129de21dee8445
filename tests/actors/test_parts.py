import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pykka
import pytest

from actors.clock import SystemClock
from actors.dispatch import SWEEP_MIN, Alarm, DispatchedActor, ThreadDispatcher
from actors.engine import EmbeddedEngine
from actors.event_stream import WAITING_MAX, EventStream
from actors.future import Future
from actors.log import log, to_stderr
from actors.lookup import PartitionIdentityLookup, PartitionIdentityLookupConfig
from actors.loop_thread import LoopDispatcher, LoopThread
from actors.node import PlacementNode
from actors.outbox import Outbox
from actors.postbox import DEPARTED_MAX, ECHOES_MAX, Postbox
from actors.store_actor import Perform, StoreActor, Turnstile
from actors.store_memory import MemoryStore
from actors.transport import InProcessTransport
from actors.witness import ActivationWitness
from messages.codec import FRAME_BYTES_MAX, Codec
from messages.frames import Answer, Bounce, Deliver, LoopBack, Resolve
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Failed,
    Load,
    LockRefused,
    Save,
    Saved,
    Stale,
    StoreFailure,
)
from placement.delivery import Deliveries
from placement.entry import Acquisition, Pid
from placement.errors import BadMessage, NoAuthority, NotReady
from placement.event import EventsLost, Happened
from placement.identity import Identity
from placement.pidcache import PidCache
from placement.registry import VirtualActorRegistry
from placement.session import ReadSessions, StoreTrouble
from placement.topology import Address, SessionId, address_of
from tests.actors.actors_under_test import Echo
from tests.actors.test_cluster import FAST
from tests.placement.builders import CART, A, B, S, table
from tests.waiting import eventually

CLOCK = SystemClock()


# --- dispatchers ---


def test_turns_run_in_order_and_one_that_raises_harms_no_other() -> None:
    seen: list[Any] = []
    bugs: list[BaseException] = []
    dispatcher = ThreadDispatcher("t", CLOCK, on_bug=bugs.append)
    for number in range(5):
        dispatcher.post(seen.append, number)
        dispatcher.post(int, "x")
    dispatcher.post(lambda: seen.append(dispatcher.is_current()))
    assert dispatcher.stop(5)
    assert seen == [0, 1, 2, 3, 4, True]
    assert len(bugs) == dispatcher.bug_count == 5
    assert dispatcher.stop(5)
    assert not dispatcher.is_current()


def assert_urgent_turns_run_before_what_waits(
    dispatcher: ThreadDispatcher | LoopDispatcher,
) -> None:
    got: list[str] = []
    held, hold, done = threading.Event(), threading.Event(), threading.Event()

    def hold_up() -> None:
        held.set()
        assert hold.wait(20)

    def own_timer() -> None:
        dispatcher.call_at(0, got.append, "own timer")

    dispatcher.post(hold_up)
    assert held.wait(20)
    dispatcher.post(got.append, "waits")
    dispatcher.post(own_timer)
    dispatcher.post(got.append, "waits longer")
    dispatcher.call_at(0, got.append, "timer")
    dispatcher.post_urgent(got.append, "urgent")
    dispatcher.post_urgent(got.append, "urgent too")
    dispatcher.post(done.set)
    hold.set()
    assert done.wait(20)
    assert got == [
        *("urgent", "urgent too", "timer", "waits", "own timer", "waits longer")
    ]
    # It wakes for what is urgent alone.
    done.clear()
    dispatcher.post_urgent(done.set)
    assert done.wait(20)


def test_what_is_urgent_runs_before_what_waits() -> None:
    dispatcher = ThreadDispatcher("d", CLOCK)
    assert_urgent_turns_run_before_what_waits(dispatcher)
    assert dispatcher.stop(5)


def test_what_is_urgent_runs_before_what_waits_on_a_loop_too() -> None:
    thread = LoopThread("loop")
    dispatcher = LoopDispatcher(thread, CLOCK)
    assert_urgent_turns_run_before_what_waits(dispatcher)
    assert dispatcher.stop(5)
    thread.soon(thread.stop)
    thread.join(10)


def test_timers_run_by_their_time_and_can_be_cancelled() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    seen: list[int] = []
    done = threading.Event()
    now = dispatcher.now_ns()
    dispatcher.call_at(now + 30_000_000, done.set)
    dispatcher.call_at(now + 20_000_000, seen.append, 2)
    dispatcher.call_at(now + 10_000_000, seen.append, 1)
    dispatcher.call_at(now + 10_000_000, seen.append, 9).cancel()
    assert done.wait(5)
    assert seen == [1, 2]
    dispatcher.post(lambda: dispatcher.stop(5))
    eventually(lambda: not dispatcher._thread.is_alive())


def test_a_timer_that_is_due_in_a_microsecond_is_not_slept_through() -> None:
    # Now and then its time is over between the look at the clock and the wait.
    # Nothing else is posted: a dispatcher that then waits for ever is not woken.
    dispatcher = ThreadDispatcher("t", CLOCK)
    done = threading.Event()
    left = 20_000

    def again() -> None:
        nonlocal left
        left -= 1
        if left:
            dispatcher.call_at(dispatcher.now_ns() + left % 60 * 500, again)
        else:
            done.set()

    dispatcher.post(again)
    last = left + 1
    while not done.wait(5) and left < last:
        last = left
    dispatcher.kill()

    assert dispatcher.stop(5)
    assert left == 0


def test_cancelled_timers_are_swept_out_where_they_are_the_most() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    later = dispatcher.now_ns() + 3_600_000_000_000
    timers = [dispatcher.call_at(later, int) for _ in range(1_000)]
    eventually(lambda: len(dispatcher._timers) == 1_000)
    for timer in timers[:990]:
        timer.cancel()
        timer.cancel()
    eventually(lambda: len(dispatcher._timers) < 10 + 2 * SWEEP_MIN)
    assert all(each in [t[2] for t in dispatcher._timers] for each in timers[990:])
    dispatcher.call_at(later, int).cancel()
    dispatcher.stop(5)


def test_a_timer_that_is_very_far_harms_no_dispatcher() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    seen: list[int] = []
    dispatcher.call_at(1 << 80, int)
    dispatcher.post(seen.append, 1)
    eventually(lambda: seen == [1])
    assert dispatcher.stop(5)


def test_a_turn_that_exits_harms_no_other() -> None:
    def leaves() -> None:
        raise SystemExit

    dispatcher = ThreadDispatcher("t", CLOCK)
    seen: list[int] = []
    dispatcher.post(leaves)
    dispatcher.post(seen.append, 1)
    assert dispatcher.stop(5)
    assert seen == [1]


def test_a_killed_dispatcher_runs_nothing_that_waits() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    inside, gate = threading.Event(), threading.Event()
    seen: list[int] = []

    def turn() -> None:
        inside.set()
        gate.wait(5)

    dispatcher.post(turn)
    inside.wait(5)
    assert dispatcher.busy_since_ns > 0
    dispatcher.post(seen.append, 1)
    dispatcher.kill()
    assert not dispatcher.stop(0.01)
    gate.set()
    assert dispatcher.stop(5)
    assert seen == []


def test_an_alarm_rings_at_the_earliest_wish() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    rung: list[int] = []
    done = threading.Event()

    def ring() -> None:
        rung.append(dispatcher.now_ns())
        done.set()

    alarm = Alarm(dispatcher, ring)
    now = dispatcher.now_ns()
    alarm.set(None)
    alarm.set(now + 60_000_000_000)
    alarm.set(now + 1_000_000)
    alarm.set(now + 30_000_000_000)
    assert done.wait(5)
    dispatcher.stop(5)
    assert len(rung) == 1


class Adder(DispatchedActor):
    def __init__(self, dispatcher: Any, on_bug: Any = None) -> None:
        super().__init__(dispatcher=dispatcher, on_bug=on_bug)
        self.total = 0
        self.seen: list[str] = []

    def on_start(self) -> None:
        self.seen.append("start")

    def on_stop(self) -> None:
        self.seen.append("stop")

    def on_receive(self, message: Any) -> Any:
        self.total += message
        return self.total


def test_a_dispatched_actor_is_a_pykka_actor() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    ref = Adder.start(dispatcher)
    assert not pykka.ActorRegistry.get_by_class(Adder)
    for number in range(1_000):
        ref.tell(number)
    assert ref.ask(0) == 499_500
    with pytest.raises(TypeError):
        ref.ask("x")
    assert ref.is_alive()
    ref.stop()
    assert not ref.is_alive()
    with pytest.raises(pykka.ActorDeadError):
        ref.tell(1)
    dispatcher.stop(5)


def test_an_actor_that_raises_when_told_stops_and_says_so() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    gate = threading.Event()
    dispatcher.post(gate.wait, 5)
    bugs: list[BaseException] = []
    actor = Adder(dispatcher, bugs.append)
    actor._start_actor_loop()
    actor.actor_ref.tell("x")
    waiting = actor.actor_ref.ask(1, block=False)
    gate.set()
    with pytest.raises(pykka.ActorDeadError):
        waiting.get(timeout=5)
    dispatcher.stop(5)
    assert len(bugs) == 1
    assert actor.seen == ["start", "stop"]


# --- the store actor ---


class Fragile(MemoryStore):
    """Fails as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.saves: list[int] = []
        self.fails: list[Any] = []

    def save(self, requests: Any, /) -> Any:
        self.saves.append(len(requests))
        if self.fails:
            raise self.fails.pop(0)
        return super().save(requests)

    def read_sessions(self) -> Any:
        raise StoreFailure("locked")


def perform(store: Fragile, requests: list[Any]) -> list[Any]:
    """Have all requests wait together, then let the actor perform them."""
    dispatcher = ThreadDispatcher("t", CLOCK)
    gate, done = threading.Event(), threading.Event()
    outcomes: list[Any] = []

    def reply(_: Any, outcome: Any) -> None:
        outcomes.append(outcome)
        if len(outcomes) == len(requests):
            done.set()

    dispatcher.post(gate.wait, 5)
    ref = StoreActor.start(store, dispatcher=dispatcher)
    for request in requests:
        ref.tell(Perform(request, reply, dispatcher))
    gate.set()
    assert done.wait(5)
    ref.stop()
    dispatcher.stop(5)
    return outcomes


ONE, TWO = Identity("a", "1"), Identity("a", "2")


def test_saves_that_follow_each_other_are_one_write() -> None:
    store = Fragile()

    outcomes = perform(store, [Save(ONE, 1, v, b"x") for v in (1, 2, 3)])

    assert store.saves == [1]
    assert len(outcomes) == 3


def test_one_broken_request_fails_alone() -> None:
    store = Fragile()
    certain = StoreFailure("too large", may_have_happened=False)
    store.fails = [certain, certain]

    outcomes = perform(store, [Save(ONE, 1, 1, b"x"), Save(TWO, 1, 1, b"x")])

    assert sorted(type(each).__name__ for each in outcomes) == ["Failed", "Stale"]


def test_a_commit_whose_answer_is_lost_may_have_happened_for_all() -> None:
    store = Fragile()
    store.fails = [StoreFailure("gone")]

    outcomes = perform(store, [Save(ONE, 1, 1, b"x"), Save(TWO, 1, 1, b"x")])

    assert outcomes == [Failed("gone", may_have_happened=True)] * 2


def test_an_order_of_one_identity_is_kept_and_sessions_fail_as_trouble() -> None:
    lock = Acquisition(SessionId("s.1#1"), 1)
    outcomes = perform(Fragile(), [Acquire(ONE, lock), Acquire(ONE, lock)])
    assert all(isinstance(each, Acquired | LockRefused) for each in outcomes)
    assert perform(Fragile(), [ReadSessions()]) == [StoreTrouble("locked")]
    assert not isinstance(outcomes[0], Saved)


class Wrong(Fragile):
    """A user's store that raises what is no StoreFailure."""

    def read_sessions(self) -> Any:
        raise KeyError("as a bug would")

    def claim(self, requests: Any, /) -> Any:
        return ()

    def close(self) -> None:
        pass


def test_a_store_that_raises_anything_has_failed_and_is_asked_again() -> None:
    store = Wrong()
    store.fails = [RuntimeError("no StoreFailure")]
    happened = Failed("RuntimeError: no StoreFailure", may_have_happened=True)

    assert perform(store, [Save(ONE, 1, 1, b"x")]) == [happened]
    assert [type(each) for each in perform(store, [Save(ONE, 1, 1, b"x")])] == [Stale]
    said = "KeyError: 'as a bug would'"
    assert perform(store, [ReadSessions()]) == [StoreTrouble(said)]
    lock = Acquisition(SessionId("s.1#1"), 1)
    [failed] = perform(store, [Claim(ONE, lock.session, 1, lock, 0)])
    assert isinstance(failed, Failed)
    assert failed.may_have_happened


def test_a_reply_that_raises_keeps_no_other_from_its_outcome() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    gate = threading.Event()
    heard: list[Any] = []

    def reply(request: Any, _: Any) -> None:
        heard.append(request.identity)
        if request.identity == ONE:
            raise RuntimeError("a bug")

    dispatcher.post(gate.wait, 5)
    ref = StoreActor.start(MemoryStore(), dispatcher=dispatcher)
    for identity in (ONE, TWO):
        ref.tell(Perform(Save(identity, 1, 1, b"x"), reply, dispatcher))
    gate.set()
    eventually(lambda: heard == [ONE, TWO])
    assert ref.is_alive()
    ref.stop()
    dispatcher.stop(5)
    assert dispatcher.bug_count == 1


def test_an_actor_whose_batch_fails_is_woken_by_what_comes_next() -> None:
    class Failing(Adder):
        def _handle_batch(self, batch: list[Any]) -> None:
            if batch[0].message == "fail":
                raise RuntimeError("the batch")
            super()._handle_batch(batch)

    dispatcher = ThreadDispatcher("t", CLOCK)
    ref = Failing.start(dispatcher)
    ref.tell("fail")
    eventually(lambda: dispatcher.bug_count == 1)

    assert ref.ask(2, timeout=5) == 2
    ref.stop()
    dispatcher.stop(5)


def test_what_is_handed_to_an_actor_is_handled_at_once_or_behind_what_waits() -> None:
    handled: list[Any] = []
    bugs: list[BaseException] = []

    class Listing(DispatchedActor):
        def on_receive(self, message: Any) -> None:
            handled.append(message)
            if message == "first":
                ref.hand("third")
                handled.append("second")
            if message == "bug":
                raise RuntimeError("a bug")

    def turn() -> None:
        ref.hand("first")
        ref.hand("fourth")
        handled.append("over")

    dispatcher = ThreadDispatcher("t", CLOCK)
    ref = Listing.start(dispatcher=dispatcher, on_bug=bugs.append)
    dispatcher.post(turn)
    eventually(lambda: len(handled) == 5)
    assert handled == ["first", "second", "over", "third", "fourth"]

    for message in ("bug", "late"):
        dispatcher.post(ref.hand, message)
    dispatcher.stop(5)
    assert [str(bug) for bug in bugs] == ["a bug"]
    assert not ref.is_alive()
    assert handled[-1] == "bug"
    assert dispatcher.bug_count == 0


def test_an_engine_over_a_store_that_hangs_is_closed_within_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, inside = threading.Event(), threading.Event()

    class Hanging(MemoryStore):
        def read_sessions(self) -> Any:
            inside.set()
            gate.wait(20)
            return super().read_sessions()

        def another(self) -> "Hanging":
            return self

    monkeypatch.setattr("actors.engine._STOP_S", 0.1)
    engine = EmbeddedEngine(Hanging())
    engine.sessions.tell(Perform(ReadSessions(), lambda *_: None, engine.system))
    assert inside.wait(5)
    began_s = time.monotonic()

    engine.close()

    assert time.monotonic() - began_s < 5
    gate.set()


@pytest.mark.parametrize("has_one_writer", [False, True])
def test_a_session_waits_for_entries_only_where_a_store_has_one_writer(
    monkeypatch: pytest.MonkeyPatch, *, has_one_writer: bool
) -> None:
    turnstile = Turnstile()
    monkeypatch.setattr("actors.engine.Turnstile", lambda: turnstile)
    gate, inside = threading.Event(), threading.Event()
    answered: list[str] = []

    class Slow(MemoryStore):
        @contextmanager
        def transaction(self) -> Iterator[None]:
            inside.set()
            gate.wait(60)
            with super().transaction():
                yield

    store = Slow()
    store.has_one_writer = has_one_writer  # type: ignore[attr-defined]
    engine = EmbeddedEngine(store)

    def reply(request: Any, _: Any) -> None:
        answered.append(type(request).__name__)

    engine.entries.tell(Perform(Load(ONE), reply, engine.system))
    assert inside.wait(30)
    engine.sessions.tell(Perform(ReadSessions(), reply, engine.system))
    if has_one_writer:
        eventually(lambda: turnstile._urgent_count == 1)
        assert not answered
    else:
        eventually(lambda: answered == ["ReadSessions"])
    gate.set()
    eventually(lambda: len(answered) == 2)
    engine.close()


# --- transport and postbox ---


def test_a_transport_tells_who_is_gone_and_not_who_was_killed() -> None:
    transport = InProcessTransport()
    seen: list[bytes] = []
    a = Address("a.1")
    assert not transport.send(a, b"0")
    transport.attach(a, seen.append)
    assert transport.send(a, b"1")
    transport.kill(a)
    assert transport.send(a, b"2")
    transport.detach(a)
    assert not transport.send(a, b"3")
    assert seen == [b"1"]


def box_of_b(
    dispatcher: ThreadDispatcher,
    transport: Any,
    *,
    handle: Callable[[Address, Any], object] = lambda *_: None,
    publish: Callable[[Any], object] = lambda _: None,
) -> Postbox:
    return Postbox(
        cluster="default",
        address=Address("b.1"),
        transport=transport,
        dispatcher=dispatcher,
        handle=handle,  # type: ignore[arg-type]
        publish=publish,  # type: ignore[arg-type]
    )


def test_a_postbox_drops_what_comes_twice_and_refuses_what_is_no_frame() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    transport = InProcessTransport()
    handled: list[Any] = []
    happened: list[Happened] = []
    box = box_of_b(
        dispatcher,
        transport,
        handle=lambda sender, body: handled.append((sender, body)),
        publish=happened.append,
    )
    assert not box.send(Address("a.1"), LoopBack(1))
    box.open()
    codec = Codec("default")
    frame = codec.encode("a.1", "b.1", 1, LoopBack(7))
    for data in (frame, frame, b"junk"):
        transport.send(Address("b.1"), data)
    box.send(Address("b.1"), LoopBack(8))
    box.leave()
    done = Future()
    box.handled(done)
    done.get(timeout=5)
    assert handled == [("a.1", LoopBack(7)), ("b.1", LoopBack(8))]
    assert [each.name for each in happened] == ["FrameRefused"]
    box.close()
    box._arrived(frame)
    box._handle_own(LoopBack(9))
    assert len(handled) == 2
    dispatcher.stop(5)


def test_a_node_hears_itself_before_what_waits_however_often_it_says_so() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    handled: list[Any] = []
    box = box_of_b(
        dispatcher,
        InProcessTransport(),
        handle=lambda _, body: handled.append(body),
        publish=handled.append,
    )
    box.open()
    held, hold = threading.Event(), threading.Event()

    def hold_up() -> None:
        held.set()
        assert hold.wait(20)

    dispatcher.post(hold_up)
    assert held.wait(20)
    box.send(Address("b.1"), LoopBack(1))
    for nonce in (2, 3, 3):
        box.send_echo(LoopBack(nonce))
    hold.set()
    assert dispatcher.stop(5)
    assert handled == [LoopBack(2), LoopBack(3), LoopBack(3), LoopBack(1)]
    assert not box._echoes


def test_echoes_that_are_lost_are_not_remembered_for_ever() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    transport = InProcessTransport()
    box = box_of_b(dispatcher, transport)
    box.open()
    transport.kill(Address("b.1"))
    for nonce in range(3 * ECHOES_MAX):
        box.send_echo(LoopBack(nonce))
        assert 0 < len(box._echoes) <= ECHOES_MAX
    assert dispatcher.stop(5)


def test_a_frame_that_is_too_large_is_refused_to_whoever_sent_or_asked() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    transport = InProcessTransport()
    happened: list[Happened] = []
    arrived: list[bytes] = []
    box = box_of_b(dispatcher, transport, publish=happened.append)
    box.open()
    to = Address("a.1")
    transport.attach(to, arrived.append)
    huge = "x" * FRAME_BYTES_MAX

    with pytest.raises(BadMessage, match="Deliver: "):
        box.send(to, Deliver(ONE, 1, 7, huge, "", 1, ()))
    assert arrived == []
    assert box.send(to, Answer(7, huge, 1))
    assert box.send(to, Bounce(ONE, 1, 8, huge, "", 1, ()))

    codec = Codec("default")
    told = [codec.decode(each, receiver="a.1").body for each in arrived]
    assert [(each.message_id, each.reason) for each in cast("Any", told)] == [
        (7, "BadMessage"),
        (8, "BadMessage"),
    ]
    assert [each.name for each in happened] == ["FrameTooLarge"] * 2
    dispatcher.stop(5)


def test_a_transport_that_raises_has_lost_the_frame_and_ends_nobody() -> None:
    class Raising(InProcessTransport):
        def send(
            self, address: Address, data: bytes, *, sender: Address | None = None
        ) -> bool:
            raise OSError("no network")

    dispatcher = ThreadDispatcher("t", CLOCK)
    happened: list[Happened] = []
    box = box_of_b(dispatcher, Raising(), publish=happened.append)
    box.open()
    assert box.send(Address("a.1"), LoopBack(1))
    box.send_echo(LoopBack(2))
    assert [each.reason for each in happened] == ["OSError: no network"] * 2
    dispatcher.stop(5)


def test_of_incarnations_that_have_departed_only_the_last_are_remembered() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    handled: list[Any] = []
    box = box_of_b(
        dispatcher,
        InProcessTransport(),
        handle=lambda sender, _: handled.append(sender),
    )
    box.open()
    codec = Codec("default")
    senders = [Address(f"a.{number}") for number in range(DEPARTED_MAX + 9)]
    frames = [codec.encode(each, "b.1", 1, LoopBack(1)) for each in senders]
    for sender, frame in zip(senders, frames, strict=True):
        box._arrived(frame)
        box.forget(sender)
        box.forget(sender)

    assert len(box._last_seen) == len(box._departed) == DEPARTED_MAX
    # One that lives and speaks again is no departed one, and no repeated one.
    box._arrived(frames[-1])
    assert len(handled) == len(senders)
    box._arrived(codec.encode(senders[-1], "b.1", 2, LoopBack(1)))
    assert handled[-1] == senders[-1]
    assert senders[-1] not in box._departed
    box.forget(Address("never.1"))
    assert len(box._last_seen) == DEPARTED_MAX
    dispatcher.stop(5)


def test_numbers_grow_for_a_receiver_whoever_else_is_written_to() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    transport = InProcessTransport()
    box = box_of_b(dispatcher, transport)
    box.open()
    arrived: list[bytes] = []
    for name in ("a.1", "c.1"):
        transport.attach(Address(name), arrived.append)
    for name in ("a.1", "c.1", "a.1"):
        box.send(Address(name), LoopBack(1))
    codec = Codec("default")
    numbers = [codec.decode(arrived[n], receiver="a.1").number for n in (0, 2)]
    assert numbers[0] < numbers[1]
    dispatcher.stop(5)


# --- events ---


def test_a_slow_subscriber_loses_the_oldest_and_hears_how_many() -> None:
    stream = EventStream("n", CLOCK.wall_ms, lambda: 1)
    inside, gate = threading.Event(), threading.Event()
    seen: list[Any] = []

    def slow(event: Any) -> None:
        inside.set()
        gate.wait(20)
        seen.append(event)

    subscription = stream.subscribe(slow)
    stream.publish(Happened(kind="placement", name="first"))
    inside.wait(5)
    for _ in range(WAITING_MAX + 5):
        stream.publish(Happened(kind="actor", name="more"))
    gate.set()
    eventually(lambda: len(seen) == WAITING_MAX + 2)
    assert isinstance(seen[1], EventsLost)
    assert seen[1].count == 5
    assert seen[2].number == 7
    subscription.cancel()
    stream.publish(Happened(kind="actor", name="after"))
    assert stream.counts["after"] == 1
    assert len(seen) == WAITING_MAX + 2


def test_a_subscriber_may_cancel_itself_and_one_that_hangs_is_left() -> None:
    stream = EventStream("n", CLOCK.wall_ms, lambda: 1)
    gate, cancelled = threading.Event(), threading.Event()

    def ends(_: Any) -> None:
        own.cancel()
        cancelled.set()

    own = stream.subscribe(ends)
    stream.publish(Happened(kind="actor", name="x"))
    assert cancelled.wait(5)
    hanging = stream.subscribe(lambda _: gate.wait(20))
    stream.publish(Happened(kind="actor", name="y"))
    hanging.cancel(timeout_s=0.05)
    own.put(None)  # type: ignore[arg-type]
    gate.set()
    stream.close()


# --- the rest ---


def test_r3_6_a_lookup_offers_the_contract_over_a_node() -> None:
    with PlacementNode("n", kinds={"echo": Echo}, **FAST) as node:
        lookup = PartitionIdentityLookup(node)
        lookup.setup_member()
        identity = Identity("echo", "1")
        found = lookup.resolve(identity)
        assert found.locality == "local"
        assert lookup.remove_pid(found.pid)
        assert not lookup.remove_pid(found.pid)
        lookup.resolve(identity)
        assert lookup.on_member_left(found.owner) == (identity,)
        lookup.update_topology()
        lookup.passivate_idle(100)
        assert node.ref("echo/1").ask(1) == 1
        lookup.passivate_idle(0)
        eventually(lambda: not node.snapshot().activations)
        assert lookup.node is node


def test_a_lookup_of_its_own_may_be_a_client() -> None:
    lookup = PartitionIdentityLookup.of(PartitionIdentityLookupConfig(name="c"))
    lookup.setup_client()
    assert lookup.node.state == "client"
    lookup.node.stop()

    lookup = PartitionIdentityLookup.of(PartitionIdentityLookupConfig(name="m"))
    lookup.setup_member()
    with pytest.raises(NoAuthority):
        lookup.resolve(Identity("echo", "1"))
    lookup.node.stop()


def test_the_witness_counts_what_overlaps_and_only_that() -> None:
    witness = ActivationWitness()
    old = Pid(ONE, SessionId("a.1#1"), 1)
    new = Pid(ONE, SessionId("b.1#1"), 2)
    witness.started(old)
    witness.handled(old)
    witness.stopped(old)
    witness.started(new)
    witness.handled(new)
    assert witness.double_count == 0
    witness.handled(old)
    assert witness.double_count == 1
    witness.started(old)
    assert witness.double_count == 2
    witness.killed("a")
    witness.killed("b")
    witness.started(new)
    assert witness.double_count == 2
    assert witness.activations == {"a": 2, "b": 2}
    assert witness.handled_by == {"a": 2, "b": 1}
    assert (witness.identity_count, witness.of("none/1").activations) == (1, 0)


def test_logs_are_quiet_until_they_are_configured(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log.error("nobody hears", a=1)
    assert capfd.readouterr() == ("", "")
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        to_stderr(logging.WARNING)
        stream = io.StringIO()
        handler: Any = root.handlers[0]
        handler.setStream(stream)
        log.error("somebody hears", a=1)
        assert "event='somebody hears' a=1" in stream.getvalue()
    finally:
        root.handlers[:] = before
        root.setLevel(level)


@pytest.mark.parametrize("timeout", [1e300, 10**400, float("inf"), None])
def test_a_future_may_be_waited_for_as_long_as_anybody_likes(timeout: Any) -> None:
    future = Future()
    timer = threading.Timer(0.01, future.set, [5])
    timer.start()
    assert future.get(timeout=timeout) == 5
    timer.join()


# --- outbox ---


def test_an_ask_that_did_not_leave_is_not_lost_with_the_session_it_was_for() -> None:
    dispatcher = ThreadDispatcher("t", CLOCK)
    cache = PidCache(ttl_ns=60 * S, size_max=10)
    sent: list[Any] = []

    def send(to: Address, frame: Any) -> bool:
        sent.append((to, type(frame)))
        return not isinstance(frame, Deliver)  # who held it has left

    outbox = Outbox(
        own=Address("x.1"),
        dispatcher=dispatcher,
        deliveries=Deliveries(cache),
        registry=VirtualActorRegistry(),
        send=send,
        need_topology=lambda _: None,
        publish=lambda _: None,
        ask_timeout=5.0,
    )
    outbox.open()
    outbox.adopt(table(A, B), ())
    cache.put(Pid(CART, A, 5), dispatcher.now_ns())
    future = Future()

    outbox.send(CART, 1, future=future, timeout=None, request_id="", chain=())
    outbox.adopt(table(B, epoch=2), (A,))

    # It is certain that nobody has it: it is sought anew, and its outcome known.
    assert sent[0] == (address_of(A), Deliver)
    assert sent[-1] == (address_of(B), Resolve)
    assert not future.is_done
    outbox.close("the end")
    with pytest.raises(NotReady, match="the end"):
        future.get(timeout=0)
    assert dispatcher.stop(5)


def test_what_is_held_keeps_what_follows_from_going_straight() -> None:
    with PlacementNode("n", kinds={"echo": Echo}) as node:
        node.start_member()
        node.ref("echo/1").ask("what is held at first")
        node.ref("echo/1").ask("what finds it")
        found = node._registry.find(Identity("echo", "1"))
        assert found is not None
        assert found.is_straight
        with node._outbox.lock:
            node._outbox.forget(found.pid)
            held = node.seek("echo/1")
            assert not found.is_straight
        assert held.get(timeout=5) == found.pid
        assert node.ref("echo/1").ask(1) == 1
        assert found.is_straight
