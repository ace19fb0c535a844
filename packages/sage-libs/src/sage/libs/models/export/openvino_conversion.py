"""Convert a model to OpenVINO's format, as one step of an export. OpenVINO GenAI and SAGE's OpenVINO backend use the format.

The step runs in SAGE's interpreter, because it needs torch and transformers. The step imports OpenVINO from the
environment of the OpenVINO backend. Converted models store keys and values as OpenVINO states. Models that Optimum Intel
converts have the same states.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sage.common.errors import ModelError, first_line
from sage.libs.models.export.formats import OPENVINO_PRECISIONS
from sage.libs.models.export.steps import finish_step
from sage.libs.models.loading import load_causal_lm, load_tokenizer

_ATTENTION = "sage_openvino_export"
#: Types of rotary embeddings whose values depend on the length of the text. The converted model would use
#: the values of short texts for all texts.
_VARYING_ROPE = frozenset({"dynamic", "longrope"})
#: Largest allowed difference between the logits of transformers and of OpenVINO, relative to the largest logit.
_TOLERANCE = 1e-3
#: Number of weights that share one scale in int4.
_INT4_GROUP = 32


class _Shape(NamedTuple):
    heads: int
    size: int


class _Layers:
    def __init__(self, past: tuple[Tensor, ...], order: Tensor, mask: Tensor | None) -> None:
        """past: stored keys and values of each layer; () if none are stored.

        order: for each sequence, its row in the tensors of `past`.
        """
        self._past, self._order, self._mask = past, order, mask
        self.present: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if self._past:
            at = len(self.present)
            key = torch.cat((self._past[at].index_select(0, self._order), key), 2)
            value = torch.cat((self._past[at + 1].index_select(0, self._order), value), 2)
        self.present += [key, value]
        group = query.shape[1] // key.shape[1]
        key, value = (_repeated(tensor, group) if group > 1 else tensor for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=self._mask, scale=scale).transpose(1, 2)


def _repeated(tensor: Tensor, group: int) -> Tensor:
    rows, heads, tokens, size = tensor.shape
    return tensor[:, :, None].expand(rows, heads, group, tokens, size).reshape(rows, heads * group, tokens, size)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float | None = None,
    layers: _Layers | None = None, sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """This function has the interface of transformers' attention functions."""
    if layers is None or options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("its kind of attention cannot be converted")
    if sliding_window and sliding_window < module.config.max_position_embeddings:
        raise NotImplementedError("its attention has a sliding window")
    return layers.attend(query, key, value, scaling), None


AttentionInterface.register(_ATTENTION, _attention)


class _Stateful(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        tokens, length = input_ids.shape[1], attention_mask.shape[1]
        is_past = torch.arange(length)[None] <= torch.arange(length - tokens, length)[:, None]
        is_seen = is_past[None, None] & attention_mask[:, None, None].bool()
        mask = torch.zeros(is_seen.shape).masked_fill(~is_seen, torch.finfo(torch.float32).min)
        layers = _Layers(past, beam_idx, mask)
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, layers=layers)
        return (output.logits, *layers.present)


def convert(folder: Path, target: Path, quantize: str) -> None:
    """Write a model as `openvino_model.xml` and `openvino_model.bin`.

    quantize: precision of the weights; "none": fp32. Before the quantization, OpenVINO's logits are compared with the logits
    of transformers. Raises ModelError if OpenVINO does not support the model.
    """
    import openvino

    model: Any = load_causal_lm(folder, torch.float32).eval()
    prompt = [7 * at % model.config.get_text_config().vocab_size for at in range(24)]
    try:
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        converted = _converted(model)
    except ModelError:
        raise
    except Exception as error:  # the conversion of an unsupported model can raise any exception
        raise _unsupported(folder, first_line(error)) from error
    difference = float((_logits(converted, prompt) - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise _unsupported(folder, f"the logits would differ by {difference:.1%} from the logits that transformers computes")
    if quantize != "none":
        converted = _quantized(converted, quantize)
    openvino.save_model(converted, target / "openvino_model.xml", compress_to_fp16=False)


def _converted(model: Any) -> Any:
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config.get_text_config()
    if (kind := (getattr(config, "rope_parameters", None) or {}).get("rope_type")) in _VARYING_ROPE:
        raise NotImplementedError(f"its rotary embedding, of type {kind}, depends on the length of the text")
    model.set_attn_implementation(_ATTENTION)
    shapes = _shapes(model)
    past = [torch.zeros(2, shape.heads, 3, shape.size) for shape in shapes]
    places = torch.arange(3, 7).repeat(2, 1)
    example = (torch.ones_like(places), torch.ones(2, 7, dtype=torch.int64), places, torch.arange(2, dtype=torch.int32))
    with torch.no_grad():
        converted = openvino.convert_model(_Stateful(model), example_input=(*example, *past))
    stored = [f"{at // 2}.{'value' if at % 2 else 'key'}" for at in range(len(shapes))]
    names = {f"past_key_values.{name}": f"present.{name}" for name in stored}
    sizes = [*[[-1, -1]] * 3, [-1], *([-1, shape.heads, -1, shape.size] for shape in shapes)]
    inputs = ("input_ids", "attention_mask", "position_ids", "beam_idx", *names)
    for given, name, size in zip(converted.inputs, inputs, sizes, strict=True):
        given.get_tensor().set_names({name})
        given.get_node().set_partial_shape(openvino.PartialShape(size))
    for returned, name in zip(converted.outputs, ("logits", *names.values()), strict=True):
        returned.get_tensor().set_names({name})
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, names)
    _set_initial_states(converted)
    return converted


def _shapes(model: Any) -> list[_Shape]:
    layers = _Layers((), torch.empty(0), None)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False, layers=layers)
    if not layers.present:
        raise NotImplementedError("it has no attention layer that can be converted")
    return [_Shape(tensor.shape[1], tensor.shape[3]) for tensor in layers.present]


def _set_initial_states(converted: Any) -> None:
    """Set empty keys and values as initial states; OpenVINO's paged attention requires initial states."""
    from openvino import opset13

    order = converted.input("beam_idx")
    rows = opset13.gather(opset13.shape_of(order, output_type="i64"), opset13.constant([0]), opset13.constant(0))
    for node in converted.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.output(0).get_partial_shape()
            shape = opset13.concat([rows, opset13.constant([heads.get_length(), 0, size.get_length()])], axis=0)
            node.set_arguments([opset13.broadcast(opset13.constant(0.0, dtype="float32"), shape)])
    converted.validate_nodes_and_infer_types()


def _logits(converted: Any, prompt: list[int]) -> Tensor:
    """Return the logits of the last token. The prompt is sent in two parts, to test the stored keys and values too."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = openvino.compile_model(converted, "CPU", settings).create_infer_request()
    result = torch.empty(0)
    for begin, end in ((0, 16), (16, len(prompt))):
        inputs = {
            "input_ids": [prompt[begin:end]], "attention_mask": [[1] * end], "position_ids": [list(range(begin, end))],
        }  # fmt: skip
        tensors = {name: torch.tensor(value).numpy() for name, value in inputs.items()}
        found = request.infer({**tensors, "beam_idx": torch.zeros(1, dtype=torch.int32).numpy()})
        result = torch.from_numpy(next(iter(found.values())))[0, -1]
    return result


def _quantized(converted: Any, quantize: str) -> Any:
    """Quantize the weights. With int4, the weights of the embeddings and of lm_head are quantized to int8."""
    import nncf

    if quantize == "int8":
        return nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_ASYM)
    fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    return nncf.compress_weights(
        converted, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=_INT4_GROUP, ratio=1.0, advanced_parameters=fallback
    )


def add_tokenizer(folder: Path, target: Path, probes: list[dict[str, Any]]) -> None:
    """Write the tokenizer in OpenVINO's format.

    probes: chats (`messages`), each with the expected token ids of its prompt (`tokens`).
    Raises ModelError if OpenVINO GenAI tokenizes a prompt differently.
    """
    import openvino
    import openvino_genai
    from openvino_tokenizers import convert_tokenizer

    for model, name in zip(convert_tokenizer(load_tokenizer(folder), with_detokenizer=True), ("", "de"), strict=True):
        openvino.save_model(model, target / f"openvino_{name}tokenizer.xml")
    tokenizer = openvino_genai.Tokenizer(target)
    for probe in probes:
        text = tokenizer.apply_chat_template(probe["messages"], add_generation_prompt=True)
        tokens = tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        if tokens != probe["tokens"]:
            problem = (
                f"OpenVINO GenAI tokenizes a prompt differently: {tokens[:20]} instead of {probe['tokens'][:20]} for "
                f"{probe['messages'][-1]['content']!r}"
            )
            raise _unsupported(folder, problem)


def _unsupported(folder: Path, problem: str) -> ModelError:
    return ModelError(
        code="export_unsupported",
        message=f"The model in {folder} cannot be converted to OpenVINO's format: {problem}.",
        hint="Use `--format merged`, and serve the model with another backend.",
        param="format",
    )


def main() -> None:
    """Run the conversion with the arguments of the command line. If --with-tokenizer is set, read probes from stdin."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--quantize", choices=OPENVINO_PRECISIONS, required=True)
    parser.add_argument("--packages", type=Path, required=True, help="Folder that contains the package openvino.")
    parser.add_argument("--with-tokenizer", action="store_true")
    given = parser.parse_args()
    sys.path.append(str(given.packages))

    def work() -> None:
        convert(given.folder, given.target, given.quantize)
        if given.with_tokenizer:
            add_tokenizer(given.target, given.target, json.load(sys.stdin))

    finish_step(work)


if __name__ == "__main__":
    main()
