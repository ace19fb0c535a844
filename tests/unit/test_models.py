import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sage.common.errors import ConfigError, Conflict, ModelError, ModelNotFound
from sage.common.model_names import absolute_name
from sage.common.paths import get_user_paths
from sage.libs.finetune.data.findings import Findings
from sage.libs.finetune.data.inspection import inspect_end
from sage.libs.models.architecture import read_architecture
from sage.libs.models.catalog import import_model, list_models
from sage.libs.models.fingerprint import fingerprint
from sage.libs.models.hot import why_not_hot
from sage.libs.models.originals import known, original, remember
from sage.libs.models.resolve import ModelKind, resolve_model
from sage.llm.client.types import EngineKind, StartRequest
from sage.llm.control_plane.executors.inference_executor import InferenceExecutor
from sage.llm.control_plane.launchers.local import LocalLauncher


def safetensors(path: Path, data: bytes = b"1234") -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def full(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    safetensors(folder / "model.safetensors")
    return folder


def adapter(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    safetensors(folder / "adapter_model.safetensors")
    return folder


def test_a_name_is_a_path_or_a_folder_in_the_models_folder(tmp_path: Path) -> None:
    folder = full(tmp_path / "m")
    assert resolve_model(str(folder)).folder == folder
    named = full(get_user_paths().models_dir / "org" / "name")
    source = resolve_model("org/name")
    assert (source.kind, source.folder) == (ModelKind.FULL, named)


def test_an_adapter_s_base_is_found_by_path_or_by_name(tmp_path: Path) -> None:
    base = full(get_user_paths().models_dir / "org" / "base")
    source = resolve_model(str(adapter(tmp_path / "a", "org/base")))
    assert source.kind is ModelKind.ADAPTER
    assert source.base is not None
    assert source.base.folder == base


def test_models_in_installed_packages_are_always_found() -> None:
    assert resolve_model("smollm2-135m-instruct").kind is ModelKind.GGUF
    assert resolve_model("SmolLM2-135M-Instruct").kind is ModelKind.GGUF
    assert resolve_model("all-minilm-l6-v2").kind is ModelKind.FULL
    assert {"smollm2-135m-instruct", "all-minilm-l6-v2"} <= {model.name for model in list_models()}


def test_the_error_for_an_unknown_model_lists_the_searched_places() -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model("org/unknown")
    assert str(get_user_paths().models_dir / "org/unknown") in caught.value.message


def test_only_commands_resolve_relative_names_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = full(tmp_path / "here" / "org" / "name")
    monkeypatch.chdir(tmp_path / "here")
    for name in ("org/name", "./org/name", "../here/org/name"):
        with pytest.raises(ModelNotFound):
            resolve_model(name)
        assert resolve_model(name, tmp_path / "here").folder.resolve() == here
        assert Path(absolute_name(name, tmp_path / "here")).resolve() == here
    named = full(get_user_paths().models_dir / "org" / "other")
    assert resolve_model("org/other", tmp_path / "here").folder == named
    assert absolute_name("org/other", tmp_path / "here") == "org/other"


@pytest.mark.parametrize(
    "name",
    [
        "~nosuchuser/x",
        "~nosuchuser",
        "x" * 5000,
        "a/" * 3000,
        "a\0b",
        "..",
        ".",
        "org/../../x",
        "/proc/1/x",
        "/" + "x" * 300,
    ],
)
def test_a_name_that_is_invalid_for_a_folder_is_an_unknown_model(name: str, tmp_path: Path) -> None:
    for base_dir in (None, tmp_path):
        with pytest.raises(ModelNotFound if base_dir is None else ModelError) as caught:
            resolve_model(name, base_dir)
        assert len(caught.value.message) < 1000 + len(str(tmp_path))


def test_the_error_for_a_missing_base_names_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"base model of the adapter in .* is missing"):
        resolve_model(str(adapter(tmp_path / "a", "org/unknown")))


def test_the_error_for_a_model_that_cannot_be_loaded_names_the_invalid_file(tmp_path: Path) -> None:
    cut = full(tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a complete safetensors file"):
        resolve_model(str(cut))
    for name, make, said in (
        ("pickle", lambda f: (f / "pytorch_model.bin").touch(), "pickle files"),
        ("claim", lambda f: (f / "sage_run.json").touch(), "has not written its adapter yet"),
        ("empty", lambda f: None, "contains no model"),
        ("nobase", lambda f: (f / "adapter_config.json").write_text("{}"), "no adapter_model.safetensors"),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        with pytest.raises(ModelError, match=said) as caught:
            resolve_model(str(tmp_path / name))
        assert ("sage llm" in caught.value.hint) is (name in ("claim", "empty"))
    broken = full(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        resolve_model(str(broken))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"w": 1}',
        b'{"w": {"data_offsets": []}}',
        b'{"w": {"data_offsets": [0, "x"]}}',
        b"\xff\xff",
    ],
)
def test_the_error_for_a_broken_header_names_the_file(tmp_path: Path, header: bytes) -> None:
    folder = full(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a complete safetensors file"):
        resolve_model(str(folder))


def test_the_error_for_an_incomplete_model_names_the_missing_file(tmp_path: Path) -> None:
    folder = full(tmp_path / "m")
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lists model-00002-of-00002\.safetensors, but this file is missing"):
        resolve_model(str(folder))


def test_a_fingerprint_depends_on_weights_and_settings_and_not_on_versions(tmp_path: Path) -> None:
    folder = full(tmp_path / "m")
    found = fingerprint(folder)
    (folder / "config.json").write_text('{"transformers_version": "9"}')
    assert fingerprint(folder) == found
    safetensors(folder / "model.safetensors", b"1235")
    assert fingerprint(folder) != found
    (folder / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint(folder) != found
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError):
        fingerprint(folder)


def test_an_adapter_that_is_its_own_base_is_rejected(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", str(tmp_path / "a"))
    with pytest.raises(ModelError, match="chain of more than 4 adapters"):
        resolve_model(str(folder))


@pytest.mark.parametrize("content", ["[]", '"text"', "null", "{"])
def test_the_error_for_a_model_file_without_a_json_object_names_the_file(tmp_path: Path, content: str) -> None:
    folder = full(tmp_path / "part" / "0")
    for name in ("config.json", "generation_config.json", "adapter_config.json"):
        (folder / name).write_text(content)
    end: Any = SimpleNamespace(answer_end=lambda: 1)
    with pytest.raises(ModelError, match=r"/config\.json is not"):
        read_architecture(folder.parent)
    with pytest.raises(ModelError, match=r"/generation_config\.json is not"):
        inspect_end(folder, end, Findings())
    with pytest.raises(ModelError, match=r"/adapter_config\.json is not"):
        why_not_hot(folder, folder)


@pytest.mark.parametrize("entry", [{"data_offsets": [0, 4]}, {"data_offsets": [0, 4], "dtype": "F32", "shape": None}])
def test_weights_without_a_shape_are_rejected(tmp_path: Path, entry: dict[str, Any]) -> None:
    header = json.dumps({"w": entry}).encode()
    (full(tmp_path / "m") / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        resolve_model(str(tmp_path / "m"))


def test_a_model_is_imported_completely_and_only_under_an_unused_name(tmp_path: Path) -> None:
    folder = full(tmp_path / "m")
    target = import_model(folder, "org/mine")
    assert resolve_model("org/mine").folder == target
    assert "org/mine" in {model.name for model in list_models()}
    with pytest.raises(Conflict, match="exists already"):
        import_model(folder, "org/mine")
    for name in ("../escape", "org/..", "finetuned/x", "finetuned", "a/b/c", "org/.hidden", "-x", ""):
        with pytest.raises(ConfigError):
            import_model(folder, name)
    import_model(folder, "finetuned-by-us")
    full(target.with_name(".other.partial"))  # an interrupted import
    assert {model.name for model in list_models()} >= {"org/mine", "finetuned-by-us"}
    assert not any(".partial" in model.name for model in list_models())
    with pytest.raises(ModelError):
        import_model(tmp_path, "org/nothing")
    with pytest.raises(ModelNotFound):
        import_model(tmp_path / "none", "org/nothing")


def test_a_converted_model_is_traced_to_its_file_until_that_file_changes(tmp_path: Path) -> None:
    gguf, converted = tmp_path / "package" / "model.gguf", tmp_path / ".converted" / "model-0123"
    for folder in (gguf.parent, converted):
        folder.mkdir(parents=True)
    gguf.write_bytes(b"content")
    assert original(converted) == converted
    remember(converted, gguf)
    assert (original(converted), known(converted.parent, gguf)) == (gguf.parent, converted)
    assert original(gguf.parent) == gguf.parent
    gguf.write_bytes(b"other content")
    assert (original(converted), known(converted.parent, gguf)) == (converted, None)


@pytest.mark.parametrize(
    ("architecture", "more", "is_usable"),
    [
        ("Qwen2ForCausalLM", (), False),
        ("T5ForConditionalGeneration", (), False),
        ("BertModel", (), True),
        ("Qwen3ForCausalLM", ("modules.json",), True),
    ],
)
def test_a_language_model_is_used_for_embeddings_only_with_settings_of_sentence_transformers(
    tmp_path: Path, architecture: str, more: tuple[str, ...], is_usable: bool
) -> None:
    folder = full(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    for name in more:
        (folder / name).write_text("[]")
    request = StartRequest(model=str(folder), engine_kind=EngineKind.EMBEDDING)
    prepared = InferenceExecutor(LocalLauncher()).prepare("engine-a", request)
    if is_usable:
        assert asyncio.run(prepared).backend == "embedding"
    else:
        with pytest.raises(ModelError, match="a language model without settings for embeddings"):
            asyncio.run(prepared)
