"""All errors that SAGE reports to users.

SageError
├── ConfigError           an option or setting is invalid
├── DatasetError          a dataset cannot be used for training
├── ModelError            a model cannot be used
│   └── ModelNotFound     the model is not found in a folder, in a package or on the hub
├── OutputError           the output folder cannot be used
├── NotFound              no engine, task or route has this name
├── Conflict              the current state does not allow the operation
├── RunError              a training run cannot continue
├── EngineError           an engine does not start or does not answer
├── BackendError          a backend's environment cannot be installed
├── BackupError           a backup cannot be written or restored
├── Overloaded            the request cannot be served now; retry later
│   └── Busy              an engine has too many requests
├── Unauthorized          the API key is missing or wrong
└── GatewayUnreachable    no gateway answers
"""

from typing import Any, ClassVar

#: Seconds after which a client should retry a request that failed with `Overloaded`.
RETRY_AFTER_SECONDS = 5


class SageError(Exception):
    """An error with a message for users, a code for programs, and a hint about what to do next."""

    http_status: int = 500
    exit_code: ClassVar[int] = 1
    #: Value of the field `type` in OpenAI's error format.
    type: ClassVar[str] = "api_error"

    def __init__(self, *, code: str, message: str, hint: str = "", param: str | None = None) -> None:
        """code: stable, in snake_case.  message: what happened, and where.  hint: what to do.  param: the invalid option."""
        super().__init__(message)
        self.code, self.message, self.hint, self.param = code, message, hint, param

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def body(self) -> dict[str, Any]:
        """Return the error as JSON content for HTTP responses and streams: OpenAI's format with an additional field `hint`.

        `message` includes the hint too, because most clients show only the message.
        """
        return {
            "error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code, "hint": self.hint}
        }


class _BadRequest(SageError):
    http_status = 400
    type = "invalid_request_error"


class ConfigError(_BadRequest):
    """An option or setting is invalid."""

    exit_code = 2


class DatasetError(_BadRequest):
    """A dataset cannot be used for training."""


class ModelError(_BadRequest):
    """A model cannot be used."""


class ModelNotFound(ModelError):
    """The model is not found in a folder, in a package or on the hub."""

    http_status = 404


class OutputError(_BadRequest):
    """The output folder cannot be used."""


class NotFound(_BadRequest):
    """No object has this name or id."""

    http_status = 404


class Conflict(_BadRequest):
    """The current state of the object does not allow the operation."""

    http_status = 409


class RunError(SageError):
    """A training run cannot continue; its checkpoints are kept."""


class EngineError(SageError):
    """An engine does not start or does not answer."""

    http_status = 502


class BackendError(SageError):
    """A backend's environment cannot be installed."""


class BackupError(SageError):
    """A backup cannot be written or restored."""


class Overloaded(SageError):
    """The request cannot be served now; the caller should retry later."""

    http_status = 503
    type = "service_unavailable_error"


class Busy(Overloaded):
    """An engine has too many requests."""

    http_status = 429
    type = "rate_limit_error"


class Unauthorized(SageError):
    """The API key is missing or wrong."""

    http_status = 401
    type = "authentication_error"


class GatewayUnreachable(SageError):
    """No gateway answers."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the second line if the first line is a heading. Omit a final period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    is_heading = lines[0].startswith("Error(s) in loading") and len(lines) > 1  # torch: line 2 names the tensor
    return lines[is_heading].rstrip(".")
