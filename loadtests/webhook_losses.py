"""Ten thousand ends told through a dispatcher that is killed -9 five times: none may be missing.

Run it as `python -m loadtests.webhook_losses` from the root of the repository. The API, an executor
and the receiver run in this process, the store and the dispatcher in processes of their own; no Ray
and no model. The receiver refuses one try in five. A dispatcher that was killed is started again at
once, so the time that Ray Serve needs for it is not in these figures: those are in
`tests/chaos/test_webhooks.py`. The exit status is 1 when an end was not told.
"""

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import orjson
import uvloop

from deployments.webhooks import dispatcher_of, guarded_http
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from serve_app.core.webhooks import event_id
from serve_app.services.executions import Submission
from serve_app.settings import Settings
from tests.support.api import Api
from tests.support.receiver import Got, receiver, status
from tests.support.webhooks import running_hooks

COUNT = 10_000
KILLS = 5
CALLERS = 64
FAILS = 0.2
RETRY_S = (0.2, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0)
LEASE_MS = 1000
WITHIN_S = 400.0


def dispatch(settings: Settings) -> None:
    """A dispatcher's process: it serves until it is killed."""

    async def serve() -> None:
        clock, entropy = SystemClock(), SystemEntropy()
        stores, http = connect(settings, clock), guarded_http(settings)
        await dispatcher_of(settings, stores, http, clock, entropy).run()

    uvloop.run(serve())


class Heard:
    """What the receiver was told, and what it said yes to."""

    def __init__(self) -> None:
        self.first_s: dict[str, float] = {}
        self.tries: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self._chance = Random(1)

    async def answer(self, got: Got, writer: asyncio.StreamWriter) -> None:
        """Refuse one in five."""
        name = got.headers["webhook-id"]
        assert orjson.loads(got.body)["id"] == name
        self.first_s.setdefault(name, time.monotonic())
        self.tries[name] += 1
        is_failure = self._chance.random() < FAILS
        self.accepted[name] += not is_failure
        await status(503 if is_failure else 200)(got, writer)

    @property
    def told(self) -> int:
        """Events that the receiver has said yes to."""
        return sum(1 for count in self.accepted.values() if count)


async def execute_all(api: Api, count: int) -> dict[str, float]:
    """So many executions; each one's event, and when it had been accepted."""
    executions, began_s, numbers = api.services.executions, dict[str, float](), iter(range(count))

    async def caller() -> None:
        for number in numbers:
            an_id = executions.new_id("default", "", None)
            await executions.start(Submission(an_id, "default", "test-echo", {"n": number}))
            began_s[event_id(an_id)] = time.monotonic()

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return began_s


async def kill_now_and_then(settings: Settings, heard: Heard, count: int) -> int:
    """Keep a dispatcher running, killing it KILLS times at even steps of the work."""
    context, kills = multiprocessing.get_context("spawn"), 0
    process = context.Process(target=dispatch, args=(settings,), daemon=True)
    process.start()
    give_up_s = time.monotonic() + WITHIN_S
    while heard.told < count and time.monotonic() < give_up_s:
        await asyncio.sleep(0.01)
        if kills < KILLS and heard.told >= count * (kills + 1) / (KILLS + 1):
            process.kill()
            kills += 1
            process = context.Process(target=dispatch, args=(settings,), daemon=True)
            process.start()
    process.kill()
    return kills


def shown(values: list[float]) -> str:
    """p50, p99 and the largest, in ms."""
    ordered = sorted(values)
    p50, p99 = (ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 99))
    return f"p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, max {ordered[-1] * 1000:.0f} ms"


async def run(count: int) -> int:
    """One run; 1 when an end is missing."""
    heard = Heard()
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddedValkey(Path(folder), SystemClock(), SystemEntropy())
        await store.start()
        given = {"webhook_retry_s": RETRY_S, "webhook_lease_ms": LEASE_MS}
        async with (
            running_hooks(store.url, Path(folder), **given) as hooks,
            receiver(heard.answer) as there,
        ):
            await hooks.create(there.url)
            began = time.monotonic()
            dispatching = asyncio.ensure_future(
                kill_now_and_then(hooks.api.services.settings, heard, count)
            )
            began_s = await execute_all(hooks.api, count)
            accepted_s = time.monotonic() - began
            kills = await dispatching
            told_s = time.monotonic() - began
        await store.stop()
    missing = {name for name in began_s if not heard.accepted[name]}
    repeated = [name for name, accepted in heard.accepted.items() if accepted > 1]
    delays = [heard.first_s[name] - at for name, at in began_s.items() if name in heard.first_s]
    print(f"executions {len(began_s)}, accepted in {accepted_s:.1f} s, told in {told_s:.1f} s")
    print(f"dispatchers killed -9: {kills}; tries {heard.tries.total()}")
    foreign = heard.tries.keys() - began_s
    print(f"ends told {len(began_s) - len(missing)}, missing {len(missing)}")
    print(f"told more than once {len(repeated)}, foreign ids {len(foreign)}")
    print(f"acceptance to first try, kills and queueing included: {shown(delays)}")
    return 1 if missing or kills < KILLS else 0


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    sys.exit(uvloop.run(run(parser.parse_args().count)))


if __name__ == "__main__":
    main()
