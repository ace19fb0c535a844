"""Run the tokens of several answers in one forward pass with OpenVINO's paged attention.

Keys and values are stored in blocks of equal size. In each pass, OpenVINO receives the list of blocks of each answer.
"""

import heapq
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage.llm.workers.packed import Part

#: Maximum number of prompt tokens in a pass. The number is small, because all answers in progress wait until the pass ends.
_PROMPT_TOKENS = 128
#: Compute in fp32. Do not pin threads to cores, because other processes use the same cores.
_SETTINGS: Mapping[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "PERFORMANCE_HINT": "LATENCY",
    "ENABLE_HYPER_THREADING": True, "ENABLE_CPU_PINNING": False,
}  # fmt: skip


class Blocks:
    """The blocks with the keys and values of one answer."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.length = 0  #: number of stored tokens


class PagedRunner:
    """Runs parts of several answers in one forward pass."""

    prompt_tokens = _PROMPT_TOKENS

    def __init__(self, folder: Path, slots: int, context_tokens: int, threads: int) -> None:
        """folder: a model in OpenVINO's format.  slots: maximum number of answers in progress."""
        import openvino

        model = openvino.Core().read_model(folder / "openvino_model.xml")
        _page(model)
        settings = {**_SETTINGS, "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.compile_model(model, "CPU", settings)
        self._request = compiled.create_infer_request()
        caches = {name: given for given in compiled.inputs if "_cache." in (name := given.get_any_name())}
        shapes = {
            name: [size.get_length() for size in list(given.get_partial_shape())[1:]] for name, given in caches.items()
        }
        self._block_tokens = next(iter(shapes.values()))[1]
        count = slots * -(-context_tokens // self._block_tokens)
        # The system allocates memory only for blocks that are used, and blocks with low numbers are used first.
        self._memory = {name: np.empty((count, *shape), np.float32) for name, shape in shapes.items()}
        for name, memory in self._memory.items():
            self._request.set_tensor(name, openvino.Tensor(memory, shared_memory=True))
        self._free = list(range(count))  #: numbers of the free blocks, as a heap

    def new_cache(self, _limit_tokens: int) -> Blocks:
        """Return an empty cache for an answer. The blocks of the cache are free again when the cache is deleted."""
        cache = Blocks()
        weakref.finalize(cache, self._release, cache.numbers)
        return cache

    def run(self, parts: list[Part], check: Callable[[], None]) -> list[Tensor]:
        """Run the parts in one pass, and return the logits of each part.

        For a part with `wants_all_logits`, the shape is (tokens, vocab_size). For any other part, only the logits after
        the last token are returned, with the shape (1, vocab_size).
        The logits are valid until the next pass.  check: called before the pass. An exception from `check` prevents
        the pass.
        """
        check()
        ids, positions, kept, counts = list[int](), list[int](), list[int](), list[int]()
        begins, blocks, block_begins = [0], list[int](), [0]
        for part in parts:
            end = part.cache.length + len(part.tokens)
            while len(part.cache.numbers) * self._block_tokens < end:
                part.cache.numbers.append(heapq.heappop(self._free))
            ids += part.tokens
            positions += range(part.cache.length, end)
            begins.append(len(ids))
            blocks += part.cache.numbers
            block_begins.append(len(blocks))
            counts.append(len(part.tokens) if part.wants_all_logits else 1)
            kept += range(len(ids) - counts[-1], len(ids))
        lengths = [part.cache.length for part in parts]
        small = {
            "past_lens": lengths, "subsequence_begins": begins, "block_indices": blocks,
            "block_indices_begins": block_begins, "max_context_len": max(positions) + 1,
        }  # fmt: skip
        inputs = {name: np.array(value, np.int32) for name, value in small.items()}
        large = {"input_ids": ids, "position_ids": positions, "kept": kept}
        inputs |= {name: np.array(value, np.int64) for name, value in large.items()}
        found = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        for part in parts:
            part.cache.length += len(part.tokens)
        return list(torch.from_numpy(next(iter(found.values())))[:, 0].split(counts))

    def _release(self, numbers: list[int]) -> None:
        for number in numbers:
            heapq.heappush(self._free, number)


def _page(model: Any) -> None:
    """Change a model so that it uses paged attention.

    The new input `kept` contains the indices of the tokens for which logits are computed.
    """
    from openvino import opset13
    from openvino._offline_transformations import paged_attention_transformation

    paged_attention_transformation(model)
    result = model.outputs[0].get_node()
    head = result.input_value(0).get_node()
    place = head if head.get_type_name() == "MatMul" else result
    kept = opset13.parameter([-1], np.int64, name="kept")
    kept.output(0).get_tensor().set_names({"kept"})
    rows = opset13.gather(place.input_value(0), kept, opset13.constant(0))
    place.input(0).replace_source_output(rows.output(0))
    model.add_parameters([kept])
    model.validate_nodes_and_infer_types()
