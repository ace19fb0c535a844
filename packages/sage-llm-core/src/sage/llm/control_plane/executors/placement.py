"""Decide whether an engine can share a server with other engines. The decision is part of the engine's validation."""

from collections.abc import Mapping
from typing import Any

from sage.common.errors import ModelError
from sage.libs.models.originals import original
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.base import ServingBackend
from sage.llm.control_plane.store.records import EngineRecord


def placement(engine: EngineRecord) -> Mapping[str, Any]:
    """Return the columns `base`, `adapter` and `form` (how the model is served, as text) of an engine.

    Reads files of the model. Raises ModelError.
    """
    source, backend = resolve_model(engine.model), registry.serving(engine.backend)
    if source.base is None:
        is_shared = backend.capabilities.hot_adapters and not engine.dedicated
        return {"base": _name(source) if is_shared else None, "adapter": None, "form": "whole model"}
    problem = _problem(source, source.base, engine, backend)
    if problem is None:
        return {"base": _name(source.base), "adapter": str(source.folder.resolve()), "form": None}
    if not backend.capabilities.merges_adapters:
        message = f"The backend '{backend.name}' cannot serve the adapter {source.name}: {problem}."
        raise ModelError(code="adapter_unfit", message=message, hint="Use `--backend transformers`.", param="backend")
    return {"base": None, "adapter": None, "form": f"merged, because {problem}"}


def _problem(source: ModelSource, base: ModelSource, engine: EngineRecord, backend: ServingBackend) -> str | None:
    """Return why a running server of `base` cannot load the adapter `source`, as part of a sentence; None if it can."""
    if engine.dedicated:
        return "a separate server was requested"
    if not backend.capabilities.hot_adapters:
        return f"the backend '{backend.name}' cannot load adapters into a running server"
    if base.kind is ModelKind.ADAPTER:
        return "its base model is also an adapter"
    return backend.can_join(source.folder, base.folder)


def _name(source: ModelSource) -> str:
    """Return the name of a model; a GGUF file and its converted form have the same name."""
    return source.name if source.kind is ModelKind.HUB else str(original(source.folder).resolve())
