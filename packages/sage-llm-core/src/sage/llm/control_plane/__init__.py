"""The control plane: compares the desired state of each engine with its actual state, and acts if the two states differ.

The main class is `ControlPlaneManager`. This class is imported only when a program uses it, because clients need only types.
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
