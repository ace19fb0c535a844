"""Cache of converted models for serving, in `cache_dir/gguf/KEY` and `cache_dir/openvino/KEY`.

KEY is a hash of three values: the model's content, the precision, and the converter's version.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from sage.libs.models.export.copies import usable_copy
from sage.libs.models.export.exporting import write_gguf, write_openvino
from sage.libs.models.export.folder import parameter_count
from sage.libs.models.export.formats import OPENVINO_PRECISIONS, PRECISIONS, LlamaCpp, OpenVino
from sage.libs.models.fingerprint import fingerprint
from sage.libs.models.resolve import ModelKind, ModelSource

#: Files, in addition to the weights, that change how a model is served.
_SMALL_FILES = (
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_KEY_DIGITS = 24


def cached_gguf(source: ModelSource, precision: str, llama_cpp: LlamaCpp) -> tuple[Path, dict[str, Any]]:
    """Return the GGUF file of a model, and the default settings of requests. If the file does not exist, create it.

    Raises ModelError if llama.cpp does not support the model, and OutputError if too little disk space is free.
    """
    source = _downloaded(source)

    def write(folder: Path) -> None:
        defaults = write_gguf(source.name, folder, precision, llama_cpp)
        (folder / "defaults.json").write_text(json.dumps(defaults), encoding="utf-8")

    weight_bytes = (4 if precision == "f32" else 2) + PRECISIONS[precision]
    key = _key(source, precision, llama_cpp.interpreter)
    target = usable_copy("gguf", key, parameter_count(source) * weight_bytes, write)
    return target / "model.gguf", json.loads((target / "defaults.json").read_text(encoding="utf-8"))


def cached_openvino(source: ModelSource, quantize: str, open_vino: OpenVino) -> Path:
    """Return the folder with a model in OpenVINO's format. If the folder does not exist, create it.

    If the model is an adapter, the folder contains the base model merged with the adapter.
    quantize: a key of OPENVINO_PRECISIONS.
    Raises ModelError if OpenVINO does not support the model, and OutputError if too little disk space is free.
    """
    source = _downloaded(source)

    def write(folder: Path) -> None:
        write_openvino(source.name, folder, quantize, open_vino)

    needed_bytes = parameter_count(source) * (4 + OPENVINO_PRECISIONS[quantize])
    return usable_copy("openvino", _key(source, quantize, open_vino.interpreter), needed_bytes, write)


def _downloaded(source: ModelSource) -> ModelSource:
    if ModelKind.HUB not in (source.kind, source.base and source.base.kind):
        return source
    from sage.libs.models.conversion import with_downloads  # imports torch

    return with_downloads(source)


def _key(source: ModelSource, precision: str, interpreter: Path) -> str:
    base = source.base or source
    digest = hashlib.sha256(f"{precision} {interpreter.parent.parent.name} {_base_key(base)}".encode())
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
