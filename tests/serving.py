"""Run a control plane with a small server that loads and unloads adapters through the same routes as vLLM."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
from pydantic import BaseModel

from sage.common.settings import load_settings
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import SETTLED, EngineKind, EngineState, EngineView, StartRequest
from sage.llm.control_plane.backends.base import Capabilities, ServingOptions, WorkerBackend
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT
from sage.llm.control_plane.manager import ControlPlaneManager

#: Program of the server. An answer contains the folder of the model. An adapter folder with a file `refused` is rejected.
_SERVER = """
import http.server, json, os, pathlib, socket, sys, threading, time
options, base_name, base = json.loads(sys.argv[1]), sys.argv[3], sys.argv[4]
models, sleeping = {base_name: base}, threading.Event()
time.sleep(options["start_seconds"])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def refuse(self, status, message):
        self.answer(status, {"error": {"message": message, "type": "x", "param": None, "code": "x"}})
    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": name} for name in list(models)]})
        elif self.path == "/is_sleeping":
            self.answer(200, {"is_sleeping": sleeping.is_set()})
        else:
            self.answer(200, {"engine": os.environ["SAGE_ENGINE_ID"], "slots": 4, "context_tokens": 512})
    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if self.path == "/wake_up" or self.path.startswith("/sleep?"):
            time.sleep(0.2)  # a real server also needs time to release or to allocate its memory
            sleeping.clear() if self.path == "/wake_up" else sleeping.set()
            self.answer(200, {})
        elif sleeping.is_set():
            self.refuse(500, "the server sleeps")
        elif self.path == "/v1/load_lora_adapter":
            time.sleep(options["load_seconds"])
            folder = content["lora_path"]
            if (pathlib.Path(folder) / "refused").exists():
                return self.refuse(400, "its rank is too large.")
            models[content["lora_name"]] = folder
            self.answer(200, {})
        elif self.path == "/v1/unload_lora_adapter":
            found = models.pop(content["lora_name"], None)
            self.answer(200, {}) if found else self.refuse(404, "not loaded")
        elif (folder := models.get(content["model"])) is None:
            self.refuse(404, "no such model")
        else:
            self.answer(200, {"model": content["model"], "folder": folder})
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[2]))
server.serve_forever(0.01)
"""


class HostingOptions(ServingOptions):
    """Options of the small server."""

    start_seconds: float = 0
    load_seconds: float = 0
    max_adapters: int | None = None


class HostingBackend(WorkerBackend):
    """The backend that runs the small server."""

    name: ClassVar[str] = "hosting"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset({EngineKind.LLM}), frozenset(ModelKind), hot_adapters=True)
    options: ClassVar[type[BaseModel]] = HostingOptions

    def argv(self, model: str, served_name: str, options: HostingOptions) -> tuple[str, ...]:
        arguments = (options.model_dump_json(), DESCRIPTOR_ARGUMENT, served_name, model)
        return (sys.executable, "-S", "-c", _SERVER, *arguments)

    def can_join(self, adapter: Path, base: Path) -> str | None:
        return "it uses DoRA" if (adapter / "dora").exists() else None

    def max_adapters(self, options: HostingOptions) -> int | None:
        return options.max_adapters

    def memory_bytes(self, model: ModelSource, options: Any) -> int | None:
        return None


def make_adapter(folder: Path, base: Path, *marks: str) -> Path:
    """Create a folder that SAGE recognizes as an adapter; marks: names of empty files to create in it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    for mark in marks:
        (folder / mark).touch()
    return folder


def run(test: Callable[[ControlPlaneManager], Awaitable[None]]) -> None:
    """Run a test with an open control plane."""

    async def main() -> None:
        manager = ControlPlaneManager(load_settings())
        await manager.open()
        try:
            await asyncio.wait_for(test(manager), 100)
        finally:
            await manager.close()

    asyncio.run(main())


async def until(manager: ControlPlaneManager, engine_id: str, *states: EngineState) -> EngineView:
    """Wait until an engine is in one of the states, and return the engine."""
    deadline = time.monotonic() + 60
    while (view := await manager.get_engine(engine_id)).state not in states:
        assert time.monotonic() < deadline, view
        assert view.state not in SETTLED, view
        await asyncio.sleep(0.01)
    return view


async def start(manager: ControlPlaneManager, model: Path, **fields: Any) -> EngineView:
    """Start an engine."""
    return await manager.start_engine(StartRequest(model=str(model), **{"backend": "hosting", **fields}))


async def started(manager: ControlPlaneManager, model: Path, **fields: Any) -> EngineView:
    """Start an engine, wait until it runs, and return it."""
    return await until(manager, (await start(manager, model, **fields)).id, EngineState.RUNNING)


async def answered(manager: ControlPlaneManager, model: str) -> str:
    """Send a request for `model`, and return the folder of the model that answers."""
    upstream = await manager.running(model, EngineKind.LLM, 30)
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        answer = await client.post(f"http://{upstream.address}/v1/chat/completions", json={"model": upstream.model_name})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["folder"])
