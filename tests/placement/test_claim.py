from typing import Any

import pytest

from placement.claim import (
    ACQUIRING_MAX,
    AcquireLock,
    AnswerPid,
    AskHolderSession,
    AskOwnerSession,
    Claims,
    NeedTopology,
    RedirectTo,
    Refuse,
    ReleaseLock,
    Requester,
    StartAt,
    TellHolderState,
)
from placement.contracts import Acquire, Failed, LockHeld, LockRefused, Release
from placement.entry import Acquisition, Pid
from placement.errors import NoAuthority, Refusal
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.topology import Address, Member, Topology
from tests.placement.builders import (
    CART,
    CLIENT,
    MS,
    A,
    B,
    S,
    acquired,
    entry,
    none_of,
    only,
    owned_by,
    table,
)

HERE: dict[Identity, Pid] = {}


def choose(identity: Identity, of: PartitionTable) -> Member:
    return of.host_of(identity)


def claims(*, started: bool = True) -> Claims:
    made = Claims(choose_host=choose, find_here=HERE.get)
    if started:
        made.adopt(A, table(A), now_ns=0)
    return made


def to(number: int) -> Requester:
    return Requester(CLIENT, number)


def ask(
    made: Claims, number: int = 1, *, epoch: int = 1, now: int = 0, **options: Any
) -> Any:
    """Ask for what somebody has claimed before: it goes on by the lock."""
    asked = made.request(
        to(number),
        options.get("identity", CART),
        epoch=epoch,
        deadline_ns=options.get("deadline", 10 * S),
        now_ns=now,
    )
    return denied(made, asked, now=now)


def denied(made: Claims, effects: Any, *, now: int = 0) -> Any:
    """What follows where claims that take the lock themselves are refused."""
    found: list[Any] = []
    for each in effects:
        if isinstance(each, StartAt) and each.takes_lock:
            found += made.start_refused(
                each.identity,
                each.acquisition.procedure,
                each.host,
                Refusal("LockDenied", "somebody was there before"),
                now_ns=now,
            )
        else:
            found.append(each)
    return tuple(found)


def lock(effects: Any) -> Acquire:
    return only(effects, AcquireLock).request


def starting(made: Claims) -> StartAt:
    request = lock(ask(made))
    return only(made.acquired(request, acquired(), now_ns=0), StartAt)


def test_a_start_names_once_who_waits_for_it() -> None:
    made = claims()
    asked = made.request(
        Requester(CLIENT, 1, ("a/1", "a/2")),
        CART,
        epoch=1,
        deadline_ns=10 * S,
        now_ns=0,
    )
    assert only(asked, StartAt).chain == ("a/1", "a/2")
    first = denied(made, asked)
    again = Requester(CLIENT, 2, ("a/2", "a/3"))
    made.request(again, CART, epoch=1, deadline_ns=10 * S, now_ns=0)
    start = only(made.acquired(lock(first), acquired(), now_ns=0), StartAt)
    assert start.chain == ("a/1", "a/2", "a/3")
    assert again == Requester(CLIENT, 2)


def test_r1_3_every_lookup_is_refused_while_placement_is_undetermined() -> None:
    made = claims(started=False)
    for number in range(3):
        refused = only(ask(made, number), Refuse)
        assert refused.refusal == Refusal("NotReady", "the node has not started")

    made.adopt(A, None, now_ns=0)
    assert "topology is not known" in only(ask(made), Refuse).refusal.message

    made.adopt(A, table(), now_ns=0)
    assert "no member owns" in only(ask(made), Refuse).refusal.message

    made.adopt(None, None, why_not="it has stopped", now_ns=0)
    assert only(ask(made), Refuse).refusal.message == "it has stopped"


def test_r3_1_a_start_is_asked_for_only_once_the_lock_is_acquired() -> None:
    made = claims()
    first = ask(made)
    assert none_of(first, StartAt)

    start = only(made.acquired(lock(first), acquired(), now_ns=0), StartAt)

    assert start.acquisition == lock(first).acquisition
    assert start.host == A
    assert start.expected_revision == 0


def take(made: Claims) -> StartAt:
    asked = made.request(to(1), CART, epoch=1, deadline_ns=10 * S, now_ns=0)
    return only(asked, StartAt)


def test_r3_1_where_its_own_member_hosts_the_claim_takes_the_lock() -> None:
    made = claims()

    start = take(made)

    assert (start.host, start.expected_revision, start.takes_lock) == (A, 0, True)
    assert made.started(Pid(CART, A, 5), 1, now_ns=0) == (
        AnswerPid(to(1), Pid(CART, A, 5)),
    )
    assert made.running_count == 0


def test_r3_1_where_another_member_hosts_the_lock_is_acquired_first() -> None:
    made = Claims(choose_host=lambda _, of: of.topology.members[-1], find_here=HERE.get)
    made.adopt(A, table(A, B), now_ns=0)
    identity = owned_by(A, table(A, B))

    asked = made.request(to(1), identity, epoch=1, deadline_ns=10 * S, now_ns=0)

    assert lock(asked).identity == identity


def test_r3_2_a_claim_that_finds_somebody_is_followed_by_the_lock() -> None:
    made = claims()
    start = take(made)
    refusal = Refusal("LockDenied", "session b owns it and is open")

    effects = made.start_refused(CART, 1, A, refusal, now_ns=1)

    request = lock(effects)
    assert request.acquisition == start.acquisition
    owned = acquired(entry(owner=B, token=3, revision=3))
    assert only(made.acquired(request, owned, now_ns=1), AskOwnerSession).session == B


def test_a_claim_that_its_host_refuses_for_now_takes_the_lock_later() -> None:
    made = claims()
    take(made)
    refusal = Refusal("Pending", "it is ending here")

    effects = made.start_refused(CART, 1, A, refusal, now_ns=0)

    assert only(effects, NeedTopology)
    assert only(made.tick(now_ns=20 * MS), StartAt).takes_lock


def test_a_claim_that_takes_the_lock_is_asked_for_again_until_it_is_answered() -> None:
    made = claims()
    first = take(made)

    again = only(made.tick(now_ns=500 * MS), StartAt)

    assert (again.acquisition, again.takes_lock) == (first.acquisition, True)


def test_what_ends_before_its_claim_is_answered_has_no_lock_to_release() -> None:
    made = claims()
    take(made)

    effects = made.tick(now_ns=10 * S)

    assert only(effects, Refuse).refusal.reason == "Pending"
    assert none_of(effects, ReleaseLock)


def test_claims_that_take_the_lock_are_as_many_at_the_store_as_others() -> None:
    made = claims()
    identities = [Identity("cart", str(number)) for number in range(ACQUIRING_MAX + 2)]
    for number, identity in enumerate(identities):
        made.request(to(number), identity, epoch=1, deadline_ns=60 * S, now_ns=0)

    claimed = made.claim_made(identities[0], 1, now_ns=1)
    failed = Refusal("StoreFailed", "the disk is full")
    refused = made.start_refused(identities[1], 2, A, failed, now_ns=1)

    assert only(claimed, StartAt).identity == identities[-2]
    assert only(refused, StartAt).identity == identities[-1]
    # What has been claimed holds up nobody, however long its user code takes.
    assert made.claim_made(identities[0], 1, now_ns=1) == ()


def test_r1_2_whoever_has_a_strategy_is_asked_once_when_a_host_is_needed() -> None:
    asked: list[Identity] = []

    def by_turns(identity: Identity, of: PartitionTable) -> Member:
        asked.append(identity)
        return of.topology.members[len(asked) % len(of.topology.members)]

    made = Claims(choose_host=by_turns, find_here=HERE.get, has_strategy=lambda _: True)
    made.adopt(A, table(A), now_ns=0)
    request = lock(ask(made))

    assert asked == []
    started = made.acquired(request, acquired(entry()), now_ns=0)
    assert not only(started, StartAt).takes_lock
    assert asked == [CART]


def test_r3_2_without_the_lock_nothing_is_started() -> None:
    made = claims()
    request = lock(ask(made))
    holder = Acquisition(B, 7)

    effects = made.acquired(request, LockHeld(holder), now_ns=0)

    assert none_of(effects, StartAt)
    assert only(effects, AskHolderSession).holder == holder
    assert made.holder_answered(CART, holder, 1, "running", now_ns=1) == ()
    assert only(made.holder_answered(CART, holder, 1, "free", now_ns=2), AcquireLock)


def test_r3_2_where_its_own_session_is_closed_the_requesters_hear_not_ready() -> None:
    made = claims()
    request = lock(ask(made))
    ask(made, 2)
    over = LockRefused(f"session {A} is closed")

    effects = made.acquired(request, over, now_ns=0)

    # A refusal after which senders try again elsewhere; nothing is to be freed.
    refusal = Refusal("NotReady", f"session {A} is closed")
    refused = [each for each in effects if isinstance(each, Refuse)]
    assert refused == [Refuse(to(1), CART, refusal), Refuse(to(2), CART, refusal)]
    assert none_of(effects, ReleaseLock)
    assert made.running_count == 0
    assert made.acquired(request, over, now_ns=1) == ()


def test_r2_5_concurrent_requests_are_one_procedure_and_one_answer_each() -> None:
    made = claims()
    request = lock(ask(made, 1))
    assert ask(made, 2) == ()
    assert ask(made, 2) == ()
    made.acquired(request, acquired(), now_ns=0)

    effects = made.started(Pid(CART, A, 5), 1, now_ns=1)

    pid = Pid(CART, A, 5)
    assert effects == (AnswerPid(to(1), pid), AnswerPid(to(2), pid))
    assert made.running_count == 0


def test_r2_2_an_open_owner_is_asked_and_its_answer_passed_on() -> None:
    made = claims()
    request = lock(ask(made))
    owned = acquired(entry(owner=B, token=3, revision=3))
    asked = only(made.acquired(request, owned, now_ns=0), AskOwnerSession)
    assert (asked.session, asked.fencing_token) == (B, 3)

    effects = made.owner_answered(CART, B, 1, "here", 3, now_ns=1)

    assert AnswerPid(to(1), Pid(CART, B, 3)) in effects
    assert only(effects, ReleaseLock).request == Release(CART, request.acquisition)


def test_r2_2_what_serves_on_the_node_itself_is_answered_at_once() -> None:
    made = claims()
    HERE[CART] = Pid(CART, A, 9)
    try:
        assert ask(made) == (AnswerPid(to(1), HERE[CART]),)
    finally:
        HERE.clear()


def test_an_owner_that_gave_up_or_is_not_the_one_is_not_believed_to_be_gone() -> None:
    made = claims()
    request = lock(ask(made))
    owned = acquired(entry(owner=B, token=3, revision=3))
    made.acquired(request, owned, now_ns=0)
    assert made.owner_answered(CART, B, 1, "not_mine", 0, now_ns=1) == ()
    assert made.owner_answered(CART, B, 1, "pending", 0, now_ns=1) == ()
    assert made.owner_answered(CART, A, 1, "gave_up", 0, now_ns=1) == ()

    effects = made.owner_answered(CART, B, 1, "gave_up", 0, now_ns=1)

    assert lock(effects) == request
    assert made.owner_answered(CART, B, 99, "gave_up", 0, now_ns=1) == ()


def test_r3_5_the_entry_of_a_closed_owner_is_claimed_over() -> None:
    made = claims()
    request = lock(ask(made))
    dead = acquired(entry(owner=B, token=3, revision=8), is_open=False)

    start = only(made.acquired(request, dead, now_ns=0), StartAt)

    assert start.expected_revision == 8


def test_r1_1_a_request_for_another_members_partition_is_redirected() -> None:
    made = Claims(choose_host=choose, find_here=HERE.get)
    both = table(A, B, epoch=4)
    made.adopt(A, both, now_ns=0)
    theirs = owned_by(B, both)

    assert ask(made, identity=theirs) == (RedirectTo(to(1), theirs, 4, B),)


def test_a_newer_epoch_is_waited_for_and_then_decided_by() -> None:
    made = claims()
    assert ask(made, epoch=5) == (NeedTopology(5),)
    assert made.due_ns == 10 * S

    effects = made.adopt(A, table(A, epoch=5), now_ns=1)

    assert only(effects, StartAt).identity == CART


def test_a_newer_epoch_that_never_comes_is_refused_at_the_deadline() -> None:
    made = claims()
    ask(made, epoch=5)
    assert made.tick(now_ns=9 * S) == ()

    refused = only(made.tick(now_ns=10 * S), Refuse)

    assert refused.refusal.reason == "NotReady"
    assert "epoch 5" in refused.refusal.message


def test_a_request_that_comes_too_late_is_refused() -> None:
    assert only(ask(claims(), deadline=5, now=5), Refuse).refusal.reason == "Pending"


@pytest.mark.parametrize("reason", ["ActivationFailed", "StoreFailed"])
def test_r2_4_a_failed_start_is_told_to_every_waiter(reason: str) -> None:
    made = claims()
    starting(made)
    ask(made, 2)

    effects = made.start_refused(CART, 1, A, Refusal(reason, "why"), now_ns=1)

    refused = [each for each in effects if isinstance(each, Refuse)]
    assert [each.to for each in refused] == [to(1), to(2)]
    assert all(each.refusal == Refusal(reason, "why") for each in refused)
    assert only(effects, ReleaseLock)


def test_a_host_that_refuses_for_now_is_tried_again_until_the_deadline() -> None:
    made = claims()
    starting(made)
    refusal = Refusal("NotReady", "it has lapsed")
    assert made.start_refused(CART, 1, A, refusal, now_ns=0) == (NeedTopology(0),)
    due = made.due_ns
    assert due is not None

    assert only(made.tick(now_ns=due), AcquireLock)

    refused = only(made.tick(now_ns=10 * S), Refuse)
    assert refused.refusal == Refusal("Pending", f"{A} refused: it has lapsed")


def test_answers_of_another_procedure_or_host_change_nothing() -> None:
    made = claims()
    starting(made)

    assert made.started(Pid(CART, A, 5), 2, now_ns=1) == ()
    assert made.started(Pid(CART, B, 5), 1, now_ns=1) == ()
    assert made.start_refused(CART, 1, B, Refusal("Pending", ""), now_ns=0) == ()
    assert made.holder_answered(CART, Acquisition(B, 1), 1, "free", now_ns=0) == ()
    assert made.owner_answered(CART, A, 1, "here", 5, now_ns=0) == ()
    assert made.running_count == 1


def test_a_start_that_is_not_answered_is_sent_again() -> None:
    made = claims()
    start = starting(made)
    due = made.due_ns
    assert due is not None

    again = only(made.tick(now_ns=due), StartAt)

    assert again.acquisition == start.acquisition


def test_a_host_that_left_is_chosen_anew() -> None:
    made = claims()
    made.adopt(A, table(A, B, epoch=2), now_ns=0)
    mine = owned_by(A, table(A, B, epoch=2))
    request = lock(ask(made, identity=mine))
    hosts = [B, A]
    found = table(A, B, epoch=2).topology

    def next_host(_: Identity, __: PartitionTable) -> Member:
        chosen = found.member(hosts.pop(0))
        assert chosen is not None
        return chosen

    made._choose_host = next_host
    start = only(made.acquired(request, acquired(entry(mine)), now_ns=0), StartAt)
    assert start.host == B

    effects = made.adopt(A, table(A, epoch=3), closed=(B,), now_ns=1)

    assert only(effects, AcquireLock)
    again = only(made.acquired(request, acquired(entry(mine)), now_ns=1), StartAt)
    assert again.host == A


def test_a_host_that_is_no_member_any_more_is_not_asked_again() -> None:
    made = claims()
    starting(made)
    made._table = table(B, epoch=4)
    due = made.due_ns
    assert due is not None

    assert only(made.tick(now_ns=due), AcquireLock)


def test_a_lock_that_comes_too_late_is_released() -> None:
    made = claims()
    request = lock(ask(made))
    assert only(made.tick(now_ns=10 * S), ReleaseLock)

    assert only(made.acquired(request, acquired(), now_ns=11 * S), ReleaseLock)
    assert made.acquired(request, LockHeld(Acquisition(B, 1)), now_ns=11 * S) == ()


def test_a_store_that_fails_is_told_to_the_waiters() -> None:
    made = claims()
    request = lock(ask(made))

    effects = made.acquired(request, Failed("disk full"), now_ns=0)

    refusal = only(effects, Refuse).refusal
    assert refusal == Refusal("StoreFailed", "disk full")
    assert only(effects, ReleaseLock)


def test_a_repeated_outcome_is_ignored() -> None:
    made = claims()
    request = lock(ask(made))
    made.acquired(request, acquired(), now_ns=0)

    assert made.acquired(request, acquired(), now_ns=0) == ()


def test_no_eligible_host_is_no_authority() -> None:
    made = claims()

    def nobody(identity: Identity, of: PartitionTable) -> Member:
        raise NoAuthority("nobody knows it")

    made._choose_host = nobody
    effects = made.acquired(lock(ask(made)), acquired(), now_ns=0)

    assert only(effects, Refuse).refusal == Refusal("NoAuthority", "nobody knows it")


def test_an_earlier_lock_of_our_own_is_released_and_taken_again() -> None:
    made = claims()
    request = lock(ask(made))
    mine = Acquisition(A, 77)

    effects = made.acquired(request, LockHeld(mine), now_ns=0)

    assert only(effects, ReleaseLock).request == Release(CART, mine)
    due = made.due_ns
    assert due is not None
    assert only(made.tick(now_ns=due), AcquireLock)


def test_who_asks_for_a_lock_of_ours_hears_running_free_or_not_mine() -> None:
    made = claims()
    request = lock(ask(made))
    other = Address("b.1")

    def state(holder: Acquisition) -> Any:
        return made.holder_asked(other, CART, holder, 4)

    assert only(state(request.acquisition), TellHolderState).state == "running"
    assert only(state(Acquisition(B, 1)), TellHolderState).state == "not_mine"
    forgotten = Acquisition(A, 50)
    release = only(state(forgotten), ReleaseLock).request
    assert made.released(release, is_released=False, now_ns=0) == ()
    state(forgotten)
    freed = only(made.released(release, is_released=True, now_ns=0), TellHolderState)
    assert (freed.state, freed.address, freed.procedure) == ("free", other, 4)


def test_r1_2_a_partition_that_moves_away_takes_its_requesters_along() -> None:
    made = claims()
    both = table(A, B, epoch=2)
    theirs = owned_by(B, both)
    ask(made, identity=theirs)

    effects = made.adopt(A, both, now_ns=1)

    assert only(effects, RedirectTo) == RedirectTo(to(1), theirs, 2, B)
    assert only(effects, ReleaseLock)
    assert made.running_count == 0


def test_r2_3_a_coordinator_that_lost_its_session_refuses_its_requesters() -> None:
    made = claims()
    ask(made)

    effects = made.adopt(None, table(A), why_not="lapsed", now_ns=1)

    assert only(effects, Refuse).refusal == Refusal("NotReady", "lapsed")


def test_a_waiter_whose_time_is_over_is_refused_and_the_others_wait_on() -> None:
    made = claims()
    ask(made, 1, deadline=100 * MS)
    ask(made, 2)

    effects = made.tick(now_ns=100 * MS)

    assert only(effects, Refuse).to == to(1)
    assert made.running_count == 1


def test_an_empty_topology_has_no_partitions() -> None:
    made = claims()
    ask(made)

    effects = made.adopt(A, PartitionTable.build(Topology(epoch=9), 16), now_ns=1)

    assert only(effects, Refuse).refusal.reason == "NotReady"


def test_those_beyond_a_bound_wait_for_their_turn_at_the_store_in_order() -> None:
    made = claims()
    identities = [Identity("cart", str(number)) for number in range(ACQUIRING_MAX + 3)]
    effects = [
        ask(made, number, identity=identity, deadline=(60 + number) * S)
        for number, identity in enumerate(identities)
    ]
    assert [len(each) for each in effects] == [1] * ACQUIRING_MAX + [0, 0, 0]
    first = effects[0][0].request

    # The next one's turn comes with an answer, or when one is given up.
    answered = denied(
        made, made.acquired(first, acquired(entry(identities[0])), now_ns=0)
    )
    assert lock(answered).identity == identities[ACQUIRING_MAX]
    assert only(answered, StartAt).identity == identities[0]
    assert len(made.acquired(first, acquired(entry(identities[0])), now_ns=0)) == 0

    # Asked again, it keeps its place; in vain it waits until its own deadline only.
    sent_again = made.tick(now_ns=S)
    assert [type(each) for each in sent_again].count(AcquireLock) == ACQUIRING_MAX
    assert only(sent_again, StartAt).identity == identities[0]
    late = denied(made, made.tick(now_ns=(60 + ACQUIRING_MAX + 1) * S))
    refused = [each.identity for each in late if isinstance(each, Refuse)]
    assert identities[-2] in refused
    assert identities[-1] not in refused
    assert lock(late).identity == identities[-1]


def test_what_the_store_does_not_answer_is_asked_again_after_growing_pauses() -> None:
    made = claims()
    ask(made, deadline=60 * S)
    tenths = range(1, 200)
    asked_at = [each / 10 for each in tenths if made.tick(now_ns=each * 100 * MS)]
    assert asked_at == [0.5, 1.5, 3.5, 7.5, 11.5, 15.5, 19.5]
