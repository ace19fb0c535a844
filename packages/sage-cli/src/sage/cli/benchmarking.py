"""Measure the installed backends of this machine, for `sage backend benchmark`."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import typer
from rich.markup import escape
from rich.table import Table

from sage.cli import render, waiting
from sage.common.errors import ConfigError, SageError
from sage.common.model_names import absolute_name
from sage.llm.client import SageClient, calls
from sage.llm.client.types import BackendView, EngineKind

_AT_ONCE = 16
_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Measurement:
    """The measurements of one backend."""

    backend: str
    start_seconds: float | None = None
    memory_bytes: int | None = None
    one_tokens_per_second: float | None = None  #: measured with one answer at a time
    many_tokens_per_second: float | None = None  #: sum over 16 answers that are generated at the same time
    problem: str | None = None  #: reason why the backend could not be measured


def measure(client: SageClient, model: str, max_tokens: int) -> Iterator[Measurement]:
    """Measure each installed backend for language models while the backend serves `model`, and yield the measurements."""
    for backend in client.backends():
        if EngineKind.LLM in backend.kinds and backend.is_installed:
            try:
                yield _measured(client, backend, model, max_tokens)
            except SageError as error:
                yield Measurement(backend.name, problem=error.message)


def table(figures: Iterable[Measurement]) -> Table:
    """Return the measurements as a table."""
    rows = Table("BACKEND", box=None, pad_edge=False, header_style="bold")
    for title in ("STARTED IN", "MEMORY", "TOKENS/S, ONE ANSWER", "TOKENS/S, 16 ANSWERS"):
        rows.add_column(title, justify="right")
    rows.add_column("PROBLEM")
    for figure in figures:
        rows.add_row(
            figure.backend,
            "" if figure.start_seconds is None else f"{figure.start_seconds:.1f} s",
            "" if figure.memory_bytes is None else render.size(figure.memory_bytes),
            "" if figure.one_tokens_per_second is None else f"{figure.one_tokens_per_second:.1f}",
            "" if figure.many_tokens_per_second is None else f"{figure.many_tokens_per_second:.1f}",
            escape(figure.problem or ""),
        )
    return rows


def _measured(client: SageClient, backend: BackendView, model: str, max_tokens: int) -> Measurement:
    typer.echo(f"Measuring {backend.name} …", err=True)
    began = time.perf_counter()
    engine = client.start_engine(model=absolute_name(model, Path.cwd()), backend=backend.name, dedicated=True)
    try:
        waiting.until_running(client, engine.id)
        start_seconds = time.perf_counter() - began
        _tokens_per_second(
            client, engine.id, answers=1, at_once=1, max_tokens=1
        )  # the speed of the first answer is ignored, because the first answer is slower
        one = _tokens_per_second(client, engine.id, answers=2, at_once=1, max_tokens=max_tokens)
        many = _tokens_per_second(client, engine.id, answers=2 * _AT_ONCE, at_once=_AT_ONCE, max_tokens=max_tokens)
        return Measurement(backend.name, start_seconds, client.get_engine(engine.id).memory_bytes, one, many)
    finally:
        client.stop_engine(engine.id, force=True)
        waiting.until_settled(client, engine.id)
        client.remove_engine(engine.id)


def _tokens_per_second(client: SageClient, engine_id: str, *, answers: int, at_once: int, max_tokens: int) -> float:
    headers = calls.headers(client.api_key)
    with (
        httpx.Client(base_url=client.base_url, headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False) as http,
        ThreadPoolExecutor(at_once) as pool,
    ):

        def tokens(number: int) -> int:
            prompt = f"Write a long story about {number} people who build a house."
            body = {"model": engine_id, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
            answer = http.post("/v1/completions", json=body)
            if answer.status_code != httpx.codes.OK:
                raise ConfigError(code="backend_unusable", message=answer.json()["error"]["message"])
            return int(answer.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        total = sum(pool.map(tokens, range(answers)))
        return total / (time.perf_counter() - began)
