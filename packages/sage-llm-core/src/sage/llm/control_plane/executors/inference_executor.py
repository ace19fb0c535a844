"""Engines of kind llm and embedding: a server process on a port of its own."""

import asyncio
import shutil
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from sage.common.errors import Conflict
from sage.common.logs import tail_lines
from sage.common.paths import get_user_paths
from sage.common.processes import ProcessIdentity, ProcessSpec
from sage.common.validation import validated
from sage.libs.models.resolve import resolve_model
from sage.llm.control_plane.backends.base import Backend
from sage.llm.control_plane.backends.embedding import EmbeddingBackend
from sage.llm.control_plane.backends.transformers import TransformersBackend
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import Launcher
from sage.llm.control_plane.store.store import EngineRecord
from sage.llm.control_plane.types import EngineKind, Reason, StartRequest, TrainingStep

BACKENDS: Mapping[EngineKind, Backend] = {
    EngineKind.LLM: TransformersBackend(),
    EngineKind.EMBEDDING: EmbeddingBackend(),
}
_HEALTH_SECONDS = 2.0


class InferenceExecutor:
    """Runs the backend of a kind."""

    def __init__(self, kind: EngineKind, launcher: Launcher) -> None:
        self._backend = BACKENDS[kind]
        self._launcher = launcher
        self._http = httpx.AsyncClient(timeout=_HEALTH_SECONDS, trust_env=False)

    async def prepare(self, engine_id: str, request: StartRequest) -> dict[str, Any]:
        """Check model, options and port. Raises ModelError, ConfigError or Conflict."""
        options = validated(self._backend.options, request.options)
        await asyncio.to_thread(resolve_model, request.model)
        if request.port:
            _check_port(request.port)
        return options.model_dump()

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict where the port it must have is taken, ModelError where its model has gone."""
        await asyncio.to_thread(resolve_model, engine.model)
        if engine.requested_port:
            _check_port(engine.requested_port)

    async def launch(self, engine: EngineRecord) -> int:
        """Start the server, unless it lives already; return its port."""
        port_file = self._folder(engine) / "port"
        if self.process(engine):
            return int(port_file.read_text())
        port = engine.requested_port or _free_port()
        port_file.parent.mkdir(parents=True, exist_ok=True)
        port_file.write_text(str(port))
        options = self._backend.options.model_validate(engine.options)
        argv = self._backend.argv(engine.model, port, options)
        log = self.log_path(engine)
        await asyncio.to_thread(self._launcher.launch, ProcessSpec(argv, self._lock_path(engine), log))
        return port

    async def observe(self, engine: EngineRecord) -> Observed:
        """Return whether the server lives and answers."""
        if self.process(engine) is None:
            return Observed(alive=False, reason=Reason(code="engine_died", message=self._last_words(engine)))
        if engine.port is None:  # its launch was not written down yet
            return Observed(alive=True)
        try:
            answer = await self._http.get(f"http://127.0.0.1:{engine.port}{self._backend.health_path}")
        except httpx.HTTPError:
            return Observed(alive=True)
        return Observed(alive=True, ready=answer.status_code == httpx.codes.OK)

    async def request_stop(self, engine: EngineRecord, *, force: bool) -> None:
        """Send SIGTERM, or SIGKILL."""
        if process := self.process(engine):
            self._launcher.signal(process, signal.SIGKILL if force else signal.SIGTERM)

    def process(self, engine: EngineRecord) -> ProcessIdentity | None:
        """Return the server's process, or None."""
        return self._launcher.observe(self._lock_path(engine))

    async def describe(self, engine: EngineRecord) -> dict[str, Any]:
        """Nothing beyond what every engine has."""
        return {}

    async def training_steps(self, engine: EngineRecord) -> list[TrainingStep]:
        """It does not train."""
        return []

    def log_path(self, engine: EngineRecord) -> Path:
        """Return where the server's output goes."""
        return self._folder(engine) / "engine.log"

    async def remove(self, engine: EngineRecord) -> None:
        """Remove lock and log."""
        await asyncio.to_thread(shutil.rmtree, self._folder(engine), ignore_errors=True)

    def _last_words(self, engine: EngineRecord) -> str:
        """Return the last line that the server said, which is its own account of why it ended."""
        lines = [line for line in tail_lines(self.log_path(engine), 20) if line.strip()]
        return f"The engine's process ended: {lines[-1] if lines else 'it said nothing.'}"

    @staticmethod
    def _folder(engine: EngineRecord) -> Path:
        return get_user_paths().state_dir / "engines" / engine.id

    def _lock_path(self, engine: EngineRecord) -> Path:
        return self._folder(engine) / "process.lock"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Conflict(
                code="port_taken",
                message=f"Port {port} cannot be used: {error.strerror}.",
                hint="Give another --port, or none for a free one.",
                param="port",
            ) from error
