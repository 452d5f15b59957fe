"""A client's settings, and where they come from.

Owns names, defaults and checks. Reads no environment by itself: it is handed in. Invariant: a
variable that is set but empty counts as unset.
"""

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, TypeVar
from urllib.parse import urlsplit

from inferpipe import __version__
from inferpipe.errors import InvalidArgumentError
from inferpipe.wire import RetryConfig

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_RETRIES = 2
CONNECT_TIMEOUT_MAX_S = 10.0  # a host that takes longer to shake hands is as good as down
NumberT = TypeVar("NumberT", int, float)

ENVIRONMENT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """The connections of one client.

    Args:
        connections_max: open at once; a call beyond them waits for a free one.
        keepalive: whether a connection serves more than one call.
        keepalive_expiry_s: how long an idle connection is kept.
        proxy: the address of an HTTP proxy; None goes straight to the server, whatever the
            environment says: a key must not take a way that a stray variable names.
        verify: for `https`: False trusts anybody; a context brings your own authorities.
    """

    connections_max: int = 50
    keepalive: bool = True
    keepalive_expiry_s: float = 30.0
    proxy: str | None = None
    verify: bool | ssl.SSLContext = True


class ExecuteOptions(TypedDict, total=False):
    """What `execute`, `execute_async` and `execute_stream` take beside workflow and input.

    `timeout_ms` bounds the execution, queue included. `retry_config` overrides the workflow's
    `retry`. `metadata` comes back with the result. A higher `priority` (-100..100) goes first.
    `cache_ttl_s` lets an earlier result of the same input do. `idempotency_key` replaces the one
    made per call: give it to repeat a call from another process without a second execution.
    """

    timeout_ms: int | None
    retry_config: RetryConfig | Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None
    user_id: str | None
    priority: int | None
    cache_ttl_s: int | None
    idempotency_key: str | None


class KeyLimits(TypedDict, total=False):
    """What a key may use: `{"requests": 100, "window": "60s"}`, `{"tokens": 10_000, ...}`."""

    rate_limit: Mapping[str, Any]
    token_limit: Mapping[str, Any] | int


class WebhookOptions(TypedDict, total=False):
    """What `webhooks.create` takes beside address and events.

    `modes` are those of the executions that it hears of: `async` where none is given. With a
    `workflow_id` it hears of that workflow alone. `headers` are sent along with each delivery.
    """

    modes: list[Literal["async", "sync", "stream"]]
    workflow_id: str
    description: str
    headers: dict[str, str]
    enabled: bool


class ClientOptions(TypedDict, total=False):
    """What `from_env` takes; each wins over its environment variable."""

    api_key: str | None
    workspace_id: str | None
    base_url: str
    timeout: float
    retries: int
    http_options: HttpOptions | None


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """A client's settings, checked. `timeout` is in seconds."""

    api_key: str | None = field(default=None, repr=False)
    workspace_id: str | None = None
    base_url: str = DEFAULT_BASE_URL
    timeout: float = DEFAULT_TIMEOUT_S
    retries: int = DEFAULT_RETRIES
    http_options: HttpOptions = HttpOptions()

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise InvalidArgumentError(
                f"base_url must start with http:// or https:// and name a host: {self.base_url!r}"
            )
        for name, value in (("api_key", self.api_key), ("workspace_id", self.workspace_id)):
            if value is not None and not (value.isascii() and value.isprintable() and value):
                raise InvalidArgumentError(f"{name} must be printable ASCII and not empty")
        if not self.timeout > 0:  # says it of NaN too
            raise InvalidArgumentError("timeout must be above 0 seconds")
        if self.retries < 0:
            raise InvalidArgumentError("retries must be 0 or more")

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        headers = {"user-agent": f"inferpipe-python/{__version__}"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        if self.workspace_id:
            headers["x-workspace-id"] = self.workspace_id
        return headers

    def url(self, path: str) -> str:
        """Return the address of a path of the API; a base address may have a path of its own."""
        return self.base_url.rstrip("/") + path


def environment_options(
    variables: Mapping[str, str], given: ClientOptions, environment: str | None
) -> ClientOptions:
    """Read the variables, below what is given.

    In the environment `staging`, named by the argument or by INFERPIPE_ENVIRONMENT, each
    INFERPIPE_STAGING_* wins over its INFERPIPE_*.

    Raises:
        InvalidArgumentError: a number that is none, or an environment of which no variable is set:
            a slip of the pen must not send staging's work to production.
    """
    prefixes = ["INFERPIPE_"]
    name = environment or variables.get("INFERPIPE_ENVIRONMENT")
    if name:
        prefixes.insert(0, _prefix(name, variables))

    def read(variable: str) -> str | None:
        values = (variables.get(prefix + variable) for prefix in prefixes)
        return next((value for value in values if value), None)

    options: ClientOptions = {}
    if api_key := read("API_KEY"):
        options["api_key"] = api_key
    if workspace_id := read("WORKSPACE_ID"):
        options["workspace_id"] = workspace_id
    if base_url := read("BASE_URL"):
        options["base_url"] = base_url
    if timeout := read("TIMEOUT_S"):
        options["timeout"] = _number("TIMEOUT_S", timeout, float)
    if retries := read("RETRIES"):
        options["retries"] = _number("RETRIES", retries, int)
    options.update(given)
    return options


def _prefix(name: str, variables: Mapping[str, str]) -> str:
    if not ENVIRONMENT_NAME.fullmatch(name):
        raise InvalidArgumentError(f"not the name of an environment: {name!r}")
    prefix = f"INFERPIPE_{name.upper().replace('-', '_')}_"
    if not any(variable.startswith(prefix) for variable in variables):
        raise InvalidArgumentError(
            f"the environment is {name!r}, but no variable {prefix}* is set, such as"
            f" {prefix}BASE_URL"
        )
    return prefix


def _number(variable: str, text: str, kind: Callable[[str], NumberT]) -> NumberT:
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidArgumentError(f"INFERPIPE_{variable} is no number: {text!r}") from error
