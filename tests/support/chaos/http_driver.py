"""Clients of a whole service over HTTP, where an answer may be lost on the way."""

from collections.abc import AsyncIterator
from typing import Any

import httpx

from serve_app.core.errors import (
    AlreadyTerminalError,
    StoreUnavailableError,
    UnknownExecutionError,
)
from tests.support.chaos.driver import Driver
from tests.support.chaos.generator import Planned
from tests.support.chaos.ledger import Ledger
from tests.support.chaos.oracle import Ask, Oracle
from tests.support.checker import TERMINAL_KINDS, Entry
from tests.support.sse import events_of

ENDED = ("completed", "failed", "cancelled")


class HttpDriver(Driver):
    """All clients of one run."""

    def __init__(
        self, http: httpx.AsyncClient, ledger: Ledger, oracle: Oracle, partition_count: int
    ) -> None:
        super().__init__(ledger, oracle, 1, partition_count)
        self._http = http

    async def start(self, plan: Planned) -> str:
        body = {"workflowId": plan.workflow_id, "input": plan.input, "priority": plan.priority}
        headers = {"Idempotency-Key": plan.key}
        return str((await self._ask("POST", "/v1/execute/async", body, headers))["id"])

    async def has_ended(self, execution_id: str) -> bool:
        return (await self._ask("GET", f"/v1/executions/{execution_id}"))["status"] in ENDED

    async def cancel(self, execution_id: str) -> None:
        await self._ask("POST", f"/v1/executions/{execution_id}/cancel", {})

    async def signal(self, execution_id: str, ask: Ask) -> None:
        body = {"name": ask.name, "data": ask.data}
        await self._ask("POST", f"/v1/executions/{execution_id}/signal", body)

    async def read(self, execution_id: str, cursor: int) -> AsyncIterator[Entry]:
        headers = {"Last-Event-ID": str(cursor)} if cursor else {}
        path = f"/v1/executions/{execution_id}/stream"
        try:
            async with self._http.stream("GET", path, headers=headers) as answer:
                if answer.status_code != 200:
                    raise StoreUnavailableError(f"{answer.status_code}")
                async for entry in events_of(answer):
                    if entry.kind == "gap":
                        continue
                    yield entry
                    if entry.kind in TERMINAL_KINDS:
                        return
        except httpx.TransportError as error:
            raise StoreUnavailableError(str(error)) from error

    async def _ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            answer = await self._http.request(method, path, json=body, headers=headers)
        except httpx.TransportError as error:
            raise StoreUnavailableError(str(error)) from error
        if answer.status_code == 404:
            raise UnknownExecutionError(answer.text)
        if answer.status_code == 409 and "ALREADY_TERMINAL" in answer.text:
            raise AlreadyTerminalError(answer.text)
        if answer.status_code in (408, 409, 429) or answer.status_code >= 500:
            raise StoreUnavailableError(f"{answer.status_code}: {answer.text}")
        assert answer.is_success, f"{answer.status_code}: {answer.text}"
        return dict(answer.json())
