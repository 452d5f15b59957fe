"""The function libraries: every `redis_*.lua` beside this file, under names of their own content.

Owns their loading. A function is loaded where it was missed: on a new server, and on one that took
the place of another. Its name ends in a digest of all libraries, so that a store that outlived an
upgrade never runs an older function under the same name, and two releases can run side by side.
"""

import hashlib
import re
from importlib import resources

from redis.asyncio import Redis

_MISSING = "unction not found"  # Redis and Valkey differ in the first letter's case
_LIBRARY = re.compile(r"#!lua name=(\w+)")
_FUNCTION = re.compile(r"(redis\.register_function\('\w+)'")
_DIGEST_LENGTH = 8


class RedisLibrary:
    """What our functions are called, and how they get to a server."""

    def __init__(self) -> None:
        folder = resources.files("serve_app.adapters")
        files = sorted(
            (file for file in folder.iterdir() if file.name.endswith(".lua")), key=lambda f: f.name
        )
        sources = [file.read_text(encoding="utf-8") for file in files]
        self._digest = hashlib.sha256("\0".join(sources).encode()).hexdigest()[:_DIGEST_LENGTH]
        self._sources = tuple(self._named(source) for source in sources)

    def name_of(self, function: str) -> str:
        """What a server knows the function as."""
        return f"{function}_{self._digest}"

    def is_missing(self, error: Exception) -> bool:
        """Whether an error says that the libraries are not there."""
        return _MISSING in str(error)

    async def load(self, client: Redis) -> None:
        """Load all libraries on one server; its replicas get them from it."""
        for source in self._sources:
            await client.function_load(source, replace=True)

    def _named(self, source: str) -> str:
        library = _LIBRARY.sub(rf"#!lua name=\1_{self._digest}", source, count=1)
        return _FUNCTION.sub(rf"\1_{self._digest}'", library)
