"""Find the original GGUF file of a converted model. This module does not import torch.

.converted/<name>-<hash>/          safetensors of the GGUF file whose SHA-256 begins with <hash>
.converted/<name>-<hash>.sources   identities of files with this hash; these files are not hashed again
"""

import json
from pathlib import Path

from sage.common.files import replace_file

FOLDER = ".converted"


def original(folder: Path) -> Path:
    """Return the folder that contains the original GGUF file of a converted model.

    If `folder` is not the folder of a converted model, or if no original file is found, return `folder`.
    """
    if folder.parent.name == FOLDER:
        for source in sources(folder.with_name(f"{folder.name}.sources")):
            gguf = Path(str(source[0]))
            if gguf.is_file() and identity(gguf) == source:
                return gguf.parent
    return folder


def identity(gguf: Path) -> list[object]:
    """Return the path, device, inode, size, modification time and change time of a file."""
    found = gguf.stat()
    return [str(gguf.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def known(root: Path, gguf: Path) -> Path | None:
    """Return the folder of the model that was converted from `gguf`, or None if no conversion of this file is recorded."""
    return next((path.with_suffix("") for path in root.glob("*.sources") if identity(gguf) in sources(path)), None)


def remember(target: Path, gguf: Path) -> None:
    """Record that the model in `target` was converted from a file with the same content as `gguf`."""
    path = target.with_name(f"{target.name}.sources")
    others = [source for source in sources(path) if source[0] != str(gguf.resolve())]
    replace_file(path, json.dumps([*others, identity(gguf)]).encode())


def sources(path: Path) -> list[list[object]]:
    """Return the file identities in a `.sources` file, or [] if the file cannot be read."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return []
