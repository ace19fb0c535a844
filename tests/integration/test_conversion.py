"""GGUF files are converted once for each content, and an incomplete conversion is never used."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sage.common.errors import ModelError
from sage.common.paths import get_user_paths
from sage.libs.models import conversion
from sage.libs.models.catalog import import_model
from sage.libs.models.loading import local_folder
from sage.libs.models.resolve import resolve_model


@pytest.fixture(autouse=True)
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Replace the conversion by a copy of the file's content. Return a function that returns the number of conversions."""
    done = tmp_path / "conversions"

    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        with done.open("a") as file:
            file.write("x")
        (target / "content").write_bytes(gguf.read_bytes())
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(conversion, "_convert", convert)
    return lambda: len(done.read_text())


def gguf(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").write_text(content)
    return folder


def content(folder: Path) -> str:
    return (local_folder(resolve_model(str(folder))) / "content").read_text()


def test_folders_with_the_same_name_are_converted_separately(tmp_path: Path, conversions: Callable[[], int]) -> None:
    first, second = gguf(tmp_path / "a" / "model", "one"), gguf(tmp_path / "b" / "model", "two")
    assert [content(first), content(second), content(first)] == ["one", "two", "one"]
    assert conversions() == 2


def test_a_replaced_file_is_converted_again_even_if_size_and_time_are_the_same(tmp_path: Path) -> None:
    folder = gguf(tmp_path / "model", "one")
    before = (folder / "model.gguf").stat()
    assert content(folder) == "one"
    gguf(folder, "two")
    os.utime(folder / "model.gguf", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content(folder) == "two"


def test_a_copied_file_is_not_converted_again(tmp_path: Path, conversions: Callable[[], int]) -> None:
    folder = gguf(tmp_path / "model", "one")
    assert content(folder) == "one"
    shutil.copytree(folder, tmp_path / "copy")
    assert content(tmp_path / "copy") == "one"
    assert content(folder) == "one"
    assert conversions() == 1


def test_an_imported_gguf_model_loads(tmp_path: Path) -> None:
    import_model(gguf(tmp_path / "model", "one"), "org/mine")
    assert (local_folder(resolve_model("org/mine")) / "content").read_text() == "one"


def test_an_earlier_conversion_of_a_packaged_model_is_used(conversions: Callable[[], int], tiny_model: Path) -> None:
    old = get_user_paths().models_dir / "smollm2-135m-instruct"
    shutil.copytree(tiny_model, old)
    assert local_folder(resolve_model("smollm2-135m-instruct")) == old


def test_concurrent_processes_convert_a_file_once(tmp_path: Path, conversions: Callable[[], int]) -> None:
    folder = gguf(tmp_path / "model", "one")
    processes = [multiprocessing.get_context("fork").Process(target=content, args=(folder,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert conversions() == 1


def test_an_interrupted_conversion_leaves_no_incomplete_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf(tmp_path / "model", "one")
    whole = conversion._convert

    def interrupted(file: Path, target: Path) -> None:
        whole(file, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "_convert", interrupted)
    with pytest.raises(ModelError, match="No space left on device") as caught:
        content(folder)
    assert "Free some space" in caught.value.hint
    root = get_user_paths().models_dir / ".converted"
    assert not [path for path in root.iterdir() if path.is_dir()]
    (root / f".{next(root.glob('*.sources')).stem}.partial").mkdir()  # a killed conversion leaves this folder
    monkeypatch.setattr(conversion, "_convert", whole)
    assert content(folder) == "one"


def test_a_file_that_is_not_gguf_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"model\.gguf cannot be converted to safetensors"):
        content(gguf(tmp_path / "model", "not a GGUF file"))


def test_a_models_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    get_user_paths().models_dir.mkdir(parents=True)
    (get_user_paths().models_dir / ".converted").touch()
    with pytest.raises(ModelError, match="cannot be converted"):
        content(gguf(tmp_path / "model", "one"))
