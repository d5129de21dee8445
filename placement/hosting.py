"""Hosting: what one node runs, from the claim of an identity to its giving up.

For one identity a host claims, starts, ends or gives up, never two of them at
once; who asks meanwhile hears `pending`. An activation is bound to the session
under which its entry was written, and ends with that session.
"""

from typing import TypeAlias

from placement.contracts import (
    Claim,
    Claimed,
    ClaimRefused,
    Failed,
    GivenUp,
    GiveUp,
    Stale,
)
from placement.entry import Acquisition, ActivationEntry, ActivationRecord, Pid
from placement.errors import Refusal
from placement.event import Happened
from placement.identity import Identity
from placement.retry import RetryPolicy
from placement.topology import Address, SessionId, address_of
from placement.value import record, value

#: So many failures of a claim are nobody's business: an answer can get lost.
_SILENT_TRIES = 2
_AGAIN = RetryPolicy(first_ns=50_000_000, largest_ns=1_000_000_000)


# --- effects -----------------------------------------------------------------


@value
class ClaimEntry:
    """Write the claim; the outcome comes back by `claimed`."""

    request: Claim


@value
class GiveUpEntry:
    """Clear the owner; the outcome comes back by `given_up`."""

    request: GiveUp


@value
class StartActivation:
    """Start what the store has confirmed; `started` or `start_failed` follows.

    `chain` are the identities that wait for it.
    """

    pid: Pid
    record: ActivationRecord
    chain: tuple[str, ...] = ()


@value
class StopActivation:
    """End it; `ended` follows when its last user code has been left."""

    pid: Pid
    lapsed: bool


@value
class TellClaimed:
    """Tell the coordinator that the store has confirmed a claim that took the lock."""

    to: Address
    identity: Identity
    procedure: int


@value
class TellStarted:
    """Tell the coordinator that the procedure is done."""

    to: Address
    pid: Pid
    procedure: int


@value
class TellStartRefused:
    """Tell the coordinator why nothing was started."""

    to: Address
    identity: Identity
    procedure: int
    host: SessionId
    refusal: Refusal


@value
class TellOwnerState:
    """Answer a coordinator's question about an entry of `session`."""

    to: Address
    identity: Identity
    session: SessionId
    procedure: int
    state: str
    fencing_token: int


@value
class SessionSettled:
    """Nothing of that session runs or is under way any more: it may be closed."""

    session: SessionId


HostingEffect: TypeAlias = (
    ClaimEntry
    | GiveUpEntry
    | StartActivation
    | StopActivation
    | TellClaimed
    | TellStarted
    | TellStartRefused
    | TellOwnerState
    | SessionSettled
    | Happened
)


@record
class _Hosted:
    """One identity on this node.

    `state` is claiming, starting, active, ending or giving up; a lapsed one is
    ending or gone. `request` is what the store was asked last, none once it is
    active; `asked_by` is who has no answer yet. `why_failed` is why its claim has
    failed until now, or why it is given up again.
    """

    identity: Identity
    session: SessionId
    state: str
    request: Claim | GiveUp | None = None
    pid: Pid | None = None
    asked_by: tuple[Address, int] | None = None
    chain: tuple[str, ...] = ()
    ends_lapsed: bool = False
    why_failed: Refusal | None = None
    tried: int = 0


class Hosting:
    """The identities of one node, each in one state at a time.

    Not thread-safe; one actor owns it. Methods return the effects to perform,
    in order.
    """

    def __init__(self, *, kinds: frozenset[str]) -> None:
        self._kinds = kinds
        self._session: SessionId | None = None
        self._why_not = "the node has not started"
        self._is_draining = False
        self._last_attempt = 0
        self._hosted: dict[Identity, _Hosted] = {}
        #: When the request of which is repeated.
        self._again: dict[Identity, int] = {}
        self._leaving: dict[SessionId, None] = {}
        #: How many it hosts under each: looking at all of them whenever one ends
        #: would be work for each with each.
        self._counts: dict[SessionId, int] = {}

    def __len__(self) -> int:
        return len(self._hosted)

    @property
    def session(self) -> SessionId | None:
        """The session under which it claims; none while it is not eligible."""
        return self._session

    @property
    def due_ns(self) -> int | None:
        """When `tick` is wanted next."""
        return min(self._again.values(), default=None)

    def state_of(self, identity: Identity) -> str | None:
        """What is going on with `identity` here."""
        hosted = self._hosted.get(identity)
        return None if hosted is None else hosted.state

    def serving(self, identity: Identity) -> Pid | None:
        """The activation that serves here under the session of now."""
        hosted = self._hosted.get(identity)
        if hosted is None or hosted.state != "active":
            return None
        return hosted.pid

    def states(self) -> tuple[tuple[Identity, str, Pid | None], ...]:
        """All of them, sorted by identity."""
        return tuple(
            (identity, hosted.state, hosted.pid)
            for identity, hosted in sorted(self._hosted.items())
        )

    # --- inputs: the session ---

    def begin(self, session: SessionId) -> tuple[HostingEffect, ...]:
        """Host under `session` from now on."""
        self._session = session
        return ()

    def lapse(self, session: SessionId, why: str) -> tuple[HostingEffect, ...]:
        """`session` is over: end all that is bound to it, without its hooks."""
        if self._session == session:
            self._session, self._why_not = None, why
        effects: list[HostingEffect] = []
        for _, hosted in sorted(self._hosted.items()):
            if hosted.session != session:
                continue
            match hosted.state:
                case "starting" | "active" | "ending":
                    if not hosted.ends_lapsed:
                        hosted.ends_lapsed = True
                        hosted.state = "ending"
                        assert hosted.pid is not None
                        effects.append(StopActivation(hosted.pid, lapsed=True))
                case "claiming":
                    effects += self._refuse_start(
                        hosted, Refusal("NotReady", f"{session} has lapsed")
                    )
                    effects += self._remove(hosted)
                case _:
                    # Whoever closes the session frees the entry.
                    effects += self._remove(hosted)
        return (*effects, *self._leave(session))

    def drain(self, why: str) -> tuple[HostingEffect, ...]:
        """Start nothing new, and end all that runs, each with its hook."""
        self._is_draining, self._why_not = True, why
        session = self._session
        effects: list[HostingEffect] = []
        for identity in sorted(self._hosted):
            effects += self.passivate(identity)
        if session is not None:
            effects += self._leave(session)
        return tuple(effects)

    def _leave(self, session: SessionId) -> tuple[HostingEffect, ...]:
        self._leaving[session] = None
        return self._settled(session)

    def _settled(self, session: SessionId) -> tuple[HostingEffect, ...]:
        if session not in self._leaving or session in self._counts:
            return ()
        del self._leaving[session]
        return (SessionSettled(session),)

    # --- inputs: starting ---

    def start(
        self,
        identity: Identity,
        *,
        acquisition: Acquisition,
        host: SessionId,
        expected_revision: int,
        chain: tuple[str, ...] = (),
        takes_lock: bool = False,
    ) -> tuple[HostingEffect, ...]:
        """A coordinator wants it started here: claim it, or say why not.

        Where the claim `takes_lock`, nobody has looked at the entry before.
        """
        to = address_of(acquisition.session)
        procedure = acquisition.procedure
        refusal = self._refusal(identity, host)
        hosted = self._hosted.get(identity)
        if hosted is not None and refusal is None:
            if hosted.state == "active":
                assert hosted.pid is not None
                return (TellStarted(to, hosted.pid, procedure),)
            if hosted.asked_by == (to, procedure):
                return ()  # a repeated one: the first will be answered
            said = f"{identity} is {hosted.state} here"
            if hosted.state == "claiming" and hosted.why_failed is not None:
                said += f", and the store fails: {hosted.why_failed.message}"
            refusal = Refusal("Pending", said)
        if refusal is not None:
            return (TellStartRefused(to, identity, procedure, host, refusal),)
        self._last_attempt += 1
        claim = Claim(
            identity,
            host,
            self._last_attempt,
            None if takes_lock else acquisition,
            expected_revision,
        )
        self._add(
            _Hosted(
                identity,
                host,
                "claiming",
                request=claim,
                asked_by=(to, procedure),
                chain=chain,
            )
        )
        return (ClaimEntry(claim),)

    def _refusal(self, identity: Identity, host: SessionId) -> Refusal | None:
        if self._session is None:
            return Refusal("NotReady", self._why_not)
        if host != self._session:
            return Refusal("NotReady", f"{host} is not the session of this node now")
        if self._is_draining:
            return Refusal("NoAuthority", self._why_not)
        if identity.kind not in self._kinds:
            return Refusal("NoAuthority", f"kind {identity.kind!r} is not known here")
        return None

    def claimed(
        self,
        request: Claim,
        outcome: Claimed | ClaimRefused | Failed,
        *,
        now_ns: int,
    ) -> tuple[HostingEffect, ...]:
        """The store has answered a claim."""
        hosted = self._hosted.get(request.identity)
        if (
            hosted is None
            or hosted.state != "claiming"
            or (hosted.request is not request and hosted.request != request)
        ):
            # The session of that claim is over; its closing frees the entry.
            return ()
        match outcome:
            case Claimed(entry):
                self._again.pop(hosted.identity, None)
                hosted.why_failed = None
                pid = entry.record.pid
                assert pid is not None
                hosted.pid = pid
                if self._is_draining:
                    hosted.why_failed = Refusal("NoAuthority", self._why_not)
                    return self._give_up(hosted)
                hosted.state = "starting"
                claimed = Happened(
                    kind="placement",
                    name="Claimed",
                    identity=pid.identity,
                    session=pid.session,
                    token=pid.fencing_token,
                )
                start = StartActivation(pid, entry.record, hosted.chain)
                if request.acquisition is not None or hosted.asked_by is None:
                    return (claimed, start)
                to, procedure = hosted.asked_by
                return (claimed, start, TellClaimed(to, pid.identity, procedure))
            case Failed(_, may_have_happened) if may_have_happened or hosted.tried:
                # The same attempt again: the store confirms it or makes it, and
                # either way says so. Nothing else is safe to conclude.
                self._try_again(hosted, now_ns)
                return self._tell_trouble(hosted, outcome.message)
            case Failed(message):
                return (
                    *self._refuse_start(hosted, Refusal("StoreFailed", message)),
                    *self._remove(hosted),
                )
            case ClaimRefused(entry) if self._is_first_look(request, entry):
                # Somebody hosted it before, and has given it up: claim over that.
                self._last_attempt += 1
                hosted.tried = 0
                again = Claim(
                    request.identity,
                    request.session,
                    self._last_attempt,
                    None,
                    entry.revision,
                )
                hosted.request = again
                return (ClaimEntry(again),)
            case ClaimRefused(_, message):
                return (
                    *self._refuse_start(hosted, Refusal("LockDenied", message)),
                    *self._remove(hosted),
                )

    def _tell_trouble(self, hosted: _Hosted, message: str) -> tuple[HostingEffect, ...]:
        """Have nobody wait for a claim that fails again and again; it goes on.

        One that a coordinator has taken the lock for is waited for by its deadline.
        """
        assert isinstance(hosted.request, Claim)
        hosted.why_failed = Refusal("StoreFailed", message)
        if hosted.tried < _SILENT_TRIES or hosted.request.acquisition is not None:
            return ()
        told = self._refuse_start(hosted, hosted.why_failed)
        hosted.asked_by = None
        return told

    def _is_first_look(self, request: Claim, entry: ActivationEntry) -> bool:
        """Tell whether a claim that took the lock did not know of the entry."""
        return (
            request.acquisition is None
            and request.expected_revision == 0
            and entry.revision > 0
            and entry.owner is None
        )

    def started(self, pid: Pid) -> tuple[HostingEffect, ...]:
        """The activation serves."""
        hosted = self._of(pid)
        if hosted is None or hosted.state != "starting":
            return ()
        hosted.state, hosted.request = "active", None
        effects: list[HostingEffect] = [
            Happened(
                kind="actor",
                name="Activated",
                identity=pid.identity,
                session=pid.session,
                token=pid.fencing_token,
            )
        ]
        if hosted.asked_by is not None:
            to, procedure = hosted.asked_by
            effects.append(TellStarted(to, pid, procedure))
            hosted.asked_by = None
        if self._is_draining:
            effects += self.passivate(pid.identity)
        return tuple(effects)

    def start_failed(self, pid: Pid, refusal: Refusal) -> tuple[HostingEffect, ...]:
        """The activation did not start; give the entry up, then say why."""
        hosted = self._of(pid)
        if hosted is None:
            return ()
        event = Happened(
            kind="actor",
            name="ActivationFailed",
            identity=pid.identity,
            session=pid.session,
            token=pid.fencing_token,
            reason=refusal.message,
        )
        if hosted.ends_lapsed:
            return (
                event,
                *self._refuse_start(hosted, refusal),
                *self._remove(hosted),
            )
        hosted.why_failed = refusal
        return (event, *self._give_up(hosted))

    # --- inputs: ending ---

    def passivate(
        self, identity: Identity, *, fencing_token: int | None = None
    ) -> tuple[HostingEffect, ...]:
        """End the activation, with its hook; one that is not active is left alone."""
        hosted = self._hosted.get(identity)
        if hosted is None or hosted.state != "active":
            return ()
        assert hosted.pid is not None
        if fencing_token is not None and fencing_token != hosted.pid.fencing_token:
            return ()
        hosted.state = "ending"
        return (StopActivation(hosted.pid, lapsed=False),)

    def ended(
        self, pid: Pid, *, version: int, snapshot: bytes | None
    ) -> tuple[HostingEffect, ...]:
        """Its last user code has been left; `snapshot` is to be kept as `version`."""
        hosted = self._of(pid)
        if hosted is None:
            return ()
        event = Happened(
            kind="actor",
            name="Lapsed" if hosted.ends_lapsed else "Passivated",
            identity=pid.identity,
            session=pid.session,
            token=pid.fencing_token,
        )
        if hosted.ends_lapsed:
            return (event, *self._remove(hosted))
        return (event, *self._give_up(hosted, version=version, snapshot=snapshot))

    def given_up(
        self, request: GiveUp, outcome: GivenUp | Stale | Failed, *, now_ns: int
    ) -> tuple[HostingEffect, ...]:
        """The store has answered a giving up."""
        hosted = self._hosted.get(request.identity)
        if hosted is None or hosted.request != request:
            return ()
        if isinstance(outcome, Failed):
            if request.snapshot is not None and not outcome.may_have_happened:
                # The last snapshot cannot be kept: say so, and free the entry.
                bare = GiveUp(request.identity, request.fencing_token)
                hosted.request = bare
                return (
                    self._lost(hosted, outcome.message),
                    GiveUpEntry(bare),
                )
            self._try_again(hosted, now_ns)
            return ()
        effects: list[HostingEffect] = []
        if isinstance(outcome, Stale) and request.snapshot is not None:
            effects.append(self._lost(hosted, "a greater token has been claimed"))
        if hosted.why_failed is not None:
            effects += self._refuse_start(hosted, hosted.why_failed)
        return (*effects, *self._remove(hosted))

    def _lost(self, hosted: _Hosted, message: str) -> Happened:
        return Happened(
            kind="actor",
            name="SnapshotLost",
            identity=hosted.identity,
            session=hosted.session,
            reason=message,
        )

    # --- inputs: questions ---

    def asked(
        self,
        to: Address,
        identity: Identity,
        *,
        session: SessionId,
        fencing_token: int,
        procedure: int,
        own: frozenset[SessionId],
    ) -> tuple[HostingEffect, ...]:
        """A coordinator asks `session` for what the store says it owns.

        `own` are the open sessions of this very incarnation.
        """

        def state(text: str, token: int = 0) -> TellOwnerState:
            return TellOwnerState(to, identity, session, procedure, text, token)

        hosted = self._hosted.get(identity)
        if session not in own:
            return (state("not_mine"),)
        if hosted is None:
            # Left behind: nothing of it runs here, so free it.
            hosted = _Hosted(
                identity,
                session,
                "giving up",
                pid=Pid(identity, session, fencing_token),
            )
            self._add(hosted)
            return (state("pending"), *self._give_up(hosted))
        if hosted.state == "active" and hosted.session == session:
            assert hosted.pid is not None
            return (state("here", hosted.pid.fencing_token),)
        return (state("pending"),)

    def tick(self, *, now_ns: int) -> tuple[HostingEffect, ...]:
        """Repeat the writes whose outcome is not known."""
        effects: list[HostingEffect] = []
        for identity, due_ns in sorted(self._again.items()):
            if due_ns > now_ns:
                continue
            del self._again[identity]
            match self._hosted[identity].request:
                case Claim() as claim:
                    effects.append(ClaimEntry(claim))
                case GiveUp() as give_up:
                    effects.append(GiveUpEntry(give_up))
        return tuple(effects)

    # --- steps ---

    def _of(self, pid: Pid) -> _Hosted | None:
        hosted = self._hosted.get(pid.identity)
        if hosted is None or (hosted.pid is not pid and hosted.pid != pid):
            return None
        return hosted

    def _try_again(self, hosted: _Hosted, now_ns: int) -> None:
        hosted.tried += 1
        self._again[hosted.identity] = now_ns + _AGAIN.pause_ns(hosted.tried)

    def _give_up(
        self, hosted: _Hosted, *, version: int = 0, snapshot: bytes | None = None
    ) -> tuple[HostingEffect, ...]:
        assert hosted.pid is not None
        hosted.state = "giving up"
        give_up = GiveUp(hosted.identity, hosted.pid.fencing_token, version, snapshot)
        hosted.request = give_up
        return (GiveUpEntry(give_up),)

    def _refuse_start(
        self, hosted: _Hosted, refusal: Refusal
    ) -> tuple[HostingEffect, ...]:
        if hosted.asked_by is None:
            return ()
        to, procedure = hosted.asked_by
        return (
            TellStartRefused(to, hosted.identity, procedure, hosted.session, refusal),
        )

    def _add(self, hosted: _Hosted) -> None:
        self._hosted[hosted.identity] = hosted
        self._counts[hosted.session] = self._counts.get(hosted.session, 0) + 1

    def _remove(self, hosted: _Hosted) -> tuple[HostingEffect, ...]:
        del self._hosted[hosted.identity]
        self._again.pop(hosted.identity, None)
        left = self._counts[hosted.session] - 1
        if left:
            self._counts[hosted.session] = left
            return ()
        del self._counts[hosted.session]
        return self._settled(hosted.session)
