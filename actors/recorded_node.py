"""Nodes of a simulation that write down what their user code and messages do.

What is written is what `actors.trace` defines, for the observer to judge: each
entry into the user's own code, each message with its end. A message bears the
name `node's address/number`, which it keeps wherever it is sent on to.
"""

from typing import Any

from actors.activation import Activation, GrainActivation, Mail
from actors.context import Timer
from actors.future import Future
from actors.node import PlacementNode
from actors.outbox import Outbox
from actors.outcome import outcome_of
from actors.trace import Asked, Ended, Entered, Record, Told
from actors.world import ProcessClock, World
from placement.entry import ActivationRecord, Pid
from placement.identity import Identity
from placement.lease import Guard


class Notes:
    """Where the parts of one process write down what they do."""

    def __init__(
        self,
        world: World,
        process: ProcessClock,
        records: list[Record],
    ) -> None:
        self.real_clock = world.real_clock
        self._world = world
        self._process = process
        self._records = records

    @property
    def now_ns(self) -> int:
        """The true time."""
        return self._world.moment_ns()

    def note(self, record: Record) -> None:
        """Keep `record`; of a process that has ended nothing is kept."""
        if not self._process.is_gone:
            self._records.append(record)


class RecordedActivation(GrainActivation):
    """A Grain each entry into whose code is written down, and watched."""

    notes: Notes
    _purpose = ""
    _mail: Mail | None = None

    def _enter(self, now_ns: int) -> bool:
        if not super()._enter(now_ns):
            return False
        purpose, mail = self._purpose, self._mail
        # Until it is set again, it is the coroutine of this turn that is entered.
        self._purpose = "resume"
        pid = self.pid
        self.notes.note(
            Entered(
                self.notes.now_ns,
                str(pid.address),
                str(pid.identity),
                str(pid.session),
                pid.fencing_token,
                purpose,
                "" if mail is None else _name_of(mail, pid),
                0 if mail is None or mail.is_ask else _number_of(mail),
            )
        )
        self.notes.real_clock.is_inside = True
        return True

    def _leave(self) -> None:
        self.notes.real_clock.is_inside = False
        super()._leave()

    def _start(self) -> None:
        self._purpose, self._mail = "activate", None
        super()._start()

    def _handle(self, mail: Mail) -> None:
        self._purpose, self._mail = "handle", mail
        super()._handle(mail)

    def _fire(self, timer: Timer) -> None:
        self._purpose, self._mail = "timer", None
        super()._fire(timer)

    def _passivate(self) -> None:
        if self._turn is None:
            self._purpose, self._mail = "passivate", None
        super()._passivate()


def _number_of(mail: Mail) -> int:
    if isinstance(mail.origin, Outbox):
        return mail.number
    # It came in a frame, and would go back as this one.
    return int(mail.carried.message_id or mail.carried.told)


def _name_of(mail: Mail, pid: Pid) -> str:
    """The name of the message, wherever it came from."""
    origin: Any = mail.origin
    sender = pid.address if isinstance(origin, Outbox) else origin.address
    return f"{sender}/{_number_of(mail)}"


class RecordedOutbox(Outbox):
    """Writes down each message, and how each ask ends."""

    notes: Notes

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
        """Send `payload`, and write it down."""
        now_ns = self.notes.now_ns
        number = super().send(
            identity,
            payload,
            future=future,
            timeout=timeout,
            request_id=request_id,
            chain=chain,
        )
        if future is None:
            self._note_told(identity, number)
            return number
        name = self._name(number)
        seconds = self.ask_timeout if timeout is None else timeout
        self.notes.note(
            Asked(
                now_ns,
                str(self._own),
                name,
                str(identity),
                "ask",
                now_ns + round(seconds * 1e9),
            )
        )
        future.on_done(lambda done: self._note_end(name, done))
        return number

    def tell(self, identity: Identity, payload: Any, request_id: str) -> int:
        """Send `payload` without an answer, and write it down."""
        number = super().tell(identity, payload, request_id)
        self._note_told(identity, number)
        return number

    def _name(self, number: int) -> str:
        return f"{self._own}/{number}"

    def _note_told(self, identity: Identity, number: int) -> None:
        self.notes.note(
            Told(
                self.notes.now_ns,
                str(self._own),
                self._name(number),
                str(identity),
                number,
            )
        )

    def _note_end(self, name: str, future: Future) -> None:
        value, outcome, reason = None, "answered", ""
        try:
            value = future.get(timeout=0)
        except Exception as error:  # whatever it ended with
            outcome, reason = outcome_of(error)
        self.notes.note(Ended(self.notes.now_ns, name, outcome, value, reason))


class RecordedNode(PlacementNode):
    """A node all of whose messages and entries into user code are written down."""

    activation_type = RecordedActivation
    outbox_type = RecordedOutbox

    def __init__(self, name: str, **parts: Any) -> None:
        super().__init__(name, **parts)
        process: Any = self._engine
        shared = process.shared
        self.notes = Notes(shared.world, process.clock, shared.records)
        assert isinstance(self._outbox, RecordedOutbox)
        self._outbox.notes = self.notes

    def make(
        self,
        pid: Pid,
        record: ActivationRecord,
        guard: Guard,
        chain: tuple[str, ...],
    ) -> Activation:
        """An activation of `pid` that writes down its entries."""
        made = super().make(pid, record, guard, chain)
        assert isinstance(made, RecordedActivation)
        made.notes = self.notes
        return made
