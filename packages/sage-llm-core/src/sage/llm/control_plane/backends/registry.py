"""The backends by name, and the choice of a backend for an engine."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from sage.common.errors import ConfigError
from sage.common.validation import validated
from sage.libs.models.resolve import ModelSource
from sage.llm.client.types import BackendView, EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import Backend, ServingBackend
from sage.llm.control_plane.backends.embedding import EmbeddingBackend
from sage.llm.control_plane.backends.llamacpp import LlamaCppBackend
from sage.llm.control_plane.backends.trainer import TrainerBackend
from sage.llm.control_plane.backends.transformers import TransformersBackend
from sage.llm.control_plane.backends.vllm import VllmBackend

#: `auto` means the first backend that can run the engine.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (TransformersBackend(), EmbeddingBackend(), TrainerBackend(), VllmBackend(), LlamaCppBackend())
}


def resolve(name: str, kind: EngineKind, model: ModelSource) -> Backend:
    """Return the backend `name`; for `auto`, return the first backend that can run `model` as an engine of `kind`.

    Raises ConfigError if the backend is not installed, or, with a list of the kind's backends, if none can run the engine.
    """
    if name != "auto" and name not in BACKENDS:
        raise _refused(f"There is no backend '{name}'.", kind)
    candidates = BACKENDS.values() if name == "auto" else [BACKENDS[name]]
    of_kind = [backend for backend in candidates if kind in backend.capabilities.kinds]
    if not of_kind:
        raise _refused(f"The backend '{name}' does not run engines of kind {kind}.", kind)
    for backend in of_kind:
        if model.kind in backend.capabilities.formats:
            if environments.environment(backend.name):
                environments.interpreter(backend.name)
            return backend
    formats = sorted({str(model_format) for backend in of_kind for model_format in backend.capabilities.formats})
    problem = f"{model.name} is a model in the format '{model.kind}'; engines of kind {kind} need {' or '.join(formats)}."
    raise _refused(problem, kind)


def list_backends() -> list[BackendView]:
    """Return all backends, and whether each is installed."""
    return [_view(backend, environments.environment(backend.name)) for backend in BACKENDS.values()]


def serving(name: str) -> ServingBackend:
    """Return the inference server `name`."""
    backend = BACKENDS[name]
    assert isinstance(backend, ServingBackend)
    return backend


def complete_options(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return stored options with the defaults of those that an older version did not have; invalid ones unchanged."""
    try:
        return validated(BACKENDS[name].options, dict(options)).model_dump(mode="json")
    except (KeyError, ConfigError):
        return options


def _refused(problem: str, kind: EngineKind) -> ConfigError:
    names = ", ".join(name for name, backend in BACKENDS.items() if kind in backend.capabilities.kinds)
    return ConfigError(
        code="backend_unusable", message=problem, hint=f"Backends for kind {kind}: auto, {names}.", param="backend"
    )


def _view(backend: Backend, environment: environments.Environment | None) -> BackendView:
    can = backend.capabilities
    return BackendView(
        name=backend.name, kinds=sorted(can.kinds), formats=sorted(can.formats), devices=sorted(can.devices),
        hot_adapters=can.hot_adapters, sleep=can.sleep, has_environment=environment is not None,
        is_installed=environment is None or environment.is_installed,
        version=environment.version if environment else version("sage-llm-core"),
        disk_bytes=environment and environment.disk_bytes,
    )  # fmt: skip
