"""Estimate the memory of an engine before its start, without loading weights or importing torch."""

from collections.abc import Sequence
from typing import Any

from sage.common.errors import ModelError
from sage.common.paths import get_user_paths
from sage.common.validation import validated
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.history import earlier_run, training_seconds
from sage.libs.models.resolve import ModelSource, resolve_model
from sage.llm.client.types import Device, EngineKind, EstimateView, StartRequest
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.trainer import training_memory

#: Values for options that a run requires, but that do not change the memory of the run.
_PLACEHOLDERS = {"dataset_path": "dataset.jsonl", "output_dir": "output"}


def estimate_engine(request: StartRequest, devices: Sequence[Device]) -> EstimateView:
    """Return the memory that an engine would need. Raises ModelError or ConfigError.

    devices: the devices of this node.  The options `dataset_path` and `output_dir` of a training run may be missing.
    """
    model = resolve_model(request.model)
    backend, _ = registry.resolve(request.backend, request.engine_kind, model, request.options.get("quantize"))
    options = validated(backend.options, _options(request))
    estimate = backend.estimate(model, options)
    if estimate is None:
        raise ModelError(
            code="model_unusable",
            message=f"The memory of {request.model} cannot be estimated, because its weights are not on this machine.",
            hint="Start the engine once to download the model.",
            param="model",
        )
    usable = [device for device in devices if device.kind != "cpu"] or list(devices)
    free_bytes = max(map(free_bytes_of, usable))
    return EstimateView(
        model=request.model,
        kind=request.engine_kind,
        backend=backend.name,
        parts=dict(estimate.breakdown.parts()),
        total_bytes=estimate.breakdown.total_bytes,
        least_bytes=estimate.least_bytes,
        devices=usable,
        fits=estimate.total_bytes <= free_bytes,
        **(_of_run(model, options, free_bytes) if isinstance(options, FinetuneConfig) else {}),
    )


def _options(request: StartRequest) -> dict[str, Any]:
    if request.engine_kind is not EngineKind.FINETUNE:
        return request.options
    return {**_PLACEHOLDERS, **request.options, "base_model": request.model}


def _of_run(model: ModelSource, config: FinetuneConfig, free_bytes: int) -> dict[str, Any]:
    needs, earlier = training_memory(model, config), earlier_run(get_user_paths().finetuned_dir, config)
    return {
        "fitting_samples": needs and needs.fitting_samples(free_bytes, config.max_seq_length),
        "training_seconds": training_seconds(config, earlier.tokens_per_second if earlier else None),
    }


def free_bytes_of(device: Device) -> int:
    """Return the free memory of a device in bytes, but at most the memory that engines may use."""
    total_bytes = device.memory_total_bytes if device.memory_usable_bytes is None else device.memory_usable_bytes
    return max(0, min(total_bytes, device.memory_total_bytes - device.memory_used_bytes))
