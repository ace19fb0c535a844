"""SAGE's training step gives the same losses and gradients as transformers and PEFT, for each model family."""

import pytest
import torch
from decoders import FAMILIES, LORA, SIZES, distance, gradients, samples, trainable
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    PreTrainedConfig,
)

from sage.libs.finetune.kernels import attention
from sage.libs.finetune.kernels.attention import AttentionShape, fused_attention, packed_attention
from sage.libs.finetune.kernels.install import Kernels, install
from sage.libs.finetune.training.batching import PackedCollator
from sage.libs.finetune.training.loss import completion_loss


def installed(model: PeftModel, compute_dtype: torch.dtype | None = None) -> Kernels:
    kernels, summary = install(model.get_base_model(), compute_dtype)
    assert kernels is not None, summary
    return kernels


@pytest.mark.parametrize("lora", [name for name in LORA if name != "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_fused_training_gives_the_gradients_of_padded_training(family: str, lora: str) -> None:
    plain = gradients(trainable(FAMILIES[family](), torch.float64, **LORA[lora]), [samples()], None)
    model = trainable(FAMILIES[family](), torch.float64, **LORA[lora])
    fast = gradients(model, [samples()], installed(model))
    assert fast.keys() == plain.keys()
    for name, expected in plain.items():
        # transformers computes the softmax of eager attention, the norms and the loss in fp32, even if the model is float64.
        torch.testing.assert_close(fast[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_gradients_in_bf16_is_not_much_larger_than_without_kernels(
    family: str, compute_dtype: torch.dtype
) -> None:
    truth = gradients(trainable(FAMILIES[family](), torch.float32).double(), [samples()], None)
    plain = gradients(trainable(FAMILIES[family](), torch.float32).to(torch.bfloat16), [samples()], None)
    model = trainable(FAMILIES[family](), torch.float32).to(torch.bfloat16)
    fast = gradients(model, [samples()], installed(model, compute_dtype))
    assert distance(fast, truth) < 1.2 * distance(plain, truth)  # rounding errors are random
    assert abs(fast["loss"] - truth["loss"]) < 0.01 * truth["loss"]


def test_the_outputs_of_norms_are_recomputed_and_not_saved() -> None:
    model = trainable(FAMILIES["llama"](), torch.float32)
    installed(model)
    outputs: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    batch = PackedCollator()([samples()])
    batch.pop("labels")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, use_cache=False)
    assert len(outputs) == 4
    assert kept
    assert not kept & {output.data_ptr() for output in outputs}


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    model = trainable(FAMILIES["llama"](), torch.float64)
    kernels = installed(model)
    whole = {name: grad.clone() for name, grad in gradients(model, [samples()], kernels).items()}
    model.zero_grad()
    cut = gradients(model, [samples()[:1], samples()[1:3], samples()[3:]], kernels)
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-9, atol=1e-12)


def test_dropout_of_the_adapters_is_applied_and_depends_on_the_seed() -> None:
    def step(seed: int) -> dict[str, Tensor]:
        model = trainable(FAMILIES["llama"](), torch.float64, **LORA["dropout"])
        kernels = installed(model)
        torch.manual_seed(seed)
        return gradients(model, [samples()], kernels)

    first, again, other = step(1), step(1), step(2)
    for name, expected in first.items():
        torch.testing.assert_close(again[name], expected, rtol=0, atol=0)
    assert first["loss"] != other["loss"]


def test_gradient_checkpointing_does_not_change_the_gradients() -> None:
    model = trainable(FAMILIES["qwen3"](), torch.float64)
    kernels = installed(model)
    kept = {name: grad.clone() for name, grad in gradients(model, [samples()], kernels).items()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    made_again = gradients(model, [samples()], kernels)
    for name, expected in kept.items():
        torch.testing.assert_close(made_again[name], expected, rtol=1e-12, atol=1e-15)


def test_the_chunked_loss_equals_the_loss_of_dense_logits() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(700, 32, dtype=torch.float64, requires_grad=True)
    head, targets = torch.randn(211, 32, dtype=torch.float64), torch.randint(211, (700,))
    loss, correct = completion_loss(hidden, head, targets)
    (3 * loss).backward()
    grad, hidden.grad = hidden.grad, None
    logits = hidden @ head.t()
    dense = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (3 * dense).backward()
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(grad, hidden.grad)
    assert correct == (logits.argmax(-1) == targets).sum()


def test_a_decoder_with_an_unknown_layout_is_packed_without_fused_layers() -> None:
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=320, n_positions=512, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    )
    lora = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    plain = gradients(trainable(config, torch.float64, **lora), [samples()], None)
    model = trainable(config, torch.float64, **lora)
    kernels = installed(model)
    assert kernels.replaced == 0
    for name, grad in gradients(model, [samples()], kernels).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SIZES), "softcapping"),
        (BloomConfig(hidden_size=64, n_layer=1, n_head=2, vocab_size=320), "BloomForCausalLM"),
    ],
)
def test_an_unsupported_model_is_not_changed(config: PreTrainedConfig, reason: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.requires_grad_(False)
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    kernels, summary = install(model)
    assert kernels is None
    assert summary.startswith("fallback: ")
    assert reason in summary
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_kernels_can_be_disabled_for_generation() -> None:
    model = trainable(FAMILIES["qwen2"](), torch.float32).eval()
    prompt = torch.arange(3, 12)[None]
    before = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    kernels = installed(model)
    with kernels.disabled():
        after = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert before.tolist() == after.tolist()
    gradients(model, [samples()], kernels)


def test_the_bounds_of_samples_are_normal_tensors_even_during_an_evaluation() -> None:
    with torch.inference_mode():
        assert not attention._bounds((0, 5, 12), torch.device("cpu")).is_inference()


@pytest.mark.parametrize("turned", [True, False])
def test_fused_attention_equals_packed_attention(turned: bool) -> None:
    """Run the attention code that is meant for GPUs on the CPU, in float64."""
    torch.manual_seed(0)
    shape, cu_seqlens, tokens = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=16, scaling=0.3), [0, 5, 12, 49], 64
    angles = torch.rand(tokens, shape.head_dim // 2, dtype=torch.float64).repeat(1, 2)
    rotary = (angles.cos(), angles.sin()) if turned else None
    given = torch.randn(tokens, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, dtype=torch.float64)
    results = []
    for attend in (packed_attention, fused_attention):
        columns = given.clone().requires_grad_()
        outputs = attend(columns, rotary, cu_seqlens, shape)
        outputs.square().sum().backward()
        assert columns.grad is not None
        results.append((outputs.detach(), columns.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
