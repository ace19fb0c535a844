"""Copies of models for serving: their size limit, leftovers of killed processes, and models that are not downloaded yet."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sage.common.paths import private_file, private_folder
from sage.libs.models import conversion
from sage.libs.models.export import cache, copies
from sage.libs.models.export.formats import LlamaCpp
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.workers import vllm


def make_copy(home: Path, name: str, *, used_seconds: int, size_bytes: int = 100) -> Path:
    """Make a copy that no process uses. name: `KIND/KEY`."""
    folder = home / "cache" / name
    private_folder(folder)
    (folder / "weights").write_bytes(bytes(size_bytes))
    use = private_file(folder.with_name(f".{folder.name}.use"))
    os.utime(use, (used_seconds, used_seconds))
    return folder


def test_the_copies_used_longest_ago_are_deleted_until_the_rest_fits(sage_home: Path) -> None:
    new, old, older = (
        make_copy(sage_home, name, used_seconds=t) for name, t in (("gguf/a", 3), ("vllm/b", 2), ("gguf/c", 1))
    )
    copies.prune(200)
    assert (new.exists(), old.exists(), older.exists()) == (True, True, False)
    assert copies.copies_bytes() == 200


def test_a_copy_that_a_process_uses_is_kept_even_if_it_was_used_longest_ago(sage_home: Path) -> None:
    used, unused = make_copy(sage_home, "gguf/a", used_seconds=1), make_copy(sage_home, "gguf/b", used_seconds=2)
    with used.with_name(".a.use").open() as use:
        fcntl.flock(use, fcntl.LOCK_SH)
        copies.prune(0)
        assert (used.exists(), unused.exists()) == (True, False)
    copies.prune(0)
    assert not used.exists()


def test_leftovers_of_a_killed_process_are_deleted_even_within_the_limit(sage_home: Path) -> None:
    complete = make_copy(sage_home, "vllm/a", used_seconds=1)
    partial = complete.with_name(".b.partial-123")
    partial.mkdir()
    private_file(complete.with_name(".b.use"))
    copies.prune(10**9)
    assert (complete.exists(), partial.exists()) == (True, False)


def test_a_copy_is_made_once_and_linked_files_do_not_count(sage_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_MODEL_CACHE_GB", "1e-9")
    (sage_home.parent / "big").write_bytes(bytes(1000))
    made: list[Path] = []

    def write(folder: Path) -> None:
        made.append(folder)
        (folder / "big").symlink_to(sage_home.parent / "big")

    other = make_copy(sage_home, "gguf/other", used_seconds=1)
    first = copies.usable_copy("vllm", "key", 0, write)
    assert copies.usable_copy("vllm", "key", 0, write) == first
    assert (len(made), first.is_dir(), other.exists(), copies.copies_bytes()) == (1, True, False, 0)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_model_is_downloaded_before_its_files_determine_the_name_of_its_copy(
    is_adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = ModelSource("org/base", ModelKind.HUB, tmp_path / "hub")
    adapter = ModelSource("adapter", ModelKind.ADAPTER, tmp_path / "adapter", hub)
    adapter.folder.mkdir()
    (adapter.folder / "adapter_model.safetensors").write_bytes(b"weights")

    def download(source: ModelSource) -> Path:
        source.folder.mkdir(exist_ok=True)
        (source.folder / "config.json").write_text(json.dumps({"hidden_size": 1}))
        return source.folder

    base = ModelSource("org/base", ModelKind.FULL, hub.folder)
    after = {"org/base": base, "adapter": ModelSource("adapter", ModelKind.ADAPTER, adapter.folder, base)}
    monkeypatch.setattr(conversion, "downloaded", download)
    monkeypatch.setattr(conversion, "resolve_model", after.__getitem__)
    keys: list[str] = []

    def named(kind: str, key: str, needed_bytes: float, write: Any) -> Path:
        keys.append(key)
        (tmp_path / "defaults.json").write_text("{}")
        return tmp_path

    for module in (cache, vllm):
        monkeypatch.setattr(module, "usable_copy", named)
    llama_cpp = LlamaCpp(tmp_path / "env" / "bin" / "python")
    for source in (adapter, after["adapter"]) if is_adapter else (hub, base):
        cache.cached_gguf(source, "f32", llama_cpp)
        vllm.serving_folder(source)
    assert keys[:2] == keys[2:]
    (hub.folder / "config.json").write_text(json.dumps({"hidden_size": 22}))
    cache.cached_gguf(base, "f32", llama_cpp)
    vllm.serving_folder(base)
    assert not set(keys[:4]) & set(keys[4:])
