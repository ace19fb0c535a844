"""Read the sizes of a model from its config and the headers of its weight files."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sage.libs.models.gguf import gguf_header
from sage.libs.models.resolve import json_object, safetensors_header

#: Matches the number of a layer in a tensor's name. Names of tensors outside the layers contain no number.
_IN_LAYER = re.compile(r"\.(\d+)\.")
#: Keys: names of config fields in transformers. Values: names of these fields in GGUF files, without the prefix (the name of
#: the architecture).
_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
#: Keys: names of modules in GGUF files. Values: names of these modules in transformers.
_GGUF_MODULES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj", "ffn_gate": "gate_proj",
    "ffn_up": "up_proj", "ffn_down": "down_proj", "token_embd": "embed_tokens", "output": "lm_head",
}  # fmt: skip
#: Context length in tokens of a model whose config contains no context length.
_CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class Architecture:
    """The sizes of a transformer. `shapes` maps names of tensors to their shapes. A matrix has the shape (rows, columns)."""

    shapes: Mapping[str, tuple[int, ...]]
    file_bytes: int  #: size of all weight files
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @cached_property
    def matrices(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the tensors with two or more dimensions. Keys: names of the tensors without `.weight`."""
        return {name.removesuffix(".weight"): shape for name, shape in self.shapes.items() if len(shape) > 1}

    @cached_property
    def layer_matrices(self) -> Mapping[str, tuple[int, ...]]:
        """The matrices in the transformer layers, without embedding and lm_head."""
        return {name: shape for name, shape in self.matrices.items() if _IN_LAYER.search(f"{name}.")}

    @cached_property
    def layer_parameters(self) -> int:
        """Number of parameters in `layer_matrices`."""
        return sum(map(math.prod, self.layer_matrices.values()))

    @cached_property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""
        outside = (shape for name, shape in self.shapes.items() if len(shape) == 2 and not _IN_LAYER.search(name))
        return max((shape[0] for shape in outside), default=0)

    @property
    def query_size(self) -> int:
        """Size of a token's queries, summed over the heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Size of a token's keys, summed over the heads. The values have the same size."""
        return self.num_key_value_heads * self.head_dim


def read_architecture(folder: Path) -> Architecture | None:
    """Return the sizes of the model in a folder; None if the folder has no weights. Raises ModelError.

    A sentence-transformers model may have its weights in a subfolder.
    """
    if files := sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*/*.safetensors")):
        headers = [safetensors_header(file) for file in files]
        shapes = {name: tuple(entry["shape"]) for header in headers for name, entry in header.items()}
        config = _text_config(files[0].with_name("config.json"))
    elif files := sorted(folder.glob("*.gguf"))[:1]:
        metadata, stored = gguf_header(files[0])
        shapes = {_transformers_name(name): shape for name, shape in stored.items()}
        prefix = metadata.get("general.architecture")
        config = {name: metadata.get(f"{prefix}.{key}") for name, key in _FIELDS.items()}
    else:
        return None
    return _architecture(shapes, config, sum(file.stat().st_size for file in files))


def _transformers_name(name: str) -> str:
    return ".".join(_GGUF_MODULES.get(part, part) for part in name.split("."))


def _text_config(path: Path) -> dict[str, Any]:
    config = json_object(path) if path.is_file() else {}
    return {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config


def _architecture(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], file_bytes: int) -> Architecture:
    """Return an Architecture. Sizes that the config does not contain are derived from the shapes, or are defaults."""
    given = {name: value for name in _FIELDS if isinstance(value := config.get(name), int)}
    numbers = {int(found[1]) for name in shapes if (found := _IN_LAYER.search(name))}
    in_layers = [shape for name, shape in shapes.items() if len(shape) == 2 and _IN_LAYER.search(name)]
    hidden = given.get("hidden_size") or max((shape[-1] for shape in shapes.values() if len(shape) == 2), default=0)
    heads = given.get("num_attention_heads") or 1
    return Architecture(
        shapes,
        file_bytes,
        hidden_size=hidden,
        num_hidden_layers=given.get("num_hidden_layers") or len(numbers),
        num_attention_heads=heads,
        num_key_value_heads=given.get("num_key_value_heads") or heads,
        head_dim=given.get("head_dim") or hidden // heads,
        intermediate_size=given.get("intermediate_size") or max((max(shape) for shape in in_layers), default=0),
        max_position_embeddings=given.get("max_position_embeddings") or _CONTEXT_TOKENS,
    )
