"""Every error the client raises.

Owns the tree below `InferPipeError`. Invariant: all arguments of an error go to
`super().__init__`, so that it survives pickling between a user's worker processes.
"""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType

from inferpipe.wire import ExecutionResult, Problem


class InferPipeError(Exception):
    """Root of the tree. `str(error)` never holds a key."""


class InvalidArgumentError(InferPipeError, ValueError):
    """The call cannot be sent as it stands; nothing was sent."""


class InferPipeConnectionError(InferPipeError):
    """The server could not be reached, or the connection broke, also after the retries."""


class InferPipeTimeoutError(InferPipeConnectionError):
    """The server did not answer in time. An execution it accepted goes on."""


class InferPipeProtocolError(InferPipeError):
    """The answer is not what an inferpipe server sends: look at the base URL, or a proxy."""


class WebhookVerificationError(InferPipeError):
    """A delivery that is not what its sender signed, or is not ours: answer 400 and drop it."""


class ExecutionFailedError(InferPipeError):
    """The execution ended `failed` or `cancelled`; `result` tells all the server knows."""

    def __init__(self, result: ExecutionResult) -> None:
        super().__init__(result)

    def __str__(self) -> str:
        result = self.result
        reason = result.error or result.error_code or "no reason given"
        return f"execution {result.id} {result.status}: {reason}"

    @property
    def result(self) -> ExecutionResult:
        """The execution's outcome, as the server told it."""
        result: ExecutionResult = self.args[0]
        return result


class InferenceError(InferPipeError):
    """An answer on a socket failed; the subclasses are for codes that callers treat apart."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)

    def __str__(self) -> str:
        return f"{self.code}: {self.args[1]}"

    @property
    def code(self) -> str:
        """The stable code, upper snake case."""
        return str(self.args[0])


class NoHostsAvailableError(InferenceError):
    """No host can take the request now, also after the retries."""


class ConnectionFailedError(InferenceError):
    """The host could not be reached, or was lost and no other could go on."""


class InferenceTimeoutError(InferenceError):
    """The request's time-out has passed."""


class ModelNotAvailableError(InferenceError):
    """There is no such model."""


class RateLimitExceededError(InferenceError):
    """The key's limit is used up, or too much runs on one socket or waits in one session."""


class InvalidPromptError(InferenceError):
    """The prompt is empty, too long, or the session has no room for it."""


class UnknownSessionError(InferenceError):
    """There is no such session in the workspace, or it has ended."""


class ApiStatusError(InferPipeError):
    """The server refused the call; the subclasses are for statuses that callers treat apart."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        super().__init__(problem, retry_after_s)

    def __str__(self) -> str:
        problem = self.problem
        places = [
            f"{'.'.join(str(part) for part in item.loc) or 'body'}: {item.msg}"
            for item in problem.errors or ()
        ]
        text = "; ".join([problem.detail or problem.title, *places])
        asked = f" (request {problem.request_id})" if problem.request_id else ""
        return f"{problem.status} {problem.code}: {text}{asked}"

    @property
    def problem(self) -> Problem:
        """The answer's body, RFC 9457."""
        problem: Problem = self.args[0]
        return problem

    @property
    def retry_after_s(self) -> float | None:
        """What `Retry-After` asked for, in seconds."""
        seconds: float | None = self.args[1]
        return seconds

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status

    @property
    def code(self) -> str:
        """The stable code, upper snake case."""
        return self.problem.code

    @property
    def detail(self) -> str:
        """What the server says went wrong."""
        return self.problem.detail

    @property
    def request_id(self) -> str | None:
        """The id to quote when asking the operator."""
        return self.problem.request_id


class BadRequestError(ApiStatusError):
    """400."""


class AuthenticationError(ApiStatusError):
    """401: no key, or not a known one."""


class PermissionDeniedError(ApiStatusError):
    """403: the key lacks the scope, or belongs to another workspace."""


class NotFoundError(ApiStatusError):
    """404: no such workflow or execution in this workspace."""


class ConflictError(ApiStatusError):
    """409: already terminal, or an idempotency key reused with another body."""


class UnprocessableError(ApiStatusError):
    """422: `problem.errors` names each wrong place."""


class RateLimitedError(ApiStatusError):
    """429, also after the retries."""


class OverloadedError(ApiStatusError):
    """503, also after the retries."""


STATUS_ERRORS: Mapping[int, type[ApiStatusError]] = MappingProxyType(
    {
        HTTPStatus.BAD_REQUEST: BadRequestError,
        HTTPStatus.UNAUTHORIZED: AuthenticationError,
        HTTPStatus.FORBIDDEN: PermissionDeniedError,
        HTTPStatus.NOT_FOUND: NotFoundError,
        HTTPStatus.CONFLICT: ConflictError,
        HTTPStatus.UNPROCESSABLE_ENTITY: UnprocessableError,
        HTTPStatus.TOO_MANY_REQUESTS: RateLimitedError,
        HTTPStatus.SERVICE_UNAVAILABLE: OverloadedError,
    }
)


CONNECTION_FAILED = "CONNECTION_FAILED"
INFERENCE_ERRORS: Mapping[str, type[InferenceError]] = MappingProxyType(
    {
        "NO_HOSTS_AVAILABLE": NoHostsAvailableError,
        CONNECTION_FAILED: ConnectionFailedError,
        "INFERENCE_TIMEOUT": InferenceTimeoutError,
        "MODEL_NOT_AVAILABLE": ModelNotAvailableError,
        "RATE_LIMIT_EXCEEDED": RateLimitExceededError,
        "INVALID_PROMPT": InvalidPromptError,
        "UNKNOWN_SESSION": UnknownSessionError,
    }
)


def inference_error(code: str, message: str) -> InferenceError:
    """Return the error class that fits the code, filled."""
    return INFERENCE_ERRORS.get(code, InferenceError)(code, message)


def status_error(problem: Problem, retry_after_s: float | None) -> ApiStatusError:
    """Return the error class that fits the status, filled."""
    return STATUS_ERRORS.get(problem.status, ApiStatusError)(problem, retry_after_s)
