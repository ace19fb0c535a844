"""Reading the body of a request within bounds, and checking that it is JSON that every part of the program can carry."""

import asyncio
import json
import re
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn, Self

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from sage.common.errors import Overloaded
from sage.llm.gateway.errors import Refusal

MAX_DEPTH = 100
#: All bodies held at once, as a multiple of the largest one allowed.
_HELD_BODIES = 8
#: A client that sends nothing for this long has lost its connection.
_SILENCE_SECONDS = 60
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BodyBudget:
    """The memory for bodies that all requests share."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of one body."""
        self.max_bytes = max_bytes
        self.left_bytes = _HELD_BODIES * max_bytes

    def body(self) -> "Body":
        """Return room for one body, given back at the end of the `with` block."""
        return Body(self)


class Body(AbstractContextManager["Body"]):
    """One request's body; reads as an ASGI `receive` afterwards."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._held_bytes = budget, 0
        self.content = b""

    def __enter__(self) -> Self:
        """Hold nothing yet."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Give the room back."""
        self._budget.left_bytes += self._held_bytes
        self._held_bytes = 0

    async def read(self, headers: Headers, receive: Receive) -> None:
        """Read everything. Raises Refusal (too large, too slow), Overloaded, or ClientDisconnect."""
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._budget.max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), _SILENCE_SECONDS)
            except TimeoutError as error:
                text = f"No byte of the body arrived for {_SILENCE_SECONDS} s."
                raise Refusal(408, "request_timeout", text) from error
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunks.append(message.get("body", b""))
            self._hold(len(chunks[-1]))
            more = message.get("more_body", False)
        self.content = b"".join(chunks)

    def _hold(self, count_bytes: int) -> None:
        if self._held_bytes + count_bytes > self._budget.max_bytes:
            raise self._too_large()
        if count_bytes > self._budget.left_bytes:
            raise Overloaded(code="too_many_requests", message="Other requests with large bodies are being answered.",
                             hint="Try again in some seconds.")  # fmt: skip
        self._held_bytes += count_bytes
        self._budget.left_bytes -= count_bytes

    def _too_large(self) -> Refusal:
        limit_mb = self._budget.max_bytes // 1_000_000
        return Refusal(413, "request_too_large", f"The body is larger than {limit_mb} MB.",
                       "Send less, or raise the setting max_request_mb.")  # fmt: skip


def parse_json(body: bytes) -> Any:
    """Return what a body says. Raises Refusal if it is not JSON, nested too deeply, or text that UTF-8 cannot write."""
    try:
        text = body.decode()
        content = json.loads(text, parse_constant=_no_number)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _too_deep() from error
    except UnicodeEncodeError as error:
        message = "The body holds half of a surrogate pair (a broken emoji, for example)."
        raise Refusal(400, "invalid_unicode", message, "Send whole characters.") from error
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    if _is_deeper(content, MAX_DEPTH):
        raise _too_deep()
    return content


def _too_deep() -> Refusal:
    return Refusal(400, "json_too_deep", f"The body is nested more than {MAX_DEPTH} levels deep.")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_deeper(content: Any, limit: int) -> bool:
    level = [content]
    for _ in range(limit + 1):
        level = [
            child
            for parent in level if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent) if isinstance(child, (dict, list))
        ]  # fmt: skip
        if not level:
            return False
    return True
