"""FastAPI dependencies. They pass objects from the application's state to the functions that handle requests."""

from typing import Annotated

from fastapi import Depends, Request

from sage.llm.control_plane.manager import ControlPlaneManager


def _manager(request: Request) -> ControlPlaneManager:
    manager: ControlPlaneManager = request.app.state.manager
    return manager


Manager = Annotated[ControlPlaneManager, Depends(_manager)]
