"""The format of a backup: a gzip-compressed tar file, whose last member is a manifest with the checksums of all files."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

from sage.common.errors import BackupError

_MANIFEST = "manifest.json"
_BLOCK_BYTES = 1024 * 1024
#: Level 1 is the fastest level. Model weights, which are most of a backup, do not become smaller at higher levels.
_GZIP_LEVEL = 1
_UNREADABLE = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError)


class Manifest(BaseModel):
    """Describes a backup, and contains the checksums of its files."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    sage_version: str
    created_at: str  #: ISO 8601, UTC
    has_database: bool
    folders: dict[str, str]  #: paths of the folders `config`, `state`, `data`, `cache` on the machine that wrote the backup
    outputs: dict[str, str]  #: keys: names of folders in the archive; values: original paths of these output folders
    files_sha256: dict[str, str] = {}
    content_bytes: int = 0  #: total size of the files


class ArchiveWriter:
    """Writes files into an archive and computes their checksums."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        """progress: called for each block of a file, with the number of bytes in the block."""
        self._gzip = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_GZIP_LEVEL)
        self._tar = tarfile.open(fileobj=self._gzip, mode="w")  # noqa: SIM115 - `finish` closes it
        self._progress = progress
        self._files_sha256: dict[str, str] = {}
        self._content_bytes = 0

    def add(self, name: str, file: IO[bytes]) -> None:
        """Add the current content of an open file; text that other processes append later is not added."""
        info = self._tar.gettarinfo(arcname=name, fileobj=file)
        info.type, info.linkname = tarfile.REGTYPE, ""
        content = _Reader(file, info.size, self._progress)
        self._tar.addfile(info, content)
        self._files_sha256[name] = content.sha256.hexdigest()
        self._content_bytes += info.size

    def finish(self, manifest: Manifest) -> None:
        """Add the manifest with the checksums of all files, and close the archive."""
        complete = {"files_sha256": self._files_sha256, "content_bytes": self._content_bytes}
        content = manifest.model_copy(update=complete).model_dump_json(indent=1).encode()
        info = tarfile.TarInfo(_MANIFEST)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.close()
        self._gzip.close()


class _Reader(io.RawIOBase):
    """Reads and hashes exactly `size` bytes. If the file has become shorter, line breaks replace the missing bytes."""

    def __init__(self, file: IO[bytes], size: int, progress: Callable[[int], None]) -> None:
        self.sha256 = hashlib.sha256()
        self._file, self._left, self._progress = file, size, progress

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        content = self._file.read(wanted).ljust(wanted, b"\n")
        self._left -= wanted
        self.sha256.update(content)
        self._progress(wanted)
        return content


def verify(path: Path, progress: Callable[[int], None]) -> Manifest:
    """Read a whole backup, compare all checksums, and return the manifest. Raises BackupError if the backup is damaged."""
    found: dict[str, str] = {}
    manifest: Manifest | None = None
    try:
        for name, file in _members(path, progress):
            if name == _MANIFEST:
                manifest = Manifest.model_validate(json.loads(file.read()))
            else:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type] # it has `readinto`
    except FileNotFoundError:
        raise BackupError(code="backup_not_found", message=f"The file {path} does not exist.") from None
    except ValidationError as error:
        raise _damaged(path, "its manifest is invalid, or a newer version of SAGE wrote the backup") from error
    except _UNREADABLE as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    if manifest is None or manifest.format != Manifest.model_fields["format"].default:
        raise _damaged(path, "it is incomplete, or a newer version of SAGE wrote it")
    if differing := sorted(set(found.items()) ^ set(manifest.files_sha256.items())):
        raise _damaged(path, f"the checksum of {differing[0][0]} differs from the checksum in the manifest")
    return manifest


def extract(path: Path, target: Callable[[str], Path | None], progress: Callable[[int], None]) -> None:
    """Write the files of a verified backup to the paths that `target` returns; omit a file if `target` returns None."""
    for name, file in _members(path):
        destination = target(name) if name != _MANIFEST else None
        if destination is not None:
            destination.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with destination.open("wb") as copy:
                destination.chmod(0o600)
                shutil.copyfileobj(file, copy, _BLOCK_BYTES)
                progress(copy.tell())


class _CountedFile(io.FileIO):
    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        super().__init__(path)
        self._progress = progress

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(size) or b""
        self._progress(len(block))
        return block


def _members(path: Path, progress: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name and the open file of each member.

    progress: called with the number of bytes of each block that is read from the backup.
    Raises ValueError if a member is not a file or its path is unsafe.
    """
    with _CountedFile(path, progress) as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
        for info in tar:
            name = PurePosixPath(info.name)
            member = tar.extractfile(info) if info.isreg() else None
            if member is None or name.is_absolute() or ".." in name.parts:
                raise ValueError(f"its member {info.name} is not a regular file, or has an unsafe path")
            yield info.name, member


def _damaged(path: Path, problem: str) -> BackupError:
    return BackupError(
        code="backup_damaged",
        message=f"{path} is not a complete backup: {problem.rstrip('.')}. Nothing was changed.",
        hint="Copy the file again, or use another backup.",
    )
