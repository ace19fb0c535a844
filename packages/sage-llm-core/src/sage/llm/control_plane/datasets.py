"""Find the file or folder that contains the dataset to which a request refers."""

from pathlib import Path
from typing import Protocol

from sage.common.errors import ConfigError
from sage.libs.finetune.data.folders import unusable

#: Prefix of the ids of uploaded files.
FILE_ID = "file-"


class DatasetResolver(Protocol):
    """Finds the file or folder of a dataset from a reference to the dataset."""

    def resolve(self, reference: str) -> Path:
        """Return the file or folder that contains a dataset.

        Raises ConfigError if the reference is not valid. Raises DatasetError if the file or folder does not exist.
        """


class LocalDatasets:
    """Finds datasets on this machine by their absolute paths."""

    def resolve(self, reference: str) -> Path:
        """Return `reference` as a path.

        Raises DatasetError if the path does not exist. Raises ConfigError if the path is relative, or if `reference` is the
        id of an uploaded file.
        """
        if reference.startswith(FILE_ID):
            raise ConfigError(
                code="file_ids_unsupported",
                message=f"'{reference[:200]}' is the id of an uploaded file, but files cannot be uploaded yet.",
                hint="Use the absolute path of a file or folder on the gateway's machine.",
                param="dataset_path",
            )
        check_absolute("dataset_path", reference)
        path = Path(reference)
        if not path.exists():
            raise unusable(path, "does not exist")
        return path


def check_absolute(option: str, path: str) -> None:
    """Raise ConfigError if a path is not absolute.

    Relative paths are refused, because the gateway and a client can have different working folders.
    """
    if not path.startswith("/"):
        raise ConfigError(
            code="path_not_absolute",
            message=f"{option}: '{path[:200]}' is not an absolute path; the gateway cannot resolve it.",
            hint=f"Use an absolute path for '{option}'.",
            param=option,
        )
