"""Start engines of the tiny model with any backend through a gateway, and send them chats."""

from pathlib import Path
from typing import Any

import httpx
from support import wait_for
from workers import HELLO

from sage.llm.client import SageClient


def start(client: SageClient, model: Path, backend: str, seconds: float = 120, **options: Any) -> str:
    """Start an engine named 'tiny' with one thread, wait until it runs, and return its id."""
    engine = client.start_engine(model=str(model), backend=backend, options={"threads": 1, **options}, name="tiny",
                                 restart_policy="on-failure")  # fmt: skip
    until(client, engine.id, "running", seconds)
    return engine.id


def until(client: SageClient, engine_id: str, state: str, seconds: float = 120) -> None:
    """Wait until an engine is in a state; fail if the engine fails."""
    wait_for(lambda: client.get_engine(engine_id).state in (state, "failed"), f"{state} or failed", seconds)
    assert client.get_engine(engine_id).state == state, client.get_engine(engine_id).reason


def ask(client: SageClient, **more: Any) -> httpx.Response:
    """Send a chat to the engine 'tiny' through the gateway, with greedy decoding."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 16, "temperature": 0, **more}
    return httpx.post(f"{client.base_url}/v1/chat/completions", json=body, timeout=60)
