"""Fourth phase of a run: load the model, attach the adapter and install the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.kernels.install import Kernels, install
from sage.libs.finetune.training.base import BaseFiles
from sage.libs.finetune.training.batching import Collator, PackedCollator, PaddedCollator
from sage.libs.finetune.training.loss import CompletionLoss
from sage.libs.finetune.training.model import decoder, load_trainable
from sage.libs.finetune.training.noise import EmbeddingNoise
from sage.libs.finetune.training.precision import Precision

#: A function that installs kernels in a model, and returns the kernels (or None) and an explanation.
Install = Callable[[Any, Precision], tuple[Kernels | None, str]]


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for training."""

    model: Any
    kernels: Kernels | None
    step_summary: str  #: whether SAGE's kernels are used, and why
    precision: Precision
    collator: Collator

    def new_loss(self) -> CompletionLoss:
        """Return a new loss function for the model. The token counts of the loss function begin at zero."""
        return CompletionLoss(self.kernels.head.weight, self.kernels.compute_dtype) if self.kernels else CompletionLoss()


def install_kernels(model: Any, precision: Precision) -> tuple[Kernels | None, str]:
    """Install SAGE's kernels in a model if its structure is supported; return the kernels or None, and an explanation."""
    return install(decoder(model), precision.compute_dtype, int8=precision.int8_products)


def no_kernels(reason: str) -> Install:
    """Return an Install function that installs no kernels, and gives `reason` as the explanation."""
    return lambda *_: (None, f"fallback: {reason}")


def load_model(base: BaseFiles, config: FinetuneConfig, precision: Precision, install: Install) -> LoadedModel:
    """Load the weights, attach the adapter and install the kernels. Raises ModelError or ConfigError.

    If the model does not support `precision`, the result contains the precision that is used instead.
    """
    model, kernels, summary = _load_weights(base, config, precision, install)
    if not kernels:
        was_bf16, precision = precision.bf16, precision.without_kernels(config.precision)
        if precision.bf16 != was_bf16:
            model, kernels, summary = _load_weights(base, config, precision, install)
    elif not kernels.int8_matrices:
        precision = precision.without_int8()
    if config.neftune_noise_alpha is not None:
        EmbeddingNoise(decoder(model), config.neftune_noise_alpha)
    collator: Collator = PackedCollator() if kernels else PaddedCollator(int(base.tokenizer.pad_token_id or 0))
    return LoadedModel(model, kernels, summary, precision, collator)


def _load_weights(
    base: BaseFiles, config: FinetuneConfig, precision: Precision, install: Install
) -> tuple[Any, Kernels | None, str]:
    set_seed(config.seed)  # immediately before the adapter's random initialization
    model = load_trainable(base.folder, config, precision, base.adapter)
    return (model, *install(model, precision))
