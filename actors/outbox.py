"""The outbox of a node: sends messages to identities, and awaits their answers."""

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from actors.activation import Activation, Mail
from actors.dispatch import Alarm, Dispatcher
from actors.future import Future
from actors.grain import decode_rejected
from messages.frames import (
    Answer,
    Bounce,
    Deliver,
    Failure,
    Frame,
    Mark,
    Redirect,
    Refused,
    Resolve,
    Resolved,
)
from placement.claim import NeedTopology
from placement.delivery import (
    Deliveries,
    DeliveryEffect,
    FailMessage,
    Outgoing,
    ResolvePid,
    SendMark,
    Transmit,
)
from placement.entry import Pid
from placement.errors import (
    REASONS,
    BadMessage,
    HandlerFailed,
    NotReady,
    OutcomeUnknown,
    PlacementError,
    Refusal,
)
from placement.event import Happened
from placement.identity import Identity
from placement.partition import PartitionTable
from placement.pidcache import PlacementResolution
from placement.registry import VirtualActorRegistry
from placement.topology import Address, SessionId, address_of

_LOOK_EVERY_NS = 20_000_000
_DEADLINES_MIN = 1_024


class Outbox:
    """Messages of one node to any identity, from any thread.

    Its lock orders sending against the sealing of mailboxes on this node, so
    that nothing overtakes what a sealed mailbox gives back. An answer does not
    take it, it only pops: whoever goes through `_asked` goes through a copy. Nor
    does a message to an activation here that is *straight*: one to which, since a
    message was last given to it under the lock, none was held. What the same thread
    sent before it is in that mailbox then, or has been handled.
    """

    def __init__(
        self,
        *,
        own: Address,
        dispatcher: Dispatcher,
        deliveries: Deliveries,
        registry: VirtualActorRegistry[Activation],
        send: Callable[[Address, Frame], bool],
        need_topology: Callable[[int], None],
        publish: Callable[[Happened], None],
        ask_timeout: float,
        linger_ns: int = 0,
    ) -> None:
        self.lock = threading.RLock()
        self.ask_timeout = ask_timeout
        #: What `keep` was given for an identity; for any thread, without the lock.
        self.known = deliveries.cache.resolution
        #: How long a node that has left sends back what it is sent.
        self._linger_ns = linger_ns
        self._own = own
        self._dispatcher = dispatcher
        self._now_ns = dispatcher.now_ns
        self._deliveries = deliveries
        self._registry = registry
        self._find = registry.find
        self._send_frame = send
        self._need_topology = need_topology
        self._publish = publish
        # One at a time for all threads, without the lock.
        self._take_number = itertools.count(1).__next__
        # Asks without an answer yet; the session of one is none while it is held.
        self._asked: dict[int, Mail] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._alarm = Alarm(dispatcher, self._tick)
        self._effects: deque[DeliveryEffect] = deque()
        self._is_performing = False
        self._needed_epochs: set[int] = set()
        deliveries.on_hold = self._hold_begins

    def waiting(self) -> tuple[Identity, ...]:
        """The identities for which a message is held or an answer awaited."""
        with self.lock:
            asked = (identity_of(each) for each in tuple(self._asked.values()))
            return (*self._deliveries.held(), *asked)

    # --- the node ---

    def open(self) -> None:
        """Send from now on."""
        with self.lock:
            self._deliveries.open()

    def close(self, why: str) -> None:
        """Send no more; what waits for an answer hears why there is none."""
        with self.lock:
            self._perform(self._deliveries.close(why))
            self._nothing_is_straight()
            asked = self._asked.copy()
            self._asked.clear()
            self._alarm.cancel()
        for each in asked.values():
            _end(each, NotReady(why) if each.session is None else OutcomeUnknown(why))

    def adopt(
        self,
        table: PartitionTable,
        closed: Iterable[SessionId],
        left: Iterable[SessionId] = (),
    ) -> None:
        """Resolve by `table`; no answer comes from `closed` sessions any more.

        But from those that have `left`: where the wire is slower than the store that
        tells of it, what was sent to them is answered or comes back yet.
        """
        gone, lingering = frozenset(closed), frozenset[SessionId]()
        if self._linger_ns:
            lingering = frozenset(s for s in left if address_of(s) != self._own)
        with self.lock:
            now_ns = self._now_ns()
            until_ns = now_ns + self._linger_ns
            asked = {
                identity_of(each): each.session
                for each in (self._asked.copy().values() if lingering else ())
                if each.session in lingering
            }
            self._perform(
                self._deliveries.adopt(
                    table,
                    gone,
                    now_ns=now_ns,
                    left=asked,
                    left_addresses=frozenset(address_of(s) for s in lingering),
                    until_ns=until_ns,
                )
            )
            if asked:
                self._dispatcher.call_at(until_ns, self._end_asked, lingering)
            if not self._deliveries.is_ready or not self._is_member(table, gone):
                self._nothing_is_straight()
        self._end_asked(gone - lingering)

    def _end_asked(self, gone: frozenset[SessionId]) -> None:
        """Nobody learns what became of what was asked there."""
        with self.lock:
            ended = [
                each
                for number, each in self._asked.copy().items()
                if each.session in gone and self._asked.pop(number, None) is not None
            ]
        for each in ended:
            _end(each, OutcomeUnknown(f"{identity_of(each)}: {each.session} has ended"))

    # --- sending ---

    def send(
        self,
        identity: Identity,
        payload: Any,
        *,
        future: Future | None,
        timeout: float | None,
        request_id: str,
        chain: tuple[str, ...],
    ) -> int:
        """Send `payload`, which has been checked and copied; its number."""
        number = self._take_number()
        now_ns = self._now_ns()
        seconds = self.ask_timeout if timeout is None else timeout
        deadline_ns = now_ns + max(0, round(seconds * 1e9))
        is_ask = future is not None
        # Carried until it needs more: an `Outgoing`, once it is held.
        mail = Mail(
            payload,
            request_id,
            chain,
            deadline_ns if is_ask else 0,  # a tell waits as long as it takes
            is_ask,
            self,
            number,
            identity,
            future,
        )
        # By `with`, though it costs twice as much: Ctrl-C may come after `acquire` and
        # before a `try`, and would leave the lock held.
        with self.lock:
            if is_ask:
                self._asked[number] = mail
                if not self._deadlines or deadline_ns < self._deadlines[0][0]:
                    self._alarm.set(deadline_ns)
                heapq.heappush(self._deadlines, (deadline_ns, number))
                if len(self._deadlines) > max(_DEADLINES_MIN, 2 * len(self._asked)):
                    self._forget_answered()
            found = self._find(identity)
            if found is not None and found.is_straight:
                mail.session = found.pid.session
                if found.deliver(mail):
                    return number
            self._go(mail, identity, deadline_ns, now_ns)
        return number

    def tell(self, identity: Identity, payload: Any, request_id: str) -> int:
        """Send `payload`, which has been checked and copied, without an answer.

        The same as `send`, in fewer steps.
        """
        number = self._take_number()
        mail = Mail(payload, request_id, (), 0, False, self, number, identity)
        found = self._find(identity)
        if found is not None and found.is_straight and found.deliver(mail):
            return number
        with self.lock:
            now_ns = self._now_ns()
            deadline_ns = now_ns + round(self.ask_timeout * 1e9)
            self._go(mail, identity, deadline_ns, now_ns)
        return number

    def _go(
        self, mail: Mail, identity: Identity, deadline_ns: int, now_ns: int
    ) -> None:
        """Give or send it to the activation that is known; else it is held."""
        if not self._is_performing:
            pid = self._deliveries.route(identity, now_ns)
            if pid is not None:
                mail.session = pid.session
                try:
                    is_sent = self._hand_over(pid, mail, deadline_ns, now_ns)
                except BadMessage:
                    is_sent = False  # said by whoever tries again
                if is_sent:
                    if pid.address == self._own:
                        found = self._find(identity)
                        if found is not None:
                            found.is_straight = True
                    return
        mail.session = None
        self._dispatch(self._outgoing(mail, identity, deadline_ns), now_ns)

    def _hold_begins(self, identity: Identity) -> None:
        found = self._find(identity)
        if found is not None:
            found.is_straight = False

    def _is_member(self, table: PartitionTable, gone: frozenset[SessionId]) -> bool:
        """Whether what this node hosts is still bound to a session that is open."""
        members = table.topology.members
        return any(address_of(each.session) == self._own for each in members) and not (
            any(address_of(session) == self._own for session in gone)
        )

    def _nothing_is_straight(self) -> None:
        for each in self._registry.all():
            each.is_straight = False

    def _outgoing(self, mail: Mail, identity: Identity, deadline_ns: int) -> Outgoing:
        """A mail as a message of this node's, to be held or sent elsewhere."""
        message = Outgoing(mail.number, identity, deadline_ns, mail, mail.chain)
        mail.carried = message
        return message

    def _forget_answered(self) -> None:
        """Keep no deadline of what has its answer; the lock is held."""
        asked = self._asked
        self._deadlines = [each for each in self._deadlines if each[1] in asked]
        heapq.heapify(self._deadlines)

    def seek(self, identity: Identity, timeout: float | None, future: Future) -> None:
        """Answer `future` with the pid of `identity`, which is started if it is not."""
        now_ns = self._now_ns()
        seconds = self.ask_timeout if timeout is None else timeout
        deadline_ns = now_ns + max(0, round(seconds * 1e9))
        with self.lock:
            # Held like a message: whoever waits for it is all that it says.
            self._dispatch(
                Outgoing(self._take_number(), identity, deadline_ns, future), now_ns
            )

    def keep(self, resolution: PlacementResolution) -> None:
        """Have it found by `known` as long as the cache keeps its reference."""
        with self.lock:
            self._deliveries.cache.keep(resolution)

    def peek(self, identity: Identity) -> Pid | None:
        """The reference that is kept; nothing is asked."""
        with self.lock:
            return self._deliveries.cache.peek(identity)

    def forget(self, pid: Pid) -> bool:
        """Drop the reference from the cache."""
        with self.lock:
            return self._deliveries.cache.remove(pid.identity, token=pid.fencing_token)

    def forget_session(self, session: SessionId) -> tuple[Identity, ...]:
        """Drop the references to it from the cache."""
        with self.lock:
            return self._deliveries.cache.forget_sessions([session])

    def _dispatch(self, message: Outgoing, now_ns: int) -> None:
        pid = self._deliveries.route(message.identity, now_ns)
        if pid is None:
            self._perform(self._deliveries.hold(message, now_ns=now_ns))
        elif self._is_performing:
            self._effects.append(Transmit(pid, message))
        else:
            bounced = self._transmit(pid, message, now_ns)
            if bounced:
                self._perform(bounced)

    def _perform(self, effects: Iterable[DeliveryEffect]) -> None:
        """Perform in order; the lock is held."""
        self._effects.extend(effects)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._effects:
                self._perform_one(self._effects.popleft())
        finally:
            self._is_performing = False
        if self._needed_epochs:
            # Once for all that is held: 0 reads whatever is known.
            needed = 0 if 0 in self._needed_epochs else max(self._needed_epochs)
            self._needed_epochs.clear()
            self._need_topology(needed)
        due_ns = self._deliveries.due_ns
        if due_ns is not None:
            # In a while at the soonest: many are due at nearly the same time.
            self._alarm.set(max(due_ns, self._now_ns() + _LOOK_EVERY_NS))

    def _perform_one(self, effect: DeliveryEffect) -> None:
        match effect:
            case Transmit(pid, message):
                self._effects.extend(self._transmit(pid, message, self._now_ns()))
            case Happened():
                self._publish(effect)
            case ResolvePid(request, identity, owner, epoch, remaining_ns, chain):
                # Undeliverable ones are asked again at the next look.
                self._send_frame(
                    address_of(owner),
                    Resolve(request, identity, epoch, remaining_ns // 1_000_000, chain),
                )
            case SendMark(pid, mark):
                sent = self._send_frame(
                    pid.address, Mark(pid.identity, pid.fencing_token, mark)
                )
                if not sent:
                    # It ended in good order: what was to bounce has bounced.
                    self._effects.extend(
                        self._deliveries.unmarked(
                            pid.identity, mark, now_ns=self._now_ns()
                        )
                    )
            case FailMessage(message, refusal):
                self._fail(message, refusal)
            case NeedTopology(epoch):
                self._needed_epochs.add(epoch)

    def _transmit(
        self, pid: Pid, message: Outgoing, now_ns: int
    ) -> tuple[DeliveryEffect, ...]:
        content = message.content
        if isinstance(content, Future):
            content.set(pid)
            return ()
        assert isinstance(content, Mail)
        asked = None
        if content.is_ask:
            asked = self._asked.get(message.number)
            if asked is None:
                return ()  # its time is over
            asked.session = pid.session
        try:
            is_sent = self._hand_over(pid, content, message.deadline_ns, now_ns)
        except BadMessage as error:
            return (FailMessage(message, Refusal.of(error)),)
        if is_sent:
            return ()
        if asked is not None:
            # Nobody has it: the end of that session says nothing about it.
            asked.session = None
        return self._deliveries.bounced(pid, message, needs_mark=False, now_ns=now_ns)

    def _hand_over(self, pid: Pid, mail: Mail, deadline_ns: int, now_ns: int) -> bool:
        """Give it to the activation; false where it is certain that it is not there."""
        if pid.address == self._own:
            found = self._find(pid.identity)
            return (
                found is not None
                and found.pid.fencing_token == pid.fencing_token
                and found.deliver(mail)
            )
        number, is_ask = mail.number, mail.is_ask
        frame = Deliver(
            pid.identity,
            pid.fencing_token,
            number if is_ask else 0,
            mail.payload,
            mail.request_id,
            max(1, (deadline_ns - now_ns) // 1_000_000),
            mail.chain,
            0 if is_ask else number,
        )
        return self._send_frame(pid.address, frame)

    def _fail(self, message: Outgoing, refusal: Refusal) -> None:
        content = message.content
        if isinstance(content, Future):
            content.set_error(refusal.error())
        elif isinstance(content, Mail) and content.is_ask:
            asked = self._asked.pop(message.number, None)
            if asked is not None:
                _end(asked, refusal.error())
        else:
            self._publish(dropped(message.identity, refusal))

    # --- origin of the mails of this node (any thread) ---

    def answered(self, mail: Mail, value: Any, pid: Pid) -> None:
        """An activation on this node has answered."""
        if self._asked.pop(mail.number, None) is not None:
            assert mail.future is not None
            mail.future.set(value)

    def failed(self, mail: Mail, error: PlacementError) -> None:
        """An activation on this node has refused or failed."""
        if self._asked.pop(mail.number, None) is not None:
            _end(mail, error)
        elif not mail.is_ask and not error.may_have_happened:
            self._publish(dropped(identity_of(mail), Refusal.of(error)))

    def bounced(self, mail: Mail, pid: Pid) -> None:
        """A sealed mailbox on this node gives it back; the lock is held."""
        with self.lock:
            now_ns = self._now_ns()
            deadline_ns = mail.deadline_ns
            if not mail.is_ask:
                # However long it was in the mailbox, it is only now homeless.
                deadline_ns = now_ns + round(self.ask_timeout * 1e9)
            message = mail.carried
            if not isinstance(message, Outgoing):
                message = self._outgoing(mail, pid.identity, deadline_ns)
            message.deadline_ns = deadline_ns
            mail.session = None
            self._perform(
                self._deliveries.bounced(pid, message, needs_mark=False, now_ns=now_ns)
            )

    # --- frames that come back ---

    def on_answer(self, frame: Answer) -> None:
        """Another node's activation has answered."""
        asked = self._asked.pop(frame.message_id, None)
        if asked is not None:
            assert asked.future is not None
            asked.future.set(frame.payload)

    def on_failure(self, frame: Failure) -> None:
        """Another node's activation has refused or failed."""
        asked = self._asked.pop(frame.message_id, None)
        if asked is not None:
            _end(asked, error_of(frame))

    def on_bounce(self, sender: Address, frame: Bounce) -> None:
        """A message found nobody at another node."""
        identity = Identity.parse(frame.identity)
        with self.lock:
            now_ns = self._now_ns()
            if frame.message_id:
                asked = self._asked.get(frame.message_id)
                if asked is None or asked.session is None:
                    return
                session = asked.session
                if address_of(session) != sender:
                    return
                asked.session = None
                message = asked.carried
                if not isinstance(message, Outgoing):
                    message = self._outgoing(asked, identity, asked.deadline_ns)
            else:
                deadline_ns = now_ns + frame.remaining_ms * 1_000_000
                mail = Mail(
                    frame.payload, frame.request_id, frame.chain, 0, False, self
                )
                message = Outgoing(frame.told, identity, deadline_ns, mail, frame.chain)
                mail.number, mail.carried = message.number, message
                # The mark goes to the incarnation; its session's number is not
                # needed for that.
                session = SessionId(f"{sender}#0")
            self._perform(
                self._deliveries.bounced(
                    Pid(identity, session, frame.token),
                    message,
                    needs_mark=True,
                    now_ns=now_ns,
                )
            )

    def on_marked(self, identity: Identity, mark: int) -> None:
        """A mark is back."""
        with self.lock:
            self._perform(
                self._deliveries.marked(identity, mark, now_ns=self._now_ns())
            )

    def on_resolution(self, frame: Resolved | Redirect | Refused) -> None:
        """A coordinator has answered."""
        with self.lock:
            now_ns = self._now_ns()
            match frame:
                case Resolved(request, identity, session, token):
                    named = Identity.parse(identity)
                    found = self._registry.find(named)
                    if found is not None and found.pid.fencing_token == token:
                        pid = found.pid  # one for all that keep it
                    else:
                        pid = Pid(named, SessionId(session), token)
                    effects = self._deliveries.resolved(request, pid, now_ns=now_ns)
                case Redirect(request, _, epoch, session):
                    effects = self._deliveries.redirected(
                        request, epoch, SessionId(session), now_ns=now_ns
                    )
                case Refused(request, _, reason, message):
                    effects = self._deliveries.refused(
                        request, Refusal(reason, message), now_ns=now_ns
                    )
            self._perform(effects)

    def _tick(self) -> None:
        late: list[Mail] = []
        with self.lock:
            now_ns = self._now_ns()
            self._perform(self._deliveries.tick(now_ns=now_ns))
            while self._deadlines and self._deadlines[0][0] <= now_ns:
                _, number = heapq.heappop(self._deadlines)
                asked = self._asked.pop(number, None)
                if asked is not None:
                    late.append(asked)
            while self._deadlines and self._deadlines[0][1] not in self._asked:
                heapq.heappop(self._deadlines)
            if self._deadlines:
                self._alarm.set(self._deadlines[0][0])
        for each in late:
            _end(each, OutcomeUnknown(f"{identity_of(each)}: no answer in time"))


def identity_of(mail: Mail) -> Identity:
    """To which identity a mail of an outbox was sent."""
    carried = mail.carried
    return carried.identity if isinstance(carried, Outgoing) else carried


def _end(mail: Mail, error: PlacementError) -> None:
    """An ask ends without an answer."""
    assert mail.future is not None
    mail.future.set_error(error)


def dropped(identity: Identity, refusal: Refusal) -> Happened:
    """A told message was refused: nobody else hears of it."""
    return Happened(
        kind="actor",
        name="MessageDropped",
        identity=identity,
        reason=f"{refusal.reason}: {refusal.message}",
    )


def error_of(frame: Failure) -> PlacementError:
    """The error that a failure frame stands for."""
    if frame.reason == "Rejected":
        return decode_rejected(frame.type_name, frame.message, frame.fields)
    if frame.reason == "HandlerFailed":
        return HandlerFailed(frame.type_name, frame.message)
    return REASONS.get(frame.reason, PlacementError)(frame.message)
