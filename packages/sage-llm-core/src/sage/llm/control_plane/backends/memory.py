"""Estimate the memory of an inference server from the headers of the weight files."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from sage.common.paths import get_user_paths
from sage.libs.models.architecture import Architecture, read_architecture
from sage.libs.models.originals import FOLDER, known
from sage.libs.models.resolve import ModelKind, ModelSource

#: Number of tokens in a typical prompt and answer together.
_ANSWER_TOKENS = 512
#: Bytes per weight of an adapter in the memory of a server.
_ADAPTER_VALUE_BYTES = 4


class Breakdown(Protocol):
    """An estimate of the peak memory as a sum of parts."""

    @property
    def total_bytes(self) -> int:
        """The peak memory."""

    def parts(self) -> Mapping[str, int]:
        """Return the size of each part. Keys: names of parts. Values: bytes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that an engine is expected to need."""

    breakdown: Breakdown
    least_bytes: int  #: the smallest memory with which the engine can work

    @property
    def total_bytes(self) -> int:
        """The larger of the peak memory and `least_bytes`."""
        return max(self.breakdown.total_bytes, self.least_bytes)


@dataclass(frozen=True)
class ServingEstimate:
    """The parts of the peak memory of a server, in bytes."""

    framework_bytes: int  #: the program and its libraries
    weights_bytes: int  #: the weights of the base model, in the data type that the server uses
    adapters_bytes: int  #: adapters that are not merged into the base model
    cache_bytes: int  #: keys and values of the cached tokens

    @property
    def total_bytes(self) -> int:
        """The peak memory of the server."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the size of each part. Keys: names of parts. Values: bytes."""
        return {field.name.removesuffix("_bytes"): getattr(self, field.name) for field in fields(self)}


def estimate_server(
    model: ModelSource,
    *,
    framework_bytes: int,
    weight_bytes: float,
    cache_bytes: int,
    least_cache_bytes: int,
) -> MemoryEstimate | None:
    """Return the memory that a server is expected to need, or None if the model is not on this machine.

    weight_bytes: bytes of a weight in memory.
    cache_bytes: memory for keys and values.  least_cache_bytes: the smallest cache with which the server can work.
    """
    base, adapter = sizes_of(model.base or model), read_architecture(model.folder) if model.base else None
    if base is None:
        return None
    estimate = ServingEstimate(
        framework_bytes,
        weights_bytes=int(base.parameters * weight_bytes),
        adapters_bytes=adapter.parameters * _ADAPTER_VALUE_BYTES if adapter else 0,
        cache_bytes=cache_bytes,
    )
    return MemoryEstimate(estimate, estimate.total_bytes - cache_bytes + min(cache_bytes, least_cache_bytes))


def sizes_of(model: ModelSource) -> Architecture | None:
    """Return the architecture of a base model, or None if the model is not on this machine."""
    folder: Path | None = model.folder
    if model.kind is ModelKind.GGUF:
        gguf = next(model.folder.glob("*.gguf"))
        folder = known(get_user_paths().models_dir / FOLDER, gguf)
    return (read_architecture(folder) if folder else None) or read_architecture(model.folder)


def cache_tokens(context_tokens: int, slots: int, *, is_limited: bool) -> int:
    """Return the number of cached tokens to assume for a server whose cache grows with the answers.

    is_limited: whether the user has set the context length. If so, every slot may use the full context length.
    """
    return slots * context_tokens if is_limited else max(context_tokens, slots * _ANSWER_TOKENS)


def token_bytes(sizes: Architecture, value_bytes: int) -> int:
    """Return the size of one token's keys and values in bytes.  value_bytes: size of one number in the cache."""
    return 2 * sizes.num_hidden_layers * sizes.key_value_size * value_bytes
