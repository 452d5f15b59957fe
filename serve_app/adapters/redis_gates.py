"""FlowStore on Redis or Valkey; the functions are in `redis_gates.lua`."""

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_index import partition_key
from serve_app.core.gates import Gate, Rate, partition_of_name
from serve_app.ports import GatePlaces


class RedisGates:
    """Gates and rates, each in the partition that its name hashes to."""

    def __init__(self, calls: RedisCalls, *, partition_count: int) -> None:
        self._calls = calls
        self._partition_count = partition_count

    async def places(self, gate: Gate) -> GatePlaces:
        """See `ports.FlowStore`."""
        key = partition_key(gate.partition(self._partition_count))
        inside, waiting, has_result = await self._calls.fcall("ip1_gate_look", key, gate.name)
        return GatePlaces(int(inside), int(waiting), has_result == 1)

    async def take_rate(self, rate: Rate, count: int, ahead_max_ms: int) -> int:
        """See `ports.FlowStore`."""
        key = partition_key(partition_of_name(rate.name, self._partition_count))
        args = (rate.name, rate.count_max, rate.window_ms, ahead_max_ms, count)
        return int(await self._calls.fcall("ip1_rate_take", key, *args))
