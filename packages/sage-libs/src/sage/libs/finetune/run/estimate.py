"""Estimate the memory of a run from the sizes of the model. This module does not import torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from sage.common.errors import RunError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.activations import BLOCK_TOKENS, kernel_activations, plain_activations
from sage.libs.models.architecture import Architecture

#: Main memory of a worker without model and data: Python, torch, transformers, PEFT and the Trainer. Measured with torch 2.9
#: on Linux: 430 MB before the model is loaded, and 60 MB more in the first step.
FRAMEWORK_BYTES = 490_000_000
#: Approximate memory of a process's CUDA context on the GPU.
CUDA_BYTES = 500_000_000
#: Bytes per trained parameter, in fp32: the parameter, its gradient, and AdamW's two moments.
_PARAMETER_BYTES, _GRADIENT_BYTES, _MOMENTS_BYTES = 4, 4, 8
#: Bytes per quantized weight, by number of bits; the scales are included.
_QUANTIZED_BYTES = {8: 1.01, 4: 0.52}
#: SAGE's training step has two tensors of shape (_LOSS_TOKENS, vocab_size) in memory: logits and probabilities.
_LOSS_TOKENS, _LOSS_COPIES = 384, 2
#: Size of the gaps in glibc's heap, as a fraction of the memory for activations and temporary values. The fractions were
#: fitted to the measurements in benchmarks/results/estimates.md.
#: _PLAIN_GAPS applies to the training step of transformers. This step frees many temporary values, which leaves gaps between
#: the saved values. The other fractions apply to SAGE's training step. _MIXED_GAPS applies if saved values and matrix
#: products have different number formats. Otherwise, _LONG_GAPS applies if a sample has more than BLOCK_TOKENS tokens.
#: _GAPS applies in all other cases.
_GAPS, _LONG_GAPS, _MIXED_GAPS, _PLAIN_GAPS = 0.12, 0.42, 0.47, 0.5
_MOST_SAMPLES = 2**20
#: Keys: training methods. Values: number of sequences per sample. All other methods have one sequence per sample.
_SEQUENCES = {"dpo": 2, "orpo": 2, "kto": 2}


@dataclass(frozen=True)
class Formats:
    """The number formats of a run."""

    bf16: bool = False  #: number format of the base model and the saved activations. True: bf16. False: fp32
    bf16_products: bool = False  #: number format of the matrix products. True: bf16. False: fp32
    base_bits: int | None = None  #: 8 or 4 if bitsandbytes quantizes the base model, else None
    int8: bool = False  #: whether SAGE's training step quantizes the layers to int8

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight or a saved activation."""
        return 2 if self.bf16 else 4

    @property
    def product_bytes(self) -> int:
        """Bytes of an operand of a matrix product."""
        return 2 if self.bf16_products else 4


@dataclass(frozen=True)
class TrainingEstimate:
    """The memory of a run in bytes, for one micro-batch. The sum of all fields is the peak."""

    framework_bytes: int  #: Python and its libraries
    weights_bytes: int  #: weights that are not trained, after quantization
    adapter_bytes: int  #: trained parameters, in fp32
    optimizer_bytes: int  #: AdamW's moments
    gradient_bytes: int  #: gradients that are in memory at the peak
    activation_bytes: int  #: values saved for the backward pass
    loss_bytes: int  #: temporary values of the loss or of the backward pass: the larger of the two
    heap_bytes: int = 0  #: gaps in the heap
    loading_bytes: int = 0  #: additional memory during loading, if loading needs more memory than training

    @property
    def total_bytes(self) -> int:
        """The peak memory of the run."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the value of each field. Keys: the field names without `_bytes`."""
        return {field.name.removesuffix("_bytes"): getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of a run as a function of the micro-batch."""

    sizes: Architecture
    config: FinetuneConfig
    formats: Formats
    has_kernels: bool  #: whether SAGE's training step is used; otherwise the step of transformers and PEFT is used
    framework_bytes: int = FRAMEWORK_BYTES
    checkpointing: bool = False  #: whether gradient checkpointing is used
    processes: int = 1  #: number of training processes that use the same memory; each process has its own copy of the model

    def at(self, lengths: Sequence[int] | Mapping[int, int]) -> TrainingEstimate:
        """Return the memory for a micro-batch.

        lengths: the number of tokens of each sample. A mapping has numbers of tokens as keys and numbers of samples as
        values.
        """
        sizes, formats, trained = self.sizes, self.formats, self._trained_parameters()
        activation_bytes, temporary_bytes = self._activations(Counter(lengths))
        gradient_bytes = trained * _GRADIENT_BYTES
        accumulated_bytes = gradient_bytes if self.config.gradient_accumulation_steps > 1 else 0
        in_step_bytes = activation_bytes + temporary_bytes + accumulated_bytes
        estimate = TrainingEstimate(
            framework_bytes=self.framework_bytes,
            weights_bytes=self._weights_bytes(),
            adapter_bytes=trained * _PARAMETER_BYTES,
            optimizer_bytes=trained * _MOMENTS_BYTES,
            gradient_bytes=accumulated_bytes + max(0, gradient_bytes - in_step_bytes),
            activation_bytes=activation_bytes,
            loss_bytes=temporary_bytes,
            heap_bytes=int((activation_bytes + temporary_bytes) * self._gaps(max(lengths))),
        )
        # During loading, the memory contains the pages of the weight file and the weights before SAGE's int8 quantization.
        # With bitsandbytes, only the pages are counted, because bitsandbytes quantizes each weight as soon as it is read.
        dense_bytes = 0 if formats.base_bits else sizes.parameters * (4 if self._is_full else formats.value_bytes)
        peak_bytes = self.framework_bytes + dense_bytes + sizes.file_bytes
        estimate = replace(estimate, loading_bytes=max(0, peak_bytes - estimate.total_bytes))
        return TrainingEstimate(**{name: self.processes * count for name, count in vars(estimate).items()})

    def largest(self) -> TrainingEstimate:
        """Return the maximum memory that a micro-batch can need with the options of the run."""
        longest, tokens = self.config.max_seq_length, self.config.pack_tokens
        batches = [batch_limit(self.config)]
        if tokens:
            batches.append({longest: max(1, tokens // longest)})
        if tokens and self.has_kernels and BLOCK_TOKENS < longest < tokens:  # one long sample and short samples
            batches.append({longest: 1, BLOCK_TOKENS: (tokens - longest) // BLOCK_TOKENS})
        return max(map(self.at, batches), key=lambda estimate: estimate.total_bytes)

    def least(self, length: int) -> TrainingEstimate:
        """Return the memory for one sample of `length` tokens, with gradient checkpointing if the options allow it.

        The pages of the mapped model files are not included, because the operating system can drop these pages.
        """
        may_checkpoint = self.config.gradient_checkpointing != "off" or self.checkpointing
        return replace(self, checkpointing=may_checkpoint, sizes=replace(self.sizes, file_bytes=0)).at([length])

    def fitting_samples(self, available_bytes: int, length: int) -> int:
        """Return how many samples of `length` tokens fit into the available memory as one micro-batch."""
        fits, too_many = 0, 1
        while self._fits(available_bytes, length, too_many):
            fits, too_many = too_many, 2 * too_many
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self._fits(available_bytes, length, middle) else (fits, middle)
        return fits

    def _fits(self, available_bytes: int, length: int, samples: int) -> bool:
        return samples <= _MOST_SAMPLES and self.at({length: samples}).total_bytes <= available_bytes

    def _gaps(self, longest: int) -> float:
        if not self.has_kernels:
            return _PLAIN_GAPS
        if self.formats.bf16 != self.formats.bf16_products:
            return _MIXED_GAPS
        return _LONG_GAPS if longest > BLOCK_TOKENS else _GAPS

    @property
    def _is_full(self) -> bool:
        return self.config.finetuning_type == "full"

    def _activations(self, lengths: Counter[int]) -> tuple[int, int]:
        sizes, config, formats = self.sizes, self.config, self.formats
        rank = 0 if self._is_full else config.lora_rank
        if self.has_kernels:
            per_token = kernel_activations(sizes, rank)
        else:
            per_token = plain_activations(sizes, rank, autocast=formats.bf16)
        repeats = _SEQUENCES.get(config.method, 1)
        tokens = repeats * sum(length * count for length, count in lengths.items())
        if not self.has_kernels:  # samples are padded to the longest sample
            tokens = repeats * lengths.total() * max(lengths)
        value_bytes = formats.value_bytes
        of_layer = tokens * (per_token.saved * value_bytes + per_token.inner * formats.product_bytes)
        weights = sum(per_token.attention_values(length) * count for length, count in lengths.items())
        of_layer += repeats * weights * value_bytes
        if self.checkpointing:
            saved = per_token.layers * tokens * per_token.layer_input * value_bytes + of_layer
        else:
            saved = per_token.layers * of_layer
        saved += self._stacked_values() * formats.product_bytes
        if self.has_kernels:
            loss = min(tokens, _LOSS_TOKENS) * sizes.vocab_size * value_bytes * _LOSS_COPIES
        else:  # logits and their gradient; log probabilities and their gradient, in fp32 (4 bytes)
            loss = tokens * sizes.vocab_size * (2 * value_bytes + 2 * 4)
        blocks = per_token.block_values(max(lengths), sizes.num_attention_heads) if self.has_kernels else 0
        backward = (tokens * per_token.backward + blocks) * formats.product_bytes
        return int(saved), int(max(loss, backward))

    def _weights_bytes(self) -> int:
        if self._is_full:
            return 0
        layers, outside = self.sizes.layer_parameters, self.sizes.parameters - self.sizes.layer_parameters
        bits = 8 if self.formats.int8 else self.formats.base_bits
        in_layers = layers * _QUANTIZED_BYTES.get(bits or 0, self.formats.value_bytes)
        return int(in_layers) + outside * self.formats.value_bytes

    def _trained_parameters(self) -> int:
        if self._is_full:
            return self.sizes.parameters
        config = self.config
        adapted = sum(config.lora_rank * sum(shape[-2:]) for shape in self._adapted().values())
        saved_modules = [
            math.prod(shape) for name, shape in self.sizes.matrices.items() if _matches(name, config.modules_to_save or [])
        ]
        return adapted + sum(saved_modules)

    def _adapted(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the matrices that get an adapter.

        If `target_modules` is a string, assume that all linear layers get an adapter.
        """
        targets, excluded = self.config.target_modules, self.config.exclude_modules
        if isinstance(targets, str):  # a regular expression is not evaluated, because the evaluation can take very long
            chosen = dict(self.sizes.layer_matrices)
        else:
            chosen = {name: shape for name, shape in self.sizes.matrices.items() if _matches(name, targets)}
        names = excluded if isinstance(excluded, list) else []
        return {name: shape for name, shape in chosen.items() if not _matches(name, names)}

    def _stacked_values(self) -> int:
        """Return the number of values in the copies of the adapter matrices that SAGE's training step saves.

        In the copies, the adapters of q_proj, k_proj and v_proj are combined into one adapter with three times the rank.
        """
        if not self.has_kernels:
            return 0
        fused = {"q_proj": 3, "k_proj": 3, "v_proj": 3}
        return sum(
            self.config.lora_rank * (shape[0] * fused.get(name.rpartition(".")[2], 1) + shape[1])
            for name, shape in self._adapted().items()
        )


def expected_kernels(config: FinetuneConfig, formats: Formats) -> bool:
    """Return whether SAGE's training step supports the options of a run. The model is not checked."""
    is_plain = not (config.use_dora or config.lora_dropout or config.modules_to_save)
    is_lora_sft = config.method == "sft" and config.finetuning_type == "lora"
    return is_lora_sft and config.fast_kernels == "auto" and is_plain and formats.base_bits is None


def batch_limit(config: FinetuneConfig) -> dict[int, int]:
    """Return the largest micro-batch that a run can have. Key: number of tokens per sample. Value: number of samples.

    If `pack_tokens` is set, samples of at most BLOCK_TOKENS tokens are assumed. Such samples need more memory per token than
    longer samples, because SAGE's training step saves their attention weights.
    """
    if not config.pack_tokens:
        return {config.max_seq_length: config.batch_size}
    length = min(config.max_seq_length, config.pack_tokens, BLOCK_TOKENS)
    return {length: max(1, config.pack_tokens // length)}


def check_memory(needs: TrainingMemory, length: int, available_bytes: int) -> None:
    """Raise RunError if even the smallest micro-batch does not fit.

    length: number of tokens of the only sample in the smallest micro-batch.
    available_bytes: free memory plus the memory that the run already uses.
    """
    least_bytes = needs.least(length).total_bytes
    if least_bytes <= available_bytes:
        return
    ways = ["use a smaller model"]
    if needs.config.finetuning_type == "full":
        ways.append("train an adapter (omit --finetuning-type)")
    elif needs.config.quantization != "4bit":
        ways.append("quantize the model to 4 bits (--quantization 4bit)")
    raise RunError(
        code="model_too_large",
        message=f"The model and its trained parameters need {gigabytes(least_bytes)} of memory, "
        f"but only {gigabytes(available_bytes)} are free.",
        hint=f"Free up memory, then `resume` the run; or {', or '.join(ways)}.",
    )


def gigabytes(count: int) -> str:
    """Format a number of bytes in gigabytes."""
    return f"{count / 1e9:.1f} GB"


def _matches(name: str, modules: Sequence[str]) -> bool:
    """Return whether `name` is one of `modules`, or ends with a period followed by one of `modules`, as in PEFT."""
    return any(name == module or name.endswith(f".{module}") for module in modules)
