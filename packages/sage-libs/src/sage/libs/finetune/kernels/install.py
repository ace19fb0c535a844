"""Putting the kernels in place, where a model's structure is the one they are for.

What each of them replaces is one module's `forward`, on the instance; modules, parameters and their names stay. Whether the
model still computes the same is then measured, and where it does not, everything is put back.
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
from sage.libs.finetune.kernels.norm import norm_of, rms_norm

#: Two ways to compute the same logits differ by rounding, and by less than this, as a share of their spread, both as root
#: mean squares. For random tokens in bf16, transformers' own are 0.08 away from those in fp32; another function is 1 away.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25}
_PROBE_LENGTHS = (7, 12)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Settings of transformers' configs that change what a decoder computes in ways that are not in the kernels.
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
    """The kernels in a model: it takes packed samples now, and its `logits` are the hidden states before the head."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype | None = None) -> None:
        """Put them in place, unchecked; `install` is the safe way."""
        self.model, self.compute_dtype = model, compute_dtype
        self.head = model.get_output_embeddings()
        self._implementation = model.config._attn_implementation  # noqa: SLF001 - transformers has no getter
        self._projections: list[Projections] = []
        self._forwards: dict[nn.Module, Forward] = dict(_replacements(model, compute_dtype, self._projections_of))
        self.replaced, self.int8_matrices = len(self._forwards), 0
        if self.head is not None:
            self._forwards[self.head] = _identity
        self._put_in()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Be transformers' own model for the length of the block, as generation needs it."""
        self.take_out()
        for projections in self._projections:
            projections.bring_back()
        try:
            yield
        finally:
            for projections in self._projections:
                projections.put_away()
            self._put_in()

    def watch(self) -> None:
        """Keep what goes into each matrix, until `shrink`."""
        for projections in self._projections:
            projections.watch()

    def shrink(self) -> str:
        """Hold the matrices of the layers in 8 bits, each of them that bears it; return what was done."""
        moved = [each for projections in self._projections if (each := projections.shrink()) is not None]
        self.int8_matrices, count = len(moved), len(self._projections)
        return f"{len(moved)} of {count} matrices in 8 bits (products move by up to {max(moved, default=0):.1%})"

    def _projections_of(self, layers: Sequence[nn.Module]) -> Projections:
        self._projections.append(Projections(layers, self.compute_dtype))
        return self._projections[-1]

    def take_out(self) -> None:
        """Put back what was there."""
        for module in self._forwards:
            del module.forward
        self.model.set_attn_implementation(self._implementation)

    def _put_in(self) -> None:
        for module, forward in self._forwards.items():
            module.forward = forward
        self.model.set_attn_implementation(attention.NAME)


def install(
    model: PreTrainedModel, compute_dtype: torch.dtype | None = None, *, int8: bool = False
) -> tuple[Kernels | None, str]:
    """Put the kernels into a model, adapters and all; return them, or None where it stays as it was, and what was done.

    model: transformers' own, not PEFT's around it.  compute_dtype: of products; by default the model's.
    int8: whether to hold the base in 8 bits, where the model bears it.
    """
    if reason := _unfit(model):
        return None, f"plain: {reason}"
    before = _probe(model, None)
    kernels = Kernels(model, compute_dtype)
    if int8:
        kernels.watch()
    try:
        difference = float((_probe(model, kernels) - before).float().std() / before.float().std())
    except (RuntimeError, ValueError, TypeError) as error:
        kernels.take_out()
        return None, f"plain: {type(model).__name__} is built otherwise ({str(error).splitlines()[0]})"
    # A quantised base rounds its inputs, so that the smallest difference may become one of its steps.
    if not difference < _TOLERANCE[torch.bfloat16 if getattr(model, "is_quantized", False) else before.dtype]:
        kernels.take_out()
        return None, f"plain: {type(model).__name__} computes otherwise (by {difference:.1%} of the logits' spread)"
    done = f"fast: packed samples, {kernels.replaced} modules with kernels of their own"
    return kernels, f"{done}, {kernels.shrink()}" if int8 else done


def _unfit(model: PreTrainedModel) -> str:
    """Return why a model cannot take the kernels, or nothing."""
    config = model.config.get_text_config()
    for name in _UNKNOWN_SETTINGS:
        if getattr(config, name, None) not in (None, 0, 0.0, 1, 1.0):
            return f"{type(model).__name__} has {name}"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return f"the head of {type(model).__name__} is not a frozen linear layer"
    if model.dtype not in _TOLERANCE:
        return f"{model.dtype} is not among the numbers that the kernels compute in"
    return ""


@torch.inference_mode()
def _probe(model: PreTrainedModel, kernels: Kernels | None) -> Tensor:
    """Return the logits of two short random samples, (tokens, vocab): one by one, or packed."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    samples = [torch.randint(vocab, (1, n), generator=generator).to(model.device) for n in _PROBE_LENGTHS]
    was_training = model.training
    model.eval()
    try:
        if kernels is None:
            return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in samples])
        positions = torch.cat([torch.arange(n) for n in _PROBE_LENGTHS])[None].to(model.device)
        bounds = torch.tensor([0, *_PROBE_LENGTHS]).cumsum(0)
        hidden = model(
            input_ids=torch.cat(samples, 1), position_ids=positions, cu_seq_lens_q=bounds, use_cache=False
        ).logits[0]
        return hidden @ kernels.head.weight.t()
    finally:
        model.train(was_training)


def _replacements(
    model: PreTrainedModel, compute_dtype: torch.dtype | None, make: MakeProjections
) -> Iterator[tuple[nn.Module, Forward]]:
    for module in model.modules():
        if norm := norm_of(module):
            yield module, _norm_forward(*norm)
        elif mlp := GatedMlp.of(module, make):
            yield module, mlp
        elif forward := _attention_forward(module, compute_dtype, make):
            yield module, forward


def _norm_forward(weight: Tensor, eps: float) -> Forward:
    return lambda hidden_states: rms_norm(hidden_states, weight, eps)


def _attention_forward(module: nn.Module, compute_dtype: torch.dtype | None, make: MakeProjections) -> Forward | None:
    """Return the forward of an attention block with fused projections, or None where its structure is another."""
    names = {name for name, _ in module.named_children()}
    if not names.issuperset(_PROJECTIONS) or names - {*_PROJECTIONS, "q_norm", "k_norm"}:
        return None
    layers = [module.get_submodule(name) for name in _PROJECTIONS]
    norm_names = [name for name in ("q_norm", "k_norm") if name in names]
    head_norms = [norm for name in norm_names if (norm := norm_of(module.get_submodule(name)))]
    if not all(map(is_fusible, layers)) or len(head_norms) != len(norm_names) or len(head_norms) == 1:
        return None
    incoming, outgoing, width = make(layers[:3]), make(layers[3:]), module.head_dim
    heads = layers[0].out_features // width
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    shape = attention.Shape(heads, layers[1].out_features // width, width, module.scaling, window, compute_dtype)

    def forward(
        hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], cu_seq_lens_q: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        projected = project(hidden_states, incoming)
        if head_norms:
            projected = _normed_heads(projected, head_norms, shape)
        rotary = position_embeddings[0][0], position_embeddings[1][0]
        attended = attention.packed_attention(projected, rotary, attention.bounds_of(cu_seq_lens_q), shape)
        return project(attended, outgoing)[None], None

    return forward


def _normed_heads(projected: Tensor, norms: list[tuple[Tensor, float]], shape: attention.Shape) -> Tensor:
    """Return the columns with each head of query and key normed, as Qwen3 does."""
    heads = projected.view(projected.shape[0], -1, shape.width)
    query, key, value = heads.split([shape.heads, shape.key_heads, shape.key_heads], dim=1)
    (query_norm, key_norm) = norms
    return torch.cat([rms_norm(query, *query_norm), rms_norm(key, *key_norm), value], dim=1).flatten(1)


def _identity(hidden_states: Tensor) -> Tensor:
    return hidden_states
