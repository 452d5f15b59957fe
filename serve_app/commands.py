"""The server's commands, as the `inferpipe` program finds them by entry point.

Owns arguments and exit codes. Invariant: importing this module is cheap; what a command needs is
imported when it runs.
"""

import argparse
import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from serve_app.core.errors import ServeAppError
from serve_app.settings import read_settings


@dataclass(frozen=True, slots=True)
class UpCommand:
    """The `up` command, as `inferpipe.cli` finds it by entry point."""

    help: str = "start the service on this machine"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The few settings that one changes often; the rest are INFERPIPE_* variables."""
        parser.add_argument("--host", help="address to bind (INFERPIPE_HOST)")
        parser.add_argument("--port", type=int, help="port to bind (INFERPIPE_PORT)")
        parser.add_argument("--data-dir", type=Path, help="where data lives (INFERPIPE_DATA_DIR)")
        parser.add_argument("--model", help="model directory or hub name (INFERPIPE_MODEL)")

    def run(self, arguments: argparse.Namespace) -> int:
        """Serve until Ctrl-C or SIGTERM; 0 then, 1 when the start failed, 2 on bad settings."""
        named = {"host", "port", "data_dir", "model"}
        given = {k: v for k, v in vars(arguments).items() if k in named and v is not None}
        try:
            settings = read_settings(**given)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                name = "_".join(str(part) for part in detail["loc"])
                sys.stderr.write(f"settings: INFERPIPE_{name.upper()}: {detail['msg']}\n")
            return 2
        except ValueError as error:
            sys.stderr.write(f"settings: {error}\n")
            return 2
        # Imported here: Ray and Serve take a second, which `inferpipe --help` should not.
        from serve_app.adapters.local_cluster import ClusterFailedError  # noqa: PLC0415
        from serve_app.adapters.model_weights import ModelFilesError  # noqa: PLC0415
        from serve_app.up import serve_locally  # noqa: PLC0415

        try:
            asyncio.run(serve_locally(settings))
        except (ServeAppError, ClusterFailedError, ModelFilesError, OSError) as error:
            sys.stderr.write(f"cannot start: {error}\n")
            return 1
        return 0


up = UpCommand()
