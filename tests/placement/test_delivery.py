from typing import Any

from placement.claim import NeedTopology
from placement.delivery import (
    ASKED_MAX,
    BOUNCES_MAX,
    WAITING_MAX,
    Deliveries,
    FailMessage,
    Outgoing,
    ResolvePid,
    SendMark,
    Transmit,
)
from placement.entry import Pid
from placement.errors import Refusal
from placement.event import Happened
from placement.identity import Identity
from placement.pidcache import PidCache
from placement.topology import SessionId, address_of
from tests.placement.builders import CART, A, B, S, none_of, only, table

HERE = Pid(CART, A, 5)
THERE = Pid(CART, B, 8)


def deliveries(*, adopted: bool = True) -> Deliveries:
    made = Deliveries(PidCache(ttl_ns=60 * S, size_max=10))
    made.open()
    if adopted:
        made.adopt(table(A, B), (), now_ns=0)
    return made


def message(number: int, deadline: int = 10 * S) -> Outgoing:
    return Outgoing(number, CART, deadline, None)


def held(made: Deliveries, number: int = 1, now: int = 0) -> ResolvePid:
    return only(made.hold(message(number), now_ns=now), ResolvePid)


def sent(effects: Any) -> list[tuple[Pid, int]]:
    return [(e.pid, e.message.number) for e in effects if isinstance(e, Transmit)]


def test_r4_3_before_start_and_after_stop_messages_are_refused() -> None:
    made = Deliveries(PidCache(ttl_ns=1, size_max=1))
    one = message(1)
    refused = only(made.hold(one, now_ns=0), FailMessage)
    assert refused.refusal == Refusal("NotReady", "the node has not started")
    made.open()
    refused = only(made.hold(one, now_ns=0), FailMessage)
    assert "topology" in refused.refusal.message
    made.adopt(table(), (), now_ns=0)
    refused = only(made.hold(one, now_ns=0), FailMessage)
    assert "no member owns" in refused.refusal.message

    made = deliveries()
    held(made)
    failed = only(made.close("it has stopped"), FailMessage)
    assert failed.refusal == Refusal("NotReady", "it has stopped")
    assert only(made.hold(one, now_ns=0), FailMessage)
    assert (
        only(
            made.bounced(HERE, one, needs_mark=True, now_ns=0), FailMessage
        ).refusal.message
        == "it has stopped"
    )


def test_a_resolution_names_once_who_waits_for_it() -> None:
    made = deliveries()
    chains = (("a/1", "a/2"), (), ("a/2", "a/3"))
    first = Outgoing(1, CART, 10 * S, None, chains[0])
    resolve = only(made.hold(first, now_ns=0), ResolvePid)
    assert resolve.chain == ("a/1", "a/2")
    for number, chain in enumerate(chains[1:], start=2):
        made.hold(Outgoing(number, CART, 10 * S, None, chain), now_ns=0)
    again = only(made.tick(now_ns=5 * S), ResolvePid)
    assert again.chain == ("a/1", "a/2", "a/3")


def test_all_that_waits_for_a_resolution_goes_in_order() -> None:
    made = deliveries()
    resolve = held(made, 1)
    assert made.hold(message(2), now_ns=0) == ()
    assert made.route(CART, 0) is None

    effects = made.resolved(resolve.request, HERE, now_ns=1)

    assert sent(effects) == [(HERE, 1), (HERE, 2)]
    assert made.route(CART, 1) == HERE
    assert made.resolved(resolve.request, HERE, now_ns=1) == ()
    assert made.due_ns is None


def test_what_bounced_goes_before_what_waited_once_the_mark_is_back() -> None:
    made = deliveries()
    made.cache.put(HERE, 0)
    mark = only(made.bounced(HERE, message(1), needs_mark=True, now_ns=0), SendMark)
    assert mark.pid == HERE
    made.hold(message(3), now_ns=0)
    made.bounced(HERE, message(2), needs_mark=True, now_ns=0)
    # An answer to something else, and a mark of something else, are not it.
    assert made.resolved(mark.mark, THERE, now_ns=0) == ()
    assert made.marked(CART, mark.mark + 1, now_ns=0) == ()
    assert made.redirected(mark.mark, 9, B, now_ns=0) == ()
    assert made.refused(mark.mark, Refusal("NoAuthority", ""), now_ns=0) == ()

    resolve = only(made.marked(CART, mark.mark, now_ns=1), ResolvePid)

    effects = made.resolved(resolve.request, THERE, now_ns=2)
    assert sent(effects) == [(THERE, 1), (THERE, 2), (THERE, 3)]


def test_the_end_of_the_session_stands_for_its_mark() -> None:
    made = deliveries()
    made.bounced(HERE, message(1), needs_mark=True, now_ns=0)
    assert none_of(made.adopt(table(A, B, epoch=2), (), now_ns=1), ResolvePid)

    effects = made.adopt(table(B, epoch=3), (A,), now_ns=1)

    assert only(effects, ResolvePid).owner == B


def test_a_mark_that_does_not_come_back_is_sent_again() -> None:
    made = deliveries()
    first = only(made.bounced(HERE, message(1), needs_mark=True, now_ns=0), SendMark)

    again = only(made.tick(now_ns=2 * S), SendMark)

    assert again == first


def test_a_bounce_on_the_node_itself_needs_no_mark() -> None:
    made = deliveries()
    effects = made.bounced(HERE, message(1), needs_mark=False, now_ns=0)

    assert only(effects, ResolvePid)


def test_a_message_that_is_never_there_fails_in_the_end() -> None:
    made = deliveries()
    lost = message(1)
    lost.bounces = BOUNCES_MAX

    effects = made.bounced(HERE, lost, needs_mark=False, now_ns=0)

    assert only(effects, FailMessage).refusal.reason == "NotHere"


def test_a_message_not_delivered_by_its_deadline_fails_with_the_last_reason() -> None:
    made = deliveries()
    resolve = held(made)
    made.hold(message(2, deadline=20 * S), now_ns=0)
    made.refused(resolve.request, Refusal("LockDenied", "busy"), now_ns=0)

    effects = made.tick(now_ns=10 * S)

    failed = only(effects, FailMessage)
    assert failed.message.number == 1
    assert failed.refusal == Refusal("LockDenied", "busy")
    assert only(effects, ResolvePid)
    assert only(made.tick(now_ns=20 * S), FailMessage).message.number == 2
    assert made.tick(now_ns=30 * S) == ()


def test_a_transient_refusal_is_tried_again_and_a_final_one_told() -> None:
    made = deliveries()
    resolve = held(made)
    assert made.refused(resolve.request, Refusal("Pending", "wait"), now_ns=0) == ()
    again = only(made.tick(now_ns=S), ResolvePid)

    refusal = Refusal("NoAuthority", "nobody")
    effects = made.refused(again.request, refusal, now_ns=S)

    assert only(effects, FailMessage).refusal == refusal
    assert made.refused(again.request, refusal, now_ns=S) == ()


def test_a_redirect_of_a_newer_epoch_is_followed_and_an_older_one_not() -> None:
    made = deliveries()
    resolve = held(made)

    effects = made.redirected(resolve.request, 2, B, now_ns=0)

    assert NeedTopology(2) in effects
    followed = only(effects, ResolvePid)
    assert (followed.owner, followed.epoch) == (B, 2)
    assert made.redirected(resolve.request, 1, A, now_ns=0) == ()
    assert only(made.tick(now_ns=S), ResolvePid)
    assert made.redirected(77, 2, B, now_ns=0) == ()


def test_what_was_sent_to_a_node_that_has_left_comes_back_before_later_messages() -> (
    None
):
    made = deliveries()
    made.cache.put(HERE, 0)

    effects = made.adopt(
        table(B, epoch=2),
        (A,),
        now_ns=1,
        left={CART: A},
        left_addresses=frozenset({address_of(A)}),
        until_ns=2 * S,
    )

    mark = only(effects, SendMark)
    assert mark.pid == HERE
    assert made.hold(message(3), now_ns=2) == ()
    made.bounced(HERE, message(1), needs_mark=True, now_ns=3)
    made.bounced(HERE, message(2), needs_mark=True, now_ns=4)
    resolve = only(made.marked(CART, mark.mark, now_ns=5), ResolvePid)
    assert resolve.owner == B
    effects = made.resolved(resolve.request, THERE, now_ns=6)
    assert sent(effects) == [(THERE, 1), (THERE, 2), (THERE, 3)]
    # Nothing comes after the mark; if it did, others would have overtaken it.
    late = only(made.bounced(HERE, message(4), needs_mark=True, now_ns=7), FailMessage)
    assert late.refusal.reason == "NotHere"


def test_a_node_that_has_left_is_not_waited_for_longer_than_it_stays() -> None:
    def left(made: Deliveries, epoch: int, until_ns: int) -> Any:
        return made.adopt(
            table(B, epoch=epoch),
            (A,),
            now_ns=1,
            left={CART: A},
            left_addresses=frozenset({address_of(A)}),
            until_ns=until_ns,
        )

    made = deliveries()
    made.cache.put(HERE, 0)
    mark = only(left(made, 2, S // 8), SendMark)
    made.hold(message(2), now_ns=2)
    # Told again meanwhile, it stays as long as was said last.
    assert none_of(left(made, 3, S // 4), ResolvePid)
    while (made.due_ns or 0) < S // 4:
        assert only(made.tick(now_ns=made.due_ns or 0), SendMark).mark == mark.mark
    assert made.due_ns == S // 4
    resolve = only(made.tick(now_ns=S // 4), ResolvePid)
    late = only(made.bounced(HERE, message(1), needs_mark=True, now_ns=S), FailMessage)
    assert late.refusal.reason == "NotHere"
    assert sent(made.resolved(resolve.request, THERE, now_ns=S)) == [(THERE, 2)]

    # Where nothing else is sent there, nothing is asked either.
    made = deliveries()
    mark = only(left(made, 2, S // 8), SendMark)
    assert mark.pid == Pid(CART, A, 0)
    assert made.marked(CART, mark.mark, now_ns=2) == ()
    assert made.held() == ()
    made = deliveries()
    left(made, 2, S // 8)
    assert none_of(made.tick(now_ns=S // 8), ResolvePid)
    assert made.held() == ()


def test_a_later_end_of_the_same_node_ends_the_waiting_for_what_comes_back() -> None:
    made = deliveries()
    made.cache.put(HERE, 0)
    wait = {"left": {CART: A}, "left_addresses": frozenset({address_of(A)})}
    made.adopt(table(B, epoch=2), (A,), now_ns=1, until_ns=2 * S, **wait)  # type: ignore[arg-type]

    other = SessionId(f"{address_of(A)}#2")
    assert none_of(made.adopt(table(B, epoch=3), (other,), now_ns=2), ResolvePid)

    assert made.held() == ()
    late = only(made.bounced(HERE, message(1), needs_mark=True, now_ns=3), FailMessage)
    assert late.refusal.reason == "NotHere"


def test_a_mark_that_cannot_be_sent_now_is_sent_again_while_things_come_back() -> None:
    made = deliveries()
    made.cache.put(HERE, 0)
    wait = {"left": {CART: A}, "left_addresses": frozenset({address_of(A)})}
    effects = made.adopt(table(B, epoch=2), (A,), now_ns=1, until_ns=2 * S, **wait)  # type: ignore[arg-type]
    mark = only(effects, SendMark).mark

    assert made.unmarked(CART, mark, now_ns=2) == ()

    made.bounced(HERE, message(1), needs_mark=True, now_ns=3)
    assert only(made.tick(now_ns=made.due_ns or 0), SendMark).mark == mark
    assert only(made.marked(CART, mark, now_ns=4), ResolvePid).owner == B


def test_r1_2_a_change_drops_stale_references_and_asks_the_new_owner() -> None:
    made = deliveries()
    made.cache.put(HERE, 0)

    effects = made.adopt(table(B, epoch=2), (A,), now_ns=1)

    assert only(effects, Happened).name == "Dropped"
    assert made.route(CART, 1) is None

    made = deliveries()
    first = held(made)
    gone, stays = first.owner, A if first.owner == B else B
    effects = made.adopt(table(stays, epoch=2), (gone,), now_ns=1)
    assert only(effects, ResolvePid).owner == stays
    assert made.adopt(table(stays, epoch=3), (), now_ns=1) == ()


def test_without_owners_a_held_message_waits_for_a_newer_topology() -> None:
    made = deliveries()
    held(made)

    effects = made.adopt(table(epoch=2), (A, B), now_ns=0)

    assert only(effects, NeedTopology).epoch == 0
    failed = only(made.tick(now_ns=10 * S), FailMessage)
    assert failed.refusal == Refusal("NotReady", "no member owns partitions")


def test_a_hold_whose_messages_all_failed_is_dropped() -> None:
    made = deliveries()
    held(made)
    assert only(made.tick(now_ns=10 * S), FailMessage)
    assert made.due_ns is None


def test_more_than_so_many_do_not_wait_for_one_identity() -> None:
    made = deliveries()
    resolve = held(made, 0)
    for number in range(1, WAITING_MAX):
        assert made.hold(message(number), now_ns=0) == ()

    refused = only(made.hold(message(WAITING_MAX), now_ns=0), FailMessage)

    assert refused.refusal.reason == "Overloaded"
    assert refused.message.number == WAITING_MAX
    assert len(sent(made.resolved(resolve.request, HERE, now_ns=1))) == WAITING_MAX


def test_a_late_answer_that_names_a_session_which_is_over_is_asked_again() -> None:
    made = deliveries()
    asked = held(made)
    made.adopt(table(A), (B,), now_ns=0)

    assert sent(made.resolved(asked.request, THERE, now_ns=1)) == []
    assert made.cache.peek(CART) is None
    again = only(made.tick(now_ns=2 * S), ResolvePid)
    assert again.owner == A
    assert sent(made.resolved(again.request, HERE, now_ns=2 * S)) == [(HERE, 1)]


def test_an_answer_that_names_no_known_member_is_used_and_not_kept() -> None:
    made = deliveries(adopted=False)
    made.adopt(table(A), (), now_ns=0)
    asked = held(made)

    effects = made.resolved(asked.request, THERE, now_ns=1)

    assert sent(effects) == [(THERE, 1)]
    assert only(effects, NeedTopology).epoch == 0
    assert made.cache.peek(CART) is None


def burst(made: Deliveries, count: int) -> list[ResolvePid]:
    """Questions that messages to so many identities raise at once."""
    effects = [
        each
        for number in range(count)
        for each in made.hold(
            Outgoing(number, Identity("cart", str(number)), 60 * S, None), now_ns=0
        )
    ]
    return [each for each in effects if isinstance(each, ResolvePid)]


def lone_deliveries() -> Deliveries:
    made = deliveries(adopted=False)
    made.adopt(table(A), (), now_ns=0)
    return made


def test_a_burst_does_not_ask_one_coordinator_everything_at_once() -> None:
    made = lone_deliveries()
    asked = burst(made, ASKED_MAX + 3)
    assert len(asked) == ASKED_MAX

    # Whatever answer comes makes room for the one that has waited longest.
    pid = Pid(asked[0].identity, A, 5)
    first = only(made.resolved(asked[0].request, pid, now_ns=1), ResolvePid)
    assert first.identity == Identity("cart", str(ASKED_MAX))
    refusal = Refusal("Pending", "later")
    second = only(made.refused(asked[1].request, refusal, now_ns=1), ResolvePid)
    assert second.identity == Identity("cart", str(ASKED_MAX + 1))
    assert none_of(made.refused(asked[1].request, refusal, now_ns=1), ResolvePid)

    # What is not answered is waited for no longer than until it is asked again.
    again = [each for each in made.tick(now_ns=S + 2) if isinstance(each, ResolvePid)]
    assert Identity("cart", str(ASKED_MAX + 2)) in {each.identity for each in again}
    assert len(again) == len({each.identity for each in again}) == ASKED_MAX + 2
    # Those that were asked twice are asked more seldom.
    assert made.tick(now_ns=S + 3) == ()
    assert len(made.tick(now_ns=2 * S + 3)) == 2


def test_one_that_waits_for_its_turn_is_late_by_its_own_deadline() -> None:
    made = lone_deliveries()
    burst(made, ASKED_MAX)
    late = Outgoing(9_999, Identity("cart", "late"), S // 2, None)
    assert made.hold(late, now_ns=0) == ()
    assert only(made.tick(now_ns=S // 2), FailMessage).message is late


def test_a_burst_is_asked_elsewhere_when_its_coordinator_has_left() -> None:
    made = lone_deliveries()
    burst(made, ASKED_MAX + 3)
    effects = made.adopt(table(B, epoch=2), [A], now_ns=1)
    asked = [each for each in effects if isinstance(each, ResolvePid)]
    assert len(asked) == ASKED_MAX
    assert {each.owner for each in asked} == {B}
    pid = Pid(asked[0].identity, B, 5)
    assert only(made.resolved(asked[0].request, pid, now_ns=1), ResolvePid)


def test_what_was_overtaken_on_a_way_that_was_not_kept_is_not_sent_on() -> None:
    made = deliveries()
    first_there, then_there = (
        Pid(CART, SessionId("c.1#1"), 5),
        Pid(CART, SessionId("d.1#1"), 9),
    )
    resolve = held(made, 1)
    made.hold(message(2), now_ns=0)
    effects = made.resolved(resolve.request, first_there, now_ns=0)
    assert sent(effects) == [(first_there, 1), (first_there, 2)]
    resolve = held(made, 3)
    assert not made.bounced(first_there, message(1), needs_mark=True, now_ns=0)
    effects = made.resolved(resolve.request, then_there, now_ns=0)
    assert sent(effects) == [(then_there, 1), (then_there, 3)]

    late = made.bounced(first_there, message(2), needs_mark=True, now_ns=0)

    assert only(late, FailMessage).refusal.reason == "NotHere"
