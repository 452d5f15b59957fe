"""The listing of executions: indexes by workspace, workflow and status, in every partition.

Owns the reading of the indexes; the commits of `redis_functions.lua` keep them, and trim them as
executions expire. Invariant: an index entry is a hint; only an execution that is still there and
still as asked for is listed, and no payload is read for it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from serve_app.adapters.event_codec import decode_snapshot
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.core.execution import Execution
from serve_app.core.journal import partition_of
from serve_app.ports import ListQuery

_SAME_MS_MAX = 64  # executions of one millisecond in one partition; far above what it can accept

Flat = Sequence[bytes] | Mapping[bytes, bytes]  # a hash, from a function or from HGETALL


def partition_key(partition: int) -> str:
    """The key prefix of a partition; its braces make it one slot."""
    return f"ip:{{{partition}}}"


def fields_of(flat: Flat) -> dict[str, bytes]:
    """The fields of a hash, however it came."""
    pairs = flat.items() if isinstance(flat, Mapping) else zip(flat[::2], flat[1::2], strict=True)
    return {name.decode(): value for name, value in pairs}


class RedisIndex:
    """Lists of one store."""

    def __init__(self, calls: RedisCalls, partition_count: int) -> None:
        self._calls = calls
        self._partition_count = partition_count

    async def recent(self, wanted: ListQuery) -> Sequence[Execution]:
        """See `ports.ExecutionStore`.

        Each partition has its own index, so the newest of each are merged; the status index is
        the narrower one, so a workflow is then looked for among its members.
        """
        found: list[Execution] = []
        before = wanted.before
        while len(found) < wanted.limit:
            page = await self._newest_ids(wanted, before)
            if not page:
                break
            loaded = await asyncio.gather(*(self._outline(one) for _, one in page))
            found += [execution for execution in loaded if _matches(execution, wanted)]
            before = page[-1]
        return found[: wanted.limit]

    async def _newest_ids(
        self, wanted: ListQuery, before: tuple[int, str] | None
    ) -> list[tuple[int, str]]:
        suffix = f":ix:{wanted.workspace}"
        if wanted.status is not None:
            suffix += f":st:{wanted.status}"
        elif wanted.workflow_id is not None:
            suffix += f":wf:{wanted.workflow_id}"
        newest = "+inf" if before is None else str(before[0])
        # A few more than asked for: those of the cursor's own millisecond are seen again.
        count = wanted.limit + _SAME_MS_MAX
        pages = await asyncio.gather(
            *(
                self._calls.call(
                    "ZREVRANGEBYSCORE", partition_key(p) + suffix, newest, "-inf", "WITHSCORES",
                    "LIMIT", 0, count,
                )
                for p in range(self._partition_count)
            )
        )  # fmt: skip
        merged = sorted(
            ((int(score), member.decode()) for page in pages for member, score in page),
            reverse=True,
        )
        return [one for one in merged if before is None or one < before][: wanted.limit]

    async def _outline(self, execution_id: str) -> Execution | None:
        """The state without its large members, which a list does not show."""
        partition = partition_of(execution_id, self._partition_count)
        assert partition is not None, "the index holds our own ids only"
        key = f"{partition_key(partition)}:s:{execution_id}"
        snapshot = fields_of(await self._calls.call("HGETALL", key))
        return decode_snapshot(execution_id, snapshot, None) if snapshot else None


def _matches(execution: Execution | None, wanted: ListQuery) -> TypeGuard[Execution]:
    """Whether it is still there and still what the index said when it was read."""
    return (
        execution is not None
        and wanted.status in (None, execution.status)
        and wanted.workflow_id in (None, execution.created.workflow_id)
    )
