"""Backends by name, datasets by reference, and the launch specification of an engine's process."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from engines import record, server

from sage.common.errors import ConfigError, Conflict, DatasetError, SageError
from sage.libs.finetune.run.reservation import RESERVED_VARIABLE
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind, StartRequest
from sage.llm.control_plane.backends import environments, registry, speeds
from sage.llm.control_plane.backends.base import Capabilities, ServingBackend
from sage.llm.control_plane.backends.transformers import TransformersBackend
from sage.llm.control_plane.datasets import LocalDatasets
from sage.llm.control_plane.executors.base import Prepared
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.executors.inference_executor import InferenceExecutor
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.store.records import EngineRecord, ServerState


def model(kind: ModelKind = ModelKind.FULL) -> ModelSource:
    return ModelSource("m", kind, Path("/nowhere"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A model's folder, with one matrix of 1,000 parameters."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"model.layers.0.w": {"dtype": "F32", "shape": [10, 100], "data_offsets": [0, 4000]}}
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4000))
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return str(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(EngineKind.LLM, "transformers"), (EngineKind.EMBEDDING, "embedding"), (EngineKind.FINETUNE, "trainer")],
)
def test_auto_selects_the_only_installed_backend_for_the_kind_of_engine(kind: EngineKind, name: str) -> None:
    backend, reason = registry.resolve("auto", kind, model())
    assert backend.name == name
    assert reason is not None
    assert reason.startswith("the only installed backend")
    assert registry.resolve(name, kind, model()) == (backend, None)


@pytest.mark.parametrize(
    ("device", "measured", "chosen", "reason"),
    [
        ("cuda", None, "vllm", "first choice for the device cuda"),
        ("cpu", None, "transformers", "first choice for the device cpu"),
        ("cpu", ("cpu", speeds.processor()), "vllm", "fastest in `sage backend benchmark` of 2026-11-26"),
        ("cpu", ("cpu", "another processor"), "transformers", "first choice"),
        ("cuda", ("cpu", speeds.processor()), "vllm", "first choice"),
    ],
)
def test_auto_selects_the_fastest_installed_backend_that_can_load_adapters_at_run_time(
    device: str, measured: tuple[str, str] | None, chosen: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "is_installed", lambda _: True)
    monkeypatch.setattr(environments, "device", lambda: device)
    if measured:
        figures = {"transformers": 30.0, "vllm": 31.0, "llamacpp": 90.0}
        speeds.save_speeds(speeds.Speeds(*measured, "m", "2026-11-26", figures))
    backend, why = registry.resolve("auto", EngineKind.LLM, model())
    assert backend.name == chosen
    assert reason in str(why)


@pytest.mark.parametrize(
    ("name", "kind", "format_", "problem"),
    [
        ("other", EngineKind.LLM, ModelKind.FULL, "no backend 'other'"),
        ("embedding", EngineKind.LLM, ModelKind.FULL, "does not run engines of kind llm"),
        ("auto", EngineKind.EMBEDDING, ModelKind.GGUF, "format 'gguf'"),
        ("embedding", EngineKind.EMBEDDING, ModelKind.ADAPTER, "need full or hub"),
    ],
)
def test_a_backend_that_cannot_run_an_engine_is_refused_with_the_names_of_the_backends_that_can(
    name: str, kind: EngineKind, format_: ModelKind, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        registry.resolve(name, kind, model(format_))
    assert caught.value.param == "backend"
    assert f"Backends for kind {kind}: auto, {'embedding' if kind is EngineKind.EMBEDDING else 'transformers, '}" in str(
        caught.value
    )


def test_a_quantized_form_is_served_only_by_backends_that_can_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "is_installed", lambda _: True)
    monkeypatch.setattr(environments, "interpreter", lambda name: f"/{name}/bin/python")
    backend, reason = registry.resolve("auto", EngineKind.LLM, model(), "int8")
    assert "int4" in backend.capabilities.quantizes
    assert reason
    for name in ("none", None, "int3"):
        assert registry.resolve("auto", EngineKind.LLM, model(), name)[0].name == "transformers"
    assert registry.resolve("llamacpp", EngineKind.LLM, model(), "int4")[0].name == "llamacpp"
    for kind, name in [(EngineKind.LLM, "transformers"), (EngineKind.LLM, "vllm"), (EngineKind.EMBEDDING, "auto")]:
        with pytest.raises(ConfigError, match="cannot quantize a model to int8") as caught:
            registry.resolve(name, kind, model(), "int8")
        assert "llamacpp" in caught.value.hint
        assert caught.value.param == "quantize"


def test_an_engine_with_a_quantization_is_checked_before_it_is_stored(weights: Path) -> None:
    for quantize, code in (("int8", "backend_unusable"), ("q8_0", "config_invalid"), ({}, "config_invalid")):
        request = StartRequest(model=str(weights), backend="transformers", options={"quantize": quantize})
        with pytest.raises(ConfigError) as caught:
            asyncio.run(executor().prepare("engine-a", request))
        assert (caught.value.code, caught.value.param) == (code, "quantize")


def test_a_new_backend_needs_only_an_entry_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(TransformersBackend):
        name = "other"
        capabilities = Capabilities(frozenset({EngineKind.LLM}), frozenset({ModelKind.GGUF}), hot_adapters=True)

    monkeypatch.setitem(registry.BACKENDS, "other", Other())
    assert registry.resolve("other", EngineKind.LLM, model(ModelKind.GGUF))[0].name == "other"
    assert registry.resolve("auto", EngineKind.LLM, model(ModelKind.GGUF))[0].name == "transformers"
    spec = executor().spec(record(backend="other", model="/m"), server(backend="other"))
    assert spec.argv[0] == Other.interpreter[0]


def test_the_command_of_every_inference_server_contains_the_port_or_the_socket_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environments, "interpreter", lambda name: f"/{name}/bin/python")
    for backend in registry.BACKENDS.values():
        if isinstance(backend, ServingBackend):
            argv = backend.argv("m", "sage-a-1", backend.options())
            assert PORT_ARGUMENT in argv or DESCRIPTOR_ARGUMENT in argv


def test_a_dataset_is_a_path_that_exists_or_the_id_of_a_file(dataset: str, tmp_path: Path) -> None:
    datasets = LocalDatasets()
    assert datasets.resolve(dataset) == Path(dataset)
    assert datasets.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(DatasetError, match="does not exist"):
        datasets.resolve(f"{dataset}.gz")
    with pytest.raises(ConfigError, match="not an absolute path"):
        datasets.resolve("data.jsonl")
    with pytest.raises(ConfigError, match="cannot be uploaded yet") as caught:
        datasets.resolve("file-abc123")
    assert caught.value.code == "file_ids_unsupported"


def executor() -> InferenceExecutor:
    return InferenceExecutor(LocalLauncher())


def prepare(weights: Path, dataset: str, output: Path, **options: Any) -> Prepared:
    given = {"dataset_path": dataset, "output_dir": str(output), **options}
    request = StartRequest(model=str(weights), engine_kind=EngineKind.FINETUNE, options=given)
    return asyncio.run(FinetuneExecutor(LocalLauncher()).prepare("engine-a", request))


def test_preparing_a_run_creates_nothing(weights: Path, dataset: str, tmp_path: Path, sage_home: Path) -> None:
    before = sorted(sage_home.rglob("*"))
    prepared = prepare(weights, f"{dataset}=2", tmp_path / "out")
    assert prepared.backend == "trainer"
    assert prepared.options["dataset_path"] == f"{dataset}=2"
    assert (prepared.reserved_bytes or 0) > 0
    assert not (tmp_path / "out").exists()
    assert sorted(sage_home.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"dataset_path": "/nowhere.jsonl"}, "dataset_unusable"),
        ({"eval_path": "/nowhere.jsonl"}, "dataset_unusable"),
        ({"dataset_path": ["file-abc"]}, "file_ids_unsupported"),
        ({"lora_rank": 0}, "config_invalid"),
        ({"dataset_path": 5}, "config_invalid"),
        ({"lora_rnk": 8}, "config_invalid"),
        ({"output_dir": "/proc/version"}, "output_unusable"),
    ],
)
def test_errors_that_are_found_without_reading_the_data_are_raised_at_once(
    weights: Path, dataset: str, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    if "output_dir" in options:
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "thesis.txt").write_text("")
        options = {"output_dir": str(tmp_path / "used")}
    with pytest.raises(SageError) as caught:
        prepare(weights, dataset, tmp_path / "out", **options)
    assert caught.value.code == code


def test_a_run_accepts_no_port_and_only_its_own_backend(weights: Path, dataset: str, tmp_path: Path) -> None:
    finetune = FinetuneExecutor(LocalLauncher())
    request = StartRequest(model=str(weights), engine_kind=EngineKind.FINETUNE, port=9000)
    with pytest.raises(Conflict, match="no port"):
        asyncio.run(finetune.prepare("engine-a", request))
    options = {"dataset_path": dataset, "output_dir": str(tmp_path / "out")}
    request = StartRequest(model=str(weights), engine_kind=EngineKind.FINETUNE, backend="transformers", options=options)
    with pytest.raises(ConfigError, match="does not run engines of kind finetune"):
        asyncio.run(finetune.prepare("engine-a", request))


@pytest.fixture
def run(weights: Path, dataset: str, tmp_path: Path) -> EngineRecord:
    """A fine-tuning engine as stored after its preparation."""
    prepared = prepare(weights, dataset, tmp_path / "out")
    return record(
        id="engine-a", kind=EngineKind.FINETUNE, model=str(weights), backend=prepared.backend, options=prepared.options
    )


def test_validation_creates_the_run_once_and_may_be_repeated(run: EngineRecord, tmp_path: Path) -> None:
    finetune = FinetuneExecutor(LocalLauncher())
    spec = finetune._run(run).spec_path
    for _ in range(2):
        asyncio.run(finetune.validate(run))
        content = spec.read_text()
    assert json.loads(content)["task_id"] == "task-a"
    assert spec.read_text() == content
    assert (tmp_path / "out").is_dir()
    asyncio.run(finetune.discard("engine-a"))
    assert not spec.exists()
    asyncio.run(finetune.discard("engine-a"))


def test_the_worker_of_a_run_gets_the_bytes_that_its_server_has_reserved(run: EngineRecord) -> None:
    finetune = FinetuneExecutor(LocalLauncher())
    asyncio.run(finetune.validate(run))
    worker = finetune.plan_server(run)
    assert RESERVED_VARIABLE not in finetune.spec(run, worker).env
    reserved = dataclasses.replace(worker, reserved_bytes=1_500_000_000)
    assert finetune.spec(run, reserved).env[RESERVED_VARIABLE] == "1500000000"


def test_validation_reports_a_faulty_dataset_and_creates_nothing(run: EngineRecord, dataset: str) -> None:
    Path(dataset).write_text('{"prompt": "a"}\nnot json\n')
    finetune = FinetuneExecutor(LocalLauncher())
    with pytest.raises(DatasetError):
        asyncio.run(finetune.validate(run))
    assert not finetune._run(run).path.exists()
    asyncio.run(finetune.check_resumable(run))  # the run can be started after the dataset is repaired
    Path(dataset).write_text('{"prompt": "a", "completion": "b"}\n')
    asyncio.run(finetune.validate(run))


def test_a_run_whose_dataset_has_changed_is_not_resumed(run: EngineRecord, dataset: str) -> None:
    finetune = FinetuneExecutor(LocalLauncher())
    asyncio.run(finetune.validate(run))
    with Path(dataset).open("a") as file:
        file.write('{"prompt": "c", "completion": "d"}\n')
    asyncio.run(finetune.check_resumable(run))  # this check is fast, because it does not read the data
    with pytest.raises(Conflict) as caught:
        asyncio.run(finetune.validate(run))
    assert caught.value.code == "dataset_changed"


def test_a_run_whose_folder_was_removed_is_not_created_again(run: EngineRecord) -> None:
    finetune = FinetuneExecutor(LocalLauncher())
    launched = dataclasses.replace(run, server_id="server-a")
    for check in (finetune.check_resumable, finetune.validate):
        with pytest.raises(SageError) as caught:
            asyncio.run(check(launched))
        assert caught.value.code == "task_not_found"


def test_servers_use_the_same_folders_and_locks_as_earlier_versions(run: EngineRecord, sage_home: Path) -> None:
    inference = executor()
    engine = record(id="engine-a", model="/m")
    server = inference.plan_server(engine)
    spec = inference.spec(engine, server)
    folder = sage_home / "state" / "engines" / "engine-a"
    assert (server.id, server.state, server.address) == ("server-a", ServerState.PLANNED, None)
    assert server.handle == str(folder / "process.lock") == str(spec.lock_path)
    assert (spec.env["SAGE_ENGINE_ID"], spec.log_path, spec.port) == ("engine-a", folder / "engine.log", 0)
    worker = FinetuneExecutor(LocalLauncher()).plan_server(run)
    assert worker.handle == str(sage_home / "data" / "models" / "finetuned" / "task-a" / "worker.lock")
    assert worker.address is None
