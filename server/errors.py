"""Everything that is answered with an error, as one tree.

    ApiError                         status  code
    ├── InvalidRequestError             400  invalid_value, or as given
    │   └── ContextLengthError          400  context_length_exceeded
    ├── AuthenticationError             401  invalid_api_key
    ├── ModelNotFoundError              404  model_not_found
    ├── ResponseNotFoundError           404  response_not_found
    ├── RouteNotFoundError              404  unknown_url
    ├── ObjectNotFoundError             404  not_found
    ├── MethodNotAllowedError           405  method_not_allowed
    ├── BodyTimeoutError                408  request_timeout
    ├── ConflictError                   409  conflict
    ├── BodyTooLargeError               413  body_too_large
    ├── UnsupportedMediaTypeError       415  unsupported_media_type
    ├── QueueFullError                  429  queue_full
    ├── GenerationError                 500  generation_failed
    ├── InternalError                   500  internal_error
    ├── FeatureOffError                 501  feature_off
    ├── ModelLoadingError               503  model_loading
    ├── EngineUnavailableError          503  engine_unavailable
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


class AuthenticationError(ApiError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


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
    """A file or a batch that is not there, or is another key's."""

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


class BodyTimeoutError(_UnreadBodyError):
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


class QueueFullError(ApiError):
    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(RETRY_AFTER_QUEUE_SECONDS)}


class GenerationError(ApiError):
    """The engine gave up on this request alone."""

    default_code = "generation_failed"


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
        # OpenAI's libraries would try again otherwise, as with every status from 500 on.
        return {"x-should-retry": "false"}


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


class EngineUnavailableError(_UnavailableError):
    default_code = "engine_unavailable"

    def __init__(self) -> None:
        super().__init__("The engine has ended and the server is about to restart.")


def shown(value: Any) -> str:
    """A client's value as an error message repeats it: short, on one line, printable ASCII."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value[: LONGEST_SHOWN_VALUE + 1] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_SHOWN_VALUE else text[: LONGEST_SHOWN_VALUE - 3] + "..."
