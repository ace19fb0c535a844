"""ControlPlaneManager: the face of the control plane."""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sage.llm.control_plane.selection import select_engine
from sqlalchemy.exc import SQLAlchemyError

from sage.common.errors import Conflict, NotFound, SageError
from sage.common.identity import ProcessIdentity
from sage.common.ids import random_suffix
from sage.common.logs import LogFile, tail_lines
from sage.common.paths import get_user_paths, private_file, private_folder
from sage.common.settings import Settings
from sage.llm.client.types import (
    SETTLED,
    SUPPORTED_ENGINE_KINDS,
    EngineEvent,
    EngineKind,
    EngineState,
    EngineView,
    Reason,
    StartRequest,
    TrainingStep,
    Wanted,
)
from sage.llm.control_plane.executors.base import Executor
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.executors.inference_executor import InferenceExecutor
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.logfile import follow
from sage.llm.control_plane.node import node_id_path, open_state_folder
from sage.llm.control_plane.reconciler import Limits, Reconciler
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import LEASE_SECONDS, EngineRecord, StaleWrite, Store

__all__ = ["SUPPORTED_ENGINE_KINDS", "ControlPlaneManager"]

logger = logging.getLogger(__name__)
_ACTOR = "user"
#: A write that met another one is decided anew this often.
_ATTEMPTS = 5
#: How often it is looked whether a log is to be cut.
_LOGS_SECONDS = 10.0


class ControlPlaneManager:
    """Starts, stops, resumes and describes engines; a background task reconciles."""

    def __init__(self, settings: Settings) -> None:
        """Open the state folder and the database. Raises ConfigError if either cannot be used."""
        self._settings = settings
        self._node = open_state_folder()
        launcher = LocalLauncher()
        self._executors: Mapping[EngineKind, Executor] = {
            EngineKind.LLM: InferenceExecutor(EngineKind.LLM, launcher),
            EngineKind.EMBEDDING: InferenceExecutor(EngineKind.EMBEDDING, launcher),
            EngineKind.FINETUNE: FinetuneExecutor(launcher),
        }
        self._store = Store(open_database(settings.store_url))
        self._store.claim(
            self._node,
            "Set SAGE_HOME to that folder, or give each its own SAGE_DATABASE_URL. "
            f"If that folder is gone, write '{{owner}}' into {node_id_path()} to take its engines over.",
        )
        look_seconds = 5 + 2 * settings.reconcile_seconds
        limits = Limits(settings.engine_start_seconds, settings.stop_seconds, look_seconds, settings.resume_engines)
        self._token = secrets.token_hex(8)
        self._reconciler = Reconciler(self._store, self._executors, limits, self._token)
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Begin to reconcile; engines that live are adopted, those that died are settled."""
        self._tasks = [asyncio.create_task(self._reconcile()), asyncio.create_task(self._bound_logs())]
        self._tasks.append(asyncio.create_task(self._discard(list(_preparing_folder().iterdir()))))

    async def close(self) -> None:
        """Stop reconciling; the engines live on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reconciler.close()
        with contextlib.suppress(SQLAlchemyError):
            await asyncio.to_thread(self._store.release_lease, self._token)

    async def start_engine(self, request: StartRequest) -> EngineView:
        """Check a request, keep it, and return the engine, queued; raises SageError, and then nothing was kept."""
        engine_id = f"engine-{random_suffix()}"
        executor = self._executors[request.engine_kind]
        # Remains if this process is killed before the engine is in the store; then the next one discards what was made.
        mark = private_file(_preparing_folder() / engine_id)
        try:
            return await self._start(engine_id, request, executor)
        finally:
            mark.unlink(missing_ok=True)

    async def _start(self, engine_id: str, request: StartRequest, executor: Executor) -> EngineView:
        options = await executor.prepare(engine_id, request)
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
            node=self._node,
            port=None,
            requested_port=request.port,
            version=1,
            created_at=now,
            state_at=now,
        )
        try:
            await asyncio.to_thread(self._store.add, record, _ACTOR)
        except Exception:
            with contextlib.suppress(SageError, OSError):
                await executor.discard(engine_id)
            raise
        self._changed.set()
        return await self._view(record)

    async def stop_engine(self, engine_id: str, *, force: bool = False) -> EngineView:
        """Ask an engine to stop and return it at once; one that has ended already is returned as it is."""
        for _ in range(_ATTEMPTS):
            engine = await asyncio.to_thread(self._store.get, engine_id)
            if engine.state in SETTLED:
                return await self._view(engine)
            wanted = Wanted.KILLED if force or engine.wanted is Wanted.KILLED else Wanted.STOPPED
            with contextlib.suppress(StaleWrite):
                engine = await asyncio.to_thread(self._store.want, engine, wanted)
                self._changed.set()
                return await self._view(engine)
        raise _busy(engine_id)

    async def resume_engine(self, engine_id: str) -> EngineView:
        """Queue an engine again that was stopped or has failed.

        Raises Conflict if it runs, is completed, or cannot go on.
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
                engine = await asyncio.to_thread(self._store.move, engine, EngineState.QUEUED, _ACTOR, wanted=Wanted.RUNNING)
                self._changed.set()
                return await self._view(engine)
        raise _busy(engine_id)

    async def remove_engine(self, engine_id: str) -> None:
        """Forget an engine that has ended, with its run directory or log; what it wrote to its output folder stays.

        Raises Conflict if it has not ended. A resume at the same time wins, or finds no engine.
        """
        for _ in range(_ATTEMPTS):
            engine = await asyncio.to_thread(self._store.get, engine_id)
            executor = self._executors[engine.kind]
            if engine.state not in SETTLED:
                raise _still_running(engine_id, f"is {engine.state}", "Stop it first: `sage llm engine stop {}`.")
            if await asyncio.to_thread(executor.process, engine):
                raise _still_running(engine_id, "still has a process", "Try again; `sage llm engine resume {}` adopts it.")
            with contextlib.suppress(StaleWrite):
                await asyncio.to_thread(self._store.remove, engine)
                try:
                    await executor.remove(engine)
                except (SageError, OSError) as error:
                    logger.warning("%s was removed, and its files were not: %s", engine_id, error)
                return
        raise _busy(engine_id)

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

    async def log_offset(self, engine_id: str, tail: int, offset: int | None = None) -> int:
        """Return the byte of an engine's log at which its last `tail` lines begin, or `offset` if the log has that byte.

        An offset beyond the end means the end, and one of what is no longer there the first byte that is.
        """
        log = LogFile(await self._log_path(engine_id))
        if offset is None:
            return await asyncio.to_thread(log.tail_offset, tail)
        start, end = await asyncio.to_thread(log.range)
        return min(max(offset, start), end)

    async def get_events(self, engine_id: str, after: int = 0) -> list[EngineEvent]:
        """Return an engine's transitions behind the one of id `after`; raises NotFound."""
        await asyncio.to_thread(self._store.get, engine_id)
        return list(await asyncio.to_thread(self._store.events, engine_id, after))

    async def get_training_steps(self, engine_id: str) -> list[TrainingStep]:
        """Return the optimizer steps of a training run, oldest first; none for an engine that does not train."""
        engine = await asyncio.to_thread(self._store.get, engine_id)
        return await self._executors[engine.kind].training_steps(engine)

    async def find_engine(self, model: str, kind: EngineKind) -> EngineRecord:
        """Return the engine that a request for `model` means, by id, name or model; it may still be starting.

        Raises NotFound, which names those that there are, or Overloaded if the only one does not respond.
        """
        engines = await asyncio.to_thread(self._store.list, active_only=True)
        return select_engine(engines, model, kind, self.is_responsive)

    def is_responsive(self, engine_id: str) -> bool:
        """Return whether an engine has answered its health checks lately; a request to one that has not may be given up."""
        return self._reconciler.silent_seconds(engine_id) < self._settings.engine_unresponsive_seconds

    async def _log_path(self, engine_id: str) -> Path:
        engine = await asyncio.to_thread(self._store.get, engine_id)
        return self._executors[engine.kind].log_path(engine)

    async def _view(self, engine: EngineRecord) -> EngineView:
        executor = self._executors[engine.kind]
        seen = await self._seen(engine, executor)
        return EngineView(
            id=engine.id,
            kind=engine.kind,
            model=engine.model,
            name=engine.name,
            state=engine.state,
            port=engine.port if engine.state not in SETTLED else None,
            created_at=engine.created_at,
            state_at=engine.state_at,
            log_path=str(executor.log_path(engine)),
            **seen,
        )

    async def _seen(self, engine: EngineRecord, executor: Executor) -> dict[str, Any]:
        """Return the fields of a view that are not in the store."""
        seen: dict[str, Any] = {"reason": engine.reason}
        try:
            if process := await asyncio.to_thread(executor.process, engine):
                seen |= {"pid": process.pid or None, "memory_bytes": await asyncio.to_thread(process.memory_bytes)}
            seen |= await executor.describe(engine)
        except Exception as error:
            logger.debug("%s cannot be described", engine.id, exc_info=error)
            seen["reason"] = engine.reason or Reason(
                code="engine_unreadable", message=f"Its files cannot be read: {type(error).__name__}: {error}."
            )
        if engine.state is EngineState.RUNNING and not self.is_responsive(engine.id):
            seconds = self._reconciler.silent_seconds(engine.id)
            seen["reason"] = Reason(
                code="engine_unresponsive",
                message=f"It has not answered for {seconds:.0f} s; requests to it are refused until it does.",
                hint=f"To restart it: `sage llm engine stop --force {engine.id}`, then `sage llm engine resume`.",
            )
        return seen

    async def _discard(self, marks: list[Path]) -> None:
        for mark in marks:
            try:
                await asyncio.to_thread(self._store.get, mark.name)
            except NotFound:
                await asyncio.gather(*(executor.discard(mark.name) for executor in self._executors.values()))
            mark.unlink(missing_ok=True)

    async def _reconcile(self) -> None:
        me, host, has_lease = ProcessIdentity.of(os.getpid()), socket.gethostname(), True
        trouble = ""
        while True:
            self._changed.clear()
            try:
                had, has_lease = has_lease, await asyncio.to_thread(self._store.hold_lease, self._token, host, me)
                trouble = ""
            except Exception as error:
                had = has_lease = False
                if repr(error) != trouble:
                    logger.warning("the database cannot be written; the next tick tries again", exc_info=error)
                trouble = repr(error)
            if has_lease:
                await self._reconciler.tick()
            elif had:
                logger.warning("another control plane reconciles this database; waiting up to %.0f s", LEASE_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._settings.reconcile_seconds)

    async def _bound_logs(self) -> None:
        """Cut the logs of engines and gateway that have grown too long."""
        limit_bytes = self._settings.log_limit_mb * 500_000  # twice: what was cut off last, and what came since
        while True:
            await asyncio.sleep(_LOGS_SECONDS)
            try:
                engines = await asyncio.to_thread(self._store.list, active_only=True)
                paths = [self._executors[engine.kind].log_path(engine) for engine in engines]
                for path in (*paths, get_user_paths().state_dir / "gateway.log"):
                    await asyncio.to_thread(LogFile(path).cut, limit_bytes)
            except (OSError, SQLAlchemyError) as error:
                logger.warning("the logs cannot be cut: %s", error)


def _preparing_folder() -> Path:
    return private_folder(get_user_paths().state_dir / "preparing")


def _busy(engine_id: str) -> Conflict:
    return Conflict(code="busy", message=f"{engine_id} is being changed by others.", hint="Try again.")


def _still_running(engine_id: str, problem: str, hint: str) -> Conflict:
    return Conflict(code="still_running", message=f"{engine_id} {problem}.", hint=hint.format(engine_id))
