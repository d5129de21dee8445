from typing import Any

import pytest

from placement.contracts import (
    Claim,
    Claimed,
    ClaimRefused,
    Failed,
    GivenUp,
    GiveUp,
    Stale,
)
from placement.entry import Acquisition, Pid
from placement.errors import Refusal
from placement.event import Happened
from placement.hosting import (
    ClaimEntry,
    GiveUpEntry,
    Hosting,
    SessionSettled,
    StartActivation,
    StopActivation,
    TellClaimed,
    TellOwnerState,
    TellStarted,
    TellStartRefused,
)
from placement.identity import Identity
from placement.topology import Address
from tests.placement.builders import CART, A, B, S, entry, none_of, only

COORDINATOR = Address("b.1")
LOCK = Acquisition(B, 4)


def hosting() -> Hosting:
    made = Hosting(kinds=frozenset({"cart"}))
    made.begin(A)
    return made


def start(made: Hosting, lock: Acquisition = LOCK, **options: Any) -> Any:
    return made.start(
        options.get("identity", CART),
        acquisition=lock,
        host=options.get("host", A),
        expected_revision=0,
    )


def claiming(made: Hosting) -> Claim:
    return only(start(made), ClaimEntry).request


def test_a_start_tells_who_waits_for_it() -> None:
    made = hosting()
    chain = ("a/1", "a/2")
    effects = made.start(
        CART, acquisition=LOCK, host=A, expected_revision=0, chain=chain
    )
    owned = entry(owner=A, token=5)
    claim = only(effects, ClaimEntry).request
    started = only(made.claimed(claim, Claimed(owned), now_ns=0), StartActivation)
    assert started.chain == chain


def test_a_start_tells_who_waits_for_it_also_after_nobody_was_left_to_answer() -> None:
    made = hosting()
    effects = made.start(
        CART,
        acquisition=LOCK,
        host=A,
        expected_revision=0,
        chain=("a/1",),
        takes_lock=True,
    )
    claim = only(effects, ClaimEntry).request
    lost = Failed("no answer", may_have_happened=True)
    told = [made.claimed(claim, lost, now_ns=0) for _ in range(2)]
    assert only(told[-1], TellStartRefused).refusal.reason == "StoreFailed"

    effects = made.claimed(claim, Claimed(entry(owner=A, token=5)), now_ns=0)

    assert only(effects, StartActivation).chain == ("a/1",)
    assert none_of(effects, TellClaimed)


def test_r3_1_a_claim_takes_the_lock_where_the_coordinator_has_not() -> None:
    made = hosting()
    effects = made.start(
        CART, acquisition=LOCK, host=A, expected_revision=0, takes_lock=True
    )
    claim = only(effects, ClaimEntry).request
    assert (claim.acquisition, claim.expected_revision) == (None, 0)
    same = made.start(
        CART, acquisition=LOCK, host=A, expected_revision=0, takes_lock=True
    )
    assert same == ()

    # Somebody has given it up before: over that it is another attempt, and the last.
    given_up = ClaimRefused(entry(revision=7), "revision is 7, not 0")
    second = only(made.claimed(claim, given_up, now_ns=0), ClaimEntry).request
    assert second.expected_revision == 7
    assert second.attempt > claim.attempt
    assert made.claimed(claim, given_up, now_ns=0) == ()
    moved = ClaimRefused(entry(revision=9), "revision is 9, not 7")
    refused = only(made.claimed(second, moved, now_ns=0), TellStartRefused)
    assert refused.refusal.reason == "LockDenied"
    assert len(made) == 0


def test_r2_5_a_claim_that_takes_the_lock_leaves_what_another_owns() -> None:
    made = hosting()
    effects = made.start(
        CART, acquisition=LOCK, host=A, expected_revision=0, takes_lock=True
    )
    claim = only(effects, ClaimEntry).request
    owned = ClaimRefused(entry(owner=B, revision=7), f"session {B} owns it and is open")

    refused = only(made.claimed(claim, owned, now_ns=0), TellStartRefused)

    assert refused.refusal.reason == "LockDenied"


def taking(made: Hosting) -> Any:
    return made.start(
        CART, acquisition=LOCK, host=A, expected_revision=0, takes_lock=True
    )


def test_a_claim_that_took_the_lock_is_told_of_before_its_user_code_has_started() -> (
    None
):
    made = hosting()
    claim = only(taking(made), ClaimEntry).request

    effects = made.claimed(claim, Claimed(entry(owner=A, token=5)), now_ns=0)

    assert only(effects, StartActivation)
    assert only(effects, TellClaimed) == TellClaimed(COORDINATOR, CART, 4)


def test_r4_4_a_claim_without_an_answer_is_told_of_once_and_goes_on() -> None:
    made = hosting()
    claim = only(taking(made), ClaimEntry).request
    lost = Failed("no answer", may_have_happened=True)

    # One answer can get lost.
    assert made.claimed(claim, lost, now_ns=0) == ()
    told = made.claimed(claim, lost, now_ns=1)

    assert only(told, TellStartRefused).refusal == Refusal("StoreFailed", "no answer")
    assert made.claimed(claim, lost, now_ns=2) == ()
    refused = only(taking(made), TellStartRefused).refusal
    assert refused.reason == "Pending"
    assert "the store fails: no answer" in refused.message
    effects = made.claimed(claim, Claimed(entry(owner=A, token=5)), now_ns=3)
    assert only(effects, StartActivation)
    assert none_of(effects, TellClaimed)
    assert none_of(made.started(Pid(CART, A, 5)), TellStarted)


def won(made: Hosting, token: int = 5, snapshot: bytes | None = None) -> Pid:
    claim = claiming(made)
    owned = entry(owner=A, token=token, snapshot=snapshot)
    started = only(made.claimed(claim, Claimed(owned), now_ns=0), StartActivation)
    assert started.record.snapshot == snapshot
    return started.pid


def active(made: Hosting, token: int = 5) -> Pid:
    pid = won(made, token)
    assert only(made.started(pid), TellStarted) == TellStarted(COORDINATOR, pid, 4)
    return pid


def asked(made: Hosting, own: frozenset[Any] = frozenset({A})) -> Any:
    return made.asked(
        COORDINATOR, CART, session=A, fencing_token=5, procedure=9, own=own
    )


def test_r2_1_a_start_claims_then_starts_then_answers() -> None:
    made = hosting()
    claim = claiming(made)
    assert (claim.session, claim.attempt, claim.acquisition) == (A, 1, LOCK)
    assert made.state_of(CART) == "claiming"

    pid = won(hosting(), snapshot=b"kept")

    assert pid == Pid(CART, A, 5)


def test_r2_2_a_repeated_start_of_what_serves_is_answered_and_starts_nothing() -> None:
    made = hosting()
    pid = active(made)

    assert start(made) == (TellStarted(COORDINATOR, pid, 4),)
    assert made.serving(CART) == pid
    assert made.states() == ((CART, "active", pid),)
    assert len(made) == 1


def test_one_thing_at_a_time_others_hear_pending() -> None:
    made = hosting()
    claiming(made)
    assert start(made) == ()

    refused = only(start(made, Acquisition(B, 5)), TellStartRefused)

    assert refused.refusal == Refusal("Pending", f"{CART} is claiming here")
    assert made.serving(CART) is None


def test_r2_3_a_node_that_is_not_eligible_refuses_for_as_long_as_it_is_not() -> None:
    made = Hosting(kinds=frozenset({"cart"}))
    for _ in range(2):
        refusal = only(start(made), TellStartRefused).refusal
        assert refusal == Refusal("NotReady", "the node has not started")
    made.begin(A)
    other = only(start(made, host=B), TellStartRefused).refusal
    assert other.reason == "NotReady"
    unknown = only(start(made, identity=Identity("what", "1")), TellStartRefused)
    assert unknown.refusal.reason == "NoAuthority"
    assert "what" in unknown.refusal.message
    made.drain("it drains")
    for _ in range(2):
        refusal = only(start(made), TellStartRefused).refusal
        assert refusal == Refusal("NoAuthority", "it drains")
    made.lapse(A, "it lapsed")
    assert only(start(made), TellStartRefused).refusal.message == "it lapsed"
    assert made.session is None


def test_a_refused_claim_starts_nothing_and_says_why() -> None:
    made = hosting()
    claim = claiming(made)

    effects = made.claimed(claim, ClaimRefused(entry(), "it is owned"), now_ns=0)

    assert only(effects, TellStartRefused).refusal == Refusal(
        "LockDenied", "it is owned"
    )
    assert none_of(effects, StartActivation)
    assert len(made) == 0


def test_an_ambiguous_claim_is_repeated_as_the_same_attempt() -> None:
    made = hosting()
    claim = claiming(made)
    lost = Failed("no answer", may_have_happened=True)
    assert made.claimed(claim, lost, now_ns=0) == ()
    assert made.tick(now_ns=1) == ()
    due = made.due_ns
    assert due is not None

    assert made.tick(now_ns=due) == (ClaimEntry(claim),)

    assert made.due_ns is None
    assert only(
        made.claimed(claim, Claimed(entry(owner=A, token=5)), now_ns=due),
        StartActivation,
    )


def test_a_claim_that_surely_failed_is_refused_with_the_stores_reason() -> None:
    made = hosting()
    failed = Failed("disk full", may_have_happened=False)

    effects = made.claimed(claiming(made), failed, now_ns=0)

    assert only(effects, TellStartRefused).refusal == Refusal(
        "StoreFailed", "disk full"
    )


def test_the_answer_to_a_claim_of_a_lapsed_session_starts_nothing() -> None:
    made = hosting()
    claim = claiming(made)
    effects = made.lapse(A, "lapsed")
    assert only(effects, TellStartRefused).refusal.reason == "NotReady"
    assert only(effects, SessionSettled).session == A

    assert made.claimed(claim, Claimed(entry(owner=A, token=5)), now_ns=0) == ()


def test_r2_4_a_failed_activation_is_given_up_before_its_requesters_hear() -> None:
    made = hosting()
    pid = won(made)
    why = Refusal("ActivationFailed", "no luck")

    effects = made.start_failed(pid, why)

    assert none_of(effects, TellStartRefused)
    give_up = only(effects, GiveUpEntry).request
    assert give_up == GiveUp(CART, 5)
    assert start(made) == ()  # whoever asked for it hears why, when it is given up
    after = made.given_up(give_up, GivenUp(), now_ns=0)
    assert only(after, TellStartRefused).refusal == why
    assert len(made) == 0


def test_r3_5_passivation_ends_it_and_gives_it_up_with_its_snapshot() -> None:
    made = hosting()
    pid = active(made)
    assert made.passivate(CART, fencing_token=4) == ()
    assert made.passivate(CART) == (StopActivation(pid, lapsed=False),)
    assert made.passivate(CART) == ()

    effects = made.ended(pid, version=3, snapshot=b"last")

    assert only(effects, GiveUpEntry).request == GiveUp(CART, 5, 3, b"last")
    assert only(effects, Happened).name == "Passivated"
    assert only(start(made, Acquisition(B, 5)), TellStartRefused)
    give_up = GiveUp(CART, 5, 3, b"last")
    assert made.given_up(GiveUp(CART, 4), GivenUp(), now_ns=0) == ()
    made.given_up(give_up, GivenUp(), now_ns=0)
    assert len(made) == 0


def test_an_ambiguous_giving_up_is_repeated() -> None:
    made = hosting()
    pid = active(made)
    made.passivate(CART)
    give_up = only(made.ended(pid, version=0, snapshot=None), GiveUpEntry).request
    made.given_up(give_up, Failed("lost"), now_ns=0)
    due = made.due_ns
    assert due is not None

    assert made.tick(now_ns=due) == (GiveUpEntry(give_up),)


def test_a_last_snapshot_that_cannot_be_kept_is_said_to_be_lost() -> None:
    made = hosting()
    pid = active(made)
    made.passivate(CART)
    full = only(made.ended(pid, version=2, snapshot=b"x"), GiveUpEntry).request
    refused = Failed("too large", may_have_happened=False)

    effects = made.given_up(full, refused, now_ns=0)

    assert only(effects, Happened).name == "SnapshotLost"
    bare = only(effects, GiveUpEntry).request
    assert bare == GiveUp(CART, 5)
    assert made.given_up(bare, Stale(9), now_ns=0) == ()
    assert len(made) == 0


def test_r3_3_a_stale_giving_up_loses_its_snapshot_and_changes_nothing() -> None:
    made = hosting()
    pid = active(made)
    made.passivate(CART)
    give_up = only(made.ended(pid, version=2, snapshot=b"x"), GiveUpEntry).request

    effects = made.given_up(give_up, Stale(9), now_ns=0)

    assert only(effects, Happened).reason == "a greater token has been claimed"


def test_a_lapse_ends_all_without_hooks_and_settles_when_all_have_ended() -> None:
    made = hosting()
    pid = active(made)

    effects = made.lapse(A, "lapsed")

    assert only(effects, StopActivation) == StopActivation(pid, lapsed=True)
    assert none_of(effects, SessionSettled)
    assert made.lapse(A, "again") == ()
    after = made.ended(pid, version=0, snapshot=None)
    assert none_of(after, GiveUpEntry)
    assert only(after, SessionSettled).session == A
    assert only(after, Happened).name == "Lapsed"
    assert made.ended(pid, version=0, snapshot=None) == ()


def test_a_lapse_while_starting_refuses_when_the_start_fails() -> None:
    made = hosting()
    pid = won(made)
    made.begin(B)
    made.lapse(A, "lapsed")
    assert made.session == B
    assert made.started(pid) == ()

    effects = made.start_failed(pid, Refusal("ActivationFailed", "x"))

    assert only(effects, TellStartRefused)
    assert only(effects, SessionSettled)
    assert made.start_failed(pid, Refusal("ActivationFailed", "x")) == ()


def test_a_lapse_while_giving_up_leaves_the_entry_to_whoever_closes() -> None:
    made = hosting()
    pid = active(made)
    made.passivate(CART)
    made.ended(pid, version=0, snapshot=None)

    assert only(made.lapse(A, "lapsed"), SessionSettled)


def test_r4_2_a_drain_ends_all_and_then_the_session_is_settled() -> None:
    made = hosting()
    pid = active(made)

    effects = made.drain("bye")

    assert only(effects, StopActivation) == StopActivation(pid, lapsed=False)
    give_up = only(made.ended(pid, version=0, snapshot=None), GiveUpEntry).request
    assert only(made.given_up(give_up, GivenUp(), now_ns=0), SessionSettled)


def test_what_is_claimed_or_started_during_a_drain_is_given_up() -> None:
    made = hosting()
    claim = claiming(made)
    made.drain("bye")
    effects = made.claimed(claim, Claimed(entry(owner=A, token=5)), now_ns=0)
    give_up = only(effects, GiveUpEntry).request
    assert none_of(effects, StartActivation)
    after = made.given_up(give_up, GivenUp(), now_ns=0)
    assert only(after, TellStartRefused).refusal == Refusal("NoAuthority", "bye")

    late = hosting()
    pid = won(late)
    late.drain("bye")
    assert only(late.started(pid), StopActivation).pid == pid


@pytest.mark.parametrize(
    ("own", "state"), [(frozenset(), "not_mine"), (frozenset({A}), "here")]
)
def test_only_the_session_that_the_entry_names_answers_for_it(
    own: frozenset[Any], state: str
) -> None:
    made = hosting()
    active(made)

    answer = only(asked(made, own), TellOwnerState)

    assert answer.state == state
    assert answer.fencing_token == (5 if state == "here" else 0)


def test_what_was_left_behind_is_given_up_when_asked_for() -> None:
    made = hosting()

    effects = asked(made)

    assert only(effects, TellOwnerState).state == "pending"
    give_up = only(effects, GiveUpEntry).request
    assert give_up == GiveUp(CART, 5)
    assert only(asked(made), TellOwnerState).state == "pending"
    assert made.given_up(give_up, GivenUp(), now_ns=S) == ()
    assert len(made) == 0
