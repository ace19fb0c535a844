import json
from pathlib import Path

import pytest

from sage.common.errors import ConfigError, Conflict, ModelError, ModelNotFound
from sage.common.paths import get_user_paths
from sage.libs.models.catalog import import_model, list_models
from sage.libs.models.resolve import ModelKind, resolve_model


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


def test_a_name_is_a_folder_or_stands_in_the_models_folder(tmp_path: Path) -> None:
    folder = full(tmp_path / "m")
    assert resolve_model(str(folder)).folder == folder
    named = full(get_user_paths().models_dir / "org" / "name")
    source = resolve_model("org/name")
    assert (source.kind, source.folder) == (ModelKind.FULL, named)


def test_an_adapter_knows_its_base_by_path_or_by_name(tmp_path: Path) -> None:
    base = full(get_user_paths().models_dir / "org" / "base")
    source = resolve_model(str(adapter(tmp_path / "a", "org/base")))
    assert source.kind is ModelKind.ADAPTER
    assert source.base is not None
    assert source.base.folder == base


def test_the_packaged_models_are_always_there() -> None:
    assert resolve_model("smollm2-135m-instruct").kind is ModelKind.GGUF
    assert resolve_model("SmolLM2-135M-Instruct").kind is ModelKind.GGUF
    assert resolve_model("all-minilm-l6-v2").kind is ModelKind.FULL
    assert {"smollm2-135m-instruct", "all-minilm-l6-v2"} <= {model.name for model in list_models()}


def test_an_unknown_model_says_which_folders_were_tried(sage_home: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model("org/unknown")
    assert str(get_user_paths().models_dir / "org/unknown") in caught.value.message
    assert str(Path("org/unknown").absolute()) in caught.value.message


def test_a_missing_base_is_told_as_the_adapter_s_trouble(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is an adapter whose base is missing"):
        resolve_model(str(adapter(tmp_path / "a", "org/unknown")))


def test_what_cannot_be_loaded_is_refused_with_the_file_at_fault(tmp_path: Path) -> None:
    cut = full(tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        resolve_model(str(cut))
    for name, make, said in (
        ("pickle", lambda f: (f / "pytorch_model.bin").touch(), "pickles"),
        ("claim", lambda f: (f / "sage_run.json").touch(), "has not written its adapter yet"),
        ("empty", lambda f: None, "holds no model"),
        ("nobase", lambda f: (f / "adapter_config.json").write_text("{}"), "no adapter_model.safetensors"),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        with pytest.raises(ModelError, match=said):
            resolve_model(str(tmp_path / name))
    broken = full(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        resolve_model(str(broken))


def test_an_adapter_of_itself_does_not_go_round_for_ever(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", str(tmp_path / "a"))
    with pytest.raises(ModelError, match="adapter of an adapter"):
        resolve_model(str(folder))


def test_a_model_is_imported_whole_under_a_name_that_is_free(tmp_path: Path) -> None:
    folder = full(tmp_path / "m")
    target = import_model(folder, "org/mine")
    assert resolve_model("org/mine").folder == target
    assert "org/mine" in {model.name for model in list_models()}
    with pytest.raises(Conflict, match="exists already"):
        import_model(folder, "org/mine")
    for name in ("../escape", "finetuned/x", "a/b/c", ""):
        with pytest.raises(ConfigError):
            import_model(folder, name)
    with pytest.raises(ModelError):
        import_model(tmp_path, "org/nothing")
    with pytest.raises(ModelNotFound):
        import_model(tmp_path / "none", "org/nothing")
