"""Engines of kind llm and embedding: a server process on a port of its own."""

import asyncio
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from sage.common.identity import ProcessIdentity
from sage.common.paths import get_user_paths, private_file
from sage.common.processes import ProcessSpec
from sage.common.validation import validated
from sage.libs.models.resolve import resolve_model
from sage.llm.client.types import EngineKind, EngineState, Reason, StartRequest, TrainingStep
from sage.llm.control_plane.backends.base import Backend
from sage.llm.control_plane.backends.embedding import EmbeddingBackend
from sage.llm.control_plane.backends.transformers import TransformersBackend
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.executors.last_words import last_words
from sage.llm.control_plane.launchers.base import Launcher
from sage.llm.control_plane.store.store import EngineRecord, port_taken

BACKENDS: Mapping[EngineKind, Backend] = {
    EngineKind.LLM: TransformersBackend(),
    EngineKind.EMBEDDING: EmbeddingBackend(),
}
_HEALTH_SECONDS = 2.0
#: Tells a server which engine it is; its health check repeats it, so that no other program is taken for it.
_ENGINE_VARIABLE = "SAGE_ENGINE_ID"


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
            _listen(request.port).close()
        return options.model_dump()

    async def discard(self, engine_id: str) -> None:
        """Nothing was made."""

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict if the port it must have is taken, ModelError if its model has gone."""
        if await asyncio.to_thread(self.process, engine):
            return  # it is adopted
        await asyncio.to_thread(resolve_model, engine.model)
        if engine.requested_port:
            _listen(engine.requested_port).close()

    async def launch(self, engine: EngineRecord) -> int:
        """Start the server and return its port, on which this process listens first: no other one gets in between."""
        return await asyncio.to_thread(self._launch, engine)

    def _launch(self, engine: EngineRecord) -> int:
        options = self._backend.options.model_validate(engine.options)
        with _listen(engine.requested_port or 0) as listener:
            port, descriptor = int(listener.getsockname()[1]), listener.fileno()
            private_file(self._port_path(engine)).write_text(str(port))
            spec = ProcessSpec(
                self._backend.argv(engine.model, port, descriptor, options),
                self._lock_path(engine),
                self.log_path(engine),
                env={_ENGINE_VARIABLE: engine.id},
                pass_fds=(descriptor,),
            )
            self._launcher.launch(spec)
        return port

    async def port(self, engine: EngineRecord) -> int:
        """Return the port of a server that lives."""
        return int(await asyncio.to_thread(self._port_path(engine).read_text))

    async def observe(self, engine: EngineRecord) -> Observed:
        """Return whether the server lives and answers."""
        process = await asyncio.to_thread(self.process, engine)
        # Asked last: what is gone by now has left all that it leaves.
        if await asyncio.to_thread(self._launcher.has_leftovers, self._lock_path(engine)):
            return Observed(alive=True, orphaned=True)
        if process:
            return Observed(alive=True, ready=await self._answers(engine))
        if engine.state is EngineState.QUEUED:
            return Observed(alive=False)
        return Observed(alive=False, reason=await asyncio.to_thread(self._why_it_died, engine))

    async def _answers(self, engine: EngineRecord) -> bool:
        if engine.port is None:  # its launch was not written down yet
            return False
        try:
            answer = await self._http.get(f"http://127.0.0.1:{engine.port}{self._backend.health_path}")
            return bool(answer.status_code == httpx.codes.OK and answer.json()["engine"] == engine.id)
        except (httpx.HTTPError, ValueError, KeyError, TypeError):  # nothing, or another program
            return False

    async def request_stop(self, engine: EngineRecord, *, force: bool) -> None:
        """Send SIGTERM to the server, or SIGKILL to its session."""
        await asyncio.to_thread(self._launcher.kill if force else self._launcher.stop, self._lock_path(engine))

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

    def _why_it_died(self, engine: EngineRecord) -> Reason:
        code = self._launcher.exit_code(self._lock_path(engine))
        message = last_words("The engine's process", code, self.log_path(engine))
        return Reason(code="engine_died", message=message, hint=f"Its log: `sage llm engine logs {engine.id}`.")

    @staticmethod
    def _folder(engine: EngineRecord) -> Path:
        return get_user_paths().state_dir / "engines" / engine.id

    def _lock_path(self, engine: EngineRecord) -> Path:
        return self._folder(engine) / "process.lock"

    def _port_path(self, engine: EngineRecord) -> Path:
        return self._folder(engine) / "port"


def _listen(port: int) -> socket.socket:
    """Return a socket that listens on loopback, at a free port for 0. Raises Conflict if the port is taken."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise port_taken(port, error.strerror or str(error)) from error
    return listener
