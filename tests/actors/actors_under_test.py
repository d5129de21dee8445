"""Actors that the tests host."""

import asyncio
import threading
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pykka

from actors import Grain, Rejected, handler


@dataclass
class Balance:
    amount: Decimal = Decimal(0)
    seen: list[str] = field(default_factory=list)


class InsufficientFunds(Rejected):
    have: Decimal


class Account(Grain[Balance]):
    @handler
    async def deposit(self, amount: Decimal) -> Decimal:
        if self.context.request_id:
            if self.context.request_id in self.state.seen:
                return self.state.amount
            self.state.seen.append(self.context.request_id)
        self.state.amount += amount
        self.save()
        return self.state.amount

    @handler
    def balance(self) -> Decimal:
        return self.state.amount

    @handler
    async def transfer(self, to: str, amount: Decimal) -> None:
        if self.state.amount < amount:
            raise InsufficientFunds(have=self.state.amount)
        await self.context.proxy(Account, to).deposit(amount)
        self.state.amount -= amount
        self.save()

    @handler
    async def exchange(self, other: str, amount: Decimal) -> None:
        """Have `other` transfer to this one, which waits meanwhile: a cycle."""
        self.state.amount += Decimal(1_000)  # to be taken back with the refusal
        own = self.context.identity.name
        await self.context.proxy(Account, other).transfer(own, amount)

    @handler
    async def circle(self, path: list[str]) -> str:
        if not path:
            return "nowhere"
        return await self.context.proxy(Account, path[0]).circle(path[1:])

    @handler
    def spoil(self) -> None:
        self.state.amount = Decimal(-1)
        raise KeyError("spoiled")

    @handler
    async def foreign(self) -> None:
        await asyncio.sleep(0)

    @handler
    def blocking(self) -> Any:
        return self.context.ref("echo/other").ask(1)


class Echo(Grain):
    def on_receive(self, message: Any) -> Any:
        return message


class Scripted(Grain):
    """Does as its messages say."""

    log: list[Any]

    def on_activate(self) -> None:
        self.log = []
        if self.context.identity.name.startswith("fails"):
            raise RuntimeError("no activation today")

    async def on_receive(self, message: Any) -> Any:
        match message:
            case ["save", text]:
                self.context.save(text.encode())
                return "saved"
            case ["snapshot"]:
                found = self.context.snapshot
                return None if found is None else found.decode()
            case ["log", item]:
                self.log.append(item)
                return list(self.log)
            case ["read"]:
                return list(self.log)
            case ["after", seconds, item]:
                self.context.after(seconds, lambda: self.log.append(item))
                return None
            case ["after cancelled", seconds, item]:
                self.context.after(seconds, lambda: self.log.append(item)).cancel()
                return None
            case ["ask", identity, inner]:
                return await self.context.ref(identity).ask_async(inner)
            case ["tell", identity, inner]:
                self.context.ref(identity).tell(inner)
                return None
            case ["passivate"]:
                self.context.passivate()
                return "soon"
            case ["token"]:
                return self.context.fencing_token
            case ["raise"]:
                raise ValueError("as told")
            case ["bad answer"]:
                return {1, 2}
            case ["now"]:
                return [self.context.now(), self.context.random.random()]
            case ["request id"]:
                return self.context.request_id
        return message

    def on_passivate(self) -> bytes | None:
        if self.log:
            return repr(self.log).encode()
        return None


class Stopping(Scripted):
    pass


GATES: dict[str, threading.Event] = {}


class Blocked(Grain):
    """Its handler blocks until its gate opens: what a Grain must not do."""

    def on_receive(self, message: Any) -> Any:
        GATES[str(message)].wait(20)
        return "back"


class Worker(pykka.ThreadingActor):
    """A ThreadingActor of a user: may block, has a context."""

    context: Any

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_start(self) -> None:
        self.count += 100

    def on_receive(self, message: Any) -> Any:
        match message:
            case ["ask", identity, inner]:
                return self.context.ref(identity).ask(inner)
            case ["save", text]:
                self.context.save(text.encode())
                return self.context.ref("echo/saved").ask(text)
            case ["snapshot"]:
                found = self.context.snapshot
                return None if found is None else found.decode()
            case ["raise"]:
                raise ValueError("as told")
            case ["stop"]:
                self.stop()
                return "stopping"
            case ["wait", gate]:
                GATES[gate].wait(20)
                return "back"
        self.count += 1
        return self.count

    @handler
    def add(self, number: int) -> int:
        self.count += number
        return self.count


class FailingWorker(pykka.ThreadingActor):
    def __init__(self) -> None:
        super().__init__()
        raise RuntimeError("not made")

    def on_receive(self, message: Any) -> Any:
        return message
