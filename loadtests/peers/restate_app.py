"""Restate's worker: a handler of three recorded steps. Restate's own ingress is the front."""

import asyncio
import sys
from typing import Any

import restate
import uvloop
from hypercorn.asyncio import serve
from hypercorn.config import Config

from loadtests.peers.work import STEPS, Work, notes_here, run_step

notes = notes_here()
three = restate.Service("three")


@three.handler()
async def run(ctx: restate.Context, given: dict[str, Any]) -> int:
    """Three recorded steps."""
    work = Work(**given)
    for step in STEPS:
        await ctx.run_typed(f"step {step}", run_step, notes=notes, work=work, step=step)
    return len(STEPS)


def main() -> None:
    """Serve on the port given."""
    config = Config()
    config.bind = [f"127.0.0.1:{sys.argv[1]}"]
    config.accesslog = None
    config.h2_max_concurrent_streams = 2147483647  # as Restate's documentation advises
    uvloop.run(serve(restate.app([three]), config, shutdown_trigger=asyncio.Event().wait))


if __name__ == "__main__":
    main()
