"""The control plane: which engines should run, which do, and what to do next.

`ControlPlaneManager` is the face; it is imported on first use, since a client needs the types and not the store.
"""

from typing import TYPE_CHECKING, Any

from sage.llm.client.types import SUPPORTED_ENGINE_KINDS, EngineKind, EngineView, StartRequest

if TYPE_CHECKING:
    from sage.llm.control_plane.manager import ControlPlaneManager

__all__ = ["SUPPORTED_ENGINE_KINDS", "ControlPlaneManager", "EngineKind", "EngineView", "StartRequest"]


def __getattr__(name: str) -> Any:
    if name == "ControlPlaneManager":
        from sage.llm.control_plane.manager import ControlPlaneManager

        return ControlPlaneManager
    raise AttributeError(name)
