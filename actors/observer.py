"""The observer: judges what a run left behind, by rules of its own.

It shares no code with what it judges: the records of `actors.trace` are all that
it knows. Every rule has a name and says, as sentences, what broke it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias, assert_never

from actors.linearizability import Add, Operation, Read, UnknownAdd, misfit_of
from actors.trace import (
    Asked,
    Ended,
    Entered,
    EntryClaimed,
    EntryGivenUp,
    EntrySaved,
    FinalState,
    Healed,
    LeftBehind,
    MembersChanged,
    ProcessEnded,
    Reached,
    Record,
    SessionChanged,
    Sought,
    Told,
    TopologyTaken,
    WorkDone,
)

_NS: Final = 1_000_000_000
_OUTCOMES: Final = frozenset({"answered", "refused", "failed", "unknown"})
_PURPOSES: Final = frozenset({"activate", "handle", "resume", "timer", "passivate"})
_STATES: Final = frozenset({"open", "closed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a run may take: time after the healing, and work for each request."""

    liveness_ns: int = 15 * _NS  # three times to live of five seconds
    grace_ns: int = 5 * _NS // 2
    frames_per_request: float = 20.0
    store_operations_per_request: float = 8.0
    seeks_per_second: int = 30
    # Of what is not done yet, at the worst moment: timers, turns, frames, asks.
    kept_for_the_cluster: int = 3_000
    kept_per_request: float = 1.0


@dataclass(frozen=True, slots=True)
class Violation:
    """What broke `rule`, and when; `identity` is empty where it concerns none."""

    rule: str
    identity: str
    at_ns: int
    what: str


def observe(records: Sequence[Record], bounds: Bounds) -> tuple[Violation, ...]:
    """Judge a whole run by every rule; what broke one, in order of time.

    Of several at one time those come first that stand first in `RULES`.
    """
    run = _sorted_out(records, bounds)
    violations = [
        Violation(rule, *found)
        for rule, check in _CHECKS.items()
        for found in check(run)
    ]
    violations.sort(key=lambda violation: violation.at_ns)
    return tuple(violations)


class _Found(NamedTuple):
    identity: str
    at_ns: int
    what: str


_OfEntry: TypeAlias = Entered | EntryClaimed | EntrySaved | EntryGivenUp
_OfSession: TypeAlias = Entered | EntryClaimed | SessionChanged


@dataclass(slots=True)
class _Run:
    """The records by what they are about, each list in order of time."""

    bounds: Bounds
    asked: dict[str, Asked] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    endings: dict[str, list[Ended]] = field(default_factory=dict)
    handled: list[Entered] = field(default_factory=list)
    entered: dict[str, list[Entered]] = field(default_factory=dict)
    entries: dict[str, list[_OfEntry]] = field(default_factory=dict)
    sessions: list[_OfSession] = field(default_factory=list)
    topologies: list[MembersChanged | TopologyTaken] = field(default_factory=list)
    gone: dict[str, ProcessEnded] = field(default_factory=dict)
    recovery: list[Healed | Reached] = field(default_factory=list)
    finals: list[FinalState] = field(default_factory=list)
    left_behind: list[LeftBehind] = field(default_factory=list)
    work: list[WorkDone] = field(default_factory=list)
    sought: list[Sought] = field(default_factory=list)

    def outcome_of(self, request: str) -> str:
        """How an ask ended; that which never did is as unknown as any."""
        endings = self.endings.get(request)
        return endings[0].outcome if endings else "unknown"

    def asks_by_identity(self) -> dict[str, list[Asked]]:
        """The adds and reads of each identity."""
        asks: dict[str, list[Asked]] = {}
        for asked in self.asked.values():
            if asked.operation in {"add", "read"}:
                asks.setdefault(asked.identity, []).append(asked)
        return asks


def _sorted_out(records: Sequence[Record], bounds: Bounds) -> _Run:
    """Put each record where the rules look for it.

    What the records promise is asserted: a name that no rule knows would be a
    rule that passes because it sees nothing.
    """
    run = _Run(bounds)
    now_ns = 0
    for record in records:
        assert record.at_ns >= now_ns, f"out of order: {record}"
        now_ns = record.at_ns
        match record:
            case Entered():
                assert record.purpose in _PURPOSES, record
                run.entries.setdefault(record.identity, []).append(record)
                run.entered.setdefault(record.identity, []).append(record)
                run.sessions.append(record)
                if record.purpose == "handle" and record.request:
                    run.handled.append(record)
            case Ended():
                assert record.outcome in _OUTCOMES, record
                run.endings.setdefault(record.request, []).append(record)
            case EntrySaved() | EntryGivenUp():
                run.entries.setdefault(record.identity, []).append(record)
            case SessionChanged():
                assert record.state in _STATES, record
                run.sessions.append(record)
            case Asked():
                assert record.request not in run.asked, f"not unique: {record}"
                assert record.request not in run.told, f"not unique: {record}"
                run.asked[record.request] = record
            case Told():
                assert record.request not in run.asked, f"not unique: {record}"
                assert record.request not in run.told, f"not unique: {record}"
                run.told[record.request] = record
            case EntryClaimed():
                run.entries.setdefault(record.identity, []).append(record)
                run.sessions.append(record)
            case MembersChanged() | TopologyTaken():
                run.topologies.append(record)
            case ProcessEnded():
                run.gone[record.address] = record
            case Healed() | Reached():
                run.recovery.append(record)
            case FinalState():
                run.finals.append(record)
            case LeftBehind():
                run.left_behind.append(record)
            case WorkDone():
                run.work.append(record)
            case Sought():
                run.sought.append(record)
            case _:
                assert_never(record)
    return run


# --- at most one ---


def _one_activation(run: _Run) -> Iterator[_Found]:
    """No token is entered after a greater one, and each belongs to one activation.

    Two that took turns would go back once, whichever is greater.
    """
    for identity, entries in run.entered.items():
        newest = entries[0]
        first_of: dict[int, Entered] = {}
        for entered in entries:
            if entered.token < newest.token:
                what = f"{_activation(entered)} was entered after {_activation(newest)}"
                yield _Found(identity, entered.at_ns, what)
            else:
                newest = entered
            first = first_of.setdefault(entered.token, entered)
            if (entered.session, entered.address) != (first.session, first.address):
                what = f"{_activation(entered)} bears the token of {_activation(first)}"
                yield _Found(identity, entered.at_ns, what)


def _closed_session(run: _Run) -> Iterator[_Found]:
    """Nothing is entered under a session that is closed, or not opened yet."""
    opened: set[str] = set()
    closed: dict[str, int] = {}
    for record in run.sessions:
        match record:
            case SessionChanged(session=session, state="open"):
                opened.add(session)
            case SessionChanged(session=session, at_ns=at_ns):
                closed.setdefault(session, at_ns)
            case Entered(session=session):
                if session in closed:
                    state = f"was closed at {closed[session]} ns"
                elif session not in opened:
                    state = "the store had not opened"
                else:
                    continue
                what = f"{_activation(record)} was entered, whose session {state}"
                yield _Found(record.identity, record.at_ns, what)


def _entry_first(run: _Run) -> Iterator[_Found]:
    """What is entered has a claim that the store confirmed, and has not given it up."""
    for identity, story in run.entries.items():
        claimed: set[tuple[str, int]] = set()
        given_up: dict[int, int] = {}
        for record in story:
            match record:
                case EntryClaimed(session=session, token=token):
                    claimed.add((session, token))
                case EntryGivenUp(token=token, at_ns=at_ns):
                    given_up.setdefault(token, at_ns)
                case Entered(session=session, token=token):
                    if (session, token) not in claimed:
                        why = "without a claim that the store had confirmed"
                    elif token in given_up:
                        why = f"though its entry was given up at {given_up[token]} ns"
                    else:
                        continue
                    what = f"{_activation(record)} was entered {why}"
                    yield _Found(identity, record.at_ns, what)


# --- what the store writes ---


def _owner_open(run: _Run) -> Iterator[_Found]:
    """Nobody takes an entry over whose owner's session is not closed."""
    closed: set[str] = set()
    for record in run.sessions:
        match record:
            case SessionChanged(session=session, state="closed"):
                closed.add(session)
            case EntryClaimed(former=former) if former and former not in closed:
                what = (
                    f"{_claim(record)} replaced token {record.former_token} of session"
                    f" {former}, which was not closed"
                )
                yield _Found(record.identity, record.at_ns, what)


def _token_grows(run: _Run) -> Iterator[_Found]:
    """The tokens of an identity grow with each claim, and none is given twice."""
    latest: dict[str, EntryClaimed] = {}
    first_of: dict[int, EntryClaimed] = {}
    for claim in run.sessions:
        if not isinstance(claim, EntryClaimed):
            continue
        before = latest.get(claim.identity, claim)
        first = first_of.setdefault(claim.token, claim)
        if first is not claim:
            what = (
                f"{_claim(claim)} has the token of {_claim(first)} of {first.identity}"
            )
            yield _Found(claim.identity, claim.at_ns, what)
        elif claim.token < before.token:
            what = f"{_claim(claim)} followed {_claim(before)}, which is greater"
            yield _Found(claim.identity, claim.at_ns, what)
        latest[claim.identity] = claim


def _stale_write(run: _Run) -> Iterator[_Found]:
    """Only the latest claim writes, until it gives up, and each version is greater."""
    for identity, story in run.entries.items():
        latest: EntryClaimed | None = None
        is_owned = False
        version_max = -1
        for record in story:
            wrong = ""
            match record:
                case EntryClaimed():
                    latest, is_owned = record, True
                case EntryGivenUp(session=session, token=token):
                    if latest is None or (session, token) != (
                        latest.session,
                        latest.token,
                    ):
                        wrong = f"token {token} of session {session} was given up"
                    else:
                        is_owned = False
                case EntrySaved(token=token, version=version):
                    if latest is None or token != latest.token:
                        wrong = f"version {version} was saved under token {token}"
                    elif not is_owned:
                        wrong = f"version {version} was saved after it was given up"
                    elif version <= version_max:
                        wrong = f"version {version} was saved over {version_max}"
                    version_max = max(version_max, version)
            if wrong:
                owner = "nobody's" if latest is None else f"that of {_claim(latest)}"
                what = f"{wrong}, where the entry was {owner}"
                yield _Found(identity, record.at_ns, what)


def _saves_kept(run: _Run) -> Iterator[_Found]:
    """The state at the end has each answered add once, and nothing that it must not."""
    adds = {
        identity: [asked for asked in asks if asked.operation == "add"]
        for identity, asks in run.asks_by_identity().items()
    }
    for final in run.finals:
        identity = final.identity
        counts = Counter(final.requests)
        own = {asked.request for asked in adds.get(identity, ())}
        for request in sorted(own | counts.keys()):
            count, outcome = counts[request], run.outcome_of(request)
            if request not in own:
                wrong = f"has {request}, which never asked it to add"
            elif outcome == "answered" and not count:
                wrong = f"lacks add {request}, which was answered"
            elif outcome == "refused" and count:
                wrong = f"has add {request}, which was refused"
            elif count > 1:
                wrong = f"has add {request} {count} times"
            else:
                continue
            yield _Found(identity, final.at_ns, f"the state at the end {wrong}")
    stored = {final.identity for final in run.finals}
    for identity in sorted(adds.keys() - stored) if stored else ():
        for asked in adds[identity]:
            if run.outcome_of(asked.request) == "answered":
                what = f"add {asked.request} was answered, but no state is stored"
                yield _Found(identity, run.finals[0].at_ns, what)


# --- what those who ask can see ---


def _linearizable(run: _Run) -> Iterator[_Found]:
    """The adds and reads of each identity can have happened one after another.

    The state at the end is one more read: it shows what was lost although it had
    been seen, also where the add's own outcome is unknown.
    """
    finals = {final.identity: final for final in run.finals}
    for identity, asks in run.asks_by_identity().items():
        history: list[Operation] = []
        for asked in asks:
            endings = run.endings.get(asked.request)
            ended = endings[0] if endings else None
            if ended is not None and ended.outcome == "refused":
                continue
            if ended is None or ended.outcome != "answered":
                if asked.operation == "add":
                    history.append(
                        UnknownAdd(request=asked.request, invoked_ns=asked.at_ns)
                    )
            elif type(ended.value) is not int:
                what = (
                    f"{asked.request} was answered {ended.value!r}, which is no count"
                )
                yield _Found(identity, ended.at_ns, what)
            else:
                history.append(
                    (Add if asked.operation == "add" else Read)(
                        request=asked.request,
                        invoked_ns=asked.at_ns,
                        ended_ns=ended.at_ns,
                        answer=ended.value,
                    )
                )
        if identity in finals:
            final = finals[identity]
            history.append(
                Read(
                    request="of the state at the end",
                    invoked_ns=final.at_ns,
                    ended_ns=final.at_ns,
                    answer=len(final.requests),
                )
            )
        misfit = misfit_of(history)
        if misfit is not None:
            yield _Found(identity, misfit.operation.ended_ns, misfit.why)


def _handled_once(run: _Run) -> Iterator[_Found]:
    """No request is handled twice."""
    first_of: dict[str, Entered] = {}
    for handled in run.handled:
        first = first_of.setdefault(handled.request, handled)
        if first is not handled:
            what = (
                f"{handled.request} was handled by {_activation(handled)}, and at"
                f" {first.at_ns} ns by {_activation(first)}"
            )
            yield _Found(handled.identity, handled.at_ns, what)


def _order(run: _Run) -> Iterator[_Found]:
    """What one tells an identity is handled in the order in which it was told."""
    latest: dict[tuple[str, str], Told] = {}
    for handled in run.handled:
        told = run.told.get(handled.request)
        if told is None:
            continue
        before = latest.get((told.teller, told.identity))
        if before is not None and told.number <= before.number:
            what = (
                f"{told.request}, number {told.number} of {told.teller}, was handled"
                f" after {before.request}, number {before.number}"
            )
            yield _Found(told.identity, handled.at_ns, what)
        else:
            latest[told.teller, told.identity] = told


def _ends(run: _Run) -> Iterator[_Found]:
    """Each ask ends once, in time, unless the process that asked has ended."""
    for asked in run.asked.values():
        endings = run.endings.get(asked.request, [])
        until_ns = asked.deadline_ns + run.bounds.grace_ns
        gone = run.gone.get(asked.asker)
        due = f"by {asked.asker} had to end by {asked.deadline_ns} ns"
        if not endings and (gone is None or gone.at_ns > until_ns):
            what = f"{asked.request} {due} and never did"
            yield _Found(asked.identity, until_ns, what)
        if endings and endings[0].at_ns > until_ns:
            what = f"{asked.request} {due} and ended at {endings[0].at_ns} ns"
            yield _Found(asked.identity, endings[0].at_ns, what)
        for again in endings[1:]:
            what = f"{asked.request} ended {again.outcome} after {endings[0].outcome}"
            yield _Found(asked.identity, again.at_ns, what)
    for request, endings in run.endings.items():
        if request not in run.asked:
            what = f"{request} ended {endings[0].outcome}, but nobody had asked"
            yield _Found("", endings[0].at_ns, what)


def _unrefused_effect(run: _Run) -> Iterator[_Found]:
    """What was refused is never handled, before or after."""
    refused = {
        request: ended
        for request, endings in run.endings.items()
        for ended in endings
        if ended.outcome == "refused"
    }
    for handled in run.handled:
        ended = refused.get(handled.request)
        if ended is not None:
            what = (
                f"{handled.request} was refused at {ended.at_ns} ns ({ended.reason}),"
                f" and handled at {handled.at_ns} ns by {_activation(handled)}"
            )
            yield _Found(handled.identity, max(ended.at_ns, handled.at_ns), what)


# --- what is left when the faults are over ---


def _reachable(run: _Run) -> Iterator[_Found]:
    """After the healing whatever is sought is found, and in time."""
    healed_ns: int | None = None
    for record in run.recovery:
        match record:
            case Healed(at_ns=at_ns):
                healed_ns = at_ns
            case Reached(at_ns=at_ns, asker=asker, identity=identity, reason=reason):
                if reason:
                    what = f"{asker} did not reach it: {reason}"
                elif healed_ns is None or at_ns <= healed_ns + run.bounds.liveness_ns:
                    continue
                else:
                    after_ns = at_ns - healed_ns
                    what = f"{asker} reached it only {after_ns} ns after the healing"
                yield _Found(identity, at_ns, what)


def _left_behind(run: _Run) -> Iterator[_Found]:
    """Nothing is left that nobody will ever clear."""
    for left in run.left_behind:
        what = f"{left.what} was left at {left.where}"
        yield _Found(left.identity, left.at_ns, what)


def _bounded_work(run: _Run) -> Iterator[_Found]:
    """A request takes no more than its bounds, on the average of the run.

    Nobody goes in circles to find an identity: that is hidden by an average.
    """
    bounds = run.bounds
    for sought in run.sought:
        if sought.times > bounds.seeks_per_second:
            what = (
                f"{sought.asker} asked {sought.times} times within a second where it"
                f" is, above {bounds.seeks_per_second}"
            )
            yield _Found(sought.identity, sought.at_ns, what)
    for work in run.work:
        for what, done, per_request in (
            ("frames", work.frames, bounds.frames_per_request),
            (
                "store operations",
                work.store_operations,
                bounds.store_operations_per_request,
            ),
        ):
            # A run without requests has no ratio: members alone make work too.
            if work.requests and done > work.requests * per_request:
                wrong = (
                    f"{done} {what} for {work.requests} requests, above {per_request}"
                )
                yield _Found("", work.at_ns, f"{wrong} for each")
        most = bounds.kept_for_the_cluster + work.requests * bounds.kept_per_request
        if work.kept_peak > most:
            wrong = f"{work.kept_peak} things kept for {work.requests} requests"
            yield _Found("", work.at_ns, f"{wrong}, above {most}")


# --- topology ---


def _topology(run: _Run) -> Iterator[_Found]:
    """Epochs grow, by one at the store; one epoch is one topology on every node."""
    stored: MembersChanged | None = None
    taken_by: dict[str, int] = {}
    sessions_of: dict[int, frozenset[str]] = {}
    first_of: dict[int, TopologyTaken] = {}
    for record in run.topologies:
        epoch = record.epoch
        wrong = []
        match record:
            case MembersChanged():
                who = "the store"
                if stored is not None and epoch != stored.epoch + 1:
                    wrong.append(f"follows epoch {stored.epoch}")
                stored = record
            case TopologyTaken(address=who):
                if epoch < taken_by.get(who, epoch):
                    wrong.append(f"follows epoch {taken_by[who]}")
                taken_by[who] = epoch
                first = first_of.setdefault(epoch, record)
                if record.draining != first.draining:
                    wrong.append(f"has others that drain than at {first.address}")
                elif record.owners != first.owners:
                    wrong.append(f"has other owners than at {first.address}")
        sessions = frozenset(record.sessions)
        known = sessions_of.setdefault(epoch, sessions)
        if sessions != known:
            differing = ", ".join(sorted(sessions ^ known))
            wrong.append(f"has other members than where it was first seen: {differing}")
        for what in wrong:
            yield _Found("", record.at_ns, f"epoch {epoch} at {who} {what}")


def _moves_least(run: _Run) -> Iterator[_Found]:
    """A partition moves only from an owner that may not keep it, or to a new one."""
    first_of: dict[int, TopologyTaken] = {}
    for record in run.topologies:
        if isinstance(record, TopologyTaken):
            first_of.setdefault(record.epoch, record)
    taken = [first_of[epoch] for epoch in sorted(first_of)]
    for before, after in pairwise(taken):
        if before.owners == after.owners or not before.owners or not after.owners:
            continue
        epochs = f"from epoch {before.epoch} to {after.epoch}"
        if len(before.owners) != len(after.owners):
            what = (
                f"{len(before.owners)} partitions became {len(after.owners)} {epochs}"
            )
            yield _Found("", after.at_ns, what)
            continue
        staying = set(after.sessions).difference(after.draining)
        joined = staying - set(before.sessions).difference(before.draining)
        moved = [
            f"{partition} from {old} to {new}"
            for partition, (old, new) in enumerate(
                zip(before.owners, after.owners, strict=True)
            )
            if old != new and old in staying and new not in joined
        ]
        if moved:
            what = (
                f"{len(moved)} partitions moved needlessly {epochs}, first {moved[0]}"
            )
            yield _Found("", after.at_ns, what)


def _activation(entered: Entered) -> str:
    return f"token {entered.token} of session {entered.session} at {entered.address}"


def _claim(claim: EntryClaimed) -> str:
    return f"token {claim.token} of session {claim.session}"


_CHECKS: Final[dict[str, Callable[[_Run], Iterator[_Found]]]] = {
    "one-activation": _one_activation,
    "closed-session": _closed_session,
    "entry-first": _entry_first,
    "token-grows": _token_grows,
    "owner-open": _owner_open,
    "stale-write": _stale_write,
    "unrefused-effect": _unrefused_effect,
    "handled-once": _handled_once,
    "order": _order,
    "saves-kept": _saves_kept,
    "linearizable": _linearizable,
    "ends": _ends,
    "reachable": _reachable,
    "left-behind": _left_behind,
    "topology": _topology,
    "moves-least": _moves_least,
    "bounded-work": _bounded_work,
}

RULES: Final = tuple(_CHECKS)
