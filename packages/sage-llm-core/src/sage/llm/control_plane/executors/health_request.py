"""Send GET requests to inference servers with little CPU time, because the gateway sends them every second.

A request with httpx needs about ten times as much CPU time. Meanwhile, the event loop forwards no other requests.
"""

import asyncio
import http.client
import io
from collections.abc import Mapping

#: Maximum length of an answer.
_MAX_BYTES = 2**22


async def get(address: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Return the status and the body of the answer.  address: HOST:PORT. Raises OSError if there is no valid answer."""
    host, _, port = address.rpartition(":")
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n{fields}Connection: close\r\n\r\n".encode())
        received = bytearray()
        while piece := await reader.read(_MAX_BYTES):
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


class _Received:
    """Bytes with the method of a socket that http.client needs."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, mode: str) -> io.BytesIO:
        """Return a file with the bytes."""
        return io.BytesIO(self._content)
