"""Everything that is answered with an error, as one tree.

    ApiError                         status  code
    ├── InvalidRequestError             400  invalid_value, or as given
    │   ├── ContextLengthError          400  context_length_exceeded
    │   └── ContradictionError          400  contradictory_constraints
    ├── InvalidHttpError                400  invalid_http
    ├── HostNotAllowedError             400  host_not_allowed
    ├── AuthenticationError             401  invalid_api_key
    ├── PermissionDeniedError           403  admin_key_required
    ├── ModelNotFoundError              404  model_not_found
    ├── ResponseNotFoundError           404  response_not_found
    ├── RouteNotFoundError              404  unknown_url
    ├── ObjectNotFoundError             404  not_found
    ├── MethodNotAllowedError           405  method_not_allowed
    ├── RequestTimeoutError             408  request_timeout
    ├── ConflictError                   409  conflict
    ├── BodyTooLargeError               413  body_too_large
    ├── UnsupportedMediaTypeError       415  unsupported_media_type
    ├── QueueFullError                  429  queue_full
    ├── RateLimitError                  429  rate_limit_exceeded
    ├── GenerationError                 500  generation_failed
    │   └── CrashingRequestError        500  engine_crashed
    ├── InternalError                   500  internal_error
    ├── FeatureOffError                 501  feature_off
    ├── EngineSilentError               503  engine_silent
    ├── ModelLoadingError               503  model_loading
    ├── EngineUnavailableError          503  engine_unavailable
    │   ├── EngineRestartingError       503  engine_unavailable
    │   └── GenerationLostError         503  engine_lost
    ├── ShuttingDownError               503  shutting_down
    ├── TooManyConnectionsError         503  too_many_connections
    ├── DeadlineError                   504  deadline_exceeded
    └── StorageError                    507  storage_failed
        └── StorageFullError            507  storage_full

The body is OpenAI's, {"error": {"message", "type", "param", "code"}}, all four keys present, but under
`/v1/messages`, where it is Anthropic's. A message
names the parameter, the limit and the value; it holds no path, no traceback and no address.
"""

from __future__ import annotations

from typing import Any, ClassVar

RETRY_AFTER_LOADING_SECONDS = 5
RETRY_AFTER_QUEUE_SECONDS = 1
_DO_NOT_RETRY = {"x-should-retry": "false"}
"""OpenAI's libraries would try again otherwise, as with every status from 500 on."""
LONGEST_SHOWN_VALUE = 100
"""Characters of a client's value that an error message repeats."""


class ApiError(Exception):
    """An answer other than success; the class says which status, type and code it has."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    @property
    def headers(self) -> dict[str, str]:
        """What the response carries beside its body."""
        return {}

    def body(self) -> dict[str, dict[str, str | None]]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class InvalidRequestError(ApiError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    default_code = "context_length_exceeded"


class ContradictionError(InvalidRequestError):
    """Known only once so much was generated."""

    default_code = "contradictory_constraints"

    def __init__(self, num_generated: int) -> None:
        super().__init__(
            f"Nothing may follow the {num_generated} tokens that were generated: there, what the request allows"
            " by format, grammar, tools, 'min_tokens', 'ignore_eos', 'allowed_token_ids' and 'bad_words'"
            " contradicts itself."
        )


class InvalidHttpError(ApiError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_http"

    def __init__(self) -> None:
        super().__init__("This is no HTTP/1.1 request, or its headers are too large.")


class HostNotAllowedError(ApiError):
    status = 400
    type = "invalid_request_error"
    default_code = "host_not_allowed"


class AuthenticationError(ApiError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class PermissionDeniedError(ApiError):
    """The key is known, and is not an admin's."""

    status = 403
    type = "permission_error"
    default_code = "admin_key_required"


class ModelNotFoundError(ApiError):
    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"


class ResponseNotFoundError(ApiError):
    status = 404
    type = "invalid_request_error"
    default_code = "response_not_found"


class RouteNotFoundError(ApiError):
    status = 404
    type = "invalid_request_error"
    default_code = "unknown_url"


class ObjectNotFoundError(ApiError):
    """A file or a batch that is not there, or is another tenant's."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowedError(ApiError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"

    def __init__(self, message: str, allow: str | None = None) -> None:
        super().__init__(message)
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        return {"allow": self.allow} if self.allow else {}


class _UnreadBodyError(ApiError):
    """The rest of the body stays unread, so the connection cannot be used again."""

    type = "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        return {"connection": "close"}


class RequestTimeoutError(_UnreadBodyError):
    status = 408
    default_code = "request_timeout"


class BodyTooLargeError(_UnreadBodyError):
    status = 413
    default_code = "body_too_large"


class UnsupportedMediaTypeError(_UnreadBodyError):
    status = 415
    default_code = "unsupported_media_type"


class ConflictError(ApiError):
    """What is asked for does not go with the state that the object is in."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class _NoRoomError(ApiError):
    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int = RETRY_AFTER_QUEUE_SECONDS) -> None:
        """`retry_after`: seconds after which there may be room."""
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)}


class QueueFullError(_NoRoomError):
    """There is no room for anybody's request."""

    default_code = "queue_full"


class RateLimitError(_NoRoomError):
    """One of the limits of the client's own tenant is reached."""

    default_code = "rate_limit_exceeded"


class GenerationError(ApiError):
    """The engine gave up on this request alone."""

    default_code = "generation_failed"


class CrashingRequestError(GenerationError):
    """The engine ends whenever it computes this request."""

    default_code = "engine_crashed"

    def __init__(self) -> None:
        super().__init__("The engine failed each time that it began with this request. It is not tried again.")

    @property
    def headers(self) -> dict[str, str]:
        return dict(_DO_NOT_RETRY)


class InternalError(ApiError):
    """A fault of the server; the log has the rest under the request id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"The server failed to answer this request. Its log tells more under {request_id}.")


class FeatureOffError(ApiError):
    """What needs an option that the server was started without."""

    status = 501
    default_code = "feature_off"

    @property
    def headers(self) -> dict[str, str]:
        return dict(_DO_NOT_RETRY)


class StorageError(ApiError):
    """The data directory cannot be written or read; the log says why."""

    status = 507
    default_code = "storage_failed"


class StorageFullError(StorageError):
    default_code = "storage_full"


class _UnavailableError(ApiError):
    status = 503

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(RETRY_AFTER_LOADING_SECONDS)}


class ModelLoadingError(_UnavailableError):
    default_code = "model_loading"


class EngineSilentError(_UnavailableError):
    """The engine lives, and does not answer: it is stopped, or in the middle of something long."""

    default_code = "engine_silent"


class EngineUnavailableError(_UnavailableError):
    default_code = "engine_unavailable"

    def __init__(self, message: str = "The engine has ended, and so will the server.") -> None:
        super().__init__(message)


class EngineRestartingError(EngineUnavailableError):
    def __init__(self) -> None:
        super().__init__("The engine is being restarted. Try again in some seconds.")


class GenerationLostError(EngineUnavailableError):
    """What the engine took along when it ended."""

    default_code = "engine_lost"

    def __init__(self) -> None:
        super().__init__("The engine failed in the middle of this request, and is being restarted. Try again.")


class DeadlineError(ApiError):
    """The answer, or its first token, did not come within the time that server or client set."""

    status = 504
    default_code = "deadline_exceeded"

    @property
    def headers(self) -> dict[str, str]:
        return dict(_DO_NOT_RETRY)


class ShuttingDownError(_UnavailableError):
    """Another server may answer, or this one once it has been started again."""

    default_code = "shutting_down"


class TooManyConnectionsError(_UnavailableError):
    default_code = "too_many_connections"

    def __init__(self, most: int) -> None:
        super().__init__(f"The server answers requests on all of the {most} connections that it can have.")


def shown(value: Any) -> str:
    """A client's value as an error message repeats it: short, on one line, printable ASCII."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value[: LONGEST_SHOWN_VALUE + 1] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_SHOWN_VALUE else text[: LONGEST_SHOWN_VALUE - 3] + "..."
