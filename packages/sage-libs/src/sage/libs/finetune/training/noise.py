"""NEFTune: add noise to the token embeddings during training, to reduce overfitting on small datasets.

The noise is uniform between -a and a, with a = alpha / sqrt(sample length * hidden size).
Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning".
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class EmbeddingNoise:
    """Adds noise to the embeddings in training mode. Padding does not count as part of a sample's length."""

    def __init__(self, model: PreTrainedModel, alpha: float) -> None:
        """model: transformers' model, not PEFT's wrapper.  alpha: strength of the noise; 5 to 15 in the paper."""
        self._alpha, self._lengths = alpha, torch.empty(0)
        model.register_forward_pre_hook(self._note_lengths, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._add)

    def _note_lengths(self, _module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Store, for each position, the length of the sample that contains the position.

        The stored tensor can be broadcast to the shape of `input_ids`.
        """
        bounds, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
        if bounds is not None:
            own = bounds.diff()
            filled = inputs["input_ids"].shape[1] - int(bounds[-1])
            self._lengths = torch.cat([own.repeat_interleave(own), own.new_ones(filled)])[None]
        elif mask is not None:
            self._lengths = mask.sum(-1, keepdim=True)

    def _add(self, module: Any, _args: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        scale = self._alpha / (self._lengths.to(embedded.device) * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale[..., None].to(embedded.dtype)
