"""The store actor: performs what waits as one transaction (group commit).

Sessions have an actor and a connection of their own, so that a renewal never
waits behind other effects: but for the batch under way, in a store of one writer.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, ClassVar, TypeAlias

from actors.dispatch import DispatchedActor, Dispatcher
from actors.log import log
from placement.contracts import (
    Acquire,
    Claim,
    Failed,
    GiveUp,
    Load,
    Release,
    Save,
    Store,
    StoreFailure,
)
from placement.session import (
    CloseSession,
    OpenSession,
    ReadSessions,
    RenewSession,
    StoreTrouble,
    WriteMembers,
)
from placement.value import record, value

#: How long the requests of a failed batch are tried one by one.
_ALONE_NS = 500_000_000

EntryRequest: TypeAlias = Acquire | Release | Load | Claim | Save | GiveUp
SessionRequest: TypeAlias = (
    OpenSession | RenewSession | ReadSessions | CloseSession | WriteMembers
)


@value
class Perform:
    """Perform `request`; `reply(request, outcome)` runs as a turn of `to`."""

    request: EntryRequest | SessionRequest
    reply: Callable[[Any, Any], None]
    to: Dispatcher


class Turnstile:
    """One at a time at a store that has one writer; the urgent before the patient.

    Without it a renewal could wait for the database's lock behind one group
    commit after the other: a lock that is asked for by polling is not fair.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._urgent_count = 0
        self._is_taken = False

        #: Passes as soon as whoever is inside has left.
        self.urgent = _Pass(self.enter_urgent, self.leave)
        #: Passes when nobody is inside, and nobody urgent waits.
        self.patient = _Pass(self.enter_patient, self.leave)

    def enter_urgent(self) -> None:
        """Wait until whoever is inside has left."""
        with self._changed:
            self._urgent_count += 1
            while self._is_taken:
                self._changed.wait()
            self._urgent_count -= 1
            self._is_taken = True

    def enter_patient(self) -> None:
        """Wait until nobody is inside, and nobody urgent waits."""
        with self._changed:
            while self._is_taken or self._urgent_count:
                self._changed.wait()
            self._is_taken = True

    def leave(self) -> None:
        """Let the next one in."""
        with self._changed:
            self._is_taken = False
            self._changed.notify_all()


class _Pass:
    """A way through a turnstile, for a `with` statement; used again and again."""

    __slots__ = ("_enter", "_leave")

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self._enter = enter
        self._leave = leave

    def __enter__(self) -> None:
        self._enter()

    def __exit__(self, *_: object) -> None:
        self._leave()


def _grouped(urgent: list[Perform]) -> list[tuple[SessionRequest, list[Perform]]]:
    """Each request once, whoever asked and however often; renewals first.

    Without this a store that answers slowly would be asked the same faster than
    it answers, and a renewal would wait behind all that.
    """
    groups: dict[Any, list[Perform]] = {}
    for perform in urgent:
        groups.setdefault(perform.request, []).append(perform)
    return sorted(
        groups.items(), key=lambda each: not isinstance(each[0], RenewSession)
    )


@record
class _Step:
    """One request to the store, and whom its outcome is for."""

    request: Any
    asked: list[Perform] = field(default_factory=list)
    outcome: Any = None


class StoreActor(DispatchedActor):
    """Drains the requests that wait, up to a bound, into one transaction."""

    batch_max: ClassVar[int] = 1_000

    def __init__(
        self,
        store: Store,
        *,
        dispatcher: Dispatcher,
        turnstile: Turnstile | None = None,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        super().__init__(dispatcher=dispatcher, on_bug=on_bug)
        self._store = store
        self._turnstile = turnstile or Turnstile()
        self.batch_count = 0
        self.request_count = 0
        self.failure_count = 0
        self._methods: dict[type, Callable[[Sequence[Any]], Sequence[Any]]] = {
            # In this order within a round: what frees before what takes.
            Release: store.release,
            GiveUp: store.give_up,
            Save: store.save,
            Load: store.load,
            Acquire: store.try_acquire,
            Claim: store.claim,
        }

    def on_stop(self) -> None:
        """Close the connection."""
        self._store.close()

    def _handle_batch(self, batch: list[Any]) -> None:
        entries: list[Perform] = []
        urgent: list[Perform] = []
        others: list[Any] = []
        for envelope in batch:
            message = envelope.message
            if not isinstance(message, Perform):
                others.append(envelope)
            elif type(message.request) in self._methods:
                entries.append(message)
            else:
                urgent.append(message)
        for request, asked in _grouped(urgent):
            with self._turnstile.urgent:
                outcome = self._perform_session(request)
            self.request_count += len(asked)
            # At once: a renewal's answer waits for nothing else, at either end.
            for perform in asked:
                perform.to.post_urgent(_reply, [(perform, outcome)])
        if entries:
            steps = _steps(entries)
            with self._turnstile.patient:
                self._perform_all(steps)
            self._answer(steps)
        self.batch_count += 1
        super()._handle_batch(others)

    def _answer(self, steps: list["_Step"]) -> None:
        """Tell all that asked, in one turn of each dispatcher."""
        replies: dict[Dispatcher, list[tuple[Perform, Any]]] = {}
        for step in steps:
            outcome = step.outcome
            self.request_count += len(step.asked)
            for perform in step.asked:
                answered = replies.get(perform.to)
                if answered is None:
                    answered = replies[perform.to] = []
                answered.append((perform, outcome))
        for dispatcher, answered in replies.items():
            dispatcher.post(_reply, answered)

    def _perform_session(self, request: Any) -> Any:
        store = self._store
        try:
            match request:
                case OpenSession(record):
                    return store.open_session(record)
                case RenewSession(session, count):
                    return store.renew_session(session, count)
                case ReadSessions():
                    return store.read_sessions()
                case CloseSession(session, count):
                    return store.close_session(session, count)
                case WriteMembers(members, expected_epoch):
                    return store.write_members(members, expected_epoch)
        except StoreFailure as error:
            self.failure_count += 1
            return StoreTrouble(str(error))
        except Exception as error:  # a store may be a user's own
            self.failure_count += 1
            log.exception("the store raised what is no StoreFailure")
            return StoreTrouble(_said(error))
        raise TypeError(f"no request to a store: {request!r}")

    def _perform_all(self, flat: list["_Step"]) -> None:
        try:
            self._perform_once(flat)
        except StoreFailure as error:
            self.failure_count += 1
            if error.may_have_happened or len(flat) == 1:
                outcome = Failed(str(error), error.may_have_happened)
                for step in flat:
                    step.outcome = outcome
                return
            # One of them may be the cause: let it fail alone. Where each takes long
            # to fail, it is the store: a thousand time-outs would hold up the rest.
            until_ns = self.dispatcher.now_ns() + _ALONE_NS
            for step in flat:
                if self.dispatcher.now_ns() < until_ns:
                    self._perform_all([step])
                else:
                    step.outcome = Failed(str(error), may_have_happened=False)
        except Exception as error:  # a store may be a user's own
            self.failure_count += 1
            log.exception("the store raised what is no StoreFailure")
            for step in flat:
                step.outcome = Failed(_said(error), may_have_happened=True)

    def _perform_once(self, steps: list["_Step"]) -> None:
        """One transaction: in rounds, so that each identity's order is kept."""
        if len(steps) == 1:
            (step,) = steps
            with self._store.transaction():
                (step.outcome,) = self._methods[type(step.request)]([step.request])
            return
        rounds: list[dict[type, list[_Step]]] = []
        seen: dict[str, int] = {}
        for step in steps:
            identity = step.request.identity
            number = seen.get(identity, 0)
            seen[identity] = number + 1
            if number == len(rounds):
                rounds.append({})
            same = rounds[number].get(type(step.request))
            if same is None:
                rounds[number][type(step.request)] = [step]
            else:
                same.append(step)
        with self._store.transaction():
            for each in rounds:
                for kind, method in self._methods.items():
                    same = each.get(kind)
                    if same:
                        outcomes = method([step.request for step in same])
                        for step, outcome in zip(same, outcomes, strict=True):
                            step.outcome = outcome


def _steps(entries: list[Perform]) -> list[_Step]:
    """One step a request; of saves that follow each other only the last is made."""
    steps: list[_Step] = []
    last: dict[str, _Step] = {}
    for perform in entries:
        request: Any = perform.request
        if type(request) is not Save:
            last.pop(request.identity, None)
            steps.append(_Step(request, [perform]))
            continue
        before = last.get(request.identity)
        if (
            before is not None
            and before.request.fencing_token == request.fencing_token
            and before.request.version < request.version
        ):
            before.request = request
            before.asked.append(perform)
            continue
        step = _Step(request, [perform])
        last[request.identity] = step
        steps.append(step)
    return steps


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _reply(answered: list[tuple[Perform, Any]]) -> None:
    """Tell each its outcome; one that raises keeps no other from hearing its own."""
    first: Exception | None = None
    for perform, outcome in answered:
        try:
            perform.reply(perform.request, outcome)
        except Exception as error:  # a bug: raised when all have heard
            log.exception("a reply raised", request=type(perform.request).__name__)
            first = first or error
    if first is not None:
        raise first
