"""CronStore: the arguments and answers of the functions in `redis_cron.lua`."""

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import CONFIG_KEY
from serve_app.event_ports import ClockBeat, DueClock


class RedisCron:
    """The clocks of all workspaces."""

    def __init__(self, calls: RedisCalls) -> None:
        self._calls = calls

    async def beat(self, worker_id: str, lease_ms: int, limit: int) -> ClockBeat:
        """See `event_ports.CronStore`."""
        now, keeps, following, flat = await self._calls.fcall(
            "ip1_clock", CONFIG_KEY, worker_id, lease_ms, limit
        )
        next_ms = int(float(following))
        pairs = zip(flat[::2], flat[1::2], strict=True)
        due = tuple(_due(name.decode(), since.decode()) for name, since in pairs)
        return ClockBeat(int(now), keeps == 1, next_ms if next_ms >= 0 else None, due)

    async def set(self, worker_id: str, clock: DueClock, done_ms: int, next_ms: int | None) -> bool:
        """See `event_ports.CronStore`."""
        answer = await self._calls.fcall(
            "ip1_clock_set",
            CONFIG_KEY,
            worker_id,
            f"{clock.workspace} {clock.workflow_id}",
            f"{clock.after_ms} {clock.version}",
            f"{done_ms} {clock.version}",
            "" if next_ms is None else next_ms,
        )
        return bool(answer)

    async def release(self, worker_id: str) -> None:
        """See `event_ports.CronStore`."""
        await self._calls.fcall("ip1_clock_release", CONFIG_KEY, worker_id)


def _due(name: str, since: str) -> DueClock:
    workspace, _, workflow_id = name.partition(" ")
    after_text, _, version_text = since.partition(" ")
    return DueClock(workspace, workflow_id, int(version_text), int(after_text))
