"""Carry out the actions for adapters that are merged in the background."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Mapping

from sage.common.errors import NotFound, SageError
from sage.common.ids import random_suffix
from sage.common.validation import validated
from sage.libs.models.resolve import resolve_model
from sage.llm.client.types import EngineKind, EngineState, OnBusy, RestartPolicy
from sage.llm.control_plane.actions import EndMerge, Merge, StartMerge, SwapServers
from sage.llm.control_plane.backends import environments, registry
from sage.llm.control_plane.executors.adapter_client import AdapterClient
from sage.llm.control_plane.executors.base import Executor, Observed, server_id_of
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.writing import Writer

logger = logging.getLogger(__name__)
#: Value of `EngineRecord.form` for an engine whose adapter was merged in the background.
MERGED = "merged in the background"


class Merger:
    """Starts and removes mergers, and swaps the servers of a merger and an engine.

    A merger is a temporary engine that merges the adapter of another engine into the base model.
    """

    def __init__(
        self,
        store: Store,
        pool: Pool,
        executors: Mapping[EngineKind, Executor],
        adapters: AdapterClient,
        routing: RoutingTable,
        write: Writer,
    ) -> None:
        self._store, self._pool, self._executors = store, pool, executors
        self._adapters, self._routing, self._write = adapters, routing, write

    async def act(self, action: Merge, observed: Observed | None) -> None:
        """Carry out an action. Raises StaleWrite if an engine was changed meanwhile."""
        match action:
            case StartMerge(engine):
                await self._start(engine, observed)
            case SwapServers():
                await self._swap(action)
            case EndMerge(engine):
                await self._end(engine, await self._problem(engine.merger_id or ""))

    async def remove(self, merger: EngineRecord) -> None:
        """Remove a merger that has stopped, and the files of its server if no other engine needs these files."""
        await self._write(self._store.remove, merger)
        self._routing.forget(merger.id)
        if not await self._pool.run(self._store.is_server_needed, server_id_of(merger), merger.id):
            await self._executors[merger.kind].remove(merger)

    async def _start(self, engine: EngineRecord, observed: Observed | None) -> None:
        try:
            merger = await asyncio.to_thread(_merger_of, engine, observed)
        except SageError as error:
            await self._end(engine, error.message)
            return
        await self._write(self._store.add, merger, notes=(engine, {"merger_id": merger.id}))
        logger.info(
            "%s: the temporary engine %s merges the adapter, for the backend '%s'", engine.id, merger.id, merger.backend
        )

    async def _swap(self, action: SwapServers) -> None:
        engine, merger = action.engine, action.merger
        try:
            await self._adapters.warm_up(action.merger_server, merger.served_as or "")
        except SageError as error:
            await self._end(engine, error.message)
            return
        merged, replaced = await self._write(self._store.swap_servers, engine, merger, form=MERGED)
        self._routing.apply(merged, action.merger_server)
        self._routing.apply(replaced, action.server)
        logger.info("%s: the merged model now answers requests, with the backend '%s'", engine.id, merged.backend)

    async def _problem(self, merger_id: str) -> str:
        with contextlib.suppress(NotFound):
            merger = await self._pool.run(self._store.get, merger_id)
            if merger.state is EngineState.FAILED and merger.reason:
                return f"{merger.reason.message} See `sage llm engine logs {merger_id}`"
        return f"{merger_id}, the engine that merged the adapter, was stopped"

    async def _end(self, engine: EngineRecord, problem: str) -> None:
        form = f"it could not be merged in the background: {problem.rstrip('.')}"
        logger.warning("%s: %s", engine.id, form)
        await self._write(self._store.revise, engine, merger_id=None, form=form)


def _merger_of(engine: EngineRecord, observed: Observed | None) -> EngineRecord:
    """Return the record of a new engine that merges the adapter of `engine` into the base model. Raises SageError."""
    backend, reason = registry.resolve_merged(resolve_model(engine.model))
    given = dict(engine.options)
    if observed and observed.context_tokens:
        given["context_tokens"] = observed.context_tokens
    if given.get("dtype") == "auto" and backend.name != engine.backend:
        given["dtype"] = "fp32" if environments.device() == "cpu" else "bf16"
    options = {name: value for name, value in given.items() if name in backend.options.model_fields}
    return dataclasses.replace(
        engine,
        id=(engine_id := f"engine-{random_suffix()}"),
        name=f"{engine_id}-merges-{engine.id}",
        backend=backend.name,
        backend_reason=reason,
        options=validated(backend.options, options).model_dump(),
        metadata={},
        restart_policy=RestartPolicy.NO,
        state=EngineState.VALIDATING,
        reason=None,
        server_id=None,
        requested_port=None,
        dedicated=True,
        base=None,
        base_version=None,
        adapter=None,
        form=None,
        revision=0,
        served_as=None,
        idle_stop_minutes=None,
        last_request_at=None,
        on_busy=OnBusy.FAIL,  # if too little memory is free, the merger fails, and the adapter continues to answer
        not_before=None,
        queue_rank=None,
        paused_by=None,
        least_bytes=None,
        threads=None,
        merger_id=None,
        merges=engine.id,
    )
