"""Find a backend by name, or choose a backend for an engine."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from sage.common.errors import ConfigError
from sage.common.validation import validated
from sage.libs.models.resolve import ModelSource
from sage.llm.client.types import BackendView, EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import Backend, ServingBackend
from sage.llm.control_plane.backends.choice import MERGED_SPEEDS, choose, fastest
from sage.llm.control_plane.backends.embedding import EmbeddingBackend
from sage.llm.control_plane.backends.llamacpp import LlamaCppBackend
from sage.llm.control_plane.backends.openvino import OpenVinoBackend
from sage.llm.control_plane.backends.trainer import TrainerBackend
from sage.llm.control_plane.backends.transformers import TransformersBackend
from sage.llm.control_plane.backends.vllm import VllmBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        TransformersBackend(),
        EmbeddingBackend(),
        TrainerBackend(),
        VllmBackend(),
        LlamaCppBackend(),
        OpenVinoBackend(),
    )
}


def resolve(name: str, kind: EngineKind, model: ModelSource, quantize: object = None) -> tuple[Backend, str | None]:
    """Return a backend that can run `model`, and why this backend was chosen (None if `name` is the name of the backend).

    quantize: the requested value of the option `quantize`. Raises ConfigError if the backend is not installed, or if no
    backend can run the model as an engine of `kind`.
    """
    if name != "auto" and name not in BACKENDS:
        raise _refused(f"There is no backend '{name}'.", kind)
    candidates = BACKENDS.values() if name == "auto" else [BACKENDS[name]]
    of_kind = [backend for backend in candidates if kind in backend.capabilities.kinds]
    if not of_kind:
        raise _refused(f"The backend '{name}' does not run engines of kind {kind}.", kind)
    purpose = "for this model"
    if quantize in ("int8", "int4"):
        of_kind, purpose = _quantizing(str(quantize), of_kind), f"that can quantize the model to {quantize}"
    able = [backend for backend in of_kind if model.kind in backend.capabilities.formats]
    if name == "auto" and (installed := [backend for backend in able if environments.is_installed(backend.name)]):
        return choose(installed, environments.device(), purpose)
    if able:
        if environments.environment(able[0].name):
            environments.interpreter(able[0].name)
        return able[0], None
    formats = sorted({str(model_format) for backend in of_kind for model_format in backend.capabilities.formats})
    problem = f"{model.name} is a model in the format '{model.kind}'; engines of kind {kind} need {' or '.join(formats)}."
    raise _refused(problem, kind)


def resolve_merged(model: ModelSource) -> tuple[Backend, str]:
    """Return the fastest installed backend that can serve an adapter merged into its base, and the reason for the choice."""
    device = environments.device()
    able = [
        backend
        for backend in BACKENDS.values()
        if EngineKind.LLM in backend.capabilities.kinds
        and model.kind in backend.capabilities.formats
        and backend.capabilities.merges_adapters
        and device in backend.capabilities.devices
        and environments.is_installed(backend.name)
    ]
    return fastest(able, device, MERGED_SPEEDS)


def list_backends() -> list[BackendView]:
    """Return all backends. Each BackendView shows whether the backend is installed."""
    return [_view(backend, environments.environment(backend.name)) for backend in BACKENDS.values()]


def serving(name: str) -> ServingBackend:
    """Return the backend `name`, which must be a backend for inference."""
    backend = BACKENDS[name]
    assert isinstance(backend, ServingBackend)
    return backend


def complete_options(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return stored options, completed with the defaults of options that newer versions of SAGE added.

    Invalid options are returned unchanged.
    """
    try:
        return validated(BACKENDS[name].options, dict(options)).model_dump(mode="json")
    except (KeyError, ConfigError):
        return options


def _quantizing(quantize: str, candidates: Sequence[Backend]) -> list[Backend]:
    if found := [backend for backend in candidates if quantize in backend.capabilities.quantizes]:
        return found
    able = ", ".join(backend.name for backend in BACKENDS.values() if quantize in backend.capabilities.quantizes)
    raise ConfigError(
        code="backend_unusable",
        message=f"{' and '.join(backend.name for backend in candidates)} cannot quantize a model to {quantize}.",
        hint=f"Omit --quantize, or start an llm engine with one of these backends: {able}.",
        param="quantize",
    )


def _refused(problem: str, kind: EngineKind) -> ConfigError:
    names = ", ".join(name for name, backend in BACKENDS.items() if kind in backend.capabilities.kinds)
    return ConfigError(
        code="backend_unusable", message=problem, hint=f"Backends for kind {kind}: auto, {names}.", param="backend"
    )


def _view(backend: Backend, environment: environments.Environment | None) -> BackendView:
    can = backend.capabilities
    return BackendView(
        name=backend.name, kinds=sorted(can.kinds), formats=sorted(can.formats), devices=sorted(can.devices),
        hot_adapters=can.hot_adapters, quantizes=sorted(can.quantizes), sleep=can.asleep_bytes is not None,
        has_environment=environment is not None, is_installed=environments.is_installed(backend.name),
        version=environment.version if environment else version("sage-llm-core"),
        disk_bytes=environment and environment.disk_bytes,
    )  # fmt: skip
