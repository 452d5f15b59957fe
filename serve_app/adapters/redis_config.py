"""Configuration in Redis: workflow definitions by version, and API keys by hash.

Owns the caches: what was read is believed for a second, a definition's version for ever, because
it never changes. Invariant: a revoked key or a new version counts everywhere within CACHE_S.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import orjson

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.core.auth import KeyRecord, Principal, Scope, key_digest
from serve_app.core.errors import UnknownWorkflowError
from serve_app.core.limits import read_limits
from serve_app.core.triggers import CronTrigger
from serve_app.core.workflow import Workflow
from serve_app.ports import Clock, Defined

CONFIG_KEY = "ip:{config}"
SHIPPED = "_shipped"  # no workspace can have this name: its pattern forbids the underscore
CACHE_S = 1.0
_KEYS = f"{CONFIG_KEY}:keys"
_WORKSPACES = f"{CONFIG_KEY}:workspaces"
CACHE_MAX = 10_000

Value = TypeVar("Value")
Parse = Callable[[object], Workflow]


class _Cache(Generic[Value]):
    """Values believed for CACHE_S; emptied when it is full, which is cheap and rare."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._values: dict[str, tuple[float, Value]] = {}

    def get(self, key: str) -> tuple[Value] | None:
        """The value in a tuple, so that None can be one."""
        found = self._values.get(key)
        if found is None or self._clock.monotonic_s() - found[0] > CACHE_S:
            return None
        return (found[1],)

    def drop(self, key: str) -> None:
        """Forget what this process itself has just changed."""
        self._values.pop(key, None)

    def put(self, key: str, value: Value) -> Value:
        if len(self._values) >= CACHE_MAX:
            self._values.clear()
        self._values[key] = (self._clock.monotonic_s(), value)
        return value


class RedisCatalog:
    """WorkflowCatalog: a workspace's own definitions, then those we ship."""

    def __init__(self, calls: RedisCalls, parse: Parse, clock: Clock) -> None:
        self._calls = calls
        self._parse = parse
        self._versions: dict[tuple[str, str, int], Workflow] = {}
        self._latest: _Cache[tuple[str, int] | None] = _Cache(clock)
        self._triggered: _Cache[tuple[tuple[str, str, int], ...]] = _Cache(clock)

    async def define(self, workspace: str, document: object) -> Defined:
        """See `ports.WorkflowCatalog`."""
        workflow = self._parse(document)
        # What was parsed is what is stored: plain JSON, whatever the document came as.
        data = orjson.dumps(workflow.document, option=orjson.OPT_SORT_KEYS)
        base = 0
        clocks = [one for one in workflow.triggers if isinstance(one, CronTrigger)]
        has_clock = bool(clocks) and workspace != SHIPPED  # a shipped one runs for nobody
        if workspace != SHIPPED:
            base = await self._last_version(SHIPPED, workflow.id)
        version, is_new = await self._calls.fcall(
            "ip1_define",
            CONFIG_KEY,
            workspace,
            workflow.id,
            data,
            base,
            int(any(not isinstance(one, CronTrigger) for one in workflow.triggers)),
            int(has_clock),
        )
        self._latest.drop(f"{workspace}:{workflow.id}")
        self._triggered.drop(workspace)
        return Defined(workflow, int(version), bool(is_new))

    def check(self, document: object) -> Workflow:
        """See `ports.WorkflowCatalog`."""
        return self._parse(document)

    async def undefine(self, workspace: str, workflow_id: str) -> bool:
        """See `ports.WorkflowCatalog`."""
        was_there = await self._calls.fcall("ip1_undefine", CONFIG_KEY, workspace, workflow_id)
        self._latest.drop(f"{workspace}:{workflow_id}")
        self._triggered.drop(workspace)
        return bool(was_there)

    async def triggered(self, workspace: str) -> tuple[tuple[int, Workflow], ...]:
        """See `ports.WorkflowCatalog`."""
        cached = self._triggered.get(workspace)
        found = cached[0] if cached else self._triggered.put(workspace, await self._ids(workspace))
        return tuple(
            [(version, await self._load(owner, one, version)) for owner, one, version in found]
        )

    async def _ids(self, workspace: str) -> tuple[tuple[str, str, int], ...]:
        rows = await self._calls.fcall("ip1_triggered", CONFIG_KEY, workspace, SHIPPED)
        return tuple(
            (owner, name.decode(), int(version))
            for owner, flat in zip((workspace, SHIPPED), rows, strict=True)
            for name, version in zip(flat[::2], flat[1::2], strict=True)
        )

    async def ids(self, workspace: str) -> tuple[str, ...]:
        """See `ports.WorkflowCatalog`."""
        names: set[str] = set()
        for owner in (workspace, SHIPPED):
            members = await self._calls.call("SMEMBERS", f"{CONFIG_KEY}:wfs:{owner}")
            names |= {member.decode() for member in members}
        return tuple(sorted(names))

    async def versions(self, workspace: str, workflow_id: str) -> Mapping[int, int]:
        """See `ports.WorkflowCatalog`."""
        found: dict[int, int] = {}
        for owner in (SHIPPED, workspace):
            row = await self._calls.call("HGETALL", f"{CONFIG_KEY}:wf:{owner}:{workflow_id}")
            stamps = {k.decode(): int(v) for k, v in row.items() if k.startswith(b"at:")}
            found |= {int(name.removeprefix("at:")): at_ms for name, at_ms in stamps.items()}
        if not found:
            raise UnknownWorkflowError(f"no workflow {workflow_id!r} in this workspace")
        return dict(sorted(found.items()))

    async def latest(self, workspace: str, workflow_id: str) -> tuple[int, Workflow]:
        """See `ports.WorkflowCatalog`."""
        name = f"{workspace}:{workflow_id}"
        cached = self._latest.get(name)
        found = cached[0] if cached else self._latest.put(name, await self._find(workspace, name))
        if found is None:
            raise UnknownWorkflowError(f"no workflow {workflow_id!r} in this workspace")
        owner, version = found
        return version, await self._load(owner, workflow_id, version)

    async def version(self, workspace: str, workflow_id: str, version: int) -> Workflow:
        """See `ports.WorkflowCatalog`."""
        for owner in (workspace, SHIPPED):
            known = self._versions.get((owner, workflow_id, version))
            if known is not None:
                return known
        try:
            return await self._load(workspace, workflow_id, version)
        except UnknownWorkflowError:
            return await self._load(SHIPPED, workflow_id, version)

    async def _find(self, workspace: str, name: str) -> tuple[str, int] | None:
        workflow_id = name.removeprefix(f"{workspace}:")
        for owner in (workspace, SHIPPED):
            key = f"{CONFIG_KEY}:wf:{owner}:{workflow_id}"
            latest = await self._calls.call("HGET", key, "latest")
            if latest is not None:
                return owner, int(latest)
        return None

    async def _last_version(self, owner: str, workflow_id: str) -> int:
        key = f"{CONFIG_KEY}:wf:{owner}:{workflow_id}"
        return int(await self._calls.call("HGET", key, "last") or 0)

    async def _load(self, owner: str, workflow_id: str, version: int) -> Workflow:
        known = self._versions.get((owner, workflow_id, version))
        if known is not None:
            return known
        key = f"{CONFIG_KEY}:wf:{owner}:{workflow_id}"
        data = await self._calls.call("HGET", key, version)
        if data is None:
            raise UnknownWorkflowError(f"no version {version} of workflow {workflow_id!r}")
        if len(self._versions) >= CACHE_MAX:
            self._versions.clear()
        workflow = self._parse(orjson.loads(data))
        self._versions[(owner, workflow_id, version)] = workflow
        return workflow


class RedisKeys:
    """API keys by their hash, and the workspaces they belong to."""

    def __init__(self, calls: RedisCalls, clock: Clock) -> None:
        self._calls = calls
        self._clock = clock
        self._cache: _Cache[KeyRecord | None] = _Cache(clock)

    async def find(self, key: str) -> Principal | None:
        """See `ports.KeyRing`."""
        digest = key_digest(key)
        cached = self._cache.get(digest)
        record = cached[0] if cached else self._cache.put(digest, await self._read(digest))
        if record is None:
            return None
        is_over = record.expires_at_ms is not None and self._clock.now_ms() >= record.expires_at_ms
        return None if is_over else record.principal()

    async def put(self, key: str, record: KeyRecord) -> None:
        """See `ports.KeyRing`."""
        await self._calls.call("HSET", _KEYS, key_digest(key), orjson.dumps(record))

    async def records(self, workspace: str) -> tuple[KeyRecord, ...]:
        """See `ports.KeyRing`."""
        rows = await self._calls.call("HVALS", _KEYS)
        found = [record for record in map(_record, rows) if record.workspace == workspace]
        return tuple(sorted(found, key=_created))

    async def revoke(self, workspace: str, key_id: str) -> bool:
        """See `ports.KeyRing`."""
        rows = await self._calls.call("HGETALL", _KEYS)
        for digest, row in rows.items():
            record = _record(row)
            if record.id == key_id and record.workspace == workspace:
                self._cache.drop(digest.decode())
                return bool(await self._calls.call("HDEL", _KEYS, digest))
        return False

    async def add_workspace(self, workspace: str, name: str) -> bool:
        """See `ports.KeyRing`."""
        record = orjson.dumps({"name": name, "at_ms": self._clock.now_ms()})
        return bool(await self._calls.call("HSETNX", _WORKSPACES, workspace, record))

    async def workspaces(self) -> Mapping[str, tuple[str, int]]:
        """See `ports.KeyRing`."""
        rows = await self._calls.call("HGETALL", _WORKSPACES)
        loaded = {name.decode(): orjson.loads(row) for name, row in rows.items()}
        return {name: (row["name"], row["at_ms"]) for name, row in sorted(loaded.items())}

    async def _read(self, digest: str) -> KeyRecord | None:
        data = await self._calls.call("HGET", _KEYS, digest)
        return None if data is None else _record(data)


def _record(data: bytes) -> KeyRecord:
    members: dict[str, Any] = orjson.loads(data)
    members["scopes"] = tuple(Scope(scope) for scope in members["scopes"])
    members["limits"] = read_limits(members.get("limits", {}))  # older keys have none
    return KeyRecord(**members)


def _created(record: KeyRecord) -> tuple[int, str]:
    return record.created_at_ms, record.id
