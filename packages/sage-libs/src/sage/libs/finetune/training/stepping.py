"""A Trainer that adapts its micro-batches to the available memory."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sage.common.errors import RunError
from sage.libs.finetune.training.batching import Batch, cut, samples_in
from sage.libs.finetune.training.changing import UnboundedEpochs
from sage.libs.finetune.training.loss import CompletionLoss
from sage.libs.models.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class AdaptingTrainer(UnboundedEpochs):
    """Computes a micro-batch in parts if the whole micro-batch does not fit into memory.

    The loss is a sum over tokens divided by the number of tokens in the step. Therefore, the sum of the parts' gradients is
    the gradient of the micro-batch.
    """

    def __init__(
        self,
        *,
        loss: CompletionLoss,
        halvings: int,
        checkpointing: str,
        on_adapted: Callable[[str, int, bool], None],
        rehearsal: Callable[[], Batch] | None = None,
        **options: Any,
    ) -> None:
        """halvings: initially, each micro-batch is cut into at most 2 ** `halvings` parts.

        If memory is insufficient, the trainer increases `halvings` and cuts micro-batches into more parts.
        checkpointing: whether to use gradient checkpointing: `on`, `off`, or `auto` (only if memory is not sufficient).
        on_adapted: called when memory use is reduced. Its arguments are a message, the current `halvings`, and whether
        gradient checkpointing is on.
        rehearsal: returns the largest micro-batch, which is computed before the first step to detect a lack of memory. The
        gradient of the rehearsal is discarded. None: no rehearsal.
        """
        super().__init__(compute_loss_func=loss, **options)
        self._loss, self._rehearsal = loss, rehearsal
        self._halvings, self._on_adapted = halvings, on_adapted
        self._may_checkpoint, self._checkpoints = checkpointing == "auto", False
        if checkpointing == "on":
            self._checkpoint()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a micro-batch, and add the gradient of the loss to the gradients of the parameters.

        If several processes train together, micro-batches are not cut, because each process must compute the same number of
        micro-batches.
        """
        if self.args.world_size > 1:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._rehearsal:
            rehearsal, self._rehearsal = self._rehearsal, None
            self._rehearse(model, rehearsal())
        return self._adapted_step(model, inputs, num_items_in_batch)

    def _rehearse(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        counts, gradients = self._loss.counts, [parameter.grad for parameter in model.parameters()]
        devices = [self.args.device] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            for parameter in model.parameters():
                parameter.grad = None
            self._adapted_step(model, inputs, None)
        self._loss.counts = counts
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient

    def _adapted_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        while True:
            before, counts = [parameter.grad for parameter in parameters], self._loss.counts
            for parameter in parameters:
                parameter.grad = None
            total, part = torch.zeros((), device=self.args.device), inputs
            try:
                for part in cut(inputs, self._halvings):
                    total += super().training_step(model, part, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                cause = (str(error).splitlines() or ["out of memory"])[0]
            else:
                for parameter, gradient in zip(parameters, before, strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                return total
            self._loss.counts = counts
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            self._adapt(part, cause)

    def _adapt(self, part: dict[str, Any], cause: str) -> None:
        tokens = part["input_ids"].shape[1]
        if samples_in(part) > 1:
            self._halvings += 1
            done = f"computing micro-batches in up to {2**self._halvings} parts; the optimizer steps do not change"
        elif self._may_checkpoint:
            self._checkpoint()
            done = "enabling gradient checkpointing, which is slower"
        else:
            raise RunError(
                code="out_of_memory",
                message=f"Out of memory: a single sample of {tokens} tokens does not fit into memory.",
                hint="Start a new run with a smaller --max-seq-length or a smaller model.",
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.info("%s", cause)
        self._on_adapted(f"Out of memory: {done}.", self._halvings, self._checkpoints)

    def _checkpoint(self) -> None:
        self._may_checkpoint, self._checkpoints = False, True
        # Older releases of transformers have only the second name, which newer releases deprecate.
        enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
