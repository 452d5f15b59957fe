"""Reading an SSE answer, event by event."""

import json
from collections.abc import AsyncIterator

import httpx

from tests.support.checker import Entry


async def events_of(answer: httpx.Response) -> AsyncIterator[Entry]:
    """The events of an SSE answer; one that a broken connection left half is none."""
    members: dict[str, str] = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if name:
            members[name] = value
        elif "data" in members:
            seq = int(members.get("id", "-1"))
            yield Entry(seq, members["event"], json.loads(members["data"]))
            members = {}
        else:
            members = {}
