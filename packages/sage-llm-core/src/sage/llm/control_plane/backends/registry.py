"""Find a backend by name, or choose one for an engine."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from sage.common.errors import ConfigError
from sage.common.validation import validated
from sage.libs.models.resolve import ModelSource
from sage.llm.client.types import BackendView, EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import Backend, ServingBackend
from sage.llm.control_plane.backends.choice import choose
from sage.llm.control_plane.backends.embedding import EmbeddingBackend
from sage.llm.control_plane.backends.llamacpp import LlamaCppBackend
from sage.llm.control_plane.backends.trainer import TrainerBackend
from sage.llm.control_plane.backends.transformers import TransformersBackend
from sage.llm.control_plane.backends.vllm import VllmBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (TransformersBackend(), EmbeddingBackend(), TrainerBackend(), VllmBackend(), LlamaCppBackend())
}


def resolve(name: str, kind: EngineKind, model: ModelSource) -> tuple[Backend, str | None]:
    """Return a backend that can run `model`, and the reason for an automatic choice.

    If `name` is `auto`, return the best installed backend and why it is the best. Otherwise, return the backend with this
    name, and None as the reason.

    Raises ConfigError if the backend is not installed, or if no backend can run the model as an engine of `kind`.
    """
    if name != "auto" and name not in BACKENDS:
        raise _refused(f"There is no backend '{name}'.", kind)
    candidates = BACKENDS.values() if name == "auto" else [BACKENDS[name]]
    of_kind = [backend for backend in candidates if kind in backend.capabilities.kinds]
    if not of_kind:
        raise _refused(f"The backend '{name}' does not run engines of kind {kind}.", kind)
    able = [backend for backend in of_kind if model.kind in backend.capabilities.formats]
    if name == "auto" and (installed := [backend for backend in able if environments.is_installed(backend.name)]):
        return choose(installed, environments.device())
    if able:
        if environments.environment(able[0].name):
            environments.interpreter(able[0].name)
        return able[0], None
    formats = sorted({str(model_format) for backend in of_kind for model_format in backend.capabilities.formats})
    problem = f"{model.name} is a model in the format '{model.kind}'; engines of kind {kind} need {' or '.join(formats)}."
    raise _refused(problem, kind)


def list_backends() -> list[BackendView]:
    """Return all backends, and whether each is installed."""
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
        is_installed=environments.is_installed(backend.name),
        version=environment.version if environment else version("sage-llm-core"),
        disk_bytes=environment and environment.disk_bytes,
    )  # fmt: skip
