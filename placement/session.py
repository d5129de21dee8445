"""Sessions: how a node opens, keeps and ends its own, and watches the others'.

Times are nanoseconds of the caller's own clock; no two clocks are compared. The
time to live of a renewal counts from before its first sending; another's session
is closed only after its count has stood still for its whole time to live, from
when the answer of the first such reading was had.

Source: Gray and Cheriton, "Leases", SOSP 1989.
"""

from collections.abc import Iterable
from typing import TypeAlias

from placement.contracts import SessionRecord, SessionView
from placement.event import Happened
from placement.lease import Guard
from placement.topology import (
    Address,
    Member,
    SessionId,
    Topology,
    session_of,
)
from placement.value import value


@value
class StoreTrouble:
    """A store call failed; it may have happened."""

    message: str


# --- effects -----------------------------------------------------------------


@value
class OpenSession:
    """Create the record; the outcome comes back by `opened`."""

    record: SessionRecord


@value
class RenewSession:
    """Raise the count; the outcome comes back by `renewed`."""

    session: SessionId
    count: int


@value
class ReadSessions:
    """Read all; the outcome comes back by `viewed`."""


@value
class CloseSession:
    """Close it if its count is still that; the outcome comes back by `closed`."""

    session: SessionId
    count: int


@value
class WriteMembers:
    """Replace the members; the outcome comes back by `members_written`."""

    members: tuple[Member, ...]
    expected_epoch: int


@value
class SendEcho:
    """Send the nonce to oneself, the whole way; it comes back by `echoed`."""

    nonce: int


@value
class SessionBegan:
    """The session is open; what it hosts asks `guard`."""

    session: SessionId
    guard: Guard


@value
class SessionLapsed:
    """The session is over, and not by our will. Its guard is shut."""

    session: SessionId
    why: str


@value
class SessionEnded:
    """The session that was stopped is closed, and left the members."""

    session: SessionId


@value
class TopologyAdopted:
    """These are the members now; `closed` sessions are known to be over.

    Those of them that have `left` were renewed shortly before: not a crash has ended
    them, and what they were sent may still come back.
    """

    topology: Topology
    closed: tuple[SessionId, ...]
    left: tuple[SessionId, ...] = ()


SessionEffect: TypeAlias = (
    OpenSession
    | RenewSession
    | ReadSessions
    | CloseSession
    | WriteMembers
    | SendEcho
    | SessionBegan
    | SessionLapsed
    | SessionEnded
    | TopologyAdopted
    | Happened
)


class Watch:
    """What readings tell of the sessions of others: who is open, who stands still."""

    def __init__(self) -> None:
        self.topology = Topology()
        self.is_known = False
        self._seen: dict[SessionId, tuple[SessionRecord, int]] = {}
        self._told: frozenset[SessionId] = frozenset()
        #: Open, and asked to be closed for they stood still.
        self._still: set[SessionId] = set()
        self._left: frozenset[SessionId] = frozenset()

    def view(
        self, view: SessionView, now_ns: int
    ) -> tuple[tuple[SessionEffect, ...], tuple[SessionId, ...]]:
        """Take a reading in: effects, and the closed sessions that are members."""
        open_now = {each.session: each for each in view.sessions if not each.closed}
        if view.topology.epoch < self.topology.epoch:
            return (), ()  # an older reading proves nothing
        seen_before = self._seen.copy()
        for session in seen_before:
            if session not in open_now:
                del self._seen[session]
        for session, record in open_now.items():
            seen = self._seen.get(session)
            if seen is None or seen[0].count < record.count:
                self._seen[session] = (record, now_ns)
                self._still.discard(session)
        closed = {each.session for each in view.sessions if each.closed}
        counts = {each.session: each.count for each in view.sessions}
        removed = [
            member.session
            for member in self.topology.members
            if member.session not in view.topology
        ]
        # Not those that are only absent: the reading may be one from before they
        # were opened, and who is taken for over stays so.
        # And what is closed is told once, however long a record names it: who hears
        # of it may ask for a newer reading, which would say the same again.
        over = tuple(sorted({*(closed - self._told), *removed}))
        left = tuple(
            session
            for session in over
            if session in self._left
            or (
                session in seen_before
                and session not in self._still
                and _was_renewed(*seen_before[session], counts.get(session, 0), now_ns)
            )
        )
        self._still &= open_now.keys()
        named = {member.session for member in view.topology.members}
        self._told = frozenset(closed | (self._told & named))
        self._left = (self._left | frozenset(left)) & (self._told | open_now.keys())
        is_new = view.topology.epoch > self.topology.epoch or not self.is_known
        effects: tuple[SessionEffect, ...] = ()
        if is_new or over:
            self.topology, self.is_known = view.topology, True
            effects = (TopologyAdopted(view.topology, over, left),)
        dead = tuple(
            member.session
            for member in view.topology.members
            if member.session in closed
        )
        return effects, dead

    def expired(self, now_ns: int, *, besides: SessionId | None) -> list[CloseSession]:
        """Close whose count has stood still for its whole time to live."""
        found = []
        for session, (record, since_ns) in sorted(
            self._seen.items(), key=lambda each: each[0]
        ):
            if session == besides or now_ns < since_ns + record.ttl_ms * 1_000_000:
                continue
            # Asked again at each time to live, in case the answer is lost.
            self._seen[session] = (record, now_ns)
            self._still.add(session)
            found.append(CloseSession(session, record.count))
        return found

    def others(self, own: SessionId | None) -> tuple[SessionId, ...]:
        """The open sessions but `own`."""
        return tuple(sorted(each for each in self._seen if each != own))

    def moved(self, before: dict[SessionId, int]) -> tuple[SessionId, ...]:
        """Those of `before` whose count is another now."""
        return tuple(
            sorted(
                session
                for session, count in before.items()
                if session in self._seen and self._seen[session][0].count != count
            )
        )

    def counts(self) -> dict[SessionId, int]:
        """The open sessions and their counts."""
        return {session: record.count for session, (record, _) in self._seen.items()}


def _was_renewed(record: SessionRecord, since_ns: int, count: int, now_ns: int) -> bool:
    """Whether its count was seen to grow not long ago, or is another now.

    Who reads three times in a time to live has seen the count of one that expired
    stand still for two thirds of it at least: half of it is well below.
    """
    is_new = (now_ns - since_ns) * 2 < record.ttl_ms * 1_000_000
    return is_new or count > record.count


class Observer:
    """A client's view: it reads and opens no session."""

    def __init__(self, *, renew_every_ns: int) -> None:
        self._every_ns = renew_every_ns
        self._watch = Watch()
        self._due_ns: int | None = None

    @property
    def topology(self) -> Topology:
        """The newest known."""
        return self._watch.topology

    @property
    def due_ns(self) -> int | None:
        """When `tick` is wanted."""
        return self._due_ns

    def start(self, now_ns: int) -> tuple[SessionEffect, ...]:
        """Read now, and from now on."""
        self._due_ns = now_ns + self._every_ns
        return (ReadSessions(),)

    def stop(self) -> None:
        """Read no more."""
        self._due_ns = None

    def viewed(
        self, outcome: SessionView | StoreTrouble, now_ns: int
    ) -> tuple[SessionEffect, ...]:
        """A reading, or why there is none."""
        if isinstance(outcome, StoreTrouble):
            return (_trouble(outcome),)
        return self._watch.view(outcome, now_ns)[0]

    def hint(self, epoch: int) -> tuple[SessionEffect, ...]:
        """Somebody speaks of `epoch`; 0: of a newer one."""
        if self._due_ns is None or 0 < epoch <= self.topology.epoch:
            return ()
        return (ReadSessions(),)

    def tick(self, now_ns: int) -> tuple[SessionEffect, ...]:
        """Read again when it is time."""
        if self._due_ns is None or now_ns < self._due_ns:
            return ()
        self._due_ns = now_ns + self._every_ns
        return (ReadSessions(),)


class OwnSession:
    """The sessions that one incarnation of a node opens, one after the other.

    `state` is idle, opening, open, returning, closing or ended. Not thread-safe;
    one actor owns it. Methods return the effects to perform, in order.
    """

    def __init__(
        self,
        address: Address,
        *,
        kinds: Iterable[str],
        weight: float,
        ttl_ns: int,
        renew_every_ns: int,
        margin_ns: int,
    ) -> None:
        if not 0 < renew_every_ns < ttl_ns - margin_ns or margin_ns < 0:
            raise ValueError(
                "renewing must be sooner than the time to live less the margin"
            )
        self._address = address
        self._kinds = tuple(sorted(kinds))
        self._weight = weight
        self._ttl_ns = ttl_ns
        self._every_ns = renew_every_ns
        self._again_ns = max(1, renew_every_ns // 4)
        self._margin_ns = margin_ns
        self._watch = Watch()
        self._number = 0
        self._state = "idle"
        self._session = SessionId("")
        self._guard: Guard | None = None
        self._is_draining = False
        self._is_stopping = False
        self._settled: dict[SessionId, int] = {}
        self._lapsed: dict[SessionId, int] = {}
        self._nonce = 0
        self._reset()

    def _reset(self) -> None:
        self._count = 0
        self._first_sent_ns = 0
        self._is_in_flight = False
        self._is_echoed = True
        self._is_writing = False
        self._due_ns: int | None = None

    # --- what is known ---

    @property
    def session(self) -> SessionId | None:
        """The session that is open; none while there is none."""
        return self._session if self._state in {"open", "closing"} else None

    @property
    def topology(self) -> Topology:
        """The newest known."""
        return self._watch.topology

    @property
    def due_ns(self) -> int | None:
        """When `tick` is wanted."""
        return self._due_ns

    def own_open(self) -> frozenset[SessionId]:
        """Those of this incarnation's sessions that it has not closed."""
        own = {*self._lapsed}
        if self.session is not None:
            own.add(self._session)
        return frozenset(own)

    def _member(self) -> Member:
        return Member(
            session=self._session,
            kinds=self._kinds,
            weight=self._weight,
            draining=self._is_draining,
        )

    # --- opening ---

    def start(self, now_ns: int) -> tuple[SessionEffect, ...]:
        """Open the first session."""
        assert self._state == "idle"
        return self._open_next(now_ns)

    def _open_next(self, now_ns: int) -> tuple[SessionEffect, ...]:
        self._number += 1
        self._reset()
        self._session = session_of(self._address, self._number)
        self._state = "opening"
        self._first_sent_ns = now_ns
        return self._send_open(now_ns)

    def _send_open(self, now_ns: int) -> tuple[SessionEffect, ...]:
        self._due_ns = now_ns + self._again_ns
        self._is_in_flight = True
        ttl_ms = self._ttl_ns // 1_000_000
        return (OpenSession(SessionRecord(session=self._session, ttl_ms=ttl_ms)),)

    def opened(
        self,
        session: SessionId,
        outcome: bool | StoreTrouble,  # noqa: FBT001  the store's own outcome
        now_ns: int,
    ) -> tuple[SessionEffect, ...]:
        """The store has answered the opening."""
        if session != self._session or self._state != "opening":
            return ()
        self._is_in_flight = False
        if isinstance(outcome, StoreTrouble):
            return (_trouble(outcome),)
        until_ns = self._first_sent_ns + self._ttl_ns - self._margin_ns
        if not outcome or now_ns >= until_ns:
            return self._open_next(now_ns)
        self._state = "open"
        self._guard = Guard(session, until_ns=until_ns)
        self._due_ns = now_ns
        return (
            Happened(kind="placement", name="SessionOpened", session=session),
            SessionBegan(session, self._guard),
            *self._renew(now_ns),
        )

    # --- renewing ---

    def _renew(self, now_ns: int) -> tuple[SessionEffect, ...]:
        """Send the next renewal, or the same again if it is not answered."""
        if not self._is_in_flight:
            self._count += 1
            self._first_sent_ns = now_ns
            self._is_in_flight = True
        self._due_ns = now_ns + self._again_ns
        return (RenewSession(self._session, self._count),)

    def renewed(
        self,
        session: SessionId,
        count: int,
        outcome: SessionView | StoreTrouble | None,
        now_ns: int,
    ) -> tuple[SessionEffect, ...]:
        """The store has answered a renewal."""
        if session != self._session or self._state not in {"open", "closing"}:
            return ()
        assert self._guard is not None
        if outcome is None:
            return self._lapse(f"{session} was closed by others", now_ns)
        if isinstance(outcome, StoreTrouble):
            return (_trouble(outcome),)
        effects: list[SessionEffect] = []
        if count == self._count and self._is_in_flight:
            self._is_in_flight = False
            self._guard.extend(self._first_sent_ns + self._ttl_ns - self._margin_ns)
            self._due_ns = self._first_sent_ns + self._every_ns
            effects.append(self._next_echo())
        return (*effects, *self.viewed(outcome, now_ns))

    def echoed(self, nonce: int, now_ns: int) -> tuple[SessionEffect, ...]:
        """The message to itself has come back: the node works."""
        if nonce != self._nonce or self._is_echoed:
            return ()
        self._is_echoed = True
        if self._state == "returning":
            return self._open_next(now_ns)
        return self.tick(now_ns)

    def _next_echo(self) -> SendEcho:
        self._is_echoed = False
        self._nonce += 1
        return SendEcho(self._nonce)

    # --- membership ---

    def viewed(
        self, outcome: SessionView | StoreTrouble, now_ns: int
    ) -> tuple[SessionEffect, ...]:
        """A reading, or why there is none."""
        if isinstance(outcome, StoreTrouble):
            return (_trouble(outcome),)
        effects, dead = self._watch.view(outcome, now_ns)
        return (*effects, *self._amend(dead))

    def _amend(self, dead: tuple[SessionId, ...]) -> tuple[SessionEffect, ...]:
        """Bring the membership to what is true of us and of closed sessions."""
        if self._state not in {"open", "closing"} or self._is_writing:
            return ()
        topology = self._watch.topology
        members = [m for m in topology.members if m.session not in dead]
        own = self._member()
        without = [m for m in members if m.session != self._session]
        if self._state == "closing":
            members = without
        elif own not in members:
            members = [*without, own]
        members.sort(key=lambda member: member.session)
        if tuple(members) == topology.members:
            return ()
        self._is_writing = True
        return (WriteMembers(tuple(members), topology.epoch),)

    def members_written(
        self, outcome: Topology | StoreTrouble, now_ns: int
    ) -> tuple[SessionEffect, ...]:
        """The store has answered a write of the members."""
        self._is_writing = False
        if isinstance(outcome, StoreTrouble):
            return (_trouble(outcome), ReadSessions())
        # Read, rather than believe: the reading also tells who is closed.
        return (ReadSessions(),)

    def hint(self, epoch: int) -> tuple[SessionEffect, ...]:
        """Somebody speaks of `epoch`; 0: of a newer one."""
        if self._state not in {"open", "closing"}:
            return ()
        if 0 < epoch <= self._watch.topology.epoch:
            return ()
        return (ReadSessions(),)

    def drain(self) -> tuple[SessionEffect, ...]:
        """Own no partitions and host nothing new from now on."""
        self._is_draining = True
        return self._amend(())

    # --- ending ---

    def stop(self, now_ns: int) -> tuple[SessionEffect, ...]:
        """End once `settle` has said that nothing of the session runs any more."""
        self._is_stopping = self._is_draining = True
        if self._state in {"idle", "opening", "returning"}:
            self._state = "ended"
            self._due_ns = None
            return (SessionEnded(self._session),)
        if self._session in self._settled:
            return self._close(now_ns)
        return self._amend(())

    def settle(self, session: SessionId, now_ns: int) -> tuple[SessionEffect, ...]:
        """Nothing of `session` runs any more: what it held may be had by others."""
        if session in self._lapsed:
            return (CloseSession(session, self._lapsed[session]),)
        if session != self._session or self._state != "open":
            return ()
        self._settled[session] = now_ns
        return self._close(now_ns) if self._is_stopping else ()

    def _close(self, now_ns: int) -> tuple[SessionEffect, ...]:
        assert self._guard is not None
        # Shut before the closing is sent: nothing may be entered under it.
        self._guard.shut()
        self._state = "closing"
        self._due_ns = now_ns + self._again_ns
        return (*self._amend(()), CloseSession(self._session, self._count))

    def closed(
        self,
        session: SessionId,
        count: int,
        outcome: bool | StoreTrouble,  # noqa: FBT001  the store's own outcome
        now_ns: int,
    ) -> tuple[SessionEffect, ...]:
        """The store has answered a closing, of our own or another's session."""
        if isinstance(outcome, StoreTrouble):
            return (_trouble(outcome),)
        if not outcome:
            return ()  # it has been renewed meanwhile
        is_own = session in self._lapsed or session == self._session
        event = Happened(
            kind="placement",
            name="SessionClosed" if is_own else "SessionExpired",
            session=session,
        )
        self._lapsed.pop(session, None)
        if session == self._session and self._state == "closing":
            self._state = "ended"
            self._due_ns = None
            return (event, SessionEnded(session))
        if self._state in {"open", "closing"}:
            return (event, ReadSessions())
        return (event,)

    def _lapse(self, why: str, now_ns: int) -> tuple[SessionEffect, ...]:
        assert self._guard is not None
        self._guard.shut()
        lapsed = self._session
        event = Happened(
            kind="placement", name="SessionLapsed", session=lapsed, reason=why
        )
        self._lapsed[lapsed] = self._count
        if self._is_stopping:
            self._state = "ended"
            self._due_ns = None
            return (event, SessionLapsed(lapsed, why), SessionEnded(lapsed))
        # The next is opened once a message to ourselves is back: who reaches the
        # store and nobody else would join, own partitions and lapse, for ever.
        self._state = "returning"
        self._due_ns = now_ns + self._again_ns
        return (event, SessionLapsed(lapsed, why), self._next_echo())

    # --- time ---

    def tick(self, now_ns: int) -> tuple[SessionEffect, ...]:
        """Renew, repeat, and close what stands still, when it is time."""
        match self._state:
            case "opening":
                if now_ns >= self._first_sent_ns + self._ttl_ns:
                    return self._open_next(now_ns)
                if self._due_ns is None or now_ns < self._due_ns:
                    return ()
                return self._send_open(now_ns)
            case "closing":
                if self._due_ns is None or now_ns < self._due_ns:
                    return ()
                self._due_ns = now_ns + self._again_ns
                return (CloseSession(self._session, self._count),)
            case "returning":
                if self._due_ns is None or now_ns < self._due_ns:
                    return ()
                self._due_ns = now_ns + self._again_ns
                return (SendEcho(self._nonce),)
            case "open":
                pass
            case _:
                return ()
        assert self._guard is not None
        if not self._guard.is_open(now_ns):
            return self._lapse("it was not renewed in time", now_ns)
        effects: list[SessionEffect] = list(
            self._watch.expired(now_ns, besides=self._session)
        )
        if self._due_ns is not None and now_ns >= self._due_ns:
            if self._is_in_flight or self._is_echoed:
                effects += self._renew(now_ns)
            else:
                # Our message to ourselves is not back: we may not be working,
                # or it was lost, once.
                self._due_ns = now_ns + self._again_ns
                effects.append(SendEcho(self._nonce))
        return tuple(effects)


def _trouble(trouble: StoreTrouble) -> Happened:
    return Happened(kind="placement", name="StoreTroubled", reason=trouble.message)
