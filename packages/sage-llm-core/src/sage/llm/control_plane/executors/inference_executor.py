"""The executor for engines of kind llm and embedding, which are inference servers."""

import asyncio
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sage.common.errors import ConfigError
from sage.common.ids import random_suffix
from sage.common.paths import get_user_paths
from sage.common.processes import ProcessSpec
from sage.common.server_keys import KEY_VARIABLE, server_key
from sage.common.training import TrainingStep
from sage.common.validation import validated
from sage.libs.models.embedding import check_embeds
from sage.libs.models.resolve import ModelSource, resolve_model
from sage.llm.client.types import SETTLED, EngineKind, Reason, StartRequest
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.executors.adapter_client import AdapterClient
from sage.llm.control_plane.executors.base import Observed, Prepared, Tokens, planned_server, server_id_of
from sage.llm.control_plane.executors.exit_message import exit_message, log_hint
from sage.llm.control_plane.executors.health_request import get
from sage.llm.control_plane.executors.placement import placement
from sage.llm.control_plane.launchers.base import Launcher, ProcessObservation
from sage.llm.control_plane.refusals import not_training
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState, suffix_of

_HEALTH_SECONDS = 2.0
#: Environment variable with the token of a server. Servers of SAGE return this token in their answer to a health check.
_ENGINE_VARIABLE = "SAGE_ENGINE_ID"


class _Answer(NamedTuple):
    """The answer of a server to a health check."""

    observed: Observed
    tokens: Mapping[str, Tokens] = {}  #: keys: model names, "" for a model without a name; values: token counts


class InferenceExecutor:
    """Runs inference servers with the commands of their backends."""

    def __init__(self, launcher: Launcher, adapters: AdapterClient | None = None) -> None:
        self._launcher, self._adapters = launcher, adapters or AdapterClient()
        self._answers: dict[tuple[str, str | None], asyncio.Task[_Answer]] = {}

    async def prepare(self, engine_id: str, request: StartRequest) -> Prepared:
        """Check model, backend, options and port. Raises ModelError, ConfigError or Conflict."""
        prepared = await asyncio.to_thread(_prepare, request)
        if request.port:
            await self._launcher.check_port(request.port)
        return prepared

    async def validate(self, engine: EngineRecord) -> Mapping[str, Any]:
        """Check that the model exists, and decide whether the engine can share a server. Raises ModelError."""
        return await asyncio.to_thread(placement, engine)

    async def discard(self, engine_id: str) -> None:
        """Do nothing, because `validate` creates no files."""

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict if the engine's requested port is taken, and ModelError if the engine's model no longer exists."""
        handle = self._handle(server_id_of(engine))
        if (process := (await self._launcher.observe([handle])).get(handle)) and process.alive:
            return  # the port is not checked, because the engine's running process can hold the port
        await asyncio.to_thread(resolve_model, engine.model)
        if engine.requested_port:
            await self._launcher.check_port(engine.requested_port)

    def spec(self, engine: EngineRecord, server: ServerRecord) -> ProcessSpec:
        """Return the specification of the process to launch, with the command that the backend defines."""
        backend = registry.serving(server.backend)
        given = dict(engine.options if server.options is None else server.options)
        options = validated(backend.options, given | ({"threads": engine.threads} if engine.threads else {}))
        folder = _folder(server.id)
        return ProcessSpec(
            backend.argv(server.model, server.served_name or server.model, options),
            folder / "process.lock",
            folder / "engine.log",
            env={**backend.environment(options), _ENGINE_VARIABLE: server.token, KEY_VARIABLE: server_key(server.token)},
            port=engine.requested_port or 0,
        )

    def plan_server(self, engine: EngineRecord, *, is_moved: bool = False) -> ServerRecord:
        """Return the record of a new server for an engine."""
        server_id = f"server-{random_suffix()}" if is_moved else server_id_of(engine)
        backend = registry.serving(engine.backend)
        base_name = f"{engine.internal_name}-base" if engine.adapter else engine.internal_name
        return dataclasses.replace(
            planned_server(engine, server_id, self._handle(server_id)),
            options=engine.options,
            served_name=base_name,
            shared=engine.base is not None,
            model_version=engine.base_version,
            max_adapters=backend.max_adapters(validated(backend.options, dict(engine.options))),
        )

    async def probe(self, engine: EngineRecord, server: ServerRecord, process: ProcessObservation) -> Observed:
        """Send a health check to the server if its process is alive; otherwise find out why the process exited."""
        if process.leftovers:
            return Observed(alive=True, orphaned=True, process=process)
        if process.alive:
            answer = await self._answer(server, server.address or process.address)
            tokens = answer.tokens.get(engine.served_as or "") or answer.tokens.get("")
            return dataclasses.replace(answer.observed, process=process, tokens=tokens)
        if server.state is ServerState.PLANNED:
            return Observed(alive=False, process=process)
        log = _folder(server.id) / "engine.log"
        message = await asyncio.to_thread(exit_message, "The engine's process", process.exit_code, log)
        hint = await asyncio.to_thread(log_hint, engine.id, log)
        reason = Reason(code="engine_died", message=message, hint=hint)
        return Observed(alive=False, reason=reason, process=process)

    def view_fields(self, engine: EngineRecord, observed: Observed | None) -> Mapping[str, Any]:
        """Return how the model is served, and the limits that the server reports."""
        fields = {"context_tokens": observed.context_tokens, "slots": observed.slots} if observed else {}
        return {
            "form": None if engine.state in SETTLED else _form(engine),
            "kv_cache_tokens": engine.options.get("kv_cache_tokens"),
            **fields,
        }

    async def training_steps(self, engine: EngineRecord, after: int, max_points: int | None) -> list[TrainingStep]:
        """Return no steps, because an inference engine does not train."""
        return []

    async def checkpoint_step(self, engine: EngineRecord) -> int:
        """Raise Conflict, because an inference engine does not train."""
        raise not_training(engine)

    async def request_checkpoint(self, engine: EngineRecord) -> None:
        """Raise Conflict, because an inference engine does not train."""
        raise not_training(engine)

    async def publish_checkpoint(self, engine: EngineRecord, step: int) -> Path:
        """Raise Conflict, because an inference engine does not train."""
        raise not_training(engine)

    def log_path(self, engine: EngineRecord) -> Path:
        """Return the path of the log of the engine's server."""
        return _folder(server_id_of(engine)) / "engine.log"

    async def remove(self, engine: EngineRecord) -> None:
        """Remove the files of the engine's last server: the lock file, the port file and the log."""
        await asyncio.to_thread(shutil.rmtree, _folder(server_id_of(engine)), ignore_errors=True)

    async def _answer(self, server: ServerRecord, address: str | None) -> _Answer:
        """Return the answer of a server to a health check. Concurrent calls for the same server share one request."""
        key = server.id, address
        asked = self._answers.get(key)
        if asked is None or asked.done():
            asked = self._answers[key] = asyncio.create_task(self._ask(server, address))
            asked.add_done_callback(lambda _: self._answers.pop(key, None))
        return await asyncio.shield(asked)

    async def _ask(self, server: ServerRecord, address: str | None) -> _Answer:
        backend = registry.serving(server.backend)
        key = {"Authorization": f"Bearer {server_key(server.token)}"}
        try:
            if address is None:
                return _Answer(Observed(alive=True))
            async with asyncio.timeout(_HEALTH_SECONDS):
                status, content = await get(address, backend.health_path, key)
            if not backend.is_ready_answer(server, status, content):
                return _Answer(Observed(alive=True))
            models = await self._adapters.loaded(server) if server.shared else frozenset[str]()
        except OSError:
            return _Answer(Observed(alive=True))
        limits = backend.limits(content)
        observed = Observed(alive=True, ready=True, models=models, context_tokens=_number(limits.get("context_tokens")),
                            slots=_number(limits.get("slots")), threads=_number(limits.get("threads")),
                            is_active=limits.get("is_active") is not False)  # fmt: skip
        return _Answer(observed, {name: Tokens(*numbers) for name, numbers in limits.get("tokens", {}).items()})

    def _handle(self, server_id: str) -> str:
        folder = _folder(server_id)
        return self._launcher.handle(ProcessSpec((), folder / "process.lock", folder / "engine.log"))


def _form(engine: EngineRecord) -> str | None:
    if not (engine.adapter and engine.server_id):
        return engine.form
    merge = engine.form if engine.merger_id is None else "the adapter is being merged in the background"
    return f"adapter on {engine.server_id}{f'; {merge}' if merge else ''}"


def _prepare(request: StartRequest) -> Prepared:
    model = resolve_model(request.model)
    if request.merge_in_background and (problem := _merge_problem(request, model)):
        raise ConfigError(
            code="config_invalid",
            message=f"--merge-in-background cannot be used: {problem}.",
            hint="Omit --merge-in-background.",
            param="merge_in_background",
        )
    if request.engine_kind is EngineKind.EMBEDDING:
        check_embeds(model.folder)
    backend, reason = registry.resolve(request.backend, request.engine_kind, model, request.options.get("quantize"))
    options = validated(backend.options, request.options)
    return Prepared(backend.name, options.model_dump(), backend.memory_bytes(model, options), reason)


def _merge_problem(request: StartRequest, model: ModelSource) -> str | None:
    if model.base is None:
        return f"{model.name} is not an adapter"
    if request.dedicated:
        return "with --dedicated, the adapter is merged before the engine answers"
    return "the merged model answers on another port than --port" if request.port else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _folder(server_id: str) -> Path:
    return get_user_paths().state_dir / "engines" / f"engine-{suffix_of(server_id)}"
