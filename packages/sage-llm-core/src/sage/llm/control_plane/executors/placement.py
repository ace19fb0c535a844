"""Decide whether an engine can share a server with other engines."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from sage.common.errors import ModelError
from sage.libs.models.fingerprint import version
from sage.libs.models.originals import original
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.base import ServingBackend
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState


def placement(engine: EngineRecord) -> Mapping[str, Any]:
    """Return an engine's columns `base`, `base_version`, `adapter` and `form` (how the model is served, as text).

    Raises ModelError if the model is not found, or if the backend cannot serve the adapter.
    """
    source, backend = resolve_model(engine.model), registry.serving(engine.backend)
    if source.base is None:
        is_shared = backend.capabilities.hot_adapters and not engine.dedicated
        return {**_shared(source if is_shared else None), "adapter": None, "form": _form("whole model", engine)}
    problem = _problem(source, source.base, engine, backend)
    if problem is None:
        return {**_shared(source.base), "adapter": str(source.folder.resolve()), "form": None}
    if not backend.capabilities.merges_adapters:
        message = f"The backend '{backend.name}' cannot serve the adapter {source.name}: {problem}."
        raise ModelError(code="adapter_unfit", message=message, hint="Use `--backend transformers`.", param="backend")
    return {**_shared(None), "adapter": None, "form": f"{_form('merged', engine)}, because {problem}"}


def like_its_base(engine: EngineRecord, servers: Iterable[ServerRecord], given: Mapping[str, Any]) -> EngineRecord:
    """Return the engine with the backend and the options of the first server that can load the engine's adapter.

    The engine is not changed if its model is no adapter, if the request named a backend or a port, or if no server fits.
    given: options that the user has set. The server must have the same values for these options.
    Raises ModelError if the model is not found.
    """
    base = resolve_model(engine.model).base
    if base is None or engine.backend_reason is None or engine.requested_port:
        return engine
    loaded = tuple(_shared(base).values())
    for server in servers:
        is_open = server.shared and server.state is not ServerState.CLOSING
        if is_open and (server.model, server.model_version) == loaded:
            options = registry.complete_options(server.backend, server.options or {})
            reason = "a server of this backend has loaded the base model"
            like = dataclasses.replace(engine, backend=server.backend, options=options, backend_reason=reason)
            if given.items() <= options.items() and placement(like)["adapter"]:
                return like
    return engine


def _problem(source: ModelSource, base: ModelSource, engine: EngineRecord, backend: ServingBackend) -> str | None:
    if engine.dedicated:
        return "a separate server was requested"
    if not backend.capabilities.hot_adapters:
        return f"the backend '{backend.name}' cannot load adapters into a running server"
    if base.kind is ModelKind.ADAPTER:
        return "its base model is also an adapter"
    return backend.can_join(source.folder, base.folder)


def _form(how: str, engine: EngineRecord) -> str:
    quantize = engine.options.get("quantize", "none")
    return how if quantize == "none" else f"{how}, {quantize}"


def _shared(base: ModelSource | None) -> dict[str, str | None]:
    """Return the columns `base` and `base_version`.  base: the model of a shared server. None: the server is not shared.

    The columns are equal for a GGUF file and for the safetensors that were created from the file.
    """
    if base is None:
        return {"base": None, "base_version": None}
    if base.kind is ModelKind.HUB:
        return {"base": base.name, "base_version": None}
    folder = original(base.folder).resolve()
    return {"base": str(folder), "base_version": version(folder)}
