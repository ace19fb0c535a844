"""The vLLM backend's command and its checks of adapters, and the rules of its server. The tests do not need vLLM."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sage.common.errors import ConfigError
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import environments, registry
from sage.llm.control_plane.backends.environments import Environment
from sage.llm.control_plane.backends.vllm import VllmBackend, VllmOptions
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT
from sage.llm.workers.vllm_server import Rules, TokenCounts

CHAT = "/v1/chat/completions"


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "device", lambda: "cpu")
    monkeypatch.setattr(Environment, "is_installed", True)


@pytest.mark.usefixtures("_installed")
def test_the_command_has_the_options_and_the_socket() -> None:
    argv = VllmBackend().argv("/m", "sage-a-1", VllmOptions(slots=4, context_tokens=512, max_rank=64, threads=1))
    given = dict(zip(argv[4::2], argv[5::2], strict=False))
    expected = {"--model": "/m", "--served-model-name": "sage-a-1", "--fd": DESCRIPTOR_ARGUMENT, "--dtype": "float32",
                "--max-num-seqs": "4", "--max-model-len": "512", "--max-lora-rank": "64"}  # fmt: skip
    assert expected.items() <= given.items()
    assert VllmBackend().environment(VllmOptions(threads=1))["OMP_NUM_THREADS"] == "1"


def test_a_backend_that_is_not_installed_is_refused_with_the_command_that_installs_it(sage_home: Path) -> None:
    with pytest.raises(ConfigError, match="'vllm' is not installed") as caught:
        registry.resolve("vllm", EngineKind.LLM, ModelSource("m", ModelKind.FULL, Path("/m")))
    assert "`sage backend install vllm`" in caught.value.hint


@pytest.mark.parametrize(
    ("entry", "problem"),
    [({}, None), ({"use_dora": True}, "use_dora"), ({"rank_pattern": {"q_proj": 4}}, "rank_pattern, which vLLM ignores")],
)
def test_an_adapter_that_vllm_would_serve_wrongly_cannot_join_the_server(
    tmp_path: Path, entry: dict[str, Any], problem: str | None
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **entry}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    reason = VllmBackend().can_join(tmp_path, tmp_path / "base")
    assert reason is None if problem is None else problem in str(reason)


class Config:
    """The fields of vLLM's configuration that the server reads."""

    def __init__(self, folder: Path) -> None:
        self.model_config, self.scheduler_config = self, self
        self.model, self.max_model_len, self.max_num_seqs = str(folder), 512, 4
        self.served_model_name = "base"


class FakeEngine:
    """Stands for vLLM's engine client: it can sleep and wake, and its `generate` yields `outputs`."""

    def __init__(self, *outputs: Any) -> None:
        self.level = 0
        self.outputs = outputs

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        for output in self.outputs:
            yield output

    async def sleep(self, level: int, mode: str) -> None:
        assert mode in ("abort", "wait", "keep")
        self.level = level

    async def wake_up(self, tags: list[str] | None) -> bool:
        self.level = 0
        return True

    async def is_sleeping(self) -> bool:
        return self.level > 0


ENGINE = FakeEngine()


def requested(folder: Path, method: str, path: str, *, json: Any = None, **headers: str) -> httpx.Response:
    """Send a request to a server with `Rules` and with fake vLLM routes; return the answer."""

    async def echo(request: Request) -> Response:
        body = await request.json()
        if body.get("model") == "text":
            return JSONResponse({"error": "none"}, 404)
        if body.get("model") == "unknown":
            return JSONResponse({"error": {"message": "none", "type": "NotFoundError", "param": "model", "code": 404}}, 404)
        if "lora_path" in body and body["lora_name"] == "large":
            return JSONResponse({"error": {"message": "rank 64 is too large", "type": "x", "param": None, "code": 500}}, 500)
        return JSONResponse(body)

    async def health(_: Request) -> Response:
        return Response()

    routes = [Route("/health", health), *(Route(p, echo, methods=["POST"]) for p in (CHAT, "/v1/load_lora_adapter"))]
    app = Starlette(routes=routes)
    app.state.vllm_config, app.state.engine_client = Config(folder), ENGINE
    app.add_middleware(Rules)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, json=json, headers=headers)

    return asyncio.run(send())


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rules, "known", {CHAT: {"model", "messages"}})


def test_a_request_reaches_vllm_unchanged_and_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [], "user": "u", "frob": None}
    assert requested(tmp_path, "POST", CHAT, json=body).json() == body
    answer = requested(tmp_path, "POST", CHAT, json={**body, "frob": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "frob")


@pytest.mark.parametrize("model", ["unknown", "text"])
def test_error_codes_are_words_instead_of_numbers(tmp_path: Path, model: str) -> None:
    answer = requested(tmp_path, "POST", CHAT, json={"model": model})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_requests_of_other_sites_and_hosts_are_rejected(tmp_path: Path) -> None:
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        assert requested(tmp_path, "POST", CHAT, json={}, **headers).status_code == 403
    assert requested(tmp_path, "POST", CHAT, json={}, origin="http://localhost:3000").status_code == 200


def test_health_reports_the_engine_the_limits_and_the_token_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_ENGINE_ID", "engine-a")
    found = requested(tmp_path, "GET", "/health").json()
    assert (found["engine"], found["context_tokens"], found["slots"]) == ("engine-a", 512, 4)
    assert found["tokens"] == {"base": [0, 0]}


@pytest.mark.parametrize(("kind", "expected"), [("DELTA", [3, 5]), ("CUMULATIVE", [3, 3])])
def test_tokens_are_counted_by_model_including_tokens_of_interrupted_answers(
    kind: str, expected: list[int], tmp_path: Path
) -> None:
    def output(*tokens: int) -> Any:
        answers = [SimpleNamespace(index=index, token_ids=[0] * count) for index, count in enumerate(tokens)]
        return SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=answers)

    engine = FakeEngine(output(1, 1), output(2, 1), output(5, 5))
    state = SimpleNamespace(vllm_config=Config(tmp_path), engine_client=engine)
    counts, sampling = TokenCounts(state), SimpleNamespace(output_kind=SimpleNamespace(name=kind))

    async def two_outputs(adapter: str | None) -> None:
        lora = adapter and SimpleNamespace(lora_name=adapter)
        async with aclosing(engine.generate("Hello", sampling, "id", lora_request=lora)) as outputs:
            assert await anext(outputs) is engine.outputs[0]
            assert await anext(outputs) is engine.outputs[1]

    for adapter in (None, "tuned", "tuned"):
        asyncio.run(two_outputs(adapter))
    assert counts.by_model == {"base": expected, "tuned": [2 * number for number in expected]}


def test_an_adapter_with_another_template_another_tokenizer_or_too_large_a_rank_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "truncation": null}')

    def loaded(name: str = "a") -> httpx.Response:
        content = {"lora_name": name, "lora_path": str(adapter)}
        return requested(base, "POST", "/v1/load_lora_adapter", json=content)

    assert loaded().status_code == 200
    assert (loaded("large").status_code, "rank 64" in loaded("large").text) == (400, True)
    (adapter / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')
    assert "adapter's tokenizer differs" in loaded().json()["error"]["message"]
    for content in ("[1]", '"text"', "{"):
        (adapter / "tokenizer.json").write_text(content)
        assert "cannot be read" in loaded().json()["error"]["message"]
    (adapter / "chat_template.jinja").write_text("{{ other }}")
    assert "adapter's chat template differs" in loaded().json()["error"]["message"]
    for file in adapter.iterdir():
        file.unlink()
    assert loaded().status_code == 200  # without these files, the adapter uses the files of the base


def test_the_server_sleeps_and_wakes_only_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_SERVER_KEY", "k")

    def send(method: str, path: str, key: str = "k") -> httpx.Response:
        return requested(tmp_path, method, path, authorization=f"Bearer {key}")

    assert send("POST", "/sleep?level=1&mode=wait", "wrong").status_code == 401
    assert send("GET", "/is_sleeping").json() == {"is_sleeping": False}
    assert send("POST", "/sleep?level=1&mode=wait").json() == {"status": "sleeping", "level": 1}
    assert send("GET", "/is_sleeping").json() == {"is_sleeping": True}
    assert send("POST", "/wake_up").json() == {"status": "awake", "tags": None}
    assert send("GET", "/sleep").status_code == 405
    monkeypatch.delenv("SAGE_SERVER_KEY")
    assert send("GET", "/is_sleeping", "").status_code == 401


def test_the_server_can_sleep_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "is_installed", True)
    commands = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(environments, "device", lambda device=device: device)
        commands[device] = "--enable-sleep-mode" in VllmBackend().argv("/m", "sage-a-1", VllmOptions())
    assert commands == {"cpu": False, "cuda": True}
