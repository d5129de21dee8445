"""Known-broken variants of the cluster, each to show that the observer sees it.

Each is a subclass of a part of the real cluster, put in its place for a trial.
Where a second line of defence would hold a defect, the variant removes both.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from actors.activation import GrainActivation
from actors.future import running
from actors.node import PlacementNode
from actors.outbox import Outbox, identity_of
from actors.postbox import Postbox
from actors.simulated_store import RecordingStore
from actors.simulation import Process, Shared
from actors.transport import Origin
from placement.claim import ClaimEffect, Claims, ReleaseLock, TellHolderState
from placement.contracts import (
    Acquire,
    Acquired,
    Claim,
    Claimed,
    ClaimRefused,
    Failed,
    GivenUp,
    GiveUp,
    LockHeld,
    LockRefused,
    Save,
    Saved,
    SessionView,
    Stale,
)
from placement.delivery import Deliveries, DeliveryEffect, Transmit
from placement.entry import Acquisition, ActivationRecord, Pid
from placement.errors import PlacementError, Refusal
from placement.hosting import ClaimEntry, Hosting, HostingEffect, StartActivation
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.pidcache import PidCache
from placement.session import OwnSession, SessionEffect, StoreTrouble
from placement.topology import Address, SessionId, Topology


class Variant:
    """The cluster as it is; a defect changes some of this."""

    node_type: type[PlacementNode] = PlacementNode
    process_type: type[Process] = Process
    store_type: type[RecordingStore] = RecordingStore

    def prepare(self, shared: Shared) -> None:
        """Change what all processes share."""
        if self.store_type is not RecordingStore:
            shared.store = self.store_type.of(shared.world, shared.records)


@dataclass(frozen=True, slots=True)
class Defect:
    """A known-broken variant: what is wrong, and which rules and seed show it."""

    description: str
    rules: tuple[str, ...]
    variant: type[Variant]
    seed: int


# --- the lease ----------------------------------------------------------------


class _UnguardedActivation(GrainActivation):
    def _enter(self, now_ns: int) -> bool:
        running.activation = self
        self._host.current = self
        return True


class _UnguardedNode(PlacementNode):
    activation_type = _UnguardedActivation


class Unguarded(Variant):
    """User code is entered whatever the guard says."""

    node_type = _UnguardedNode


class _LateSession(OwnSession):
    def renewed(
        self,
        session: SessionId,
        count: int,
        outcome: SessionView | StoreTrouble | None,
        now_ns: int,
    ) -> tuple[SessionEffect, ...]:
        self._first_sent_ns = now_ns
        return super().renewed(session, count, outcome, now_ns)


class _LateNode(PlacementNode):
    session_type = _LateSession


class LeaseFromAnswer(Variant):
    """The time to live is measured from the answer, not from the first sending."""

    node_type = _LateNode


class _RecklessSession(OwnSession):
    def __init__(self, address: Address, **settings: Any) -> None:
        super().__init__(address, **{**settings, "margin_ns": 0})


class _RecklessNode(PlacementNode):
    session_type = _RecklessSession


class NoMargin(Variant):
    """The guard stays open until the very end of the time to live."""

    node_type = _RecklessNode


# --- the entry ----------------------------------------------------------------


class _HastyHosting(Hosting):
    def start(
        self,
        identity: Identity,
        *,
        acquisition: Acquisition,
        host: SessionId,
        expected_revision: int,
        **more: Any,
    ) -> tuple[HostingEffect, ...]:
        effects = super().start(
            identity,
            acquisition=acquisition,
            host=host,
            expected_revision=expected_revision,
            **more,
        )
        if not effects or not isinstance(effects[-1], ClaimEntry):
            return effects
        hosted = self._hosted[identity]
        hosted.pid = Pid(identity, host, expected_revision + 1)
        hosted.state = "starting"
        return (StartActivation(hosted.pid, ActivationRecord()), *effects)

    def claimed(
        self, request: Claim, outcome: Claimed | ClaimRefused | Failed, *, now_ns: int
    ) -> tuple[HostingEffect, ...]:
        return ()


class _HastyNode(PlacementNode):
    hosting_type = _HastyHosting


class EntryAfterStart(Variant):
    """The activation starts first, and its entry is written then."""

    node_type = _HastyNode


class _StealingStore(RecordingStore):
    def _owner_is_open(self, row: Any) -> bool:
        return False

    def _why_refused(self, row: Any, request: Claim) -> str | None:
        why = super()._why_refused(row, request)
        return None if why is not None and "owns it and is open" in why else why


class EntryReplaced(Variant):
    """An entry may be replaced while the session of its owner is open."""

    store_type = _StealingStore


class _RashStore(RecordingStore):
    def close_session(self, session: SessionId, count: int, /) -> bool:
        record = self._session(session)
        return super().close_session(session, record.count if record else count)


class CloseIgnoresCount(Variant):
    """A session is closed whether or not it was renewed meanwhile."""

    store_type = _RashStore


class _ForgetfulStore(RecordingStore):
    def _give_up(self, request: GiveUp, now_ms: int) -> GivenUp | Stale:
        token = self._row(request.identity).fencing_token
        if request.fencing_token < token and self._row(request.identity).owner:
            # Recorded as what it is: the giving up of an older token.
            outcome = super()._give_up(
                GiveUp(request.identity, token, request.version, request.snapshot),
                now_ms,
            )
            last = self.records.pop()
            self.records.append(
                msgspec.structs.replace(last, token=request.fencing_token)
            )
            return outcome
        return super()._give_up(request, now_ms)


class LateRelease(Variant):
    """A late giving up clears the entry of the next owner."""

    store_type = _ForgetfulStore


class _LenientStore(RecordingStore):
    def _save(self, request: Save, now_ms: int) -> Saved | Stale:
        row = self._row(request.identity)
        if row.owner is not None and request.fencing_token < row.fencing_token:
            if request.version > row.version:
                version = row.version
                self._write_snapshot(row, request.snapshot, request.version)
                row.revision = self._next_revision()
                self._keep_row(request.identity, row)
                self._record_save(request.identity, request.fencing_token, version)
            return Saved(row.version)
        return super()._save(request, now_ms)


class StaleSave(Variant):
    """A save under an older token is stored."""

    store_type = _LenientStore


# --- what leaves --------------------------------------------------------------


class _UngatedActivation(GrainActivation):
    def _emit(
        self, leave: Callable[[], None], never: Callable[[PlacementError], None]
    ) -> bool:
        if not self._is_shut and self.guard.is_open(self._host.now_ns()):
            leave()
        else:
            never(self._unknown())
        return False


class _UngatedNode(PlacementNode):
    activation_type = _UngatedActivation


class NoOutputGate(Variant):
    """The answer leaves before what was saved for it is stored."""

    node_type = _UngatedNode


class _BlindActivation(GrainActivation):
    def _saved(self, request: Save, outcome: Saved | Stale | Failed) -> None:
        if (
            isinstance(outcome, Failed)
            and outcome.may_have_happened
            and self._state != "ended"
        ):
            self.save(request.snapshot)
        else:
            super()._saved(request, outcome)


class _BlindNode(PlacementNode):
    activation_type = _BlindActivation


class BlindRepeat(Variant):
    """A save that timed out is taken for failed, and written anew, as a later one."""

    node_type = _BlindNode


class _ResendingOutbox(Outbox):
    def adopt(
        self,
        table: PartitionTable,
        closed: Iterable[SessionId],
        left: Iterable[SessionId] = (),
    ) -> None:
        gone = frozenset(closed)
        with self.lock:
            again = [
                each for each in tuple(self._asked.values()) if each.session in gone
            ]
            for each in again:
                each.session = None
        super().adopt(table, gone, left)
        with self.lock:
            for each in again:
                message = self._outgoing(each, identity_of(each), each.deadline_ns)
                self._dispatch(message, self._now_ns())


class _ResendingNode(PlacementNode):
    outbox_type = _ResendingOutbox


class SentAgain(Variant):
    """A message whose outcome is unknown is taken for lost, and sent again."""

    node_type = _ResendingNode


class _CredulousPostbox(Postbox):
    def _arrived(self, data: bytes, origin: Origin | None = None) -> None:
        self._last_seen.clear()
        super()._arrived(data, origin)


class _CredulousNode(PlacementNode):
    postbox_type = _CredulousPostbox


class HandledTwice(Variant):
    """A frame that arrives twice is handled twice."""

    node_type = _CredulousNode


class _UnorderedDeliveries(Deliveries):
    def resolved(
        self, request: int, pid: Pid, *, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        effects = super().resolved(request, pid, now_ns=now_ns)
        sent = [each for each in effects if isinstance(each, Transmit)]
        others = [each for each in effects if not isinstance(each, Transmit)]
        return (*others, *reversed(sent))


class _UnorderedNode(PlacementNode):
    deliveries_type = _UnorderedDeliveries


class OrderLost(Variant):
    """What waited for a resolution is sent in another order."""

    node_type = _UnorderedNode


# --- finding out --------------------------------------------------------------


class _LosingClaims(Claims):
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._lost: set[Acquisition] = set()

    def acquired(
        self,
        request: Acquire,
        outcome: Acquired | LockHeld | LockRefused | Failed,
        *,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        effects = super().acquired(request, outcome, now_ns=now_ns)
        if not isinstance(outcome, Failed):
            return effects
        self._lost.add(request.acquisition)
        self._releasing.pop((request.identity, request.acquisition), None)
        return tuple(each for each in effects if not isinstance(each, ReleaseLock))

    def holder_asked(
        self,
        address: Address,
        identity: Identity,
        holder: Acquisition,
        procedure_number: int,
    ) -> tuple[ClaimEffect, ...]:
        if holder in self._lost and holder.session == self._session:
            return (
                TellHolderState(address, identity, holder, procedure_number, "running"),
            )
        return super().holder_asked(address, identity, holder, procedure_number)

    def _release(
        self, identity: Identity, acquisition: Acquisition
    ) -> tuple[ClaimEffect, ...]:
        if acquisition in self._lost:
            return ()
        return super()._release(identity, acquisition)


class _LosingNode(PlacementNode):
    claims_type = _LosingClaims


class LostLock(Variant):
    """A lock whose answer was lost is neither given back nor said to be free."""

    node_type = _LosingNode


class _ObedientDeliveries(Deliveries):
    def __init__(self, cache: PidCache) -> None:
        super().__init__(cache)
        self._followed: Counter[int] = Counter()

    def redirected(
        self, request: int, epoch: int, owner: SessionId, *, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        hold = self._by_request.get(request)
        table = self._table
        if hold is None or hold.marked is not None or table is None:
            return ()
        self._followed[request] += 1
        # A circle of two actors on one node takes no time: now and then it pauses,
        # or a simulation would not get out of it.
        if epoch > table.epoch or self._followed[request] % 64 == 0:
            return super().redirected(request, epoch, owner, now_ns=now_ns)
        return self._ask(hold, owner, epoch, now_ns)


class _ObedientNode(PlacementNode):
    deliveries_type = _ObedientDeliveries


class OldRedirect(Variant):
    """A redirect with an older epoch is followed at once, also to where it is from."""

    node_type = _ObedientNode


class _StickyCache(PidCache):
    def adopt(self, topology: Topology) -> tuple[Pid, ...]:
        return ()


class _StickyNode(PlacementNode):
    cache_type = _StickyCache


class StaleCache(Variant):
    """References outlive the departure of the member that they lead to."""

    node_type = _StickyNode


class _ForgettingClaims(Claims):
    def start_refused(
        self,
        identity: Identity,
        procedure_number: int,
        host: SessionId,
        refusal: Refusal,
        *,
        now_ns: int,
    ) -> tuple[ClaimEffect, ...]:
        procedure = self._numbered(identity, procedure_number)
        if procedure is None or refusal.reason != "ActivationFailed":
            return super().start_refused(
                identity, procedure_number, host, refusal, now_ns=now_ns
            )
        # Neither told nor looked at again: whoever asks joins those who wait.
        procedure.phase, procedure.awaiting, procedure.due_ns = "failed", None, 0
        return ()


class _ForgettingNode(PlacementNode):
    claims_type = _ForgettingClaims


class ForgottenWaiter(Variant):
    """Who waits for an activation that fails is neither told so nor served later."""

    node_type = _ForgettingNode


def _defect(variant: type[Variant], seed: int, *rules: str) -> Defect:
    assert variant.__doc__ is not None
    return Defect(variant.__doc__, rules, variant, seed)


DEFECTS: dict[str, Defect] = {
    "unguarded": _defect(Unguarded, 1, "closed-session", "one-activation"),
    "lease-from-answer": _defect(
        LeaseFromAnswer, 2, "closed-session", "one-activation"
    ),
    "no-margin": _defect(NoMargin, 8, "closed-session", "one-activation"),
    "entry-after-start": _defect(EntryAfterStart, 1, "entry-first"),
    "entry-replaced": _defect(EntryReplaced, 1, "owner-open"),
    "close-ignores-count": _defect(
        CloseIgnoresCount, 1, "closed-session", "one-activation"
    ),
    "late-release": _defect(LateRelease, 1, "stale-write"),
    "stale-save": _defect(StaleSave, 2, "stale-write"),
    "no-output-gate": _defect(NoOutputGate, 1, "saves-kept", "linearizable"),
    "blind-repeat": _defect(BlindRepeat, 3, "saves-kept", "linearizable"),
    "sent-again": _defect(SentAgain, 1, "handled-once"),
    "handled-twice": _defect(HandledTwice, 1, "handled-once"),
    "order-lost": _defect(OrderLost, 1, "order"),
    "lost-lock": _defect(LostLock, 1, "reachable", "left-behind"),
    "old-redirect": _defect(OldRedirect, 2, "bounded-work"),
    "stale-cache": _defect(StaleCache, 1, "reachable"),
    "forgotten-waiter": _defect(ForgottenWaiter, 1, "reachable", "left-behind"),
}


def variant_of(name: str) -> Variant:
    """The variant of that name; the sound cluster where it is empty."""
    return DEFECTS[name].variant() if name else Variant()
