"""Start engines that serve the checkpoints or the result of a training run, and load newer versions into these engines."""

import asyncio
import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage.common.errors import ModelError, NotFound, SageError
from sage.common.ids import random_suffix
from sage.llm.client.types import SETTLED, DesiredState, EngineKind, EngineState, StartRequest
from sage.llm.control_plane.creation import new_engine
from sage.llm.control_plane.executors.base import Executor
from sage.llm.control_plane.executors.placement import like_its_base, placement
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.served_run import ServedRun
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.store.store import StaleWrite, Store
from sage.llm.control_plane.writing import Writer

logger = logging.getLogger(__name__)
#: If an OSError prevents the publication of a result, SAGE tries again for this number of seconds.
_RETRY_SECONDS = 60.0


class Publisher:
    """Executes the action Publish. An action that failed can be executed again."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        executors: Mapping[EngineKind, Executor],
        routing: RoutingTable,
        write: Writer,
    ) -> None:
        self._store, self._pool, self._executors = store, pool, executors
        self._routing, self._write = routing, write
        #: key: run id; value: time.monotonic() of the first failure to publish the result
        self._failing: dict[str, float] = {}

    async def publish(self, run: EngineRecord, step: int | None) -> None:
        """Serve a version of a run: the checkpoint of `step`, or the result if `step` is None.

        If this method raises StaleWrite or OSError, the caller must call this method again. If the result still cannot be
        served a minute after the first OSError, this method logs a warning and returns, so that the run can end.
        """
        serve = ServedRun.of(run)
        assert serve
        try:
            model = await self._version(run, step)
            engine = await self._existing(serve)
            if serve.engine_id and engine is None:  # a user has removed the engine
                await self._revise(run, serve=None)
            elif engine is None or (step is None and _has_merged(engine)):
                await self._start(run, serve, model, step, engine)
            elif _has_merged(engine):
                message = f"{engine.id} has merged an earlier version into its base model."
                raise ModelError(code="adapter_unfit", message=message)
            else:
                await self._replace(engine, model, is_result=step is None)
                await self._revise(run, serve=serve.published(step, engine.id).model_dump())
        except (SageError, ValueError) as error:  # ValueError: the folder's path is not allowed as the name of a model
            await self._give_up(run, serve, step, error)
        except OSError as error:
            if step is not None or not self._has_failed_for_long(run):
                raise
            await self._give_up(run, serve, step, error)
        self._failing.pop(run.id, None)

    def _has_failed_for_long(self, run: EngineRecord) -> bool:
        since_seconds = self._failing.setdefault(run.id, time.monotonic())
        return time.monotonic() - since_seconds >= _RETRY_SECONDS

    async def _give_up(self, run: EngineRecord, serve: ServedRun, step: int | None, error: Exception) -> None:
        logger.warning(
            "training run %s: %s cannot be served: %s",
            run.id,
            f"the checkpoint of step {step}" if step else "the result",
            error,
        )
        await self._revise(run, serve=serve.published(step, serve.engine_id).model_dump())

    async def _version(self, run: EngineRecord, step: int | None) -> str:
        if step is None:
            folder = Path(run.options["output_dir"])
        else:
            folder = await self._executors[EngineKind.FINETUNE].publish_checkpoint(run, step)
        return str(await asyncio.to_thread(folder.resolve))

    async def _existing(self, serve: ServedRun) -> EngineRecord | None:
        if serve.engine_id is None:
            return None
        try:
            return await self._pool.run(self._store.get, serve.engine_id)
        except NotFound:
            return None

    async def _start(
        self, run: EngineRecord, serve: ServedRun, model: str, step: int | None, replaced: EngineRecord | None
    ) -> None:
        """Create an engine that serves the run.

        replaced: engine that serves an earlier version, or None. The same transaction requests the stop of this engine.
        """
        engine_id = f"engine-{random_suffix()}"
        request = StartRequest(model=model, name=serve.name, idle_stop_minutes=run.idle_stop_minutes)
        prepared = await self._executors[EngineKind.LLM].prepare(engine_id, request)
        engine = new_engine(engine_id, run.node, request, prepared, run.restart_policy)
        servers = await self._pool.run(self._store.servers, engine.node)
        engine = await asyncio.to_thread(like_its_base, engine, servers, {})
        placed = await asyncio.to_thread(placement, engine)
        if step is not None and placed["adapter"] is None:
            message = f"The run's checkpoints cannot be loaded as adapters. The only possible form is: {placed['form']}."
            raise ModelError(code="adapter_unfit", message=message)
        noted = serve.published(step, engine.id).model_dump()
        added = await self._write(self._store.add, engine, notes=(run, {"serve": noted}), replaces=replaced)
        self._routing.apply(added, None)
        logger.info("training run %s: engine %s serves this run as '%s'", run.id, added.id, added.name)

    async def _replace(self, engine: EngineRecord, model: str, *, is_result: bool) -> None:
        if engine.state is EngineState.VALIDATING:  # the validation in progress checks the older version
            raise StaleWrite(engine.id)
        values: dict[str, Any] = {"model": model}
        if engine.state is EngineState.FAILED and is_result and engine.desired is DesiredState.RUNNING:
            write = functools.partial(self._store.transition, engine, EngineState.VALIDATING)
            self._routing.apply(await self._write(write, restarts=0, **values), None)
            return
        if engine.adapter is not None and engine.state not in SETTLED:
            values |= {"adapter": model, "revision": engine.revision + 1, "reason": None}
        await self._revise(engine, **values)

    async def _revise(self, engine: EngineRecord, **values: Any) -> None:
        await self._write(functools.partial(self._store.revise, engine), **values)


def _has_merged(engine: EngineRecord) -> bool:
    """Return whether an engine serves a version that is merged into the base model."""
    return engine.adapter is None and engine.state in (EngineState.STARTING, EngineState.RUNNING)
