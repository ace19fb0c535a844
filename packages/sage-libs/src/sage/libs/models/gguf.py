"""Read the header of a GGUF file: metadata and the shapes of the tensors. This module does not import numpy.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from sage.common.errors import ModelError

_MAGIC = b"GGUF"
#: Numeric types of metadata. Keys: ids of the types in GGUF files. Values: format characters of the module `struct`.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the metadata without arrays, and the shape of each tensor: (rows, columns) for a matrix.

    Raises ModelError if the file cannot be read or is not a complete GGUF file.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ValueError("the file does not begin with 'GGUF'")
            _, tensors, entries = _unpack(file, "IQQ")
            metadata = {_text(file): _value(file, _unpack(file, "I")[0]) for _ in range(entries)}
            shapes = dict(_tensor(file) for _ in range(tensors))
    except OSError as error:
        raise ModelError(
            code="model_invalid", message=f"{path} cannot be read ({error.strerror}).", param="model"
        ) from error
    except (ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        message = f"{path} is not a complete GGUF file ({error}); copy or download the file again."
        raise ModelError(code="model_invalid", message=message, param="model") from error
    return {key: value for key, value in metadata.items() if value is not None}, shapes


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name = _text(file)
    shape = _unpack(file, f"{_unpack(file, 'I')[0]}Q")
    _unpack(file, "IQ")  # type and offset
    return name, tuple(reversed(shape))  # GGUF stores the number of columns first


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _unpack(file, _NUMBERS[kind])[0]
    item, count = _unpack(file, "IQ")
    if item in (_STRING, _ARRAY):
        for _ in range(count):
            _value(file, item)
    else:
        file.seek(count * struct.calcsize(_NUMBERS[item]), 1)
    return None


def _text(file: BinaryIO) -> str:
    (count,) = _unpack(file, "Q")
    return file.read(count).decode("utf-8", "replace")


def _unpack(file: BinaryIO, letters: str) -> tuple[Any, ...]:
    size = struct.calcsize(f"<{letters}")
    return struct.unpack(f"<{letters}", file.read(size))
