"""SageClient and AsyncSageClient: the same methods, one to call and one to await."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import httpx

from sage.common.errors import GatewayUnreachable
from sage.llm.client import calls
from sage.llm.client.calls import Call
from sage.llm.client.types import Device, EngineEvent, EngineView, TrainingStep

_CONNECT_SECONDS = 10.0
#: Streams may be silent for as long as an engine has nothing to say.
_STREAM_TIMEOUT = httpx.Timeout(_CONNECT_SECONDS, read=None)
_RECONNECT_SECONDS = 0.3


class SageClient:
    """Talks to a gateway. Every method raises SageError: what the gateway told, or GatewayUnreachable."""

    def __init__(self, base_url: str = "http://127.0.0.1:8889", api_key: str | None = None, timeout_seconds: float = 120):
        """base_url: where the gateway is; timeout_seconds: for one answer, except streams, starts and removals."""
        self.base_url, self.api_key, self._timeout_seconds = base_url, api_key, timeout_seconds
        self._http = httpx.Client(
            base_url=base_url, headers=calls.headers(api_key), timeout=timeout_seconds, trust_env=False
        )

    def __enter__(self) -> Self:
        """Use it as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def start_engine(self, **request: Any) -> EngineView:
        """Start an engine; the fields are those of StartRequest."""
        return EngineView.model_validate(self._json(calls.start(request)))

    def list_engines(self) -> list[EngineView]:
        """Return all engines, oldest first."""
        return [EngineView.model_validate(item) for item in self._json(calls.list_all())["data"]]

    def get_engine(self, engine_id: str) -> EngineView:
        """Return one engine."""
        return EngineView.model_validate(self._json(calls.get(engine_id)))

    def stop_engine(self, engine_id: str, *, force: bool = False) -> EngineView:
        """Ask an engine to stop; returns at once."""
        return EngineView.model_validate(self._json(calls.stop(engine_id, force=force)))

    def resume_engine(self, engine_id: str) -> EngineView:
        """Queue a stopped or failed engine again."""
        return EngineView.model_validate(self._json(calls.resume(engine_id)))

    def remove_engine(self, engine_id: str) -> None:
        """Forget an engine that has ended."""
        self._json(calls.remove(engine_id))

    def get_logs(self, engine_id: str, tail: int = 100) -> list[str]:
        """Return the last lines of an engine's log."""
        with self._stream(calls.logs(engine_id, tail)) as response:
            return list(response.iter_lines())

    def follow_logs(self, engine_id: str, tail: int = 100, patience_seconds: float = 60) -> Iterator[bytes]:
        """Yield the last lines of an engine's log and what is added, as bytes, until it has ended.

        Where the gateway goes away, it is waited for as long as `patience_seconds`, and nothing is lost or repeated.
        """
        offset: int | None = None
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                with self._stream(calls.follow_logs(engine_id, tail, offset)) as response:
                    offset = int(response.headers["X-Log-Offset"])
                    for chunk in response.iter_raw():
                        deadline = time.monotonic() + patience_seconds
                        offset += len(chunk)
                        yield chunk
                return
            except GatewayUnreachable:
                if offset is None or time.monotonic() > deadline:
                    raise
                time.sleep(_RECONNECT_SECONDS)

    def events(self, engine_id: str, *, follow: bool = False) -> Iterator[EngineEvent]:
        """Yield an engine's transitions; with `follow`, each new one until it has ended."""
        with self._stream(calls.events(engine_id, follow=follow)) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield EngineEvent.model_validate_json(line.removeprefix("data: "))

    def training_steps(self, engine_id: str) -> list[TrainingStep]:
        """Return the optimizer steps of a training run, oldest first."""
        return [TrainingStep.model_validate(item) for item in self._json(calls.training_steps(engine_id))["data"]]

    def devices(self) -> list[Device]:
        """Return GPUs and main memory."""
        return [Device.model_validate(item) for item in self._json(calls.devices())["data"]]

    def health(self, timeout_seconds: float = 3) -> dict[str, Any]:
        """Return the gateway's version and process; whatever has its port and says nothing is not waited for."""
        return dict(self._json(calls.health(), timeout_seconds))

    def models(self) -> list[str]:
        """Return the names that requests can use."""
        return [item["id"] for item in self._json(calls.models())["data"]]

    def chat(self, model: str, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return a model's answer."""
        answer = self._json(calls.chat(model, messages, options))
        return str(answer["choices"][0]["message"]["content"] or "")

    def chat_stream(self, model: str, messages: list[dict[str, Any]], **options: Any) -> Iterator[str]:
        """Yield a model's answer piece by piece."""
        with self._stream(calls.chat(model, messages, {**options, "stream": True})) as response:
            reader = calls.ChatStream()
            yield from map(reader.piece, response.iter_lines())
            reader.finish()

    def _json(self, call: Call, timeout_seconds: float | None = None) -> Any:
        seconds = timeout_seconds or call.timeout_seconds or self._timeout_seconds
        timeout = httpx.Timeout(min(seconds, _CONNECT_SECONDS), read=seconds)
        try:
            response = self._http.request(call.method, call.path, json=call.json, params=call.params, timeout=timeout)
        except httpx.HTTPError as error:
            raise calls.unreachable(self.base_url, error) from error
        return calls.content_of(response)

    @contextmanager
    def _stream(self, call: Call) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(
                call.method, call.path, json=call.json, params=call.params, timeout=_STREAM_TIMEOUT
            ) as response:
                if response.is_error:
                    response.read()
                    calls.raise_for_error(response)
                yield response
        except httpx.HTTPError as error:
            raise calls.unreachable(self.base_url, error) from error


class AsyncSageClient:
    """Talks to a gateway from asyncio. Every method raises SageError."""

    def __init__(self, base_url: str = "http://127.0.0.1:8889", api_key: str | None = None, timeout_seconds: float = 120):
        """base_url: where the gateway is; timeout_seconds: for one answer, except streams, starts and removals."""
        self.base_url, self.api_key, self._timeout_seconds = base_url, api_key, timeout_seconds
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=calls.headers(api_key), timeout=timeout_seconds, trust_env=False
        )

    async def __aenter__(self) -> Self:
        """Use it as a context manager."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def start_engine(self, **request: Any) -> EngineView:
        """Start an engine; the fields are those of StartRequest."""
        return EngineView.model_validate(await self._json(calls.start(request)))

    async def list_engines(self) -> list[EngineView]:
        """Return all engines, oldest first."""
        return [EngineView.model_validate(item) for item in (await self._json(calls.list_all()))["data"]]

    async def get_engine(self, engine_id: str) -> EngineView:
        """Return one engine."""
        return EngineView.model_validate(await self._json(calls.get(engine_id)))

    async def stop_engine(self, engine_id: str, *, force: bool = False) -> EngineView:
        """Ask an engine to stop; returns at once."""
        return EngineView.model_validate(await self._json(calls.stop(engine_id, force=force)))

    async def resume_engine(self, engine_id: str) -> EngineView:
        """Queue a stopped or failed engine again."""
        return EngineView.model_validate(await self._json(calls.resume(engine_id)))

    async def remove_engine(self, engine_id: str) -> None:
        """Forget an engine that has ended."""
        await self._json(calls.remove(engine_id))

    async def get_logs(self, engine_id: str, tail: int = 100) -> list[str]:
        """Return the last lines of an engine's log."""
        async with self._stream(calls.logs(engine_id, tail)) as response:
            return [line async for line in response.aiter_lines()]

    async def follow_logs(self, engine_id: str, tail: int = 100) -> AsyncIterator[str]:
        """Yield the last lines of an engine's log and each new one until it has ended."""
        async with self._stream(calls.follow_logs(engine_id, tail, None)) as response:
            async for line in response.aiter_lines():
                yield line

    async def events(self, engine_id: str, *, follow: bool = False) -> AsyncIterator[EngineEvent]:
        """Yield an engine's transitions; with `follow`, each new one until it has ended."""
        async with self._stream(calls.events(engine_id, follow=follow)) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    yield EngineEvent.model_validate_json(line.removeprefix("data: "))

    async def training_steps(self, engine_id: str) -> list[TrainingStep]:
        """Return the optimizer steps of a training run, oldest first."""
        told = await self._json(calls.training_steps(engine_id))
        return [TrainingStep.model_validate(item) for item in told["data"]]

    async def devices(self) -> list[Device]:
        """Return GPUs and main memory."""
        return [Device.model_validate(item) for item in (await self._json(calls.devices()))["data"]]

    async def health(self, timeout_seconds: float = 3) -> dict[str, Any]:
        """Return the gateway's version and process; whatever has its port and says nothing is not waited for."""
        return dict(await self._json(calls.health(), timeout_seconds))

    async def models(self) -> list[str]:
        """Return the names that requests can use."""
        return [item["id"] for item in (await self._json(calls.models()))["data"]]

    async def chat(self, model: str, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return a model's answer."""
        answer = await self._json(calls.chat(model, messages, options))
        return str(answer["choices"][0]["message"]["content"] or "")

    async def chat_stream(self, model: str, messages: list[dict[str, Any]], **options: Any) -> AsyncIterator[str]:
        """Yield a model's answer piece by piece."""
        async with self._stream(calls.chat(model, messages, {**options, "stream": True})) as response:
            reader = calls.ChatStream()
            async for line in response.aiter_lines():
                yield reader.piece(line)
            reader.finish()

    async def _json(self, call: Call, timeout_seconds: float | None = None) -> Any:
        seconds = timeout_seconds or call.timeout_seconds or self._timeout_seconds
        timeout = httpx.Timeout(min(seconds, _CONNECT_SECONDS), read=seconds)
        try:
            response = await self._http.request(call.method, call.path, json=call.json, params=call.params, timeout=timeout)
        except httpx.HTTPError as error:
            raise calls.unreachable(self.base_url, error) from error
        return calls.content_of(response)

    @asynccontextmanager
    async def _stream(self, call: Call) -> AsyncIterator[httpx.Response]:
        try:
            async with self._http.stream(
                call.method, call.path, json=call.json, params=call.params, timeout=_STREAM_TIMEOUT
            ) as response:
                if response.is_error:
                    await response.aread()
                    calls.raise_for_error(response)
                yield response
        except httpx.HTTPError as error:
            raise calls.unreachable(self.base_url, error) from error
