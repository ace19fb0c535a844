"""Memory of the keys and values of one answer."""

import pytest
import torch

from sage.llm.workers.packed import KeyValueCache


class Full:
    """A tensor on a device without free memory."""

    shape = (1, 1, 4)

    def new_empty(self, *_: int) -> torch.Tensor:
        raise MemoryError


def test_a_cache_that_could_not_grow_grows_at_the_next_attempt() -> None:
    cache, like = KeyValueCache(layers=1, limit_tokens=1000), torch.zeros(1, 1, 4)
    cache.reserve(256, like, like)
    cache.keys[:], cache.values[:], cache.length = 1, 2, 256
    for key, value in ((Full(), like), (like, Full())):
        with pytest.raises(MemoryError):
            cache.reserve(1, key, value)  # type: ignore[arg-type]
    cache.reserve(1, like, like)
    assert cache.keys.shape[2] == cache.values.shape[2] > 256
    assert torch.equal(cache.keys[:, :, :256].unique(), torch.tensor([1.0]))
    assert torch.equal(cache.values[:, :, :256].unique(), torch.tensor([2.0]))
