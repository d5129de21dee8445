"""Claims: the activation procedure of the identities whose partitions a member owns.

One procedure an identity, whoever asks: acquire the lock, read the entry, then
either ask the session that owns it, or choose a host and let it start the
activation. Where the host would be this very member its claim is tried first: it
takes the lock itself, and stands where nobody was there before. Nothing is
concluded from silence: a question or a start that is not answered is sent again,
and ends when the store says that the session asked is closed. Times are
nanoseconds of the caller's clock.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import TypeAlias

from placement.contracts import (
    Acquire,
    Acquired,
    Failed,
    LockHeld,
    LockRefused,
    Release,
)
from placement.entry import Acquisition, Pid
from placement.errors import NoAuthority, Refusal
from placement.event import Happened
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.retry import RetryPolicy
from placement.topology import Address, Member, SessionId
from placement.value import record, value

FindHere: TypeAlias = Callable[[Identity], Pid | None]
"""The activation that serves on this very node, where there is one."""

ChooseHost: TypeAlias = Callable[[Identity, PartitionTable], Member]

#: Refusals of a host after which another try may go better.
_TRANSIENT = frozenset({"NoAuthority", "NotReady", "Pending", "LockDenied"})

#: How many procedures ask the store at once; the others wait for their turn. What
#: waits behind thousands in a store's queue would be asked again before its answer.
ACQUIRING_MAX = 512
_NEVER_NS = 1 << 63

#: A question may soon have another answer; a store or host is only late.
_ASK_AGAIN = RetryPolicy(first_ns=20_000_000, largest_ns=500_000_000)
# Growing, because what is late under load is sent once more into that load.
_SEND_AGAIN = RetryPolicy(first_ns=500_000_000, largest_ns=4_000_000_000)


@value
class Requester:
    """Who asked for an identity: where the answer goes, and its request's number.

    `chain` are the identities that wait for the answer.
    """

    address: Address
    request: int
    chain: tuple[str, ...] = field(default=(), compare=False)


# --- effects -----------------------------------------------------------------


@value
class AcquireLock:
    """Take the lock; the outcome comes back by `acquired`."""

    request: Acquire


@value
class ReleaseLock:
    """Free the lock; the outcome comes back by `released`."""

    request: Release


@value
class AskOwnerSession:
    """Ask `session`, by name, for the activation that the entry says it has."""

    session: SessionId
    identity: Identity
    fencing_token: int
    procedure: int


@value
class AskHolderSession:
    """Ask the lock's holder whether its procedure still runs."""

    holder: Acquisition
    identity: Identity
    procedure: int


@value
class TellHolderState:
    """Answer such a question."""

    address: Address
    identity: Identity
    holder: Acquisition
    procedure: int
    state: str


@value
class StartAt:
    """Have `host` claim the identity and start its activation.

    `takes_lock` says that the claim is to take the lock too: nobody has yet.
    """

    host: SessionId
    identity: Identity
    acquisition: Acquisition
    expected_revision: int
    epoch: int
    remaining_ns: int
    chain: tuple[str, ...] = ()
    takes_lock: bool = False


@value
class AnswerPid:
    """Tell the requester where the activation is."""

    to: Requester
    pid: Pid


@value
class RedirectTo:
    """Tell the requester which member owns the partition, as of `epoch`."""

    to: Requester
    identity: Identity
    epoch: int
    owner: SessionId


@value
class Refuse:
    """Tell the requester why not."""

    to: Requester
    identity: Identity
    refusal: Refusal


@value
class NeedTopology:
    """A newer topology than the known one is spoken of: read it soon."""

    epoch: int


ClaimEffect: TypeAlias = (
    AcquireLock
    | ReleaseLock
    | AskOwnerSession
    | AskHolderSession
    | TellHolderState
    | StartAt
    | AnswerPid
    | RedirectTo
    | Refuse
    | NeedTopology
    | Happened
)


@record
class _Procedure:
    """One run of the procedure: what it waits for, and who waits for it.

    `awaiting` is the session whose answer (or end) it waits for; `holder` the
    acquisition in its way; `may_hold` whether the store may hold its lock;
    `takes_lock` whether the claim under way takes it itself.
    """

    identity: Identity
    acquisition: Acquisition
    phase: str
    waiters: dict[Requester, int] = field(default_factory=dict)
    revision: int = 0
    token: int = 0
    awaiting: SessionId | None = None
    holder: Acquisition | None = None
    may_hold: bool = False
    takes_lock: bool = False
    due_ns: int = 0
    asked: int = 0
    sent: int = 0
    why: str = "the claim is under way"

    def latest_ns(self) -> int:
        return max(self.waiters.values())

    def chain(self) -> tuple[str, ...]:
        """All identities that wait for it, each once."""
        chains = [to.chain for to in self.waiters if to.chain]
        if not chains:
            return ()  # the usual one
        return tuple(dict.fromkeys(itertools.chain.from_iterable(chains)))


class Claims:
    """The procedures of one member's partitions.

    Not thread-safe; one actor owns it. Until `adopt` has brought a session and a
    table every request is refused. Methods return the effects to perform, in
    order.

    Whoever has a strategy of its own is asked for a host only where one is to be
    started, and once: it may count.
    """

    def __init__(
        self,
        *,
        choose_host: ChooseHost,
        find_here: FindHere,
        has_strategy: Callable[[Identity], bool] = lambda _: False,
    ) -> None:
        self._find_here = find_here
        self._choose_host = choose_host
        self._has_strategy = has_strategy
        self._session: SessionId | None = None
        self._table: PartitionTable | None = None
        self._why_not = "the node has not started"
        self._last_number = 0
        self._running: dict[Identity, _Procedure] = {}
        self._ahead: dict[Requester, tuple[Identity, int, int]] = {}
        self._freeing: dict[
            tuple[Identity, Acquisition], dict[tuple[Address, int], None]
        ] = {}
        self._due: list[tuple[int, int, Identity]] = []
        self._look_ns = _NEVER_NS
        self._acquiring: dict[Identity, int] = {}
        self._queue: deque[tuple[Identity, int]] = deque()
        self._releasing: dict[tuple[Identity, Acquisition], int] = {}
        self._release_due: list[tuple[int, int, Identity, Acquisition]] = []

    @property
    def running_count(self) -> int:
        """How many procedures run."""
        return len(self._running)

    def waiting(self) -> tuple[Identity, ...]:
        """What a procedure runs for, or a newer topology or release is awaited for."""
        ahead = (identity for identity, _, _ in self._ahead.values())
        releasing = (identity for identity, _ in self._releasing)
        return (*self._running, *ahead, *releasing)

    @property
    def due_ns(self) -> int | None:
        """When `tick` is wanted next, perhaps in vain; none while nothing waits."""
        return None if self._look_ns == _NEVER_NS else self._look_ns

    def _look_at(self, at_ns: int) -> None:
        if at_ns < self._look_ns:  # noqa: PLR1730  min() is called
            self._look_ns = at_ns

    def _first_due_ns(self) -> int:
        """When the first of all is due; what is due for nobody any more is let go."""
        first, due = _NEVER_NS, self._due
        while due:
            at_ns, number, identity = due[0]
            procedure = self._numbered(identity, number)
            if procedure is not None and procedure.due_ns == at_ns:
                first = at_ns
                break
            heapq.heappop(due)
        if self._release_due:
            first = min(first, self._release_due[0][0])
        for _, _, deadline_ns in self._ahead.values():
            first = min(first, deadline_ns)
        return first

    # --- inputs: topology and session ---

    def adopt(
        self,
        session: SessionId | None,
        table: PartitionTable | None,
        *,
        closed: Iterable[SessionId] = (),
        why_not: str = "",
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        """Decide by this session and table from now on; `closed` sessions ended.

        Procedures of another session, or of partitions that moved away, end
        here: their requesters are sent on.
        """
        effects: list[ClaimEffect] = []
        gone = frozenset(closed)
        is_same_session = session == self._session
        if not is_same_session:
            # The locks of a session fall free when it is closed.
            self._releasing.clear()
            self._release_due.clear()
        self._session, self._table = session, table
        self._why_not = why_not or self._why_not
        for identity, procedure in sorted(self._running.items()):
            owner = table.owner_of(identity) if table is not None else None
            if not is_same_session or session is None or owner is None:
                effects += self._end(procedure)
                effects += self._refuse_all(
                    procedure, Refusal("NotReady", self._reason())
                )
            elif owner.session != session:
                assert table is not None
                effects += self._end(procedure)
                effects += [
                    RedirectTo(to, identity, table.epoch, owner.session)
                    for to in procedure.waiters
                ]
            elif procedure.awaiting in gone:
                effects += self._acquire(procedure, now_ns)
        ahead, self._ahead = self._ahead, {}
        for to, (identity, epoch, deadline_ns) in ahead.items():
            effects += self.request(
                to, identity, epoch=epoch, deadline_ns=deadline_ns, now_ns=now_ns
            )
        return (*effects, *self._admit(now_ns))

    def _reason(self) -> str:
        if self._session is None:
            return self._why_not
        if self._table is None:
            return "the topology is not known yet"
        return "no member owns partitions"

    # --- inputs: requests ---

    def request(
        self,
        to: Requester,
        identity: Identity,
        *,
        epoch: int,
        deadline_ns: int,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        """Find or start the activation of `identity`, on behalf of `to`."""
        session, table = self._session, self._table
        if session is None or table is None:
            return (Refuse(to, identity, Refusal("NotReady", self._reason())),)
        if now_ns >= deadline_ns:
            return (
                Refuse(
                    to, identity, Refusal("Pending", "its time was over on arrival")
                ),
            )
        if epoch > table.epoch:
            self._ahead[to] = (identity, epoch, deadline_ns)
            self._look_at(deadline_ns)
            return (NeedTopology(epoch),)
        owner = table.owner_of(identity)
        if owner is None:
            return (Refuse(to, identity, Refusal("NotReady", self._reason())),)
        if owner.session != session:
            return (RedirectTo(to, identity, table.epoch, owner.session),)
        procedure = self._running.get(identity)
        if procedure is not None:
            procedure.waiters[to] = deadline_ns
            return ()
        here = self._find_here(identity)
        if here is not None:
            # Its owner answers for itself: no need to ask the store who that is.
            return (AnswerPid(to, here),)
        self._last_number += 1
        procedure = _Procedure(
            identity, Acquisition(session, self._last_number), "acquiring"
        )
        procedure.waiters[to] = deadline_ns
        self._running[identity] = procedure
        procedure.takes_lock = self._is_host(identity)
        return self._acquire(procedure, now_ns)

    def _is_host(self, identity: Identity) -> bool:
        """Tell whether this very member hosts `identity`, for all that is known."""
        assert self._table is not None
        if self._has_strategy(identity):
            return False
        try:
            return self._choose_host(identity, self._table).session == self._session
        except NoAuthority:
            return False

    # --- inputs: outcomes and answers ---

    def acquired(
        self,
        request: Acquire,
        outcome: Acquired | LockHeld | LockRefused | Failed,
        *,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        """The store has answered an `AcquireLock`."""
        if self._acquiring.get(request.identity) == request.acquisition.procedure:
            del self._acquiring[request.identity]
        effects = self._acquired(request, outcome, now_ns)
        return (*effects, *self._admit(now_ns))

    def _acquired(
        self,
        request: Acquire,
        outcome: Acquired | LockHeld | LockRefused | Failed,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        procedure = self._found(request.identity, request.acquisition)
        if procedure is None:
            # Nobody wants it any more: a lock taken late must not stay.
            if isinstance(outcome, LockHeld | LockRefused):
                return ()
            return self._release(request.identity, request.acquisition)
        if procedure.phase != "acquiring":
            return ()
        match outcome:
            case Failed(message):
                return (
                    *self._end(procedure),
                    *self._refuse_all(procedure, Refusal("StoreFailed", message)),
                )
            case LockRefused(message):
                # Our session is over, which we may not know yet: nothing has
                # happened, and the next owner of the partition serves.
                procedure.may_hold = False
                return (
                    *self._end(procedure),
                    *self._refuse_all(procedure, Refusal("NotReady", message)),
                )
            case LockHeld(holder):
                return self._held(procedure, holder, now_ns)
            case Acquired(entry, owner_is_open):
                procedure.may_hold, procedure.sent = True, 0
                procedure.revision = entry.revision
                procedure.token = entry.fencing_token
                if entry.owner is not None and owner_is_open:
                    procedure.phase = "asking owner"
                    procedure.awaiting = entry.owner
                    return self._ask(procedure, now_ns)
                return self._start(procedure, now_ns)

    def owner_answered(
        self,
        identity: Identity,
        session: SessionId,
        procedure_number: int,
        state: str,
        fencing_token: int,
        *,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        """The session that the entry names has answered for it."""
        procedure = self._numbered(identity, procedure_number)
        if procedure is None:
            return ()
        if state == "here" and (
            fencing_token == procedure.token
            and procedure.phase in {"asking owner", "acquiring", "queued"}
        ):
            found = self._found_at(procedure, Pid(identity, session, fencing_token))
            return (*found, *self._admit(now_ns))
        if procedure.phase != "asking owner" or procedure.awaiting != session:
            return ()
        if state == "gave_up":
            return self._acquire(procedure, now_ns)
        procedure.why = (
            f"its activation at {session} is being started or ended"
            if state == "pending"
            else f"its owner {session} is gone, and not closed yet"
        )
        return ()

    def holder_answered(
        self,
        identity: Identity,
        holder: Acquisition,
        procedure_number: int,
        state: str,
        *,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        """The session that holds the lock has said whether its procedure runs."""
        procedure = self._numbered(identity, procedure_number)
        if (
            procedure is None
            or procedure.phase != "asking holder"
            or procedure.holder != holder
        ):
            return ()
        if state == "free":
            return self._acquire(procedure, now_ns)
        return ()

    def holder_asked(
        self,
        address: Address,
        identity: Identity,
        holder: Acquisition,
        procedure_number: int,
    ) -> tuple[ClaimEffect, ...]:
        """Another coordinator finds a lock held by us: say running, or free it."""
        if holder.session != self._session:
            return (
                TellHolderState(
                    address, identity, holder, procedure_number, "not_mine"
                ),
            )
        if self._found(identity, holder) is not None:
            return (
                TellHolderState(address, identity, holder, procedure_number, "running"),
            )
        askers = self._freeing.setdefault((identity, holder), {})
        askers[(address, procedure_number)] = None
        return self._release(identity, holder)

    def released(
        self, request: Release, *, is_released: bool, now_ns: int
    ) -> tuple[ClaimEffect, ...]:
        """The store has answered a `ReleaseLock`; whoever asked for it hears so."""
        key = (request.identity, request.acquisition)
        askers = self._freeing.pop(key, {})
        if not is_released:
            tried = self._releasing.get(key)
            if tried is not None:
                self._releasing[key] = tried + 1
                at_ns = now_ns + _ASK_AGAIN.pause_ns(tried + 1)
                heapq.heappush(
                    self._release_due,
                    (at_ns, request.acquisition.procedure, *key),
                )
                self._look_at(at_ns)
            return ()
        self._releasing.pop(key, None)
        return tuple(
            TellHolderState(
                address, request.identity, request.acquisition, number, "free"
            )
            for address, number in askers
        )

    def claim_made(
        self, identity: Identity, procedure_number: int, *, now_ns: int
    ) -> tuple[ClaimEffect, ...]:
        """Its host has claimed it: the store is asked no more, user code starts."""
        if self._acquiring.get(identity) == procedure_number:
            del self._acquiring[identity]
        return self._admit(now_ns)

    def started(
        self, pid: Pid, procedure_number: int, *, now_ns: int
    ) -> tuple[ClaimEffect, ...]:
        """The host has claimed it, and the activation is started."""
        procedure = self._numbered(pid.identity, procedure_number)
        if (
            procedure is None
            or procedure.phase != "starting"
            or procedure.awaiting != pid.session
        ):
            return ()
        found = self._found_at(procedure, pid)
        return (*found, *self._admit(now_ns))

    def start_refused(
        self,
        identity: Identity,
        procedure_number: int,
        host: SessionId,
        refusal: Refusal,
        *,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        """The host does not start it, and says why."""
        procedure = self._numbered(identity, procedure_number)
        if (
            procedure is None
            or procedure.phase != "starting"
            or procedure.awaiting != host
        ):
            return ()
        if refusal.reason not in _TRANSIENT:
            return (
                *self._end(procedure),
                *self._refuse_all(procedure, refusal),
                *self._admit(now_ns),
            )
        if procedure.takes_lock:
            self._acquiring.pop(identity, None)
            if refusal.reason == "LockDenied":
                # Somebody was there before: find out who, under the lock.
                procedure.takes_lock, procedure.sent = False, 0
                return (*self._acquire(procedure, now_ns), *self._admit(now_ns))
        # The host's knowledge or ours is old: look again, in a while.
        procedure.phase = "pausing"
        procedure.why = f"{host} refused: {refusal.message}"
        self._wait(procedure, now_ns)
        return (NeedTopology(0), *self._admit(now_ns))

    def tick(self, *, now_ns: int) -> tuple[ClaimEffect, ...]:
        """Send again what was not answered, and refuse whose time is over."""
        effects: list[ClaimEffect] = []
        late = [
            (to, identity)
            for to, (identity, _, deadline_ns) in self._ahead.items()
            if now_ns >= deadline_ns
        ]
        for to, identity in late:
            _, epoch, _ = self._ahead.pop(to)
            effects.append(
                Refuse(
                    to,
                    identity,
                    Refusal("NotReady", f"the topology of epoch {epoch} is not known"),
                )
            )
        while self._release_due and self._release_due[0][0] <= now_ns:
            _, _, identity, acquisition = heapq.heappop(self._release_due)
            if (identity, acquisition) in self._releasing:
                effects.append(ReleaseLock(Release(identity, acquisition)))
        while self._due and self._due[0][0] <= now_ns:
            due_ns, number, identity = heapq.heappop(self._due)
            procedure = self._numbered(identity, number)
            if procedure is not None and procedure.due_ns == due_ns:
                effects += self._again(procedure, now_ns)
        effects += self._admit(now_ns)
        self._look_ns = self._first_due_ns()
        return tuple(effects)

    # --- steps ---

    def _found(self, identity: Identity, acquisition: Acquisition) -> _Procedure | None:
        procedure = self._running.get(identity)
        if procedure is not None and procedure.acquisition == acquisition:
            return procedure
        return None

    def _numbered(self, identity: Identity, number: int) -> _Procedure | None:
        procedure = self._running.get(identity)
        if procedure is not None and procedure.acquisition.procedure == number:
            return procedure
        return None

    def _wait(self, procedure: _Procedure, now_ns: int) -> None:
        """Have it looked at again after its pause, and at its first deadline."""
        first = min(procedure.waiters.values())
        if procedure.phase == "queued":
            procedure.due_ns = max(first, now_ns + 1)
            self._push(procedure)
            return
        if procedure.phase in {"acquiring", "starting"}:
            policy = _SEND_AGAIN
            tried = procedure.sent = procedure.sent + 1
        else:
            policy = _ASK_AGAIN
            tried = procedure.asked = procedure.asked + 1
        procedure.due_ns = policy.next_ns(tried, now_ns=now_ns, deadline_ns=first)
        self._push(procedure)

    def _push(self, procedure: _Procedure) -> None:
        heapq.heappush(
            self._due,
            (procedure.due_ns, procedure.acquisition.procedure, procedure.identity),
        )
        self._look_at(procedure.due_ns)

    def _acquire(self, procedure: _Procedure, now_ns: int) -> tuple[ClaimEffect, ...]:
        procedure.awaiting = procedure.holder = None
        number = procedure.acquisition.procedure
        if (
            len(self._acquiring) >= ACQUIRING_MAX
            and self._acquiring.get(procedure.identity) != number
        ):
            procedure.phase = "queued"
            self._queue.append((procedure.identity, number))
            self._wait(procedure, now_ns)
            return ()
        self._acquiring[procedure.identity] = number
        if procedure.takes_lock:
            # Its own host: one write takes the lock, claims, and frees the lock.
            assert self._session is not None
            procedure.phase = "starting"
            procedure.awaiting = self._session
            return self._send_start(procedure, now_ns)
        procedure.phase = "acquiring"
        procedure.may_hold = True
        self._wait(procedure, now_ns)
        return (AcquireLock(Acquire(procedure.identity, procedure.acquisition)),)

    def _admit(self, now_ns: int) -> tuple[ClaimEffect, ...]:
        """Have those that have waited longest ask the store, while there is room."""
        if not self._queue:
            return ()
        effects: list[ClaimEffect] = []
        while self._queue and len(self._acquiring) < ACQUIRING_MAX:
            procedure = self._numbered(*self._queue.popleft())
            if procedure is not None and procedure.phase == "queued":
                effects += self._acquire(procedure, now_ns)
        return tuple(effects)

    def _held(
        self, procedure: _Procedure, holder: Acquisition, now_ns: int
    ) -> tuple[ClaimEffect, ...]:
        procedure.phase = "asking holder"
        procedure.sent = 0
        procedure.may_hold = False
        procedure.holder = holder
        procedure.awaiting = holder.session
        procedure.why = f"the lock is held by {holder.session}"
        return self._ask(procedure, now_ns)

    def _ask(self, procedure: _Procedure, now_ns: int) -> tuple[ClaimEffect, ...]:
        self._wait(procedure, now_ns)
        number = procedure.acquisition.procedure
        assert procedure.awaiting is not None
        if procedure.holder is None:
            return (
                AskOwnerSession(
                    procedure.awaiting, procedure.identity, procedure.token, number
                ),
            )
        if procedure.holder.session == self._session:
            # An earlier procedure of our own, whose release has not arrived.
            return self._release(procedure.identity, procedure.holder)
        return (AskHolderSession(procedure.holder, procedure.identity, number),)

    def _start(self, procedure: _Procedure, now_ns: int) -> tuple[ClaimEffect, ...]:
        assert self._table is not None
        try:
            host = self._choose_host(procedure.identity, self._table)
        except NoAuthority as error:
            return (
                *self._end(procedure),
                *self._refuse_all(procedure, Refusal.of(error)),
            )
        procedure.phase = "starting"
        procedure.awaiting = host.session
        procedure.why = f"{host.session} has not answered the start"
        return self._send_start(procedure, now_ns)

    def _send_start(
        self, procedure: _Procedure, now_ns: int
    ) -> tuple[ClaimEffect, ...]:
        assert self._table is not None
        assert procedure.awaiting is not None
        self._wait(procedure, now_ns)
        return (
            StartAt(
                procedure.awaiting,
                procedure.identity,
                procedure.acquisition,
                procedure.revision,
                self._table.epoch,
                max(0, procedure.latest_ns() - now_ns),
                procedure.chain(),
                procedure.takes_lock,
            ),
        )

    def _again(self, procedure: _Procedure, now_ns: int) -> tuple[ClaimEffect, ...]:
        effects: list[ClaimEffect] = []
        late = [to for to, until in procedure.waiters.items() if now_ns >= until]
        for to in late:
            del procedure.waiters[to]
            effects.append(
                Refuse(to, procedure.identity, Refusal("Pending", procedure.why))
            )
        if not procedure.waiters:
            return (*effects, *self._end(procedure))
        if procedure.phase == "queued":
            self._wait(procedure, now_ns)
            return tuple(effects)
        if procedure.phase != "starting":
            # The store is read anew: it knows which session is closed by now.
            return (*effects, *self._acquire(procedure, now_ns))
        assert self._table is not None
        assert procedure.awaiting is not None
        if procedure.awaiting in self._table.topology:
            return (*effects, *self._send_start(procedure, now_ns))
        return (*effects, *self._acquire(procedure, now_ns))

    def _found_at(self, procedure: _Procedure, pid: Pid) -> tuple[ClaimEffect, ...]:
        if procedure.phase == "starting":
            procedure.may_hold = False  # the claim's own write has released it
        ended = self._end(procedure)
        return (*ended, *[AnswerPid(to, pid) for to in procedure.waiters])

    def _end(self, procedure: _Procedure) -> tuple[ClaimEffect, ...]:
        del self._running[procedure.identity]
        self._acquiring.pop(procedure.identity, None)
        if not procedure.may_hold:
            return ()
        return self._release(procedure.identity, procedure.acquisition)

    def _release(
        self, identity: Identity, acquisition: Acquisition
    ) -> tuple[ClaimEffect, ...]:
        """Free the lock; again and again, until the store has said that it is."""
        self._releasing.setdefault((identity, acquisition), 0)
        return (ReleaseLock(Release(identity, acquisition)),)

    def _refuse_all(
        self, procedure: _Procedure, refusal: Refusal
    ) -> tuple[ClaimEffect, ...]:
        return (
            Happened(
                kind="placement",
                name="ClaimRefused",
                identity=procedure.identity,
                reason=f"{refusal.reason}: {refusal.message}",
            ),
            *(Refuse(to, procedure.identity, refusal) for to in procedure.waiters),
        )
