"""A cache of the GGUF files that serve models, `cache_dir/gguf/KEY`; the key is a hash of the model's content."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from sage.common.paths import get_user_paths, private_folder
from sage.common.processes import held_lock
from sage.libs.models.export.exporting import write_gguf
from sage.libs.models.export.folder import new_folder, parameter_count
from sage.libs.models.export.formats import PRECISIONS, LlamaCpp
from sage.libs.models.fingerprint import fingerprint
from sage.libs.models.resolve import ModelKind, ModelSource

#: Files other than the weights that change how a model is served.
_SMALL_FILES = (
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_KEY_DIGITS = 24


def cached_gguf(source: ModelSource, precision: str, llama_cpp: LlamaCpp) -> tuple[Path, dict[str, Any]]:
    """Return the GGUF file of a model with its adapter merged, and the defaults of requests; create the file if needed.

    Raises ModelError if llama.cpp does not support the model, OutputError if the disk is too small.
    """
    root = private_folder(get_user_paths().cache_dir / "gguf")
    target = root / _key(source, precision, llama_cpp)
    with held_lock(root / f".{target.name}.lock"):
        if not target.is_dir():
            for left in root.glob(f".{target.name}.partial-*"):  # left by a killed process
                shutil.rmtree(left, ignore_errors=True)
            weight_bytes = (4 if precision == "f32" else 2) + PRECISIONS[precision]
            with new_folder(target, parameter_count(source) * weight_bytes) as folder:
                defaults = write_gguf(source.name, folder, precision, llama_cpp)
                (folder / "defaults.json").write_text(json.dumps(defaults), encoding="utf-8")
    return target / "model.gguf", json.loads((target / "defaults.json").read_text(encoding="utf-8"))


def _key(source: ModelSource, precision: str, llama_cpp: LlamaCpp) -> str:
    base = source.base or source
    digest = hashlib.sha256(f"{precision} {llama_cpp.interpreter.parent.parent.name} {_base_key(base)}".encode())
    for folder in (base.folder, source.folder):
        for file in (folder / name for name in _SMALL_FILES):
            digest.update(file.read_bytes() if file.is_file() else b"-")
    if source.base:
        with (source.folder / "adapter_model.safetensors").open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:_KEY_DIGITS]


def _base_key(base: ModelSource) -> str:
    if base.kind is not ModelKind.GGUF:
        return fingerprint(base.folder)
    file = next(base.folder.glob("*.gguf"))
    return f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
