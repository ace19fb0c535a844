"""Manage the models of one server: the base model, and adapters that are loaded and unloaded while the server runs.

Each model has a Voice: its tokenizer, chat template and end tokens.
"""

import asyncio
import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fastapi import FastAPI

from sage.common.errors import ConfigError, NotFound
from sage.libs.models.adapters import read_lora
from sage.libs.models.hot import why_not_hot
from sage.libs.models.resolve import inspect_folder
from sage.llm.workers import server
from sage.llm.workers.adapters import Adapter
from sage.llm.workers.batch import Batch
from sage.llm.workers.fields import Body, ModelName
from sage.llm.workers.generator import Generator
from sage.llm.workers.packed import PackedRunner
from sage.llm.workers.voice import Voice

#: Files that determine how a prompt is built. Adapters for which these files are equal share one tokenizer, because a
#: tokenizer takes about 30 MB of memory.
_VOICE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


class LoadRequest(Body):
    """A request to load an adapter, in vLLM's format."""

    lora_name: ModelName
    lora_path: str


class UnloadRequest(Body):
    """A request to unload an adapter, in vLLM's format."""

    lora_name: ModelName


class Hosted:
    """A model in the server, with the number of requests that use it."""

    def __init__(self, folder: Path, voice: Voice, adapter: Adapter | None) -> None:
        self.folder, self.voice, self.adapter = folder, voice, adapter
        self.created = int(time.time())
        self.prompt_tokens = self.completion_tokens = 0  #: totals since the model was loaded
        self._requests = 0
        self._unused = asyncio.Event()

    def enter(self) -> None:
        """Count a request that uses the model."""
        self._requests += 1
        self._unused.clear()

    def leave(self) -> None:
        """Stop counting a request, because the request has ended."""
        self._requests -= 1
        if not self._requests:
            self._unused.set()

    async def unused(self) -> None:
        """Wait until no request uses the model."""
        if self._requests:
            await self._unused.wait()


class Hosting:
    """Finds models by name, and loads and unloads adapters."""

    def __init__(self, generator: Generator, batch: Batch, served_name: str | None) -> None:
        """served_name: name of the base model. None: every name except the names of adapters means the base model."""
        self._generator, self._batch, self._served_name = generator, batch, served_name
        self._base = Hosted(generator.folder, generator.voice, None)
        self._adapters: dict[str, Hosted] = {}
        self._voices: WeakValueDictionary[str, Voice] = WeakValueDictionary()
        self._loading = asyncio.Lock()

    def find(self, name: str) -> Hosted:
        """Return the loaded model with this name. Raises NotFound."""
        if found := self._adapters.get(name):
            return found
        if self._served_name in (None, name):
            return self._base
        message = f"The model '{name}' is not loaded in this server."
        raise NotFound(code="model_not_found", message=message, hint="`GET /v1/models` lists the models.", param="model")

    def tokens(self) -> dict[str, list[int]]:
        """Return the numbers of prompt and completion tokens of each model. The keys are the names of the models.

        If the base model has no served name, its key is "".
        """
        hosted = {self._served_name or "": self._base, **self._adapters}
        return {name: [model.prompt_tokens, model.completion_tokens] for name, model in hosted.items()}

    def listed(self) -> list[dict[str, Any]]:
        """Return the list of models in the format of OpenAI and vLLM."""
        base_name = self._served_name or self._base.folder.name
        hosted = {base_name: self._base, **self._adapters}
        return [
            {
                "id": name, "object": "model", "created": model.created, "owned_by": "sage", "root": str(model.folder),
                "parent": base_name if model.adapter else None, "max_model_len": self._generator.context_tokens,
            }
            for name, model in hosted.items()
        ]  # fmt: skip

    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter. If the same folder is already loaded as `name`, do nothing. Raises ConfigError or ModelError."""
        async with self._loading:
            if (known := self._adapters.get(name)) and known.folder == folder:
                return
            if known or name == self._served_name:
                message = f"lora_name: '{name}' is the name of another loaded model."
                raise ConfigError(code="invalid_value", message=message, hint="Choose another name.", param="lora_name")
            hosted, adapter = await asyncio.to_thread(self._read, folder)
            await self._batch.between_passes(partial(self._add, adapter))
            self._adapters[name] = hosted

    async def unload(self, name: str) -> None:
        """Wait until the adapter's answers in progress have ended, then unload the adapter. Raises NotFound.

        If the caller disconnects, the adapter remains loaded and a repeated call waits again.
        """
        hosted = self._adapters.get(name)
        if not hosted or not hosted.adapter:
            raise NotFound(code="model_not_found", message=f"No adapter '{name}' is loaded.", param="lora_name")
        await hosted.unused()
        if self._adapters.pop(name, None) is None:  # another call has unloaded the adapter
            return
        await self._batch.between_passes(partial(self._runner().adapters.forget, hosted.adapter))

    def _add(self, adapter: Adapter) -> None:
        try:
            self._runner().add(adapter)
        except NotImplementedError as error:
            raise _not_hot(str(error)) from error

    def _runner(self) -> PackedRunner:
        runner = self._generator.runner
        if not isinstance(runner, PackedRunner):
            raise _not_hot("the base model answers only one request at a time")
        return runner

    def _read(self, folder: Path) -> tuple[Hosted, Adapter]:
        if not folder.is_absolute():
            message = "lora_path is not an absolute path."
            raise ConfigError(code="invalid_value", message=message, param="lora_path")
        self._runner()
        inspect_folder(folder, str(folder))
        if reason := why_not_hot(folder, self._generator.folder):
            raise _not_hot(reason)
        adapter = Adapter(read_lora(self._generator.model, folder))
        return Hosted(folder, self._voice(folder), adapter), adapter

    def _voice(self, folder: Path) -> Voice:
        """Return the Voice of an adapter, or the base model's Voice if the adapter's folder has no tokenizer."""
        if not (folder / "tokenizer.json").is_file():
            return self._generator.voice
        digest = hashlib.sha256()
        for name in _VOICE_FILES:
            content = (folder / name).read_bytes() if (folder / name).is_file() else b""
            digest.update(b"%d " % len(content) + content)
        key = digest.hexdigest()
        voice = self._voices.get(key) or self._generator.voice_of(folder)
        self._voices[key] = voice
        return voice


def add_routes(app: FastAPI, hosting: Hosting) -> None:
    """Add the HTTP routes that list, load and unload models, in vLLM's format."""

    @app.get("/v1/models", responses={403: server.ANSWERED[403]})
    async def models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": hosting.listed()}

    @app.post("/v1/load_lora_adapter", responses=server.ANSWERED)
    async def load(request: LoadRequest) -> dict[str, Any]:
        """Load an adapter."""
        await hosting.load(request.lora_name, Path(request.lora_path))
        return {"status": "ok"}

    @app.post("/v1/unload_lora_adapter", responses=server.ANSWERED)
    async def unload(request: UnloadRequest) -> dict[str, Any]:
        """Unload an adapter when its answers in progress have ended."""
        await hosting.unload(request.lora_name)
        return {"status": "ok"}


def _not_hot(reason: str) -> ConfigError:
    return ConfigError(
        code="adapter_not_hot",
        message=f"The adapter cannot be loaded into a running server: {reason}.",
        hint="Start the engine with `--dedicated`; the adapter is then merged into a copy of its base model.",
        param="lora_path",
    )
