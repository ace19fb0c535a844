"""Compute a fingerprint of a base model from a part of its weights, to check whether an adapter belongs to this model."""

import hashlib
import json
from pathlib import Path

from sage.common.errors import ModelError
from sage.libs.models.originals import identity
from sage.libs.models.resolve import safetensors_header

#: Maximum number of bytes to read from the middle of each tensor.
_SAMPLE_BYTES = 256
#: Entries of config.json that do not change the results of the model.
_FREE = ("transformers_version", "_name_or_path", "use_cache", "architectures")


def version(folder: Path) -> str:
    """Return the fingerprint of the model in a folder. For a GGUF file, return a hash that changes if the file is replaced.

    Raises ModelError if an existing config.json cannot be read, or a safetensors file is incomplete or damaged.
    """
    if (folder / "config.json").is_file():
        return fingerprint(folder)
    return hashlib.sha256(json.dumps([identity(file) for file in sorted(folder.glob("*.gguf"))]).encode()).hexdigest()


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of a base model: 64 hex digits.

    The fingerprint depends on config.json, on the names, dtypes and shapes of all tensors, and on some bytes of each tensor.
    Raises ModelError if config.json cannot be read, or a safetensors file is incomplete or damaged.
    """
    digest = hashlib.sha256()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        digest.update(json.dumps({k: v for k, v in config.items() if k not in _FREE}, sort_keys=True).encode())
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            header = safetensors_header(path)
            with path.open("rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                for name, entry in header.items():
                    first, end = entry["data_offsets"]
                    file.seek(begin + first + max(0, end - first - _SAMPLE_BYTES) // 2)
                    tensors[name] = entry["dtype"], entry["shape"], file.read(min(_SAMPLE_BYTES, end - first)).hex()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(code="model_invalid", message=f"{folder} cannot be read: {error}.", param="model") from error
    digest.update(json.dumps(tensors, sort_keys=True).encode())
    return digest.hexdigest()
