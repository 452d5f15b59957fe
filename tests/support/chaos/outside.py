"""The other side of `http` steps and webhooks: answers as planned, and notes all that came."""

import asyncio
from dataclasses import dataclass

import orjson

from tests.support.chaos.ledger import Call, Hook, Ledger
from tests.support.chaos.oracle import answer
from tests.support.receiver import Got


@dataclass
class Outside:
    """What a `receiver` answers with."""

    ledger: Ledger

    async def receive(self, got: Got, writer: asyncio.StreamWriter) -> None:
        """Answer as the other side of `http` steps and webhooks, and note what came."""
        if got.path == "/effects":
            status, body = await self._take_call(got)
        else:
            status, body = self._take_hook(got), b""
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def _take_call(self, got: Got) -> tuple[int, bytes]:
        key, wish = got.headers["idempotency-key"], orjson.loads(got.body)
        now_s = asyncio.get_running_loop().time()
        self.ledger.calls.append(Call(key, got.body, now_s))
        self.ledger.write("call", key=key, n=wish["n"])
        await asyncio.sleep(wish["ms"] / 1000)
        if int(key.rpartition("/")[2]) <= wish["fail"]:
            return wish["status"], b"{}"
        return 200, orjson.dumps({"n": answer(wish["n"])})

    def _take_hook(self, got: Got) -> int:
        event = orjson.loads(got.body)
        message_id = got.headers["webhook-id"]
        is_first = all(one.message_id != message_id for one in self.ledger.hooks)
        execution_id = event["data"]["executionId"]
        self.ledger.hooks.append(Hook(message_id, execution_id, event["type"]))
        self.ledger.write("hook", id=message_id, execution=execution_id)
        return 500 if is_first and message_id.encode()[-1] % 8 == 0 else 204
