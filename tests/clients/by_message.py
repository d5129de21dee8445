"""A client by message: messages/CLIENTS.md, where no name needs an escape."""

import asyncio
import json
import secrets
import sys
from typing import Any

import msgpack
import nats

TRY_MS, AGAIN = 2_000, ("NotReady", "Pending", "LockDenied")


def frames_in(data: bytes) -> list[bytes]:
    frames, at = [], 1
    while data[:1] == b"\xc1" and at < len(data):
        begin, at = at + 4, at + 4 + int.from_bytes(data[at : at + 4], "big")
        frames.append(data[begin:at])
    return frames or [data]


class Client:
    def __init__(self, nc: Any, name: str) -> None:
        self.nc, self.address = nc, f"{name}.{secrets.token_hex(8)}"
        self.numbers, self.waiting = iter(range(1, 1 << 63)), dict[int, Any]()

    async def arrived(self, message: Any) -> None:
        for frame in frames_in(message.data):
            body = msgpack.unpackb(frame, strict_map_key=False)[5]
            found = self.waiting.pop(body[3 if body[0] == 15 else 1], None)
            if found is not None and not found.done():
                found.set_result(body)

    async def say(self, at: str, *body: Any) -> Any:
        number, to = next(self.numbers), at.partition("#")[0]
        way = "find" if to == "*" else f"client.{to}"
        said = [number if each is ... else each for each in body]
        self.waiting[number] = answer = asyncio.get_running_loop().create_future()
        await self.nc.publish(
            f"placement.default.{way}.{self.address}",
            msgpack.packb([1, "default", self.address, to, number, said]),
        )
        await asyncio.wait([answer], timeout=TRY_MS / 1_000)
        return answer.result() if answer.done() else [0, *body]

    async def ask(self, identity: str, payload: Any, body: Any = None) -> Any:
        while True:
            match body:  # 22 Found, 3 Redirect, 2 Resolved, 13 Answer, 14 Failure
                case [22, _, epoch, [at, *_], *_] | [3, _, _, epoch, at, *_]:
                    body = await self.say(at, 1, ..., identity, epoch, TRY_MS)
                case [2, _, _, at, token, *_]:
                    deliver = [12, identity, token, ..., payload, "", TRY_MS, []]
                    body = await self.say(at, *deliver)
                case [13, _, answer, *_]:
                    return {"answer": answer}
                case [0, 12, *_]:  # it may have been handled
                    return {"error": "OutcomeUnknown"}
                case [4, _, _, str(why), text, *_] if why not in AGAIN:
                    return {"error": why, "message": text}
                case [14, _, str(why), text, *_]:
                    return {"error": why, "message": text}
                case _:  # not yet, not now, not there any more, not answered
                    await asyncio.sleep(0.05)
                    body = await self.say("*", 21, ...)


async def main(url: str, name: str) -> None:
    nc = await nats.connect(url)
    client = Client(nc, name)
    subject = f"placement.default.node.{client.address}.>"
    await nc.subscribe(subject, cb=client.arrived)
    for line in sys.stdin:
        found = await asyncio.wait_for(client.ask(*json.loads(line)), 30)
        sys.stdout.write(json.dumps(found) + "\n")
    await nc.close()


asyncio.run(main(*sys.argv[1:]))
