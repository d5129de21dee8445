"""Delivery: one node's messages to identities, each at most once, kept in order.

A message goes straight to the activation that the cache knows. Where none is
known, or the one known was not there, all messages to that identity are held
until it is known where they go: first those that came back, then those that
waited, in the order in which they were sent.

A message comes back (*bounces*) only where it is certain that it reached no user
code. After the first one from another node a mark is sent after it on the same
way; when the mark is back, or the session asked is closed, nothing else can
bounce. Times are nanoseconds of the caller's clock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from types import MappingProxyType
from typing import TypeAlias

from placement.claim import NeedTopology
from placement.entry import Pid
from placement.errors import Refusal
from placement.event import Happened
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.pidcache import PidCache
from placement.retry import RetryPolicy
from placement.topology import Address, SessionId, address_of
from placement.value import record, value

BOUNCES_MAX = 16

#: Of how many identities it is remembered that a known activation's session ended.
OVER_MAX = 100_000

#: Of how many sessions it is remembered that they are over.
ENDED_MAX = 10_000
WAITING_MAX = 10_000
_NEVER_NS = 1 << 63

#: How many questions to one coordinator are under way; more wait here, so that a
#: burst does not keep it, and the node that it is on, from all else. One without an
#: answer counts no longer than until it is asked again.
ASKED_MAX = 512

#: Refusals after which a later resolution may go better.
_TRANSIENT = frozenset({"NotReady", "Pending", "LockDenied", "NotHere"})

_AGAIN = RetryPolicy(first_ns=5_000_000, largest_ns=500_000_000)
# Growing, because what is late under load is sent once more into that load.
_UNANSWERED = RetryPolicy(first_ns=1_000_000_000, largest_ns=4_000_000_000)


@record
class Outgoing:
    """A message on its way to an identity.

    `number` grows with each message of the node; `deadline_ns` is when it is no
    longer to be delivered; `content` is the caller's; `chain` are the identities
    that wait for its answer, each for the next.
    """

    number: int
    identity: Identity
    deadline_ns: int
    content: object
    chain: tuple[str, ...] = ()
    bounces: int = 0


# --- effects -----------------------------------------------------------------


@value
class ResolvePid:
    """Ask the coordinator at `owner` where the activation is."""

    request: int
    identity: Identity
    owner: SessionId
    epoch: int
    remaining_ns: int
    chain: tuple[str, ...] = ()


@value
class Transmit:
    """Send `message` to the activation that `pid` names."""

    pid: Pid
    message: Outgoing


@value
class SendMark:
    """Send a mark the way the messages to `pid` went; it comes back by `marked`."""

    pid: Pid
    mark: int


@value
class FailMessage:
    """Tell the sender that the message was not delivered, and why."""

    message: Outgoing
    refusal: Refusal


DeliveryEffect: TypeAlias = (
    ResolvePid | Transmit | SendMark | FailMessage | NeedTopology | Happened
)


_NOWHERE: Mapping[Identity, SessionId] = MappingProxyType({})
_NOT_IN_TIME = Refusal("Pending", "its placement was not known in time")


@record
class _Hold:
    """The messages to one identity that wait, and for what.

    `marked` is the activation whose mark is awaited; none while resolving. Of one
    whose node has left it is awaited `until_ns` at the latest; 0: no such time.
    """

    identity: Identity
    request: int
    bounced: list[Outgoing] = field(default_factory=list)
    waiting: list[Outgoing] = field(default_factory=list)
    marked: Pid | None = None
    until_ns: int = 0
    owner: SessionId | None = None
    followed_epoch: int = 0
    due_ns: int = 0
    tried: int = 0
    sent: int = 0
    is_counted: bool = False
    is_queued: bool = False
    refusal: Refusal = _NOT_IN_TIME

    def messages(self) -> list[Outgoing]:
        """All of them, in the order in which they were first sent."""
        if not self.bounced and len(self.waiting) == 1:
            return self.waiting  # the usual one
        # What came back may have come in any order: some from a node, some not
        # even sent.
        return sorted((*self.bounced, *self.waiting), key=lambda each: each.number)


class Deliveries:
    """The ways of one node's messages. Not thread-safe; its owner holds a lock."""

    def __init__(self, cache: PidCache) -> None:
        self.cache = cache
        #: Called with an identity when messages to it begin to be held.
        self.on_hold: Callable[[Identity], object] = lambda _: None
        self._held: dict[Identity, _Hold] = {}
        self._by_request: dict[int, _Hold] = {}
        self._first_due_ns = _NEVER_NS
        self._asked_count: dict[SessionId, int] = {}
        self._queues: dict[SessionId, deque[int]] = {}
        self._with_room: dict[SessionId, None] = {}
        self._over: dict[Identity, int] = {}
        self._ended: dict[SessionId, None] = {}
        self._table: PartitionTable | None = None
        self._is_running = self.is_ready = False
        self._why_not = "the node has not started"
        self._last_request = 0

    @property
    def due_ns(self) -> int | None:
        """When `tick` is wanted, perhaps in vain; none while no message waits."""
        return self._first_due_ns if self._held else None

    def held(self) -> tuple[Identity, ...]:
        """The identities for which messages wait."""
        return tuple(self._held)

    # --- inputs: the node ---

    def open(self) -> None:
        """Accept messages from now on."""
        self._is_running = True
        self._look_whether_ready()

    def close(self, why: str) -> tuple[DeliveryEffect, ...]:
        """Refuse messages from now on, and those that wait."""
        self._is_running, self._why_not, self._table = False, why, None
        self._look_whether_ready()
        refusal = Refusal("NotReady", why)
        effects = [
            FailMessage(message, refusal)
            for hold in self._held.values()
            for message in hold.messages()
        ]
        self._held.clear()
        self._by_request.clear()
        self.cache.clear()
        return tuple(effects)

    def adopt(
        self,
        table: PartitionTable,
        closed: Iterable[SessionId],
        *,
        now_ns: int,
        left: Mapping[Identity, SessionId] = _NOWHERE,
        left_addresses: frozenset[Address] = frozenset(),
        until_ns: int = 0,
    ) -> tuple[DeliveryEffect, ...]:
        """Resolve by `table` from now on; nothing comes back from `closed`.

        But for messages under way to nodes that have `left`: the identities with such
        messages, and where these went. They come back `until_ns` at the latest, and
        until the mark behind them is back, later messages wait.
        """
        self._table = table
        self._look_whether_ready()
        over = tuple(closed)
        gone = frozenset(address_of(session) for session in over)
        self._note_ended(over)
        effects: list[DeliveryEffect] = []
        known: dict[Identity, Pid] = {}
        for pid in self.cache.adopt(table.topology):
            if left.get(pid.identity) == pid.session:
                known[pid.identity] = pid
            else:
                self._note_over(pid.identity, pid.fencing_token)
            effects.append(
                Happened(
                    kind="cache",
                    name="Dropped",
                    identity=pid.identity,
                    session=pid.session,
                    token=pid.fencing_token,
                    reason="topology",
                )
            )
        for hold in sorted(self._held.values(), key=lambda each: each.identity):
            if hold.marked is not None:
                if hold.marked.address in left_addresses:
                    hold.until_ns = until_ns
                    self._due(hold, min(hold.due_ns, until_ns))
                elif hold.marked.address in gone:
                    effects += self._go_on(hold, now_ns)
            elif hold.owner is None or hold.owner not in table.topology:
                self._uncount(hold)
                effects += self._resolve(hold, now_ns)
        for identity in sorted(left):
            if identity not in self._held:
                hold = self._new_hold(identity)
                hold.marked = known.get(identity) or Pid(identity, left[identity], 0)
                hold.until_ns = until_ns
                effects += self._mark(hold, now_ns)
        effects += self._admit(now_ns)
        for each in (self._asked_count, self._queues):
            for owner in [owner for owner in each if owner not in table.topology]:
                del each[owner]
        return tuple(effects)

    # --- inputs: messages ---

    def route(self, identity: Identity, now_ns: int) -> Pid | None:
        """Where a message to `identity` goes straight; none: `hold` it."""
        if identity in self._held or not self.is_ready:
            return None
        return self.cache.get(identity, now_ns)

    def _look_whether_ready(self) -> None:
        self.is_ready = self.refusal() is None

    def refusal(self) -> Refusal | None:
        """Why nothing can be sent now; none where it can."""
        if not self._is_running:
            return Refusal("NotReady", self._why_not)
        if self._table is None:
            return Refusal("NotReady", "the topology is not known yet")
        if not self._table.owners:
            return Refusal("NotReady", "no member owns partitions")
        return None

    def hold(self, message: Outgoing, *, now_ns: int) -> tuple[DeliveryEffect, ...]:
        """Keep `message` until its way is known; find that out."""
        if not self.is_ready:
            refusal = self.refusal()
            assert refusal is not None
            return (FailMessage(message, refusal),)
        hold = self._held.get(message.identity)
        if hold is not None:
            if len(hold.waiting) >= WAITING_MAX:
                why = f"{WAITING_MAX} messages wait to know where {hold.identity} is"
                return (FailMessage(message, Refusal("Overloaded", why)),)
            hold.waiting.append(message)
            self._due(hold, min(hold.due_ns, message.deadline_ns))
            return ()
        hold = self._new_hold(message.identity)
        hold.waiting.append(message)
        return self._resolve(hold, now_ns)

    def bounced(
        self, pid: Pid, message: Outgoing, *, needs_mark: bool, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        """`message` has come back from `pid`: nothing of it was handled.

        `needs_mark` says that more may be under way to the same place.
        """
        self.cache.remove(pid.identity, token=pid.fencing_token)
        message.bounces += 1
        if not self._is_running:
            return (FailMessage(message, Refusal("NotReady", self._why_not)),)
        if self._is_overtaken(pid):
            # What was sent after it went to a newer activation already: sent on
            # now, it would arrive out of order.
            refusal = Refusal("NotHere", "later messages have gone elsewhere before it")
            return (FailMessage(message, refusal),)
        if message.bounces > BOUNCES_MAX:
            refusal = Refusal("NotHere", f"sent {BOUNCES_MAX} times, never there")
            return (FailMessage(message, refusal),)
        hold = self._held.get(pid.identity)
        if hold is not None:
            hold.bounced.append(message)
            self._due(hold, min(hold.due_ns, message.deadline_ns))
            return ()
        hold = self._new_hold(pid.identity)
        hold.bounced.append(message)
        hold.tried = message.bounces - 1
        if not needs_mark:
            return self._resolve(hold, now_ns)
        hold.marked = pid
        return self._mark(hold, now_ns)

    def _is_overtaken(self, pid: Pid) -> bool:
        known = self.cache.peek(pid.identity)
        if known is not None and known.fencing_token > pid.fencing_token:
            return True
        # Its session was over: nobody waited for what might yet come back.
        return self._over.get(pid.identity, 0) >= pid.fencing_token

    def _note_ended(self, sessions: Iterable[SessionId]) -> None:
        self._ended.update(dict.fromkeys(sessions))
        while len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]

    def _note_over(self, identity: Identity, token: int) -> None:
        known = self._over.pop(identity, 0)
        self._over[identity] = max(known, token)
        if len(self._over) > OVER_MAX:
            del self._over[next(iter(self._over))]

    def marked(
        self, identity: Identity, mark: int, *, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        """A mark is back."""
        hold = self._by_request.get(mark)
        if hold is None or hold.identity != identity or hold.marked is None:
            return ()
        return self._go_on(hold, now_ns)

    def unmarked(
        self, identity: Identity, mark: int, *, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        """A mark could not be sent: all has come back, where that is certain."""
        hold = self._by_request.get(mark)
        if hold is not None and hold.until_ns:
            return ()  # perhaps only not now: it is sent again
        return self.marked(identity, mark, now_ns=now_ns)

    def _go_on(self, hold: _Hold, now_ns: int) -> tuple[DeliveryEffect, ...]:
        """Nothing more comes back: resolve, if anybody wants to know."""
        # Where its node is gone for good: what came yet would be overtaken.
        if hold.until_ns and hold.marked is not None and hold.marked.fencing_token:
            self._note_over(hold.identity, hold.marked.fencing_token)
        if not hold.bounced and not hold.waiting:
            self._drop(hold)
            return ()
        return self._resolve(hold, now_ns)

    # --- inputs: answers of coordinators ---

    def resolved(
        self, request: int, pid: Pid, *, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        """A coordinator says where it is."""
        hold = self._by_request.get(request)
        if hold is None or hold.marked is not None or hold.identity != pid.identity:
            return ()
        if pid.session in self._ended:
            # An answer that was late: what it names is over, and nothing would
            # take it out of the cache again.
            self._pause(hold, now_ns)
            return self._admit(now_ns)
        self._drop(hold)
        if self._table is None or pid.session not in self._table.topology:
            # Too new to be known here, or over before it was: used, not kept. What
            # comes back later from an older one was overtaken by these.
            self._note_over(pid.identity, pid.fencing_token - 1)
            return (
                NeedTopology(0),
                *(Transmit(pid, message) for message in hold.messages()),
                *self._admit(now_ns),
            )
        self.cache.put(pid, now_ns)
        effects: list[DeliveryEffect] = [
            Happened(
                kind="cache",
                name="Cached",
                identity=pid.identity,
                session=pid.session,
                token=pid.fencing_token,
            )
        ]
        effects += [Transmit(pid, message) for message in hold.messages()]
        return (*effects, *self._admit(now_ns))

    def redirected(
        self, request: int, epoch: int, owner: SessionId, *, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        """Not that coordinator's partition: ask `owner`, or wait for `epoch`."""
        hold = self._by_request.get(request)
        if hold is None or hold.marked is not None or self._table is None:
            return ()
        if epoch > self._table.epoch:
            is_back = hold.owner is None or address_of(owner) == address_of(hold.owner)
            if epoch > hold.followed_epoch and not is_back:
                hold.followed_epoch = epoch
                self._uncount(hold)
                asked = self._ask(hold, owner, epoch, now_ns)
                return (NeedTopology(epoch), *asked, *self._admit(now_ns))
            # Followed before, or back to whoever said so (it has another session
            # than the members know): sent on at once it would go in circles.
            self._pause(hold, now_ns)
            return (NeedTopology(epoch), *self._admit(now_ns))
        # Its knowledge is older than ours: it waits for ours when asked so.
        self._pause(hold, now_ns)
        return self._admit(now_ns)

    def refused(
        self, request: int, refusal: Refusal, *, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        """A coordinator refuses: try again where that may help, else give up."""
        hold = self._by_request.get(request)
        if hold is None or hold.marked is not None:
            return ()
        if refusal.reason in _TRANSIENT:
            hold.refusal = refusal
            self._pause(hold, now_ns)
            return self._admit(now_ns)
        self._drop(hold)
        return (
            *(FailMessage(message, refusal) for message in hold.messages()),
            *self._admit(now_ns),
        )

    def tick(self, *, now_ns: int) -> tuple[DeliveryEffect, ...]:
        """Fail what is too late, and ask again what was not answered."""
        effects: list[DeliveryEffect] = []
        due = [hold for hold in self._held.values() if hold.due_ns <= now_ns]
        for hold in sorted(due, key=lambda each: each.identity):
            effects += self._fail_late(hold, now_ns)
            if hold.until_ns and hold.marked is not None:
                if now_ns < hold.until_ns:
                    effects += self._mark(hold, now_ns)
                    continue
                effects += self._go_on(hold, now_ns)
            elif not hold.bounced and not hold.waiting:
                self._drop(hold)
            elif hold.marked is not None:
                effects += self._mark(hold, now_ns)
            elif hold.is_queued:
                self._until(hold, _NEVER_NS)
            else:
                self._uncount(hold)
                effects += self._resolve(hold, now_ns)
        effects += self._admit(now_ns)
        self._first_due_ns = min(
            (hold.due_ns for hold in self._held.values()), default=_NEVER_NS
        )
        return tuple(effects)

    # --- steps ---

    def _new_hold(self, identity: Identity) -> _Hold:
        self._last_request += 1
        hold = _Hold(identity, self._last_request)
        self._held[identity] = hold
        self._by_request[hold.request] = hold
        self.on_hold(identity)
        return hold

    def _drop(self, hold: _Hold) -> None:
        del self._held[hold.identity]
        del self._by_request[hold.request]
        self._uncount(hold)

    def _uncount(self, hold: _Hold) -> None:
        """The question is answered, or waited for no longer: make room for another."""
        hold.is_queued = False
        if hold.is_counted and hold.owner is not None:
            hold.is_counted = False
            self._asked_count[hold.owner] -= 1
            self._with_room[hold.owner] = None

    def _admit(self, now_ns: int) -> tuple[DeliveryEffect, ...]:
        """Ask what has waited longest, where there is room now."""
        if not self._with_room:
            return ()
        effects: list[DeliveryEffect] = []
        owners, self._with_room = self._with_room, {}
        for owner in owners:
            queue = self._queues.get(owner)
            while queue and self._asked_count.get(owner, 0) < ASKED_MAX:
                hold = self._by_request.get(queue.popleft())
                if hold is not None and hold.is_queued and hold.owner == owner:
                    effects += self._resolve(hold, now_ns)
        return tuple(effects)

    def _fail_late(self, hold: _Hold, now_ns: int) -> list[DeliveryEffect]:
        late = [each for each in hold.messages() if each.deadline_ns <= now_ns]
        if late:
            hold.bounced = [m for m in hold.bounced if m.deadline_ns > now_ns]
            hold.waiting = [m for m in hold.waiting if m.deadline_ns > now_ns]
        return [FailMessage(message, hold.refusal) for message in late]

    def _until(self, hold: _Hold, at_ns: int) -> None:
        for message in (*hold.bounced, *hold.waiting):
            at_ns = min(at_ns, message.deadline_ns)
        self._due(hold, at_ns)

    def _due(self, hold: _Hold, at_ns: int) -> None:
        hold.due_ns = at_ns
        self._first_due_ns = min(self._first_due_ns, at_ns)

    def _pause(self, hold: _Hold, now_ns: int) -> None:
        hold.tried += 1
        hold.sent = 0
        self._uncount(hold)
        self._until(hold, now_ns + _AGAIN.pause_ns(hold.tried))

    def _mark(self, hold: _Hold, now_ns: int) -> tuple[DeliveryEffect, ...]:
        assert hold.marked is not None
        hold.sent += 1
        again_ns = now_ns + _UNANSWERED.pause_ns(hold.sent)
        self._until(hold, min(again_ns, hold.until_ns or again_ns))
        return (SendMark(hold.marked, hold.request),)

    def _resolve(self, hold: _Hold, now_ns: int) -> tuple[DeliveryEffect, ...]:
        hold.marked, hold.until_ns = None, 0
        owner = None
        if self._table is not None:
            owner = self._table.owner_of(hold.identity)
        if owner is None or self._table is None:
            hold.refusal = Refusal("NotReady", "no member owns partitions")
            self._pause(hold, now_ns)
            return (NeedTopology(0),)
        return self._ask(hold, owner.session, self._table.epoch, now_ns)

    def _ask(
        self, hold: _Hold, owner: SessionId, epoch: int, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        if hold.owner != owner:
            hold.owner, hold.sent = owner, 0
        if not hold.sent:
            # The first time: it has to be its turn, and is counted from now on.
            count = self._asked_count.get(owner, 0)
            if count >= ASKED_MAX:
                hold.is_queued = True
                self._queues.setdefault(owner, deque()).append(hold.request)
                self._until(hold, _NEVER_NS)
                return ()
            self._asked_count[owner] = count + 1
            hold.is_counted = True
        hold.is_queued = False
        hold.sent += 1
        self._until(hold, now_ns + _UNANSWERED.pause_ns(hold.sent))
        messages = hold.messages()
        latest, chain = messages[0].deadline_ns, messages[0].chain
        if len(messages) > 1:
            latest = max(message.deadline_ns for message in messages)
            chain = tuple(dict.fromkeys(each for m in messages for each in m.chain))
        return (
            ResolvePid(
                hold.request,
                hold.identity,
                owner,
                epoch,
                max(0, latest - now_ns),
                chain,
            ),
        )
