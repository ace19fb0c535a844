"""Send GET requests to inference servers. The gateway sends such a request to each server every second.

A request with httpx would need about ten times as much CPU time. During this time, the event loop could not
forward other requests.
"""

import asyncio
import http.client
import io
import re
from collections.abc import Mapping

#: Maximum length of an answer.
_MAX_BYTES = 2**22
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


async def get(address: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Return the status and the body of the answer.  address: HOST:PORT. Raises OSError if there is no valid answer."""
    host, _, port = address.rpartition(":")
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n{fields}Connection: close\r\n\r\n".encode())
        received = bytearray()
        while not _is_complete(received) and (piece := await reader.read(_MAX_BYTES)):
            received += piece
            if len(received) > _MAX_BYTES:
                raise OSError(f"the answer of {address}{path} is longer than {_MAX_BYTES} bytes")
    finally:
        writer.close()
    try:
        response = http.client.HTTPResponse(_Received(received))  # type: ignore[arg-type]
        response.begin()
        return response.status, response.read()
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"the answer of {address}{path} is not valid: {error!r}") from None


def _is_complete(received: bytearray) -> bool:
    """Return whether an answer with the header Content-Length is complete.

    Return False for other answers, because they end when the server disconnects.
    """
    head, separator, body = received.partition(b"\r\n\r\n")
    length = _CONTENT_LENGTH.search(head) if separator else None
    return length is not None and len(body) >= int(length[1])


class _Received:
    """Received bytes with the method `makefile`, the only method of a socket that http.client calls."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, mode: str) -> io.BytesIO:
        """Return a file with the bytes."""
        return io.BytesIO(self._content)
