"""Measure one backend."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sage.common.server_keys import server_key
from sage.llm.client import SageClient
from sage.llm.client.types import EngineView
from sage.llm.control_plane.store.records import suffix_of
from serving.home import start, stop
from serving.load import measure
from serving.memory import PeakMemory

#: For each backend: options that select the same precision in all backends, and the name of this precision.
SAME_PRECISION: dict[str, tuple[dict[str, Any], str]] = {
    "transformers": ({"dtype": "fp32"}, "fp32"),
    "vllm": ({"dtype": "fp32"}, "fp32"),
    "llamacpp": ({"dtype": "fp32"}, "fp32"),
    "openvino": ({}, "fp32"),
}


@dataclass(frozen=True)
class Row:
    """One row of the results: the speed of a backend in one case."""

    models: str  #: "base", "1 adapter" or "16 adapters"
    at_once: int
    path: str  #: "direct" or "gateway"
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    reason: str = ""  #: reason why the case could not be measured


@dataclass
class Result:
    """The measurements of a backend."""

    backend: str
    version: str
    precision: str
    options: dict[str, Any] = field(default_factory=dict)  #: options of the engines
    rows: list[Row] = field(default_factory=list)
    start_seconds: float | None = None  #: time until the base model runs
    add_seconds: list[float] = field(default_factory=list)  #: for each adapter: time until it runs
    add_first_token_seconds: list[float] = field(default_factory=list)  #: for each adapter: time of the first answer
    peak_bytes: int | None = None
    is_shared: bool = False  #: whether one server hosts the base model and all adapters
    reason: str = ""  #: reason why the backend could not be measured


def run(client: SageClient, result: Result, base: Path, adapters: Sequence[Path], *, answers: int, tokens: int) -> None:
    """Measure a backend, and add its figures to `result`."""
    engine, result.start_seconds = start(client, base, "base", result.backend, result.options)
    engines = [engine]
    try:
        for adapter in adapters:
            added, seconds = start(client, adapter, adapter.name, result.backend, result.options)
            engines.append(added)
            result.add_seconds.append(seconds)
            began = time.perf_counter()
            client.chat(added.name, [{"role": "user", "content": "Hello"}], max_tokens=1)
            result.add_first_token_seconds.append(time.perf_counter() - began)
            result.is_shared = added.server_id == engine.server_id
            if not result.is_shared:
                break
        with PeakMemory({engine.pid for engine in engines if engine.pid}) as memory:
            for row in _rows(client.base_url, engines, len(adapters), result.is_shared, answers, tokens):
                result.rows.append(row)
                print(result.backend, row, flush=True)
        result.peak_bytes = memory.peak_bytes
    finally:
        for engine in engines:
            stop(client, engine.id)


def _rows(
    url: str, engines: Sequence[EngineView], adapter_count: int, is_shared: bool, answers: int, tokens: int
) -> Iterator[Row]:
    base, *adapters = engines
    cases = {"base": [base], "1 adapter": adapters[:1], f"{adapter_count} adapters": adapters}
    for name, chosen in cases.items():
        for at_once in (1, 16):
            for path in ("direct", "gateway"):
                if name.startswith(str(adapter_count)) and not is_shared:
                    yield Row(name, at_once, path, reason="each adapter needs a separate server")
                elif at_once == 1 and len(chosen) > 1:
                    continue  # with one request at a time, several adapters are as fast as one
                else:
                    yield _row(url if path == "gateway" else "", name, chosen, at_once, answers, tokens)


def _row(url: str, name: str, engines: Sequence[EngineView], at_once: int, answers: int, tokens: int) -> Row:
    path = "gateway" if url else "direct"
    key = "" if url else server_key(f"engine-{suffix_of(engines[0].server_id or '')}")
    models = [engine.name for engine in engines] if url else _names_at_server(engines, key)
    address = url or f"http://{engines[0].address}"
    measure(address, models, key, count=len(models), at_once=at_once, max_tokens=1)  # warm-up
    count = max(1, answers // 8) if at_once == 1 else answers
    found = measure(address, models, key, count=count, at_once=at_once, max_tokens=tokens)
    if found.tokens != count * tokens:
        return Row(name, at_once, path, reason=f"the answers have {found.tokens} tokens instead of {count * tokens}")
    return Row(name, at_once, path, found.tokens_per_second, found.first_token_seconds)


def _names_at_server(engines: Sequence[EngineView], key: str) -> list[str]:
    """Return the model names that the engines' server accepts for these engines.

    A name may belong to another adapter of the server. This does not change the result, because all adapters are equally
    fast.
    """
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.get(f"http://{engines[0].address}/v1/models", headers=headers, trust_env=False).raise_for_status()
    names = [model["id"] for model in answer.json()["data"]]
    is_base = engines[0].name == "base"
    return names[:1] if is_base or len(names) == 1 else names[1 : 1 + len(engines)]


def median(values: Sequence[float]) -> float | None:
    """Return the median; None if there are no values."""
    return statistics.median(values) if values else None
