"""A small HTTP server with vLLM's routes for sleep and wake-up."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SleepingServer(http.server.ThreadingHTTPServer):
    """Records its requests. If `ignores` is true, the server never sleeps.

    The route whose path is `fails` answers with status 500.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.is_sleeping, self.ignores, self.fails = False, False, ""
        self.requests: list[str] = []
        self.keys: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: SleepingServer

    def do_GET(self) -> None:
        self._handle({"/is_sleeping": lambda: None})

    def do_POST(self) -> None:
        self._handle({"/sleep": lambda: self._set(True), "/wake_up": lambda: self._set(False)})

    def _set(self, is_sleeping: bool) -> None:
        self.server.is_sleeping = is_sleeping and not self.server.ignores

    def _handle(self, routes: dict) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(self.path)
        self.server.keys.add(self.headers["Authorization"])
        status = 404 if path not in routes else 500 if path == self.server.fails else 200
        if status == 200:
            routes[path]()
        body = json.dumps({"is_sleeping": self.server.is_sleeping}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def sleeping_server() -> Iterator[SleepingServer]:
    """Run a server in a thread."""
    with SleepingServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
