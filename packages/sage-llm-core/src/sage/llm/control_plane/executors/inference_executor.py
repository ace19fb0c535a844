"""Engines of kind llm and embedding: inference servers."""

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from sage.common.paths import get_user_paths
from sage.common.processes import ProcessSpec
from sage.common.training import TrainingStep
from sage.common.validation import validated
from sage.libs.models.resolve import resolve_model
from sage.llm.client.types import Reason, StartRequest
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.executors.base import Observed, Prepared, planned_server, suffix_of
from sage.llm.control_plane.executors.exit_message import exit_message
from sage.llm.control_plane.launchers.base import Launcher, ProcessObservation
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState

_HEALTH_SECONDS = 2.0
#: Environment variable with the id of the engine that a server was created for; its health check returns that id.
_ENGINE_VARIABLE = "SAGE_ENGINE_ID"


class InferenceExecutor:
    """Runs inference servers with the commands of their backends."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        # No limit of connections: servers that do not answer must not block requests to others. The prober has a limit.
        # No idle connections: httpx scans all idle connections at each request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=_HEALTH_SECONDS, limits=limits, trust_env=False)

    async def prepare(self, engine_id: str, request: StartRequest) -> Prepared:
        """Check model, backend, options and port; raises ModelError, ConfigError or Conflict."""
        prepared = await asyncio.to_thread(_prepare, request)
        if request.port:
            await self._launcher.check_port(request.port)
        return prepared

    async def validate(self, engine: EngineRecord) -> None:
        """Check that the model exists; raises ModelError."""
        await asyncio.to_thread(resolve_model, engine.model)

    async def discard(self, engine_id: str) -> None:
        """Do nothing: `validate` creates nothing."""

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict if the requested port of the engine is taken, ModelError if its model no longer exists."""
        handle = self._handle(engine.id)
        if (process := (await self._launcher.observe([handle])).get(handle)) and process.alive:
            return  # the living process is adopted
        await asyncio.to_thread(resolve_model, engine.model)
        if engine.requested_port:
            await self._launcher.check_port(engine.requested_port)

    def spec(self, engine: EngineRecord, server: ServerRecord | None) -> ProcessSpec:
        """Return the backend's process; its files are in the folder of the engine that the server was created for."""
        backend = registry.serving(engine.backend)
        options = validated(backend.options, dict(engine.options))
        folder = _folder(server.id if server else engine.id)
        return ProcessSpec(
            backend.argv(engine.model, options),
            folder / "process.lock",
            folder / "engine.log",
            env={_ENGINE_VARIABLE: folder.name},
            port=engine.requested_port or 0,
        )

    def plan_server(self, engine: EngineRecord) -> ServerRecord:
        """Return a new server that hosts only this engine."""
        return planned_server(engine, self._handle(engine.id))

    async def probe(self, engine: EngineRecord, server: ServerRecord, process: ProcessObservation) -> Observed:
        """Request the server's health, or find out why the server exited."""
        if process.leftovers:
            return Observed(alive=True, orphaned=True, process=process)
        if process.alive:
            address = server.address or process.address
            ready = address is not None and await self._answers(server, address)
            return Observed(alive=True, ready=ready, process=process)
        if server.state is ServerState.PLANNED:
            return Observed(alive=False, process=process)
        message = await asyncio.to_thread(
            exit_message, "The engine's process", process.exit_code, _folder(server.id) / "engine.log"
        )
        reason = Reason(code="engine_died", message=message, hint=f"Its log: `sage llm engine logs {engine.id}`.")
        return Observed(alive=False, reason=reason, process=process)

    def view_fields(self, engine: EngineRecord, observed: Observed | None) -> Mapping[str, Any]:
        """Return no fields: an inference engine has only the fields of every engine."""
        return {}

    async def training_steps(self, engine: EngineRecord, after: int, max_points: int | None) -> list[TrainingStep]:
        """Return no steps: an inference engine does not train."""
        return []

    def log_path(self, engine: EngineRecord) -> Path:
        """Return the path of the log of the engine's server."""
        return _folder(engine.server_id or engine.id) / "engine.log"

    async def remove(self, engine: EngineRecord) -> None:
        """Remove the files of the engine: its lock, port and log."""
        await asyncio.to_thread(shutil.rmtree, _folder(engine.id), ignore_errors=True)

    async def _answers(self, server: ServerRecord, address: str) -> bool:
        try:
            answer = await self._http.get(f"http://{address}{registry.serving(server.backend).health_path}")
            is_it = answer.status_code == httpx.codes.OK and answer.json()["engine"] == _folder(server.id).name
        except (httpx.HTTPError, ValueError, KeyError, TypeError):  # no answer, or an answer of another program
            return False
        return is_it

    def _handle(self, engine_id: str) -> str:
        folder = _folder(engine_id)
        return self._launcher.handle(ProcessSpec((), folder / "process.lock", folder / "engine.log"))


def _prepare(request: StartRequest) -> Prepared:
    model = resolve_model(request.model)
    backend = registry.resolve(request.backend, request.engine_kind, model)
    options = validated(backend.options, request.options)
    return Prepared(backend.name, options.model_dump(), backend.memory_bytes(model, options))


def _folder(record_id: str) -> Path:
    """Return the folder of a server, which is named after the engine that it was created for."""
    return get_user_paths().state_dir / "engines" / f"engine-{suffix_of(record_id)}"
