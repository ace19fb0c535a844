"""Load and unload adapters of running servers, with the HTTP routes that vLLM defines for this purpose."""

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import httpx

from sage.common.errors import EngineError
from sage.common.server_keys import server_key
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.executors.health_request import get
from sage.llm.control_plane.store.records import ServerRecord

logger = logging.getLogger(__name__)
_LOAD_SECONDS = 120.0
#: Seconds until an unload request times out. The server first completes the requests that use the adapter. An unload that
#: timed out is tried again.
_UNLOAD_SECONDS = 10.0
_THREADS_SECONDS = 10.0
_SHOWN_CHARACTERS = 500


class AdapterRefused(EngineError):
    """The server refuses an adapter, and another attempt would also fail."""


class AdapterClient:
    """Loads and unloads adapters, one at a time on each server."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(limits=limits, trust_env=False)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self, server: ServerRecord, name: str, folder: str) -> None:
        """Load the adapter in `folder` under the name `name`. A name that is already loaded is not an error.

        Raises AdapterRefused if the server refuses the adapter, EngineError if the server fails to load the adapter, and
        OSError if the result is not known.
        """
        async with self._turns.setdefault(server.id, asyncio.Lock()):
            answer = await self._post(server, "load_lora_adapter", _LOAD_SECONDS, lora_name=name, lora_path=folder)
            if answer.is_client_error and name not in await self.loaded(server):
                raise AdapterRefused(code="adapter_refused", message=_message(answer))
            if answer.is_server_error:
                raise EngineError(code="adapter_load_failed", message=_message(answer))
            if registry.serving(server.backend).capabilities.warm_up:
                await self.warm_up(server, name)

    async def set_threads(self, server: ServerRecord, threads: int) -> None:
        """Change the number of CPU threads of one of SAGE's servers. Raises OSError."""
        answer = await self._post(server, "threads", _THREADS_SECONDS, threads=threads)
        if answer.is_error:
            raise OSError(f"{server.id} failed to change its number of CPU threads: {_message(answer)}")

    async def warm_up(self, server: ServerRecord, name: str) -> None:
        """Let a model generate one token. Raises EngineError if this fails, and OSError if the result is not known."""
        answer = await self._post(server, "completions", _LOAD_SECONDS, model=name, prompt="a", max_tokens=1)
        if answer.is_error:
            raise EngineError(code="engine_unusable", message=f"{server.id} failed to generate a token: {_message(answer)}.")

    async def unload(self, server: ServerRecord, name: str) -> None:
        """Unload an adapter. A name that is not loaded is ignored. Raises OSError."""
        async with self._turns.setdefault(server.id, asyncio.Lock()):
            answer = await self._post(server, "unload_lora_adapter", _UNLOAD_SECONDS, lora_name=name)
            if answer.is_error and name in await self.loaded(server):
                raise OSError(f"{server.id} failed to unload the adapter {name}: {_message(answer)}")

    async def loaded(self, server: ServerRecord) -> frozenset[str]:
        """Return the names of the models that a server has loaded. Raises OSError."""
        return frozenset(await self.folders(server))

    async def folders(self, server: ServerRecord) -> Mapping[str, str | None]:
        """Return the loaded models as a dictionary. Raises OSError.

        Keys: names of the models.  Values: folders of the models. A folder is None if the server does not report the folder.
        """
        try:
            async with asyncio.timeout(_UNLOAD_SECONDS):
                _, content = await get(server.address or "", "/v1/models", {})
            return {str(model["id"]): model.get("root") for model in json.loads(content)["data"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"the models of {server.id} cannot be listed: {error!r}") from None

    async def _post(self, server: ServerRecord, route: str, timeout_seconds: float, **content: Any) -> httpx.Response:
        url, headers = f"http://{server.address}/v1/{route}", {"Authorization": f"Bearer {server_key(server.token)}"}
        try:
            return await self._http.post(url, json=content, headers=headers, timeout=timeout_seconds)
        except httpx.HTTPError as error:
            raise OSError(f"{server.id} did not answer the request to {route}: {error!r}") from None


def _message(answer: httpx.Response) -> str:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return " ".join(message.split())[:_SHOWN_CHARACTERS].rstrip(".") or f"status {answer.status_code}"
