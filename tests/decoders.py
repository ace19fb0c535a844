"""Create small random decoder models of several families, and compute the gradients of a training step."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sage.libs.finetune.data.tokenizing import IGNORED, Encoded
from sage.libs.finetune.kernels.install import Kernels
from sage.libs.finetune.training.batching import PackedCollator, PaddedCollator
from sage.libs.finetune.training.loss import CompletionLoss

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "attention_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with biases and tied embeddings": lambda: LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mistral with a window": lambda: MistralConfig(**SIZES, sliding_window=40),
    "gemma": lambda: GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh"),
}
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "down_proj": 5}, "use_rslora": True},
    "two layers only": {"target_modules": ["q_proj", "v_proj"]},
    "dropout": {"lora_dropout": 0.4},
    "DoRA": {"use_dora": True},
}
#: Sequence lengths below and above the size of the attention window, of a block of queries, and of a row of 64 tokens.
LENGTHS = (3, 33, 70, 300, 17)


def samples() -> tuple[Encoded, ...]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 320, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [IGNORED] * (length // 2) + ids[length // 2 :]))
    return tuple(made)


def trainable(config: PreTrainedConfig, dtype: torch.dtype, **lora: Any) -> PeftModel:
    """Return a random model with LoRA adapters whose weights are not zero. Each call returns the same weights."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=dtype is torch.bfloat16)
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
        elif "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def gradients(model: PeftModel, micro_batches: list[tuple[Encoded, ...]], kernels: Kernels | None) -> dict[str, Tensor]:
    """Return the loss and all gradients of one step, accumulated over micro-batches; kernels: SAGE's kernels or None."""
    collator = PackedCollator() if kernels else PaddedCollator(0)
    loss = CompletionLoss(kernels.head.weight, kernels.compute_dtype) if kernels else CompletionLoss()
    total = sum(sequence.trained_tokens for batch in micro_batches for sequence in batch)
    value = torch.zeros((), device=model.device)
    for micro_batch in micro_batches:
        batch = {name: tensor.to(model.device) for name, tensor in collator([micro_batch]).items()}
        labels = batch.pop("labels")
        part = loss(model(**batch, use_cache=False), labels, total)
        part.backward()
        value = value + part.detach().double()
    found = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": value.cpu(), **found}


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the Euclidean distance of all gradients together."""
    squares = [((found[name].double() - truth[name]) ** 2).sum() for name in truth if name != "loss"]
    return float(torch.stack(squares).sum().sqrt())
