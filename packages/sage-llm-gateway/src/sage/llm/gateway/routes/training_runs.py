"""The HTTP routes that change and fork training runs."""

from fastapi import APIRouter, status

from sage.llm.client.run_types import ForkRequest, TrainingChange, TrainingChangeView
from sage.llm.client.types import EngineView
from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter(prefix="/v1/management/engines")


@router.patch("/{engine_id}/training", status_code=status.HTTP_202_ACCEPTED)
async def change_training(engine_id: str, request: TrainingChange, manager: Manager) -> TrainingChangeView:
    """Change options of a training run from its next step on. Options that are omitted do not change."""
    return await manager.change_training(engine_id, request)


@router.post("/{engine_id}/fork", status_code=status.HTTP_201_CREATED)
async def fork_engine(engine_id: str, request: ForkRequest, manager: Manager) -> EngineView:
    """Start a training run that continues from a checkpoint of another training run."""
    return await manager.fork_engine(engine_id, request)
