from typing import Any

import pytest

from placement.contracts import SessionRecord, SessionView
from placement.event import Happened
from placement.session import (
    CloseSession,
    Observer,
    OpenSession,
    OwnSession,
    ReadSessions,
    RenewSession,
    SendEcho,
    SessionBegan,
    SessionEnded,
    SessionLapsed,
    StoreTrouble,
    TopologyAdopted,
    Watch,
    WriteMembers,
)
from placement.topology import Address, SessionId, Topology, session_of
from tests.placement.builders import A, B, S, member, none_of, only

OWN = Address("own.1")
FIRST, SECOND = session_of(OWN, 1), session_of(OWN, 2)
TTL, EVERY, MARGIN = 5 * S, S, S
TROUBLE = StoreTrouble("locked")


def own() -> OwnSession:
    return OwnSession(
        OWN,
        kinds=["cart"],
        weight=1.0,
        ttl_ns=TTL,
        renew_every_ns=EVERY,
        margin_ns=MARGIN,
    )


def view(
    *sessions: SessionId,
    epoch: int = 1,
    counts: dict[SessionId, int] | None = None,
    closed: tuple[SessionId, ...] = (),
    members: tuple[SessionId, ...] | None = None,
) -> SessionView:
    counts = counts or {}
    records = [
        SessionRecord(session=each, ttl_ms=5_000, count=counts.get(each, 0))
        for each in sessions
    ]
    records += [
        SessionRecord(session=each, ttl_ms=5_000, closed=True) for each in closed
    ]
    named = sessions if members is None else members
    topology = Topology(epoch=epoch, members=tuple(member(each) for each in named))
    return SessionView(topology, tuple(sorted(records, key=lambda r: r.session)))


def opened() -> tuple[OwnSession, Any]:
    made = own()
    record = only(made.start(0), OpenSession).record
    assert (record.session, record.ttl_ms) == (FIRST, 5_000)
    effects = made.opened(FIRST, True, 0)
    assert only(effects, RenewSession) == RenewSession(FIRST, 1)
    return made, only(effects, SessionBegan).guard


def joined() -> tuple[OwnSession, Any]:
    made, guard = opened()
    made.renewed(FIRST, 1, view(FIRST), 0)
    made.echoed(1, 0)
    return made, guard


def test_nothing_names_a_session_before_its_opening_is_confirmed() -> None:
    made = own()
    made.start(0)
    assert made.session is None
    assert made.own_open() == frozenset()
    assert made.hint(5) == ()

    made.opened(FIRST, True, 0)

    assert made.session == FIRST
    assert made.own_open() == {FIRST}


def test_an_opening_not_confirmed_in_its_time_is_abandoned() -> None:
    made = own()
    made.start(0)
    assert only(made.opened(FIRST, TROUBLE, 0), Happened).reason == "locked"
    assert made.tick(1) == ()
    assert only(made.tick(S), OpenSession).record.session == FIRST

    assert only(made.tick(TTL), OpenSession).record.session == SECOND
    assert made.opened(FIRST, True, TTL) == ()
    # Refused, or confirmed when its guard could not be open any more.
    third = only(made.opened(SECOND, False, TTL), OpenSession).record.session
    late = only(made.opened(third, True, 2 * TTL), OpenSession).record.session
    assert late == session_of(OWN, 4)


def test_the_guard_is_measured_from_before_the_first_sending() -> None:
    made, guard = opened()
    assert guard.until_ns == TTL - MARGIN
    assert only(made.tick(EVERY), RenewSession).count == 1
    made.renewed(FIRST, 1, TROUBLE, EVERY)

    made.renewed(FIRST, 1, view(FIRST), 3 * S)

    # Sent first at 0, repeated at 1 s, answered at 3 s: it counts from 0.
    assert guard.until_ns == TTL - MARGIN
    made.echoed(1, 3 * S)
    only(made.renewed(FIRST, 2, view(FIRST), 3 * S), SendEcho)
    assert guard.until_ns == 3 * S + TTL - MARGIN


def test_a_node_renews_only_when_its_message_to_itself_has_come_back() -> None:
    made, guard = opened()
    assert only(made.renewed(FIRST, 1, view(FIRST), 0), SendEcho).nonce == 1

    assert none_of(made.tick(EVERY), RenewSession)
    assert made.echoed(7, EVERY) == ()
    assert only(made.echoed(1, 2 * S), RenewSession).count == 2
    assert made.echoed(1, 2 * S) == ()
    assert guard.is_open(2 * S)


def test_a_message_to_itself_that_was_lost_is_sent_again() -> None:
    made, guard = opened()
    sent = only(made.renewed(FIRST, 1, view(FIRST), 0), SendEcho)
    assert made.tick(EVERY - 1) == ()

    assert made.tick(EVERY) == (sent,)
    assert made.tick(EVERY) == ()
    assert made.due_ns is not None
    assert made.tick(made.due_ns) == (sent,)

    # The second one has come back, and then the first: it renews once.
    assert only(made.echoed(sent.nonce, 2 * S), RenewSession).count == 2
    assert made.echoed(sent.nonce, 2 * S) == ()
    assert guard.is_open(2 * S)


def test_r2_3_a_session_not_renewed_in_time_lapses_and_another_is_opened() -> None:
    made, guard = joined()
    assert only(made.tick(EVERY), RenewSession)

    effects = made.tick(TTL - MARGIN)

    assert only(effects, SessionLapsed).session == FIRST
    assert guard.is_shut
    assert made.session is None
    echo = only(effects, SendEcho)
    opening = made.echoed(echo.nonce, TTL - MARGIN)
    assert only(opening, OpenSession).record.session == SECOND
    assert made.session is None
    # Once its activations have ended it is closed, sooner than by others.
    assert only(made.settle(FIRST, 9 * S), CloseSession).session == FIRST
    assert made.renewed(FIRST, 2, view(FIRST), 9 * S) == ()
    assert guard.is_shut
    made.closed(FIRST, 2, True, 9 * S)
    assert made.own_open() == frozenset()


def test_after_a_lapse_no_session_is_opened_before_a_message_to_itself_is_back() -> (
    None
):
    made, _ = joined()
    made.tick(EVERY)
    echo = only(made.tick(TTL - MARGIN), SendEcho)
    # However long: it reaches the store, and perhaps nobody else.
    for _ in range(100):
        assert made.due_ns is not None
        assert made.tick(made.due_ns - 1) == ()
        assert made.tick(made.due_ns) == (echo,)
    # One of the session before, which comes late, says nothing of now.
    assert made.echoed(echo.nonce - 1, 90 * S) == ()
    assert made.opened(SECOND, True, 90 * S) == ()

    assert only(made.echoed(echo.nonce, 99 * S), OpenSession).record.session == SECOND
    assert made.echoed(echo.nonce, 99 * S) == ()


def test_a_node_that_is_cut_off_from_itself_can_stop() -> None:
    made, _ = joined()
    made.tick(EVERY)
    made.tick(TTL - MARGIN)

    assert only(made.stop(9 * S), SessionEnded).session == FIRST
    assert made.due_ns is None
    assert made.echoed(2, 9 * S) == ()


def test_a_session_closed_by_others_lapses_at_once() -> None:
    made, guard = joined()

    effects = made.renewed(FIRST, 1, None, S)

    assert "closed by others" in only(effects, SessionLapsed).why
    assert guard.is_shut


def test_who_is_no_member_joins_and_tells_its_kinds() -> None:
    made, _ = opened()

    effects = made.renewed(FIRST, 1, view(members=()), 0)

    written = only(effects, WriteMembers)
    assert written.expected_epoch == 1
    assert [each.session for each in written.members] == [FIRST]
    assert none_of(made.viewed(view(members=(), epoch=2), 0), WriteMembers)
    assert made.members_written(Topology(epoch=3), 0) == (ReadSessions(),)
    assert only(made.viewed(view(members=(), epoch=4), 0), WriteMembers)
    assert only(made.members_written(TROUBLE, 0), Happened)


def test_r1_2_only_a_newer_epoch_is_adopted() -> None:
    made, _ = joined()
    effects = made.viewed(view(FIRST, A, epoch=3), 0)
    assert only(effects, TopologyAdopted).topology.epoch == 3

    assert made.viewed(view(FIRST, epoch=2), 0) == ()
    assert made.viewed(view(FIRST, A, epoch=3), 0) == ()
    assert made.topology.epoch == 3
    assert made.hint(3) == ()
    assert made.hint(4) == (ReadSessions(),)
    assert made.hint(0) == (ReadSessions(),)
    assert only(made.viewed(TROUBLE, 0), Happened).name == "StoreTroubled"


def test_a_reading_from_before_an_opening_does_not_say_that_it_is_over() -> None:
    made, _ = joined()
    before = view(FIRST, epoch=2)
    made.viewed(before, 0)
    made.viewed(view(FIRST, A, epoch=2, members=(FIRST,)), 1)

    assert made.viewed(before, 2) == ()

    effects = made.viewed(view(FIRST, A, epoch=3), 3)
    assert only(effects, TopologyAdopted).closed == ()


def test_who_was_renewed_shortly_before_its_end_has_left_and_has_not_crashed() -> None:
    made = Observer(renew_every_ns=EVERY)
    made.start(0)
    made.viewed(view(A, B, epoch=3), 0)
    made.viewed(view(A, B, epoch=3, counts={A: 1}), 2 * S)

    over = view(closed=(A, B), members=(A, B), epoch=3)
    told = only(made.viewed(over, 4 * S), TopologyAdopted)
    assert (told.closed, told.left) == ((A, B), (A,))
    # It still has where both are told once more.
    over = view(closed=(A, B), members=(), epoch=4)
    told = only(made.viewed(over, 9 * S), TopologyAdopted)
    assert (told.closed, told.left) == ((A, B), (A,))
    assert made.viewed(view(members=(), epoch=4), 10 * S) == ()
    assert made._watch._left == frozenset()


def test_who_stood_still_until_it_was_closed_has_not_left() -> None:
    watch = Watch()
    watch.view(view(A, epoch=3), 0)
    assert watch.expired(TTL, besides=None) == [CloseSession(A, 0)]
    effects, _ = watch.view(view(closed=(A,), members=(A,), epoch=3), TTL + 1)
    assert only(effects, TopologyAdopted).left == ()


def test_a_count_that_is_another_in_the_last_reading_shows_who_has_left() -> None:
    watch = Watch()
    watch.view(view(A, epoch=3), 0)
    # The store refuses: it has been renewed meanwhile.
    assert watch.expired(TTL, besides=None) == [CloseSession(A, 0)]
    watch.view(view(A, epoch=3, counts={A: 1}), TTL + 1)
    seen_last = view(A, members=(), epoch=4, counts={A: 2})
    effects, _ = watch.view(seen_last, 3 * TTL)
    told = only(effects, TopologyAdopted)
    assert (told.closed, told.left) == ((A,), (A,))


def test_a_member_that_is_closed_is_told_once_and_once_more_when_it_has_left() -> None:
    made = Observer(renew_every_ns=EVERY)
    made.start(0)
    dead = view(closed=(A,), members=(A,), epoch=3)

    assert only(made.viewed(dead, 0), TopologyAdopted).closed == (A,)
    assert made.viewed(dead, 1) == ()
    # An older reading of the same epoch makes it no news.
    assert made.viewed(view(A, epoch=3), 2) == ()
    assert made.viewed(dead, 3) == ()

    gone = made.viewed(view(closed=(A,), members=(), epoch=4), 4)
    assert only(gone, TopologyAdopted).closed == (A,)
    assert made.viewed(view(closed=(A,), members=(), epoch=4), 5) == ()


def test_another_is_closed_only_when_it_stood_still_for_its_whole_time() -> None:
    made, _ = joined()
    made.viewed(view(FIRST, A, epoch=2, counts={A: 1}), 1 * S)
    made.viewed(view(FIRST, A, epoch=2, counts={A: 2}), 3 * S)
    guard_keeps(made, 3 * S)

    assert none_of(made.tick(3 * S + TTL - 1), CloseSession)
    assert only(made.tick(3 * S + TTL), CloseSession) == CloseSession(A, 2)
    assert made.closed(A, 2, False, 9 * S) == ()
    assert only(made.closed(A, 2, TROUBLE, 9 * S), Happened)
    effects = made.closed(A, 2, True, 9 * S)
    assert only(effects, Happened).name == "SessionExpired"
    assert ReadSessions() in effects


def test_the_others_time_counts_from_when_a_renewals_answer_was_had() -> None:
    made, _ = joined()
    assert only(made.tick(1 * S), RenewSession).count == 2

    made.renewed(FIRST, 2, view(FIRST, A, epoch=2, counts={A: 1}), 3 * S)
    guard_keeps(made, 3 * S)

    assert none_of(made.tick(3 * S + TTL - 1), CloseSession)
    assert only(made.tick(3 * S + TTL), CloseSession) == CloseSession(A, 1)


def guard_keeps(made: OwnSession, now: int) -> None:
    """Renew until `now` and beyond, so that only the other one stands still."""
    assert made._guard is not None
    made._guard.extend(now + 100 * S)


def test_a_closed_member_is_removed_by_whoever_finds_it() -> None:
    made, _ = joined()

    effects = made.viewed(view(FIRST, epoch=2, closed=(A,), members=(A, FIRST)), 0)

    assert A in only(effects, TopologyAdopted).closed
    assert [m.session for m in only(effects, WriteMembers).members] == [FIRST]


def test_r4_2_a_stop_waits_for_the_activations_then_leaves_and_closes() -> None:
    made, guard = joined()
    draining = only(made.stop(S), WriteMembers)
    assert draining.members[0].draining
    made.members_written(Topology(epoch=2), S)

    effects = made.settle(FIRST, 2 * S)

    assert guard.is_shut
    assert only(effects, WriteMembers).members == ()
    assert only(effects, CloseSession) == CloseSession(FIRST, 1)
    assert only(made.tick(3 * S), CloseSession)
    assert made.tick(3 * S) == ()
    ended = made.closed(FIRST, 1, True, 3 * S)
    assert only(ended, SessionEnded)
    assert made.tick(9 * S) == ()
    assert made.due_ns is None


def test_a_stop_after_all_has_settled_closes_at_once() -> None:
    made, _ = joined()
    assert made.settle(FIRST, S) == ()
    assert made.settle(SECOND, S) == ()

    assert only(made.stop(S), CloseSession)


def test_a_drain_is_written_into_the_membership() -> None:
    made, _ = joined()

    assert only(made.drain(), WriteMembers).members[0].draining


def test_a_stop_before_the_opening_is_confirmed_ends_at_once() -> None:
    made = own()
    made.start(0)

    assert made.stop(0) == (SessionEnded(FIRST),)
    assert made.opened(FIRST, True, 0) == ()


def test_a_lapse_while_stopping_ends_it() -> None:
    made, _ = joined()
    made.stop(0)

    effects = made.tick(TTL)

    assert only(effects, SessionLapsed)
    assert only(effects, SessionEnded)
    assert none_of(effects, OpenSession)
    assert only(made.closed(FIRST, 1, True, TTL), Happened).name == "SessionClosed"


def test_an_observer_reads_and_opens_nothing() -> None:
    made = Observer(renew_every_ns=EVERY)
    assert made.hint(3) == ()
    assert made.tick(5 * S) == ()
    assert made.start(0) == (ReadSessions(),)
    assert made.tick(1) == ()
    assert made.due_ns == EVERY
    assert made.tick(EVERY) == (ReadSessions(),)
    assert only(made.viewed(view(A), 0), TopologyAdopted).topology.epoch == 1
    assert only(made.viewed(TROUBLE, 0), Happened)
    assert made.hint(1) == ()
    assert made.hint(2) == (ReadSessions(),)
    assert made.topology.epoch == 1
    made.stop()
    assert made.due_ns is None


def test_a_watch_tells_who_moved() -> None:
    watch = Watch()
    watch.view(view(A, B, counts={A: 1, B: 1}), 0)
    first = watch.counts()

    watch.view(view(A, B, counts={A: 1, B: 2}), 1)

    assert watch.moved(first) == (B,)
    assert watch.others(A) == (B,)
    effects, _ = watch.view(view(A, epoch=2), 2)
    assert only(effects, TopologyAdopted).closed == (B,)
    assert watch.moved(first) == ()


@pytest.mark.parametrize(("every", "margin"), [(0, 0), (4 * S, S), (S, -1)])
def test_times_that_cannot_hold_are_refused(every: int, margin: int) -> None:
    with pytest.raises(ValueError, match="renewing must be sooner"):
        OwnSession(
            OWN,
            kinds=(),
            weight=1,
            ttl_ns=TTL,
            renew_every_ns=every,
            margin_ns=margin,
        )
