"""The control plane: compares the desired state of engines with their actual state, and acts on differences.

`ControlPlaneManager` is the facade. It is imported on first use, because clients import this package only for the types.
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
