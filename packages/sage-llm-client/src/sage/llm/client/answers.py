"""Read the gateway's answers."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from sage.common.error_codes import error_class
from sage.common.errors import GatewayUnreachable, SageError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


def parse(text: str) -> Any:
    """Return the value of a JSON text. Raises GatewayUnreachable if the text is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise not_a_gateway("the answer is not JSON") from error


def as_model(model: type[M]) -> Callable[[httpx.Response], M]:
    """Return a function that reads an answer whose content is one instance of `model`."""
    return lambda response: model.model_validate(parse(response.text))


def as_list(model: type[M]) -> Callable[[httpx.Response], list[M]]:
    """Return a function that reads an answer whose field `data` is a list of instances of `model`."""
    return lambda response: [model.model_validate(item) for item in parse(response.text)["data"]]


def read(response: httpx.Response, reader: Callable[[httpx.Response], T]) -> T:
    """Return what `reader` reads from an answer.

    Raises the SageError that the answer reports, or GatewayUnreachable if `reader` cannot read the answer.
    """
    raise_for_error(response)
    try:
        return reader(response)
    except (ValueError, KeyError, TypeError, IndexError) as error:  # pydantic's ValidationError is a ValueError
        raise not_a_gateway("the answer has unexpected content") from error


def raise_for_error(response: httpx.Response) -> None:
    """Raise a SageError if the HTTP status reports an error. The caller must have read the body."""
    if response.is_success:
        return
    try:
        error = response.json()["error"]
        raise rebuild_error(error, response.status_code)
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"The gateway answered with HTTP status {response.status_code} and gave no reason."
        raise error_class("unknown", response.status_code)(code="unknown", message=message) from None


def rebuild_error(error: dict[str, Any], http_status: int | None = None) -> SageError:
    """Return the SageError for an error object in OpenAI's format."""
    code, hint = error.get("code") or "unknown", error.get("hint") or ""
    # The gateway appends the hint to the message, because some clients show only the message.
    message = error["message"].removesuffix(hint).rstrip()
    return error_class(code, http_status)(code=code, message=message, hint=hint, param=error.get("param"))


def not_a_gateway(problem: str) -> GatewayUnreachable:
    """Return the error for an answer that does not come from a gateway of this version."""
    return GatewayUnreachable(
        code="not_a_gateway",
        message="The program at the gateway's address is not a SAGE gateway, or is a gateway of another version: "
        f"{problem}.",
        hint="`sage gateway status` shows the gateway's address; SAGE_GATEWAY_HOST and SAGE_GATEWAY_PORT set the address.",
    )


def unreachable(base_url: str, error: httpx.HTTPError) -> GatewayUnreachable:
    """Return the error for a gateway that does not answer."""
    if isinstance(error, httpx.ReadTimeout):
        return GatewayUnreachable(
            code="gateway_slow",
            message=f"The gateway at {base_url} accepted the request, but did not answer in time.",
            hint="The request is possibly still in progress: check `sage llm engine list` before you retry.",
        )
    return GatewayUnreachable(
        code="gateway_unreachable",
        message=f"The gateway at {base_url} does not answer ({type(error).__name__}).",
        hint="`sage gateway start` starts the gateway; `sage gateway status` shows its address.",
    )
