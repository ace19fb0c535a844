"""Run a small HTTP server in the test's process that answers like a gateway."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from engine_views import engine_view

from sage.common import errors

EVENT = {
    "engine_id": "engine-a", "kind": "transition", "at": "2026-01-01T00:00:00Z", "before": "queued", "after": "starting",
    "actor": "user", "reason": "",
}  # fmt: skip

ROUTE = {
    "name": "org/a", "engines": [{"engine": "b", "weight": 9}], "fallback": None, "updated_at": "2026-01-01T00:00:00Z",
}  # fmt: skip


def sse(*ids: int) -> str:
    return "".join(f"id: {i}\nevent: transition\ndata: {json.dumps({'id': i, **EVENT})}\n\n" for i in ids)


class Gateway(BaseHTTPRequestHandler):
    """Answers the client's calls with fixed values."""

    broken: set[str]
    asked: list[str]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.asked.append(self.path)
        if "follow=true" in query or (path.endswith("/events") and "engines" in path):
            self.send_stream(path, query)
        elif path.endswith("/logs"):
            self.send(200, b"one\ntwo\n")
        elif path.endswith("engine-html"):
            self.send(200, b"<html>")
        elif path.endswith("engine-unknown"):
            error = errors.NotFound(code="engine_not_found", message="No engine.", hint="List them.", param="engine_id")
            self.send_json(404, error.body())
        else:
            self.send_json(200, self.answers(query).get(path, engine_view().model_dump(mode="json")))

    def answers(self, query: str) -> dict[str, Any]:
        page = {"data": [engine_view().model_dump(mode="json")], "first_id": "engine-a", "last_id": "engine-a"}
        device = {"node": "n", "kind": "cpu", "index": 0, "name": "x", "memory_total_bytes": 2, "memory_used_bytes": 1}
        backend = {
            "name": "x", "kinds": ["llm"], "formats": ["full"], "devices": ["cpu"], "hot_adapters": True, "sleep": False,
            "has_environment": False, "is_installed": True, "version": "1",
        }  # fmt: skip
        return {
            "/v1/management/engines": {**page, "has_more": "after" not in query and "limit=1&" not in query},
            "/v1/management/engines/engine-odd": {"id": 5},
            "/v1/management/engines/engine-a/training": {"data": [{"step": 1, "loss": 2.0}]},
            "/v1/management/events": {"data": [{"id": 1, **EVENT}], "last_id": 1, "has_more": False},
            "/v1/management/gpu": {"data": [device]},
            "/v1/management/queue": {"data": [engine_view().model_dump(mode="json")]},
            "/v1/management/routes": {"data": [ROUTE]},
            "/v1/management/routes/org%2Fa": ROUTE,
            "/v1/management/backends": {"data": [backend]},
            "/v1/models": {"data": [{"id": "m"}]},
            "/health": {"service": "sage-gateway"},
        }

    def send_stream(self, path: str, query: str) -> None:
        """Send a stream. With `follow`, the first answer of each path is cut off before its end."""
        begin = int(query.rpartition("=")[2]) if "offset=" in query else 0
        after = int(query.partition("after=")[2].partition("&")[0] or 0)
        whole, first = (
            ("one\nälpha\nend"[begin:], "one\näl") if path.endswith("/logs") else (sse(*range(after + 1, 6)), sse(1, 2))
        )
        headers = {"X-Log-Offset": str(begin)}
        if path in self.broken or "follow=false" in query:
            self.send(200, whole.encode(), headers)
        else:
            self.broken.add(path)
            self.send(200, first.encode(), headers, length=len(whole.encode()) + 1)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if body.get("stream"):
            parts = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
            if body["model"] == "dies":
                parts.append(errors.EngineError(code="engine_died", message="It died.", hint="See its log.").body())
            end = "data: [DONE]\n\n" if body["model"] == "m" else ""
            self.send(200, ("".join(f"data: {json.dumps(part)}\n\n" for part in parts) + end).encode())
        elif self.path.endswith("estimate"):
            amounts = {"parts": {"weights": 3}, "total_bytes": 3, "least_bytes": 2, "devices": [], "fits": True}
            self.send_json(200, {"model": body["model"], "kind": "llm", "backend": "x", **amounts})
        elif self.path.endswith("completions"):
            self.send_json(200, {"choices": [{"message": {"content": "Hello"}}]})
        elif self.path.endswith("/webhooks/test"):
            self.send_json(200, {"data": [{"host": "a.example", "problem": None}]})
        else:
            self.send_json(200, engine_view().model_dump(mode="json"))

    def do_DELETE(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_json(202, {"engine_id": "engine-a", "revision": 1})

    def send_json(self, status: int, content: Any) -> None:
        self.send(status, json.dumps(content).encode())

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(length or len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def small_gateway() -> Iterator[tuple[str, list[str]]]:
    """Run the server during the block. Yield its URL, and the list of the requested paths, which grows with each request."""
    asked: list[str] = []
    handler = type("Handler", (Gateway,), {"broken": set(), "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()
