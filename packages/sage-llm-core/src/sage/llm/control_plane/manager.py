"""ControlPlaneManager: the face of the control plane."""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from sage.common.errors import Conflict, NotFound
from sage.common.logs import tail_lines
from sage.common.processes import ProcessIdentity
from sage.common.settings import Settings
from sage.libs.finetune.manager import random_suffix
from sage.llm.control_plane.executors.base import Executor
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.executors.inference_executor import InferenceExecutor
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.logfile import follow, tail_offset
from sage.llm.control_plane.reconciler import Limits, Reconciler
from sage.llm.control_plane.states import SETTLED, EngineState
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import LEASE_SECONDS, EngineRecord, StaleWrite, Store
from sage.llm.control_plane.types import (
    DEFAULT_MODEL,
    EngineEvent,
    EngineKind,
    EngineView,
    StartRequest,
    TrainingStep,
    Wanted,
)

logger = logging.getLogger(__name__)
_ACTOR = "user"
#: A write that met another one is decided anew this often.
_ATTEMPTS = 5


class ControlPlaneManager:
    """Starts, stops, resumes and describes engines; a background task reconciles."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._launcher = LocalLauncher()
        self._executors: Mapping[EngineKind, Executor] = {
            EngineKind.LLM: InferenceExecutor(EngineKind.LLM, self._launcher),
            EngineKind.EMBEDDING: InferenceExecutor(EngineKind.EMBEDDING, self._launcher),
            EngineKind.FINETUNE: FinetuneExecutor(),
        }
        self._store = Store(open_database(settings.store_url))
        limits = Limits(settings.engine_start_seconds, settings.stop_seconds)
        self._reconciler = Reconciler(self._store, self._executors, limits)
        self._token = secrets.token_hex(8)
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to reconcile; engines that live are adopted, those that died are settled."""
        self._loop = asyncio.create_task(self._reconcile())

    async def close(self) -> None:
        """Stop reconciling; the engines live on."""
        if self._loop:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        with contextlib.suppress(SQLAlchemyError):
            await asyncio.to_thread(self._store.release_lease, self._token)

    async def start_engine(self, request: StartRequest) -> EngineView:
        """Check a request, keep it, and return the engine, queued; raises SageError, and then nothing was kept."""
        engine_id = f"engine-{random_suffix()}"
        options = await self._executors[request.engine_kind].prepare(engine_id, request)
        now = datetime.now(UTC)
        record = EngineRecord(
            id=engine_id,
            kind=request.engine_kind,
            model=request.model,
            name=request.name or request.model,
            options=options,
            wanted=Wanted.RUNNING,
            state=EngineState.QUEUED,
            reason=None,
            node=self._launcher.node,
            port=None,
            requested_port=request.port,
            version=1,
            created_at=now,
            state_at=now,
        )
        await asyncio.to_thread(self._store.add, record, _ACTOR)
        self._changed.set()
        return await self._view(record)

    async def stop_engine(self, engine_id: str, *, force: bool = False) -> EngineView:
        """Ask an engine to stop and return it at once; one that has ended already is returned as it is."""
        for _ in range(_ATTEMPTS):
            engine = await asyncio.to_thread(self._store.get, engine_id)
            if engine.state in SETTLED:
                return await self._view(engine)
            with contextlib.suppress(StaleWrite):
                engine = await asyncio.to_thread(self._store.want, engine, Wanted.STOPPED)
                if force:
                    await self._executors[engine.kind].request_stop(engine, force=True)
                self._changed.set()
                return await self._view(engine)
        raise _busy(engine_id)

    async def resume_engine(self, engine_id: str) -> EngineView:
        """Queue an engine again that was stopped or has failed.

        Raises Conflict where it runs, is completed, or cannot go on.
        """
        for _ in range(_ATTEMPTS):
            engine = await asyncio.to_thread(self._store.get, engine_id)
            if engine.state not in (EngineState.STOPPED, EngineState.FAILED):
                raise Conflict(
                    code="not_resumable",
                    message=f"{engine_id} is {engine.state}: only what is stopped or failed can be resumed.",
                    hint=f"`sage llm engine status {engine_id}` shows it.",
                )
            await self._executors[engine.kind].check_resumable(engine)
            with contextlib.suppress(StaleWrite):
                engine = await asyncio.to_thread(self._store.want, engine, Wanted.RUNNING)
                engine = await asyncio.to_thread(self._store.move, engine, EngineState.QUEUED, _ACTOR)
                self._changed.set()
                return await self._view(engine)
        raise _busy(engine_id)

    async def remove_engine(self, engine_id: str) -> None:
        """Forget an engine that has ended, with its run directory or log; what it wrote to its output folder stays.

        Raises Conflict where it has not ended.
        """
        engine = await asyncio.to_thread(self._store.get, engine_id)
        if engine.state not in SETTLED:
            raise Conflict(
                code="still_running",
                message=f"{engine_id} is {engine.state}.",
                hint=f"Stop it first: `sage llm engine stop {engine_id}`.",
            )
        with contextlib.suppress(NotFound):  # its run directory was removed by hand
            await self._executors[engine.kind].remove(engine)
        await asyncio.to_thread(self._store.remove, engine)

    async def list_engines(self) -> list[EngineView]:
        """Return all engines, oldest first."""
        engines = await asyncio.to_thread(self._store.list)
        return list(await asyncio.gather(*(self._view(engine) for engine in engines)))

    async def get_engine(self, engine_id: str) -> EngineView:
        """Return an engine; raises NotFound."""
        return await self._view(await asyncio.to_thread(self._store.get, engine_id))

    async def get_logs(self, engine_id: str, tail: int = 100) -> list[str]:
        """Return the last lines of an engine's log."""
        return await asyncio.to_thread(tail_lines, await self._log_path(engine_id), tail)

    async def follow_logs(self, engine_id: str, offset: int) -> AsyncIterator[bytes]:
        """Yield an engine's log from a byte on, and what is added, until the engine has ended."""

        async def has_ended() -> bool:
            return (await asyncio.to_thread(self._store.get, engine_id)).state in SETTLED

        async for chunk in follow(await self._log_path(engine_id), offset, has_ended):
            yield chunk

    async def log_offset(self, engine_id: str, tail: int) -> int:
        """Return the byte of an engine's log at which its last `tail` lines begin."""
        return await asyncio.to_thread(tail_offset, await self._log_path(engine_id), tail)

    async def get_events(self, engine_id: str, after: int = 0) -> list[EngineEvent]:
        """Return an engine's transitions behind the one of id `after`; raises NotFound."""
        await asyncio.to_thread(self._store.get, engine_id)
        return list(await asyncio.to_thread(self._store.events, engine_id, after))

    async def get_training_steps(self, engine_id: str) -> list[TrainingStep]:
        """Return the optimizer steps of a training run, oldest first; none for an engine that does not train."""
        engine = await asyncio.to_thread(self._store.get, engine_id)
        return await self._executors[engine.kind].training_steps(engine)

    async def find_engine(self, model: str, kind: EngineKind) -> EngineRecord:
        """Return the engine that a request for `model` means: by id, name or model, the newest that is active.

        Raises NotFound, which names those that there are.
        """
        engines = await asyncio.to_thread(self._store.list, active_only=True)
        active = [engine for engine in reversed(engines) if engine.kind is kind and engine.state != EngineState.STOPPING]
        if model == DEFAULT_MODEL:
            running = [engine for engine in active if engine.state is EngineState.RUNNING]
            found = max(running, key=lambda engine: engine.state_at, default=active[0] if active else None)
        else:
            found = next((engine for engine in active if model in (engine.id, engine.name, engine.model)), None)
        if found is None:
            wanted = "MODEL" if model == DEFAULT_MODEL else model
            names = ", ".join(dict.fromkeys(engine.name for engine in active)) or "none"
            raise NotFound(
                code="model_not_found",
                message=f"No engine of kind {kind} serves the model '{model}'; there are: {names}.",
                hint=f"Start one: `sage llm engine start {wanted} --engine-kind {kind}`.",
                param="model",
            )
        return found

    async def _log_path(self, engine_id: str) -> Path:
        engine = await asyncio.to_thread(self._store.get, engine_id)
        return self._executors[engine.kind].log_path(engine)

    async def _view(self, engine: EngineRecord) -> EngineView:
        executor = self._executors[engine.kind]
        process = await asyncio.to_thread(executor.process, engine)
        return EngineView(
            id=engine.id,
            kind=engine.kind,
            model=engine.model,
            name=engine.name,
            state=engine.state,
            reason=engine.reason,
            port=engine.port if engine.state not in SETTLED else None,
            pid=process.pid if process else None,
            memory_bytes=await asyncio.to_thread(process.memory_bytes) if process else None,
            created_at=engine.created_at,
            state_at=engine.state_at,
            log_path=str(executor.log_path(engine)),
            **await executor.describe(engine),
        )

    async def _reconcile(self) -> None:
        me, has_lease = ProcessIdentity.of(os.getpid()), True
        while True:
            self._changed.clear()
            try:
                had, has_lease = has_lease, await asyncio.to_thread(
                    self._store.hold_lease, self._token, self._launcher.node, me
                )  # fmt: skip
                if has_lease:
                    await self._reconciler.tick()
                elif had:
                    logger.warning("another control plane reconciles this database; waiting up to %.0f s", LEASE_SECONDS)
            except Exception:
                logger.exception("a tick failed; the next one tries again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._settings.reconcile_seconds)


def _busy(engine_id: str) -> Conflict:
    return Conflict(code="busy", message=f"{engine_id} is being changed by others.", hint="Try again.")
