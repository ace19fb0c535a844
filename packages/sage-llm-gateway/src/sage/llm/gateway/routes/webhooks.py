"""The HTTP interface of webhooks."""

from typing import Any

from fastapi import APIRouter

from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter(prefix="/v1/management/webhooks")


@router.post("/test")
async def test_webhooks(manager: Manager) -> dict[str, Any]:
    """Send a test message to each URL of the setting `webhook_urls` once, and return the results."""
    return {"object": "list", "data": await manager.webhooks.test()}
