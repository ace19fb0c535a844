"""Estimate the memory of an engine before it is started. No weights are loaded, and torch is not imported."""

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
from sage.llm.control_plane.inventory import list_devices

#: Options that a run requires, but that do not influence its memory.
_PLACEHOLDERS = {"dataset_path": "dataset.jsonl", "output_dir": "output"}


def estimate_engine(request: StartRequest) -> EstimateView:
    """Return the memory that an engine would need. Raises ModelError or ConfigError.

    The options `dataset_path` and `output_dir` of a training run may be missing.
    """
    model = resolve_model(request.model)
    backend, _ = registry.resolve(request.backend, request.engine_kind, model)
    options = validated(backend.options, _options(request))
    estimate = backend.estimate(model, options)
    if estimate is None:
        raise ModelError(
            code="model_unusable",
            message=f"The memory of {request.model} cannot be estimated, because its weights are not on this machine.",
            hint="Start the engine once, which downloads the model.",
            param="model",
        )
    devices = _usable_devices()
    free_bytes = max(device.memory_total_bytes - device.memory_used_bytes for device in devices)
    return EstimateView(
        model=request.model,
        kind=request.engine_kind,
        backend=backend.name,
        parts=dict(estimate.breakdown.parts()),
        total_bytes=estimate.breakdown.total_bytes,
        least_bytes=estimate.least_bytes,
        devices=devices,
        fits=estimate.total_bytes <= free_bytes,
        **(_of_run(model, options, free_bytes) if isinstance(options, FinetuneConfig) else {}),
    )


def _options(request: StartRequest) -> dict[str, Any]:
    if request.engine_kind is not EngineKind.FINETUNE:
        return request.options
    return {**_PLACEHOLDERS, **request.options, "base_model": request.model}


def _of_run(model: ModelSource, config: FinetuneConfig, free_bytes: int) -> dict[str, Any]:
    """Return the fields of the view that only training runs have."""
    needs, earlier = training_memory(model, config), earlier_run(get_user_paths().finetuned_dir, config)
    return {
        "fitting_samples": needs and needs.fitting_samples(free_bytes, config.max_seq_length),
        "training_seconds": training_seconds(config, earlier.tokens_per_second if earlier else None),
    }


def _usable_devices() -> list[Device]:
    """Return the GPUs of this machine; if there are none, the main memory."""
    devices = list_devices()
    return [device for device in devices if device.kind != "cpu"] or devices
