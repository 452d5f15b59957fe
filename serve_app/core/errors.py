"""Every error a caller can meet: one stable code each, no HTTP.

Owns the codes and the error tree. Does not own statuses or bodies: `ingress/errors.py` maps a
code to HTTP, each compat surface to its own shape. Invariant: all arguments of an error go to
`super().__init__`, or it does not survive pickling between actors; dispatch on `code`, never on
the type, because Ray rebuilds a foreign error under a synthesised class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from serve_app.core.limits import Standing


class ErrorCode(StrEnum):
    """Stable, public, upper snake case."""

    MALFORMED_JSON = "MALFORMED_JSON"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_INPUT = "INVALID_INPUT"
    INVALID_WORKFLOW = "INVALID_WORKFLOW"
    INVALID_CURSOR = "INVALID_CURSOR"
    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    UNKNOWN_WORKFLOW = "UNKNOWN_WORKFLOW"
    UNKNOWN_EXECUTION = "UNKNOWN_EXECUTION"
    UNKNOWN_KEY = "UNKNOWN_KEY"
    UNKNOWN_SESSION = "UNKNOWN_SESSION"
    UNKNOWN_WEBHOOK = "UNKNOWN_WEBHOOK"
    UNKNOWN_DELIVERY = "UNKNOWN_DELIVERY"
    TOO_MANY_WEBHOOKS = "TOO_MANY_WEBHOOKS"
    CHANGED_MEANWHILE = "CHANGED_MEANWHILE"
    WORKSPACE_EXISTS = "WORKSPACE_EXISTS"
    ALREADY_TERMINAL = "ALREADY_TERMINAL"
    NOT_TERMINAL = "NOT_TERMINAL"
    TOO_MANY_SIGNALS = "TOO_MANY_SIGNALS"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    IDEMPOTENCY_IN_PROGRESS = "IDEMPOTENCY_IN_PROGRESS"
    RATE_LIMIT_EXCEEDED = "RATE_LIMIT_EXCEEDED"
    OVERLOADED = "OVERLOADED"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    MODEL_NOT_AVAILABLE = "MODEL_NOT_AVAILABLE"
    NO_HOSTS_AVAILABLE = "NO_HOSTS_AVAILABLE"
    INVALID_PROMPT = "INVALID_PROMPT"
    CONNECTION_FAILED = "CONNECTION_FAILED"
    EGRESS_REFUSED = "EGRESS_REFUSED"
    EXCHANGE_FAILED = "EXCHANGE_FAILED"
    STEP_FAILED = "STEP_FAILED"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    SEAL_BROKEN = "SEAL_BROKEN"
    STALE_LEASE = "STALE_LEASE"
    ILLEGAL_TRANSITION = "ILLEGAL_TRANSITION"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one place of a document; `loc` is keys and indexes from its root."""

    loc: tuple[str | int, ...]
    msg: str


class ServeAppError(Exception):
    """Root of the tree. `str(error)` is fit for the caller; it never holds a secret."""

    code = ErrorCode.INTERNAL


class MalformedJsonError(ServeAppError):
    """The body is not JSON as RFC 8259 has it, or nests deeper than the limit."""

    code = ErrorCode.MALFORMED_JSON


class BodyTooLargeError(ServeAppError):
    """The body is larger than the limit."""

    code = ErrorCode.BODY_TOO_LARGE


class InvalidRequestError(ServeAppError):
    """The request has the wrong shape; `problems` says where."""

    code = ErrorCode.INVALID_REQUEST

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, tuple(problems))

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Where and what, in document order."""
        return tuple(self.args[1])


class InvalidInputError(InvalidRequestError):
    """The input does not satisfy the workflow's input schema."""

    code = ErrorCode.INVALID_INPUT


class InvalidWorkflowError(InvalidRequestError):
    """The definition cannot be accepted."""

    code = ErrorCode.INVALID_WORKFLOW


class InvalidCursorError(ServeAppError):
    """A cursor that is no cursor."""

    code = ErrorCode.INVALID_CURSOR


class UnauthorizedError(ServeAppError):
    """No key, or one that is not known."""

    code = ErrorCode.UNAUTHORIZED


class ForbiddenError(ServeAppError):
    """A known key without the right scope or workspace."""

    code = ErrorCode.FORBIDDEN


class NotFoundError(ServeAppError):
    """There is no such path."""

    code = ErrorCode.NOT_FOUND


class MethodNotAllowedError(ServeAppError):
    """The path is there, but not for this method."""

    code = ErrorCode.METHOD_NOT_ALLOWED


class UnknownWorkflowError(ServeAppError):
    """No workflow of this id is visible in the workspace."""

    code = ErrorCode.UNKNOWN_WORKFLOW


class UnknownExecutionError(ServeAppError):
    """No execution of this id in the workspace."""

    code = ErrorCode.UNKNOWN_EXECUTION


class UnknownKeyError(ServeAppError):
    """No key of this id in the workspace."""

    code = ErrorCode.UNKNOWN_KEY


class UnknownSessionError(ServeAppError):
    """No session of this id in the workspace, or it has ended."""

    code = ErrorCode.UNKNOWN_SESSION


class UnknownWebhookError(ServeAppError):
    """No webhook of this id in the workspace."""

    code = ErrorCode.UNKNOWN_WEBHOOK


class UnknownDeliveryError(ServeAppError):
    """No delivery of this id in the workspace, or it is no longer kept."""

    code = ErrorCode.UNKNOWN_DELIVERY


class TooManyWebhooksError(ServeAppError):
    """The workspace has as many webhooks as one may have."""

    code = ErrorCode.TOO_MANY_WEBHOOKS


class ChangedMeanwhileError(ServeAppError):
    """Somebody else changed the same thing again and again; read it and try once more."""

    code = ErrorCode.CHANGED_MEANWHILE


class WorkspaceExistsError(ServeAppError):
    """A workspace of this id is there already."""

    code = ErrorCode.WORKSPACE_EXISTS


class AlreadyTerminalError(ServeAppError):
    """The execution has ended; nothing can be asked of it."""

    code = ErrorCode.ALREADY_TERMINAL


class NotTerminalError(ServeAppError):
    """The execution has not ended yet, so it cannot be retried."""

    code = ErrorCode.NOT_TERMINAL


class TooManySignalsError(ServeAppError):
    """An execution holds as many signals as are kept, and no step has taken them."""

    code = ErrorCode.TOO_MANY_SIGNALS


class IdempotencyConflictError(ServeAppError):
    """The same Idempotency-Key came with another body."""

    code = ErrorCode.IDEMPOTENCY_CONFLICT


class IdempotencyInProgressError(ServeAppError):
    """The first request with the same Idempotency-Key is still under way."""

    code = ErrorCode.IDEMPOTENCY_IN_PROGRESS


class RateLimitExceededError(ServeAppError):
    """More was asked than the caller's limit allows; asking later helps."""

    code = ErrorCode.RATE_LIMIT_EXCEEDED

    def __init__(self, message: str, standing: Standing | None = None) -> None:
        super().__init__(message, standing)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def standing(self) -> Standing | None:
        """Where the caller stands, if it was a key's limit."""
        found = self.args[1]
        return found if isinstance(found, Standing) else None


class OverloadedError(ServeAppError):
    """Admission refused: a queue bound is reached. Nothing was accepted."""

    code = ErrorCode.OVERLOADED


class StoreUnavailableError(ServeAppError):
    """The store cannot be reached, so nothing can be made durable."""

    code = ErrorCode.STORE_UNAVAILABLE


class ModelNotAvailableError(ServeAppError):
    """No such model is configured; the message lists those that are."""

    code = ErrorCode.MODEL_NOT_AVAILABLE


class NoHostsAvailableError(ServeAppError):
    """The model is configured, but no replica can take the request now."""

    code = ErrorCode.NO_HOSTS_AVAILABLE


class InvalidPromptError(ServeAppError):
    """The prompt is empty, too long, or asks for what the engine cannot do."""

    code = ErrorCode.INVALID_PROMPT


class ConnectionFailedError(ServeAppError):
    """The link to a replica broke, or the replica died, with the request on it."""

    code = ErrorCode.CONNECTION_FAILED


class EgressRefusedError(ServeAppError):
    """A URL leads where requests of ours may not go."""

    code = ErrorCode.EGRESS_REFUSED


class SealBrokenError(ServeAppError):
    """Something encrypted at rest cannot be read: another cluster secret, or it was changed."""

    code = ErrorCode.SEAL_BROKEN


class ExchangeFailedError(ServeAppError):
    """Somebody else's server could not be reached, or gave no complete answer."""

    code = ErrorCode.EXCHANGE_FAILED


class StepFailedError(ServeAppError):
    """A step ended in an error.

    `retryable` says whether another attempt may help, `retry_after_ms` not before when.
    """

    code = ErrorCode.STEP_FAILED

    def __init__(
        self,
        message: str,
        retryable: bool = True,  # noqa: FBT001, FBT002 - positional, so that it pickles
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message, retryable, retry_after_ms)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def retry_after_ms(self) -> int | None:
        """How long to wait at least; None: as the policy has it."""
        found = self.args[2]
        return found if isinstance(found, int) else None

    @property
    def retryable(self) -> bool:
        """Whether the retry policy applies."""
        return bool(self.args[1])


class DeadlineExceededError(ServeAppError):
    """The deadline passed before the work was done."""

    code = ErrorCode.TIMEOUT


class StaleLeaseError(ServeAppError):
    """Another worker owns the execution now; the holder of the old token must stop."""

    code = ErrorCode.STALE_LEASE


class IllegalTransitionError(ServeAppError):
    """An event that cannot follow the present status: a bug in whoever decided it."""

    code = ErrorCode.ILLEGAL_TRANSITION
