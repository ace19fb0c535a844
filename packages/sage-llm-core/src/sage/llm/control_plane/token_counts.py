"""Read the numbers of tokens from the Prometheus metrics of inference servers."""

import asyncio
from collections.abc import Iterable, Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sage.common.server_keys import server_key
from sage.llm.client.types import EngineKind, EngineState, EngineView
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.base import TokenMetrics
from sage.llm.control_plane.executors.base import Tokens
from sage.llm.control_plane.store.records import token_of

_TIMEOUT_SECONDS = 2.0


async def read_token_counts(engines: Iterable[EngineView]) -> Mapping[str, Tokens]:
    """Return the numbers of tokens by engine id, for the running engines whose backends have `token_metrics`.

    Engines that do not return valid metrics within two seconds are omitted.
    """
    asked = {
        engine.id: (metrics, engine)
        for engine in engines
        if engine.state is EngineState.RUNNING
        and engine.kind is not EngineKind.FINETUNE
        and (metrics := registry.serving(engine.backend).token_metrics)
    }
    if not asked:
        return {}
    async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
        found = await asyncio.gather(*(_read(client, metrics, engine) for metrics, engine in asked.values()))
    return {engine_id: tokens for engine_id, tokens in zip(asked, found, strict=True) if tokens}


async def _read(client: httpx.AsyncClient, metrics: TokenMetrics, engine: EngineView) -> Tokens | None:
    key = {"Authorization": f"Bearer {server_key(token_of(engine.server_id or ''))}"}
    try:
        answer = (await client.get(f"http://{engine.address}{metrics.path}", headers=key)).raise_for_status()
        families = list(text_string_to_metric_families(answer.text))
    except (httpx.HTTPError, ValueError):
        return None
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return Tokens(int(values.get(metrics.prompt, 0)), int(values.get(metrics.completion, 0)))
