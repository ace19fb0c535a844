"""Send concurrent requests for streamed answers, and measure tokens/s and the time to the first token."""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import aiohttp

#: Logit bias that forbids SmolLM2's end tokens, so that each answer has exactly `max_tokens` tokens.
_NO_END = {"0": -100, "2": -100}
_TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True)
class Figures:
    """The measurements of several answers."""

    tokens_per_second: float  #: sum over all answers
    first_token_seconds: float  #: median time to the first token
    tokens: int


async def ask(session: aiohttp.ClientSession, url: str, model: str, number: int, max_tokens: int) -> tuple[float, int]:
    """Request one streamed answer; return the seconds until its first token, and its number of tokens."""
    prompt = f"Story number {number}: write a long story about {number} people who build a house."
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0,
        "logit_bias": _NO_END, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first_seconds = time.perf_counter(), 0.0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP status {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if not first_seconds and any(choice["delta"].get("content") for choice in event.get("choices", ())):
                first_seconds = time.perf_counter() - began
            if usage := event.get("usage"):
                tokens = int(usage["completion_tokens"])
    return first_seconds, tokens


async def _measure(url: str, models: Sequence[str], key: str, count: int, at_once: int, max_tokens: int) -> Figures:
    waiting = iter(zip(range(count), cycle(models), strict=False))
    found: list[tuple[float, int]] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for number, model in waiting:
            found.append(await ask(session, url, model, number, max_tokens))

    headers = {"Authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # llama.cpp closes a connection after a stream
    async with aiohttp.ClientSession(timeout=_TIMEOUT, headers=headers, connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(at_once)))
        seconds = time.perf_counter() - began
    tokens = sum(tokens for _, tokens in found)
    return Figures(tokens / seconds, statistics.median(first for first, _ in found), tokens)


def measure(url: str, models: Sequence[str], key: str, *, count: int, at_once: int, max_tokens: int) -> Figures:
    """Request `count` answers, `at_once` at a time, and return the measurements.

    models: model names; the requests use one model after the other.  key: API key of the server.
    """
    return asyncio.run(_measure(url, models, key, count, at_once, max_tokens))
