"""Select the files of a dataset: one file, or the files of one split in a folder.

The train split is used for training, the validation split for evaluation. A file of the test split is read only if the user
gives the path of this file.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sage.common.errors import DatasetError

Split = Literal["train", "validation"]

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
#: If the path of a file contains one of these words, the file belongs to the word's split. If the path contains words of
#: several splits, the file belongs to the first of these splits in the order below. `test` comes first, so test data is
#: never used for training.
_SPLIT_WORDS = {
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation"},
    "train": {"train", "training"},
}
#: Metadata files that the library `datasets` writes; they contain no samples.
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
#: Pattern for the file name of a shard on the Hugging Face Hub. A shard is one of the files into which a split is divided.
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*")


@dataclass(frozen=True)
class Selection:
    """The files of a dataset."""

    files: list[Path]
    skipped: list[Path] = field(default_factory=list)  #: data files of the folder that are not in `files`


def suffix_of(path: Path) -> str:
    """Return the suffix of a data file in lower case, such as `.csv` or `.jsonl.gz`; "" if the file is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    is_columns = kind in (".parquet", ".arrow")  # these formats compress their content themselves
    return kind + compression if kind in FORMATS and not (compression and is_columns) else ""


def select_files(path: Path, split: Split = "train") -> Selection:
    """Return the files to read. If `path` is a folder, these are the files of one split.

    Raises DatasetError if there are no files to read.
    """
    try:
        return _folder_files(path, split) if path.is_dir() else Selection([_file(path)])
    except OSError as error:
        raise unusable(path, f"cannot be read: {error.strerror or error}") from error


def _file(path: Path) -> Path:
    if not path.exists():
        raise unusable(path, "does not exist")
    if not path.is_file():
        raise unusable(path, "is not a regular file")
    if not suffix_of(path):
        raise unusable(path, f"has a name that does not end in {', '.join(FORMATS)}")
    return path


def _folder_files(folder: Path, split: Split) -> Selection:
    if (folder / "state.json").is_file():
        return Selection(_saved_files(folder))
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder, split)
    if configured := _configured(folder):
        return _of_split(folder, configured, split)
    found = sorted(_data_files(folder))
    if not found:
        inside = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and any(_data_files(sub)))
        hint = f"Give one of its folders: {', '.join(inside)}." if inside else ""
        raise unusable(folder, f"is a folder that contains no file of these formats: {', '.join(FORMATS)}", hint)
    return _of_split(folder, [(_split_of(file.relative_to(folder)), file) for file in found], split)


def _data_files(folder: Path) -> Iterable[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in _NO_DATA or _is_cache(path):
            continue
        if path.is_file() and suffix_of(path):
            yield path
        elif path.is_dir() and (path.name.lower() == "data" or _split_of(Path(path.name))):
            yield from _data_files(path)


def _is_cache(path: Path) -> bool:
    """Return whether a file is a cache file of the library `datasets`."""
    return path.name.startswith("cache-") and path.suffix == ".arrow"


def _split_of(name: Path) -> str:
    words = set(re.split(r"[^a-z]+", str(name).lower()))
    return next((split for split, names in _SPLIT_WORDS.items() if words & names), "")


def _of_split(folder: Path, found: list[tuple[str, Path]], split: Split) -> Selection:
    """Return the files of a split.

    Files without a split in their names are used in two cases: for train, if there are no train files; for validation, if no
    file has a split in its name.
    """
    there = {name for name, _ in found}
    wanted = split if split in there or (there != {""} and split != "train") else ""
    files = [file for name, file in found if name == wanted]
    if not files:
        raise unusable(
            folder,
            f"contains {' and '.join(sorted(there - {''}))} data, but no {split} data",
            "Give the path of the file to use.",
        )
    if wanted:
        files = _of_one_dataset(folder, files, split)
    return Selection(files, [file for _, file in found if file not in files])


def _of_one_dataset(folder: Path, files: list[Path], split: Split) -> list[Path]:
    """Return the files of one dataset. If there are several datasets, select the dataset whose name equals `split`.

    Shards with different names, such as `train` and `train_sft`, belong to different datasets.
    """
    shards = {file: match["split"] for file in files if (match := _SHARD.fullmatch(file.name))}
    names = sorted(set(shards.values()))
    if len(names) < 2:
        return files
    if split not in names:
        raise unusable(
            folder, f"contains several {split} datasets: {', '.join(names)}", "Give only the files of one dataset."
        )
    return [file for file, name in shards.items() if name == split]


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a dataset written by `datasets.save_to_disk`."""
    state = _json(folder / "state.json")
    names = [str(entry.get("filename")) for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if not names:
        raise unusable(folder, "has a state.json that lists no data files")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise unusable(folder, f"lacks the file {missing[0]}, which state.json lists", "Save the dataset again.")
    return [folder / name for name in names]


def _saved_splits(folder: Path, split: Split) -> Selection:
    splits = [str(name) for name in _json(folder / "dataset_dict.json").get("splits") or []]
    if not splits:
        raise unusable(folder, "has a dataset_dict.json that lists no splits")
    found = [(_split_of(Path(name)), folder / name) for name in splits]
    chosen = _of_split(folder, found, split)
    if len(chosen.files) > 1:
        exact = [saved for saved in chosen.files if saved.name == split]
        if not exact:
            names = ", ".join(saved.name for saved in chosen.files)
            raise unusable(folder, f"contains several {split} datasets: {names}", "Give only the subfolder of one dataset.")
        chosen = Selection(exact)
    skipped = [saved for _, saved in found if saved not in chosen.files]
    return Selection([file for saved in chosen.files for file in _saved_files(saved)], skipped)


def _configured(folder: Path) -> list[tuple[str, Path]]:
    """Return the split and path of each file in the default config of README.md, or [] if README.md lists no data files."""
    named = _card(folder).get("configs")
    configs = (
        [config for config in named if isinstance(config, dict) and "data_files" in config]
        if isinstance(named, list)
        else []
    )
    if not configs:
        return []
    default = [config for config in configs if config.get("default") or config.get("config_name") == "default"] or configs
    if len(default) > 1:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise unusable(
            folder, f"contains several datasets ({names})", "Give only the files or the subfolder of one dataset."
        )
    data_files = default[0]["data_files"]
    entries = data_files if isinstance(data_files, list) else [data_files]
    found = []
    for entry in entries:
        split, patterns = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            files = [file for file in _matching(folder, str(pattern)) if suffix_of(file)]
            found += [(_split_of(Path(str(split))) or str(split), file) for file in files]
    return found


def _matching(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise unusable(folder, f"has a README.md in which the file pattern {pattern!r} is invalid: {error}") from error


def _card(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") and text.count("---") > 1 else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise unusable(path, "is not valid JSON") from error
    return content if isinstance(content, dict) else {}


def unusable(path: Path, problem: str, hint: str = "") -> DatasetError:
    """Return the error to raise if a dataset cannot be read at all."""
    return DatasetError(
        code="dataset_unusable",
        message=f"The dataset {path} {problem}.",
        hint=hint or f"Use a {', '.join(FORMATS[:-1])} file (also .gz and .zst), or a folder of such files.",
        param="dataset_path",
    )
