"""HookStore: the sealed secrets of each workspace's hooks, as one hash."""

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import CONFIG_KEY


class RedisHooks:
    """Secrets in Redis."""

    def __init__(self, calls: RedisCalls) -> None:
        self._calls = calls

    async def find(self, workspace: str, workflow_id: str) -> str:
        """See `event_ports.HookStore`."""
        found = await self._calls.call("HGET", f"{CONFIG_KEY}:in:{workspace}", workflow_id)
        return "" if found is None else found.decode()

    async def set(self, workspace: str, workflow_id: str, present: str, new: str) -> bool:
        """See `event_ports.HookStore`."""
        args = (workspace, workflow_id, present, new)
        return bool(await self._calls.fcall("ip1_hook_set", CONFIG_KEY, *args))
