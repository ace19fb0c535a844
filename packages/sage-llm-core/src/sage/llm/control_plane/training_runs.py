"""Change the options of training runs, and fork training runs."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from sage.common.ids import random_suffix
from sage.common.training import TrainingOptions
from sage.llm.client.run_types import ForkRequest, TrainingChangeView
from sage.llm.client.types import EngineKind, EngineState, EngineView, StartRequest
from sage.llm.control_plane.creation import new_engine
from sage.llm.control_plane.executors.base import Executor
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.refusals import no_run, still_validating
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord


class TrainingRuns:
    """Base class of ControlPlaneManager with the methods for training runs. ControlPlaneManager sets the attributes."""

    _node: str
    _executors: Mapping[EngineKind, Executor]
    _own: Callable[[str], Awaitable[tuple[EngineRecord, ServerRecord | None]]]
    _add: Callable[[EngineRecord], Awaitable[EngineView]]

    async def change_training(self, engine_id: str, options: TrainingOptions) -> TrainingChangeView:
        """Request that a training run uses other options from its next step on. This method does not wait for that step.

        If the run has no process, the options are used when the run is resumed. Raises Conflict or ConfigError.
        """
        engine, executor = await self._run(engine_id)
        if engine.state is EngineState.VALIDATING:  # the run directory possibly does not exist yet
            raise still_validating(engine_id)
        return TrainingChangeView(engine_id=engine_id, revision=await executor.change_options(engine, options))

    async def fork_engine(self, engine_id: str, request: ForkRequest) -> EngineView:
        """Start a run that continues from a checkpoint of another run. Return the new engine in state `validating`.

        The files of the checkpoint are linked or copied, so the new run keeps them if the other run removes the checkpoint.
        Raises SageError.
        """
        parent, executor = await self._run(engine_id)
        fork_id = f"engine-{random_suffix()}"
        options = {**request.options, "output_dir": request.output_dir}
        config = await executor.fork(parent, fork_id, request.step, options)
        try:
            start = StartRequest(
                model=parent.model, engine_kind=EngineKind.FINETUNE, name=request.name or parent.name,
                metadata=dict(parent.metadata), priority=parent.priority, backend=parent.backend,
                options={name: value for name, value in config.items() if name != "base_model"},
            )  # fmt: skip
            prepared = await executor.prepare(fork_id, start)
            record = new_engine(fork_id, self._node, start, prepared, parent.restart_policy, None, parent.on_busy)
            record = replace(record, devices=parent.devices, max_restarts=parent.max_restarts)
            return await self._add(record)
        except BaseException:
            await executor.discard(fork_id)
            raise

    async def _run(self, engine_id: str) -> tuple[EngineRecord, FinetuneExecutor]:
        """Return a training run of this node, and its executor. Raises Conflict if the engine is not a training run."""
        engine, _ = await self._own(engine_id)
        executor = self._executors[engine.kind]
        if not isinstance(executor, FinetuneExecutor):
            raise no_run(engine)
        return engine, executor
