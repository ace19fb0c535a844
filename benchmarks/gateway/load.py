"""Send requests in a closed loop: each connection sends the next request when the previous answer is complete.

If the program wrk is installed, wrk sends the requests; otherwise, this file sends them.

`load.py URL CONNECTIONS SECONDS BODY_FILE` prints the figures as JSON.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httptools
import uvloop

_WRK_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format('\\n{{"requests": %d, "seconds": %f, "median_ms": %f, "p99_ms": %f, "errors": %d}}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, failed))
end
"""


@dataclass(frozen=True)
class Figures:
    """The measurements of one run."""

    requests: int
    seconds: float
    median_ms: float
    p99_ms: float
    errors: int

    @property
    def per_second(self) -> float:
        """Return the number of requests per second."""
        return self.requests / self.seconds


def name() -> str:
    """Return the name of the program that sends the requests."""
    return "wrk" if shutil.which("wrk") else "load.py"


def measure(url: str, connections: int, seconds: float, body: Path) -> Figures:
    """Send requests for `seconds` from a separate process, and return the measurements; body: file with the body."""
    if shutil.which("wrk"):
        script = body.with_suffix(".lua")
        script.write_text(_WRK_SCRIPT.format(body=body))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s", "-s", script, url]
    else:
        command = [sys.executable, __file__, url, connections, seconds, body]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return Figures(**json.loads(done.stdout.strip().splitlines()[-1]))


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, end_seconds: float, latencies: list[float], errors: list[int]) -> None:
        self._request, self._end_seconds, self._latencies, self._errors = request, end_seconds, latencies, errors
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._began_seconds = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        now_seconds = time.perf_counter()
        self._latencies.append(now_seconds - self._began_seconds)
        if self._parser.get_status_code() != 200:
            self._errors.append(self._parser.get_status_code())
        if now_seconds < self._end_seconds:
            asyncio.get_running_loop().call_soon(self._send)
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if time.perf_counter() < self._end_seconds:
            self._errors.append(0)
        self.ended.set_result(None)


async def _run(url: str, connections: int, seconds: float, body: bytes) -> Figures:
    address = urlsplit(url)
    head = f"POST {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    latencies: list[float] = []
    errors: list[int] = []
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    opened = [
        await loop.create_connection(
            lambda: _Connection(request, began + seconds, latencies, errors), "127.0.0.1", int(address.port or 80)
        )
        for _ in range(connections)
    ]
    await asyncio.gather(*(connection.ended for _, connection in opened))
    taken = time.perf_counter() - began
    latencies.sort()
    median, p99 = (latencies[int(len(latencies) * share)] * 1000 for share in (0.5, 0.99))
    return Figures(len(latencies), taken, median, p99, len(errors))


if __name__ == "__main__":
    figures = uvloop.run(_run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]).read_bytes()))
    print(json.dumps(asdict(figures)))
