"""What users import: the client of an inferpipe server.

Owns the public names. Invariant: importing this package loads nothing but these few lines; each
name is fetched from its module on first use (PEP 562). The server imports `inferpipe.wire`
through this package and must not pay for an HTTP client, nor a user for Ray or vLLM.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferpipe._config import ExecuteOptions, HttpOptions
    from inferpipe._stream import StreamChunk, StreamEvent
    from inferpipe._websocket import WebSocketClient
    from inferpipe.client import AsyncInferPipe, InferPipe
    from inferpipe.errors import (
        ApiStatusError,
        AuthenticationError,
        BadRequestError,
        ConflictError,
        ConnectionFailedError,
        ExecutionFailedError,
        InferenceError,
        InferenceTimeoutError,
        InferPipeConnectionError,
        InferPipeError,
        InferPipeProtocolError,
        InferPipeTimeoutError,
        InvalidArgumentError,
        InvalidPromptError,
        ModelNotAvailableError,
        NoHostsAvailableError,
        NotFoundError,
        OverloadedError,
        PermissionDeniedError,
        RateLimitedError,
        RateLimitExceededError,
        UnknownSessionError,
        UnprocessableError,
        WebhookVerificationError,
    )
    from inferpipe.inference import InferenceConfig, InferenceManager, InferenceStream
    from inferpipe.streams import AsyncExecutionStream, ExecutionStream
    from inferpipe.wire import (
        ExecutionInfo,
        ExecutionRecord,
        ExecutionResult,
        HealthStatus,
        HostView,
        Problem,
        RetryConfig,
        SessionView,
    )

    __version__: str

__all__ = [
    "ApiStatusError",
    "AsyncExecutionStream",
    "AsyncInferPipe",
    "AuthenticationError",
    "BadRequestError",
    "ConflictError",
    "ConnectionFailedError",
    "ExecuteOptions",
    "ExecutionFailedError",
    "ExecutionInfo",
    "ExecutionRecord",
    "ExecutionResult",
    "ExecutionStream",
    "HealthStatus",
    "HostView",
    "HttpOptions",
    "InferPipe",
    "InferPipeConnectionError",
    "InferPipeError",
    "InferPipeProtocolError",
    "InferPipeTimeoutError",
    "InferenceConfig",
    "InferenceError",
    "InferenceManager",
    "InferenceStream",
    "InferenceTimeoutError",
    "InvalidArgumentError",
    "InvalidPromptError",
    "ModelNotAvailableError",
    "NoHostsAvailableError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "Problem",
    "RateLimitExceededError",
    "RateLimitedError",
    "RetryConfig",
    "SessionView",
    "StreamChunk",
    "StreamEvent",
    "UnknownSessionError",
    "UnprocessableError",
    "WebSocketClient",
    "WebhookVerificationError",
]

_HOME = {
    **dict.fromkeys(("ExecuteOptions", "HttpOptions"), "inferpipe._config"),
    **dict.fromkeys(("StreamChunk", "StreamEvent"), "inferpipe._stream"),
    **dict.fromkeys(("AsyncInferPipe", "InferPipe"), "inferpipe.client"),
    **dict.fromkeys(
        ("InferenceConfig", "InferenceManager", "InferenceStream"), "inferpipe.inference"
    ),
    "WebSocketClient": "inferpipe._websocket",
    **dict.fromkeys(("AsyncExecutionStream", "ExecutionStream"), "inferpipe.streams"),
    **dict.fromkeys(
        (
            "ExecutionInfo",
            "ExecutionRecord",
            "ExecutionResult",
            "HealthStatus",
            "HostView",
            "Problem",
            "RetryConfig",
            "SessionView",
        ),
        "inferpipe.wire",
    ),
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _installed_version()
    elif name in __all__:
        # Whatever has no other home is an error class: they are the long tail of the names.
        value = getattr(import_module(_HOME.get(name, "inferpipe.errors")), name)
    else:
        raise AttributeError(f"module 'inferpipe' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    # Here and not at the top: this import alone takes longer than the rest of the package.
    metadata = import_module("importlib.metadata")
    try:
        return str(metadata.version("inferpipe"))
    except metadata.PackageNotFoundError:
        return "0+source"  # a source tree on the path, not installed
