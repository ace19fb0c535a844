"""Resolve the dataset reference in a request to the file or folder that contains the dataset."""

from pathlib import Path
from typing import Protocol

from sage.common.errors import ConfigError
from sage.libs.finetune.data.folders import unusable

#: Prefix of the ids of uploaded files.
FILE_ID = "file-"


class DatasetResolver(Protocol):
    """Resolves references to datasets."""

    def resolve(self, reference: str) -> Path:
        """Return the file or folder that contains a dataset.

        Raises ConfigError if the reference cannot be resolved, DatasetError if the file or folder does not exist.
        """


class LocalDatasets:
    """Datasets on this machine, by absolute path."""

    def resolve(self, reference: str) -> Path:
        """Return the path of the dataset; raises DatasetError if it does not exist."""
        if reference.startswith(FILE_ID):
            raise ConfigError(
                code="file_ids_unsupported",
                message=f"'{reference[:200]}' is the id of an uploaded file, and files cannot be uploaded yet.",
                hint="Give the absolute path of a file or folder on the gateway's machine.",
                param="dataset_path",
            )
        check_absolute("dataset_path", reference)
        path = Path(reference)
        if not path.exists():
            raise unusable(path, "does not exist")
        return path


def check_absolute(option: str, path: str) -> None:
    """Raise ConfigError if a path is relative, because the gateway and its clients have different working folders."""
    if not path.startswith("/"):
        raise ConfigError(
            code="path_not_absolute",
            message=f"{option}: '{path[:200]}' is not an absolute path, and the gateway has another working folder.",
            hint=f"Use an absolute path for '{option}'.",
            param=option,
        )
