"""Create the record of a new engine."""

from datetime import UTC, datetime
from pathlib import Path

from sage.common.errors import ConfigError
from sage.llm.client.types import (
    DesiredState,
    EngineKind,
    EngineState,
    OnBusy,
    RestartPolicy,
    StartRequest,
    check_engine_name,
)
from sage.llm.control_plane.executors.base import Prepared
from sage.llm.control_plane.served_run import ServedRun
from sage.llm.control_plane.store.records import EngineRecord


def served_run(request: StartRequest) -> ServedRun | None:
    """Return how the result of a run will be served, or None if the request has no `serve`. Raises ConfigError."""
    if request.engine_kind is EngineKind.FINETUNE and request.merge_in_background:
        message = "--merge-in-background is only for engines of kind llm, not for a training run."
        hint = "Omit --merge-in-background."
        raise ConfigError(code="config_invalid", message=message, hint=hint, param="merge_in_background")
    if request.serve is None:
        if request.engine_kind is EngineKind.FINETUNE and request.idle_stop_minutes:
            message = "--idle-stop applies only to the engine that serves the run's result; a run is never idle."
            hint = "Add --serve, or omit --idle-stop."
            raise ConfigError(code="config_invalid", message=message, hint=hint, param="idle_stop_minutes")
        return None
    if request.engine_kind is not EngineKind.FINETUNE:
        message = f"--serve: only a training run has a result to serve; the engine kind is {request.engine_kind}."
        raise ConfigError(code="config_invalid", message=message, hint="Omit --serve.", param="serve")
    name = request.serve.name or request.name or Path(str(request.options.get("output_dir"))).name
    try:
        return ServedRun(name=check_engine_name(name), checkpoints=request.serve.checkpoints)
    except ValueError as error:
        message = f"The result cannot be served under the name '{name}': the name {error}."
        raise ConfigError(code="config_invalid", message=message, hint="Use --serve-as NAME.", param="serve.name") from error


def default_policy(setting: str | None, kind: EngineKind) -> RestartPolicy:
    """Return the restart policy of engines whose request sets no policy.

    setting: value of the setting `restart_policy`; None: the setting is not set.
    """
    if setting is None:
        return RestartPolicy.UNLESS_STOPPED if kind is EngineKind.FINETUNE else RestartPolicy.NO
    return RestartPolicy(setting)


def new_engine(
    engine_id: str,
    node: str,
    request: StartRequest,
    prepared: Prepared,
    restart_policy: RestartPolicy,
    serve: ServedRun | None = None,
    on_busy: OnBusy = OnBusy.WAIT,
) -> EngineRecord:
    """Return the record of a new engine in state `validating`.

    restart_policy, on_busy: values for a request that does not set these fields.
    """
    now = datetime.now(UTC)
    return EngineRecord(
        id=engine_id,
        kind=request.engine_kind,
        model=request.model,
        name=request.name or request.model,
        backend=prepared.backend,
        backend_reason=prepared.backend_reason,
        options=dict(prepared.options),
        metadata=request.metadata,
        desired=DesiredState.RUNNING,
        force=False,
        restart_policy=request.restart_policy or restart_policy,
        restarts=0,
        state=EngineState.VALIDATING,
        reason=None,
        figures=None,
        node=node,
        server_id=None,
        requested_port=request.port,
        devices=tuple(request.devices) if request.devices else None,
        reserved_bytes=int(request.memory_gb * 1e9) if request.memory_gb else prepared.reserved_bytes,
        least_bytes=None if request.memory_gb else prepared.least_bytes,
        max_restarts=request.max_restarts,
        on_busy=request.on_busy or on_busy,
        priority=request.priority,
        not_before=request.not_before,
        version=1,
        created_at=now,
        state_at=now,
        first_event=0,
        last_event=0,
        dedicated=request.dedicated,
        idle_stop_minutes=request.idle_stop_minutes,
        merger_id="" if request.merge_in_background else None,
        serve=serve.model_dump() if serve else None,
    )
