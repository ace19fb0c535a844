"""Install the kernels in a model if its structure is supported.

Each kernel replaces the `forward` of one module instance. Modules, parameters and their names stay the same. Then the new
logits are compared with the logits of the original model. If the difference is too large, all kernels are removed again.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from sage.libs.finetune.kernels import attention
from sage.libs.finetune.kernels.lora import Projections, is_fusible, project
from sage.libs.finetune.kernels.mlp import GatedMlp, MakeProjections
from sage.libs.finetune.kernels.norm import frozen_rms_norm, rms_norm

#: Maximum accepted ratio std(new logits - original logits) / std(original logits), for each data type of the logits. Between
#: the bf16 logits and the fp32 logits of a model in transformers, the ratio is 0.08. Between unrelated logits, it exceeds 1.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25}
_PROBE_LENGTHS = (7, 12)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Settings in transformers' model configs that the kernels do not implement.
_UNKNOWN_SETTINGS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "attention_dropout",
)

Forward = Callable[..., Any]
AttentionInterface.register(attention.NAME, attention.attention_interface)


class Kernels:
    """The kernels installed in a model.

    With the kernels, the model accepts packed samples. The field `logits` of the model's output contains the last hidden
    states.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype | None = None) -> None:
        """Install the kernels without comparing the logits; the function `install` also compares them."""
        self.model, self.compute_dtype = model, compute_dtype
        self.head = model.get_output_embeddings()
        self._implementation = model.config._attn_implementation  # noqa: SLF001 - transformers has no getter
        self._projections: list[Projections] = []
        self._forwards: dict[nn.Module, Forward] = dict(_replacements(model, compute_dtype, self._projections_of))
        self.replaced, self.int8_matrices = len(self._forwards), 0
        if self.head is not None:
            self._forwards[self.head] = _identity
        self._install()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Uninstall the kernels for the duration of the `with` block, for example to generate text."""
        self.uninstall()
        for projections in self._projections:
            projections.restore_dense_weights()
        try:
            yield
        finally:
            for projections in self._projections:
                projections.free_dense_weights()
            self._install()

    def record_inputs(self) -> None:
        """Record the inputs of each weight matrix until `quantize` is called."""
        for projections in self._projections:
            projections.record_inputs()

    def quantize(self) -> str:
        """Quantize the weight matrices to int8, except matrices with a large error; return a summary."""
        errors = [each for projections in self._projections if (each := projections.quantize()) is not None]
        self.int8_matrices, count = len(errors), len(self._projections)
        return f"int8: {len(errors)} of {count} weights quantized, largest error {max(errors, default=0):.1%}"

    def _projections_of(self, layers: Sequence[nn.Module]) -> Projections:
        self._projections.append(Projections(layers, self.compute_dtype))
        return self._projections[-1]

    def uninstall(self) -> None:
        """Restore the original `forward` of every module."""
        for module in self._forwards:
            del module.forward
        self.model.set_attn_implementation(self._implementation)

    def _install(self) -> None:
        for module, forward in self._forwards.items():
            module.forward = forward
        self.model.set_attn_implementation(attention.NAME)


def install(
    model: PreTrainedModel, compute_dtype: torch.dtype | None = None, *, int8: bool = False
) -> tuple[Kernels | None, str]:
    """Install the kernels in a model with adapters.

    Return the kernels and a summary. If the kernels are not used, return None and the reason.
    model: transformers' model, not PEFT's wrapper.  compute_dtype: dtype of matrix products; default: the model's dtype.
    int8: whether to quantize the frozen weights to int8, except weights with a large error.
    """
    if reason := _unsupported_reason(model):
        return None, f"fallback: {reason}"
    before = _probe(model, None)
    kernels = Kernels(model, compute_dtype)
    if int8:
        kernels.record_inputs()
    try:
        difference = float((_probe(model, kernels) - before).float().std() / before.float().std())
    except (RuntimeError, ValueError, TypeError) as error:
        kernels.uninstall()
        return None, f"fallback: unsupported module structure in {type(model).__name__} ({str(error).splitlines()[0]})"
    # A quantized model gets the tolerance of bf16, because a quantized layer rounds its inputs and can enlarge differences.
    if not difference < _TOLERANCE[torch.bfloat16 if getattr(model, "is_quantized", False) else before.dtype]:
        kernels.uninstall()
        return None, f"fallback: outputs of {type(model).__name__} differ by {difference:.1%}"
    done = f"fast: packed samples, {kernels.replaced} modules with SAGE's kernels"
    return kernels, f"{done}, {kernels.quantize()}" if int8 else done


def _unsupported_reason(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    for name in _UNKNOWN_SETTINGS:
        if getattr(config, name, None) not in (None, 0, 0.0, 1, 1.0):
            return f"{type(model).__name__} has {name}"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return f"the head of {type(model).__name__} is not a frozen linear layer"
    if model.dtype not in _TOLERANCE:
        return f"the kernels do not support {model.dtype}"
    return ""


@torch.inference_mode()
def _probe(model: PreTrainedModel, kernels: Kernels | None) -> Tensor:
    """Return the logits of two random samples, shape (tokens, vocab_size). If `kernels` is given, the samples are packed."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    samples = [torch.randint(vocab, (1, n), generator=generator).to(model.device) for n in _PROBE_LENGTHS]
    was_training = model.training
    model.eval()
    try:
        if kernels is None:
            return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in samples])
        positions = torch.cat([torch.arange(n) for n in _PROBE_LENGTHS])[None].to(model.device)
        cu_seqlens = torch.tensor([0, *_PROBE_LENGTHS]).cumsum(0)
        hidden = model(
            input_ids=torch.cat(samples, 1), position_ids=positions, cu_seq_lens_q=cu_seqlens, use_cache=False
        ).logits[0]
        return hidden @ kernels.head.weight.t()
    finally:
        model.train(was_training)


def _replacements(
    model: PreTrainedModel, compute_dtype: torch.dtype | None, make: MakeProjections
) -> Iterator[tuple[nn.Module, Forward]]:
    for module in model.modules():
        if norm := frozen_rms_norm(module):
            yield module, _norm_forward(*norm)
        elif mlp := GatedMlp.of(module, make):
            yield module, mlp
        elif forward := _attention_forward(module, compute_dtype, make):
            yield module, forward


def _norm_forward(weight: Tensor, eps: float) -> Forward:
    return lambda hidden_states: rms_norm(hidden_states, weight, eps)


def _attention_forward(module: nn.Module, compute_dtype: torch.dtype | None, make: MakeProjections) -> Forward | None:
    names = {name for name, _ in module.named_children()}
    if not names.issuperset(_PROJECTIONS) or names - {*_PROJECTIONS, "q_norm", "k_norm"}:
        return None
    layers = [module.get_submodule(name) for name in _PROJECTIONS]
    norm_names = [name for name in ("q_norm", "k_norm") if name in names]
    head_norms = [norm for name in norm_names if (norm := frozen_rms_norm(module.get_submodule(name)))]
    if not all(map(is_fusible, layers)) or len(head_norms) != len(norm_names) or len(head_norms) == 1:
        return None
    incoming, outgoing, head_dim = make(layers[:3]), make(layers[3:]), module.head_dim
    heads = layers[0].out_features // head_dim
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    shape = attention.AttentionShape(
        heads, layers[1].out_features // head_dim, head_dim, module.scaling, window, compute_dtype
    )

    def forward(
        hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], cu_seq_lens_q: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        projected = project(hidden_states, incoming)
        if head_norms:
            projected = _normalize_heads(projected, head_norms, shape)
        rotary = position_embeddings[0][0], position_embeddings[1][0]
        attended = attention.packed_attention(projected, rotary, attention.cu_seqlens_as_list(cu_seq_lens_q), shape)
        return project(attended, outgoing)[None], None

    return forward


def _normalize_heads(projected: Tensor, norms: list[tuple[Tensor, float]], shape: attention.AttentionShape) -> Tensor:
    """Return `projected` with RMSNorm applied to each head of query and key, as in Qwen3."""
    heads = projected.view(projected.shape[0], -1, shape.head_dim)
    query, key, value = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    (query_norm, key_norm) = norms
    return torch.cat([rms_norm(query, *query_norm), rms_norm(key, *key_norm), value], dim=1).flatten(1)


def _identity(hidden_states: Tensor) -> Tensor:
    return hidden_states
