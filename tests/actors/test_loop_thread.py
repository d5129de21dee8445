"""A dispatcher on the thread of an event loop."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from actors.clock import SystemClock
from actors.loop_thread import TURNS_AT_ONCE, LoopDispatcher, LoopThread
from tests.waiting import eventually

CLOCK = SystemClock()


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("loop")
    yield thread
    thread.soon(thread.stop)
    thread.join(10)
    assert not thread.is_alive


def test_turns_of_many_threads_run_one_by_one_each_threads_in_order(
    thread: LoopThread,
) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    got: list[tuple[int, int]] = []
    inside: list[bool] = []

    def turn(who: int, number: int) -> None:
        inside.append(dispatcher.is_current())
        got.append((who, number))

    def post(who: int) -> None:
        for number in range(3_000):
            dispatcher.post(turn, who, number)

    posters = [threading.Thread(target=post, args=(who,)) for who in range(4)]
    for each in posters:
        each.start()
    for each in posters:
        each.join()
    eventually(lambda: len(got) == 12_000)
    assert all(inside)
    assert not dispatcher.is_current()
    for who in range(4):
        assert [number for at, number in got if at == who] == list(range(3_000))


def test_what_a_turn_posts_runs_after_what_was_posted_before(
    thread: LoopThread,
) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    got: list[str] = []
    hold = threading.Event()

    def first() -> None:
        hold.wait(20)
        dispatcher.post(got.append, "third")
        got.append("first")

    dispatcher.post(first)
    dispatcher.post(got.append, "second")
    hold.set()
    eventually(lambda: len(got) == 3)
    assert got == ["first", "second", "third"]


def test_a_turn_that_raises_is_told_and_the_others_go_on(thread: LoopThread) -> None:
    bugs: list[BaseException] = []
    dispatcher = LoopDispatcher(thread, CLOCK, on_bug=bugs.append)
    got: list[int] = []

    def wrong() -> None:
        raise ZeroDivisionError

    dispatcher.post(wrong)
    dispatcher.post(got.append, 1)
    eventually(lambda: got)
    assert [type(bug) for bug in bugs] == [ZeroDivisionError]
    assert dispatcher.bug_count == 1


def on(thread: LoopThread, asked: Callable[[], bool]) -> bool:
    """What `asked` answers on that thread, outside of all turns."""
    answers: list[bool] = []
    thread.loop.call_soon_threadsafe(lambda: answers.append(asked()))
    eventually(lambda: answers)
    return answers[0]


def test_a_turn_runs_now_only_on_the_thread_and_where_nothing_waits(
    thread: LoopThread,
) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    got: list[str] = []

    def behind() -> bool:
        dispatcher.post(got.append, "posted before")
        return dispatcher.take_now(got.append, "not now")

    def behind_urgent() -> bool:
        dispatcher.post_urgent(got.append, "urgent")
        return dispatcher.take_now(got.append, "not now")

    def inside() -> None:
        if not dispatcher.take_now(got.append, "not now"):
            got.append("inside")

    assert on(thread, lambda: dispatcher.take_now(got.append, "now"))
    assert got == ["now"]
    assert not dispatcher.take_now(got.append, "not now")
    assert not on(thread, behind)
    assert not on(thread, behind_urgent)
    eventually(lambda: len(got) == 3)
    # A turn that is taken so is one like others: what it asks for comes after it.
    assert on(thread, lambda: dispatcher.take_now(inside))
    dispatcher.post(inside)
    eventually(lambda: len(got) == 5)
    assert got == ["now", "posted before", "urgent", "inside", "inside"]
    assert dispatcher.stop(20)
    assert not on(thread, lambda: dispatcher.take_now(got.append, "not now"))


def test_what_a_turn_taken_now_asks_for_is_done(thread: LoopThread) -> None:
    bugs: list[BaseException] = []
    dispatcher = LoopDispatcher(thread, CLOCK, on_bug=bugs.append)
    rung = threading.Event()

    def wrong() -> None:
        dispatcher.call_at(dispatcher.now_ns() + 20_000_000, rung.set)
        raise ZeroDivisionError

    assert on(thread, lambda: dispatcher.take_now(wrong))
    assert [type(bug) for bug in bugs] == [ZeroDivisionError]
    assert dispatcher.busy_since_ns == 0
    assert rung.wait(20)


def test_timers_run_in_their_order_not_early_and_not_once_cancelled(
    thread: LoopThread,
) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    got: list[tuple[str, int]] = []

    def ring(name: str) -> None:
        got.append((name, dispatcher.now_ns()))

    now_ns = dispatcher.now_ns()
    at_ns = {"third": 60, "first": 20, "never": 30, "second": 40}
    at_ns = {name: now_ns + ms * 1_000_000 for name, ms in at_ns.items()}
    timers = {name: dispatcher.call_at(at, ring, name) for name, at in at_ns.items()}
    timers["never"].cancel()
    eventually(lambda: len(got) == 3)
    assert [name for name, _ in got] == ["first", "second", "third"]
    assert all(rang_ns >= at_ns[name] for name, rang_ns in got)


def test_a_timer_rings_while_turns_never_cease_and_the_loop_has_its_turn(
    thread: LoopThread,
) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    rung, looped = threading.Event(), threading.Event()
    is_over = threading.Event()
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        if not is_over.is_set():
            dispatcher.post(again)

    dispatcher.post(again)
    dispatcher.call_at(dispatcher.now_ns() + 20_000_000, rung.set)
    thread.loop.call_soon_threadsafe(looped.set)
    assert rung.wait(20)
    assert looped.wait(20)
    eventually(lambda: count > 3 * TURNS_AT_ONCE)
    is_over.set()


def test_many_cancelled_timers_are_let_go(thread: LoopThread) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    later_ns = dispatcher.now_ns() + 3_600_000_000_000
    for timer in [dispatcher.call_at(later_ns, print) for _ in range(1_000)]:
        timer.cancel()
    eventually(lambda: len(dispatcher._timers) < 100)


def test_a_stop_runs_what_was_posted_and_nothing_after(thread: LoopThread) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    got: list[int] = []
    for number in range(5_000):
        dispatcher.post(got.append, number)
    assert dispatcher.stop(20)
    assert got == list(range(5_000))
    dispatcher.post(got.append, -1)
    dispatcher.call_at(dispatcher.now_ns(), got.append, -2)
    done = threading.Event()
    thread.soon(done.set)
    assert done.wait(20)
    assert got == list(range(5_000))
    assert dispatcher.stop(1)


def test_a_stop_does_not_wait_for_a_turn_that_does_not_come_back_or_for_itself(
    thread: LoopThread,
) -> None:
    dispatcher = LoopDispatcher(thread, CLOCK)
    answers: list[bool] = []
    hold = threading.Event()
    dispatcher.post(hold.wait, 20)
    began = time.monotonic()
    assert not dispatcher.stop(0.05)
    assert time.monotonic() - began < 10
    hold.set()
    other = LoopDispatcher(thread, CLOCK)
    other.post(lambda: answers.append(other.stop(20)))
    eventually(lambda: answers)
    assert answers == [True]


def test_where_the_thread_has_ended_a_stop_is_done_and_a_post_does_nothing() -> None:
    thread = LoopThread("loop")
    dispatcher = LoopDispatcher(thread, CLOCK)
    thread.soon(thread.stop)
    thread.join(10)
    dispatcher.post(print)
    assert dispatcher.stop(1)
