"""The control plane: compares the desired and the actual state of each engine, and changes engines whose states differ.

`ControlPlaneManager` is the main class. It is imported only when a program uses it, because clients need only the types.
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
