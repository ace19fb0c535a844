"""Run llama.cpp's server with a GGUF file, and generate answers with transformers for comparison."""

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from sage.libs.models.chat import ChatFormat
from sage.libs.models.export.formats import LlamaCpp
from sage.llm.control_plane.backends import environments

#: Program that serves the GGUF file named by its argument, and prints the server's address. It exits when stdin is closed.
_PROGRAM = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = sys.argv[1], 512, 1, False, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaServer:
    """A process of llama.cpp's server."""

    def __init__(self, llama_cpp: LlamaCpp, file: Path) -> None:
        self._process = subprocess.Popen(
            [llama_cpp.interpreter, "-c", _PROGRAM, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        assert self._process.stdout
        self._address = self._process.stdout.readline().strip().removeprefix("http://")
        assert self._address, "the file does not load"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def chat(self, messages: list[dict[str, Any]], **more: Any) -> Any:
        return self.post("/v1/chat/completions", messages=messages, **more)

    def post(self, path: str, **body: Any) -> Any:
        return self._request("POST", path, json.dumps(body))

    def get(self, path: str) -> Any:
        return self._request("GET", path, None)

    def _request(self, method: str, path: str, body: str | None) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content)


def installed_home() -> Path:
    """Return the SAGE_HOME with the backends for the tests; `make integration` installs llama.cpp there."""
    return Path(os.environ.get("TEST_BACKENDS_HOME", Path(sys.prefix) / "backends"))


def link_backend(name: str, sage_home: Path) -> None:
    """Link an installed backend into the home of a test; skip the test if the backend is not installed."""
    folder = environments.chosen(name).folder
    installed = installed_home() / folder.relative_to(sage_home)
    if not installed.is_dir():
        pytest.skip(f"The backend '{name}' is not installed: SAGE_HOME={installed_home()} sage backend install {name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(installed)


def trained_model(base: Path, adapter: Path) -> Any:
    """Return a base model with an adapter merged into it."""
    import torch

    from sage.libs.models.adapters import attach_adapter, merged
    from sage.libs.models.loading import load_causal_lm

    return merged(attach_adapter(load_causal_lm(base, torch.float32), adapter))


def greedy_answer(model: Any, chat_format: ChatFormat, messages: list[dict[str, Any]], max_tokens: int) -> str:
    """Return the answer that transformers generates with greedy decoding."""
    import torch

    prompt, ends = torch.tensor([chat_format.prompt_ids(messages)]), chat_format.end_ids(None)
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends,
        pad_token_id=0,
    )[0, prompt.shape[1] :].tolist()  # fmt: skip
    return str(chat_format.tokenizer.decode([token for token in answer if token not in ends], skip_special_tokens=True))
