"""Server-sent events on their way through: whole lines only, and an error event if the stream is cut."""

import json
from collections.abc import AsyncIterator

from sage.common.errors import SageError
from sage.llm.gateway.errors import error_body

_DONE = (b"data: [DONE]", b"data:[DONE]")
_ERROR = b'"error"'


async def relayed_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces of a stream, cut at line ends.

    Raises EOFError if the stream ends neither with [DONE] nor with an error. What stands behind the last line end is
    dropped then, so that an error event can follow.
    """
    rest, last_line = b"", b""
    async for piece in pieces:
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            last_line = next((line for line in reversed(whole.splitlines()) if line.strip()), last_line)
            yield whole + newline
    last_line = rest.strip() or last_line
    if not last_line.startswith(_DONE) and _ERROR not in last_line[:20]:
        raise EOFError("the stream was cut")
    if rest:
        yield rest


def failure_event(error: SageError) -> bytes:
    """Return the event that ends a stream with an error; the empty line ends an event that was cut."""
    return b"\n\ndata: " + json.dumps(error_body(error)).encode() + b"\n\n"
