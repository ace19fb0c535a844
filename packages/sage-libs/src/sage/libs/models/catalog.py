"""List the local models, and import models into the models folder."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sage.common.errors import ConfigError, Conflict, ModelError, ModelNotFound, SageError, first_line
from sage.common.files import fsync_tree
from sage.common.paths import get_user_paths
from sage.common.processes import held_lock
from sage.libs.models.resolve import PACKAGED, inspect_folder

#: Valid names of models. A name has one part, or two parts separated by `/`. No part begins with a dot, so no part is `..`
#: or hidden. `finetuned` is not valid, because the folder of this name contains the run directories.
_NAME = re.compile(r"(?!finetuned(/|$))\w[\w.+-]*(/\w[\w.+-]*)?")


@dataclass(frozen=True)
class ModelEntry:
    """A local model that can be used by name."""

    name: str
    kind: str
    size_bytes: int
    path: Path


def list_models() -> list[ModelEntry]:
    """Return the models in the models folder and in installed packages, sorted by name."""
    paths = get_user_paths()
    entries: dict[str, ModelEntry] = {}
    for name, packaged in PACKAGED.items():
        if (folder := packaged.path()) and folder.is_dir():
            entries[name] = ModelEntry(name, f"packaged ({packaged.package})", _size_bytes(folder), folder)
    for folder in sorted([*paths.models_dir.glob("*"), *paths.models_dir.glob("*/*")]):
        parts = folder.relative_to(paths.models_dir).parts
        is_hidden = parts[0] == paths.finetuned_dir.name or any(part.startswith(".") for part in parts)
        if is_hidden or not folder.is_dir():
            continue
        name = "/".join(parts)
        try:
            source = inspect_folder(folder, name)
        except SageError:  # the folder contains other models, or no model
            continue
        entries[name] = ModelEntry(name, source.kind, _size_bytes(folder), folder)
    return sorted(entries.values(), key=lambda entry: entry.name)


def import_model(folder: Path, name: str) -> Path:
    """Copy a model atomically into the models folder, and return the path of the copy.

    Raises ModelError if the folder has no model, ConfigError if the name is invalid, and Conflict if the name is in use.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            code="config_invalid",
            message=f"'{name}' is not a valid name of a model. A name can contain letters, digits, the characters .+-_ and "
            "one `/`. The name and the part after `/` must begin with a letter, digit or _. "
            "`finetuned` and `finetuned/…` are reserved.",
            hint="Use a name such as org/name.",
            param="name",
        )
    if not folder.is_dir():
        raise ModelNotFound(code="model_not_found", message=f"{folder} is not a folder.", hint="Give the folder of a model.")
    inspect_folder(folder.absolute(), name)
    target = get_user_paths().models_dir / name
    with held_lock(get_user_paths().models_dir / ".locks" / "import.lock"):
        if target.exists():
            raise Conflict(code="model_exists", message=f"{target} exists already.", hint="Use another name with --name.")
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, partial)
            fsync_tree(partial)
            os.replace(partial, target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            problem = error.strerror or first_line(error)
            raise ModelError(
                code="model_unusable", message=f"{folder} cannot be copied to {target}: {problem}.", param="model"
            ) from error
    return target


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
