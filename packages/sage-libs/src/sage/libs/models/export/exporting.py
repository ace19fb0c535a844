"""Export a model into a new folder. Each step runs in a separate process, so this module does not import torch."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sage.common.errors import ConfigError, ModelError
from sage.libs.models.export.card import write_card
from sage.libs.models.export.folder import new_folder, parameter_count
from sage.libs.models.export.formats import OPENVINO_PRECISIONS, PRECISIONS, ExportFormat, LlamaCpp, OpenVino
from sage.libs.models.export.steps import run_step
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model

#: A function that is called with the title of the current step and the number of bytes written so far.
Report = Callable[[str, int], None]


def silent(step: str, size_bytes: int) -> None:
    """Ignore a progress report."""


#: Files that an export copies from an adapter's folder.
_ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "tokenizer*", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip


def export_model(
    name: str,
    format_: ExportFormat,
    output: Path,
    *,
    precision: str | None = None,
    llama_cpp: LlamaCpp | None = None,
    open_vino: OpenVino | None = None,
    report: Report = silent,
) -> None:
    """Write a model and a model card into a new folder; after any exception, the folder is removed.

    precision, for GGUF files: a key of PRECISIONS; None: the model's precision.
    precision, for OpenVINO's format: a key of OPENVINO_PRECISIONS; None: fp32.
    llama_cpp: required for GGUF files.  open_vino: required for OpenVINO's format.
    Raises ConfigError, ModelError or OutputError.
    """
    source = resolve_model(name)
    if format_ is ExportFormat.ADAPTER and source.kind is not ModelKind.ADAPTER:
        raise ConfigError(
            code="config_invalid", message=f"{name} is not an adapter.", hint="Use `--format merged`.", param="format"
        )
    with new_folder(output.absolute(), _needed_bytes(source, format_, precision)) as folder:
        match format_:
            case ExportFormat.ADAPTER:
                _weights(report, folder, "Checking the adapter", "--model", name)
                for pattern in _ADAPTER_FILES:
                    for file in source.folder.glob(pattern):
                        shutil.copy(file, folder)
            case ExportFormat.MERGED:
                _weights(report, folder, "Writing safetensors", "--model", name, "--folder", str(folder))
            case ExportFormat.GGUF | ExportFormat.OLLAMA:
                assert llama_cpp, "GGUF files need llama.cpp's converter"
                modelfile = folder / "Modelfile" if format_ is ExportFormat.OLLAMA else None
                write_gguf(name, folder, precision, llama_cpp, report=report, modelfile=modelfile)
            case ExportFormat.OPENVINO:
                assert open_vino, "OpenVINO's format needs OpenVINO"
                write_openvino(name, folder, precision or "none", open_vino, report=report, with_tokenizer=True)
        write_card(folder, output.name, source, format_, precision)


def write_gguf(
    name: str,
    folder: Path,
    precision: str | None,
    llama_cpp: LlamaCpp,
    *,
    report: Report = silent,
    modelfile: Path | None = None,
) -> dict[str, Any]:
    """Write `model.gguf` into a folder, and check that llama.cpp tokenizes prompts in the same way as transformers.

    precision: a key of PRECISIONS; None: the model's precision.  modelfile: path for Ollama's Modelfile; None: no Modelfile.
    Returns the model's default sampling settings and its context length in tokens.
    Raises ModelError if llama.cpp does not support the model or tokenizes a prompt differently.
    """
    dense, file = folder / ".safetensors", folder / "model.gguf"
    wanted = [flag for flag, is_set in (("--fp32", precision == "f32"), ("--modelfile", modelfile)) if is_set]
    facts = _weights(report, folder, "Writing safetensors", "--model", name, "--folder", str(dense), *wanted)
    if modelfile:
        modelfile.write_text(facts["modelfile"], encoding="utf-8")
    if precision is None:
        precision = {"float32": "f32", "float16": "f16"}.get(facts["dtype"], "bf16")
    bos = ("--begins-with-bos",) if facts["begins_with_bos"] else ()
    conversion = (
        sys.executable, "-m", "sage.libs.models.export.gguf_conversion", "--folder", str(dense), "--target", str(file),
        "--precision", precision, "--packages", str(llama_cpp.packages), "--end-tokens", str(facts["end_tokens"]), *bos,
    )  # fmt: skip
    _run(report, folder, "Converting to GGUF", conversion)
    shutil.rmtree(dense)
    _check_tokens(report, file, llama_cpp, facts["probes"])
    return {"sampling": facts["sampling"], "context_tokens": facts["context_tokens"]}


def write_openvino(
    name: str, folder: Path, quantize: str, open_vino: OpenVino, *, with_tokenizer: bool = False, report: Report = silent
) -> None:
    """Write a model in OpenVINO's format into a folder. Also copy the model's configuration, tokenizer and chat template.

    quantize: a key of OPENVINO_PRECISIONS.  with_tokenizer: also write the tokenizer in OpenVINO's format, and check that
    OpenVINO GenAI tokenizes prompts in the same way as transformers.
    Raises ModelError if OpenVINO does not support the model.
    """
    dense = folder / ".safetensors"
    facts = _weights(report, folder, "Writing safetensors", "--model", name, "--folder", str(dense), "--fp32")
    weights = set(dense.glob("*.safetensors*"))
    for file in set(dense.iterdir()) - weights:
        shutil.copy(file, folder)
    conversion = (
        sys.executable, "-m", "sage.libs.models.export.openvino_conversion", "--folder", str(dense), "--target", str(folder),
        "--quantize", quantize, "--packages", str(open_vino.packages), *(("--with-tokenizer",) if with_tokenizer else ()),
    )  # fmt: skip
    _run(report, folder, "Converting to OpenVINO's format", conversion, json.dumps(facts["probes"]))
    shutil.rmtree(dense)


def _check_tokens(report: Report, file: Path, llama_cpp: LlamaCpp, probes: list[dict[str, Any]]) -> None:
    chats = json.dumps([probe["messages"] for probe in probes])
    argv = (str(llama_cpp.interpreter), str(Path(__file__).with_name("tokenizer_check.py")), str(file))
    found = _run(report, file.parent, "Comparing the tokenization", argv, chats)
    for probe, tokens in zip(probes, found, strict=True):
        if probe["tokens"] != tokens:
            raise ModelError(
                code="export_unsupported",
                message=f"llama.cpp tokenizes a prompt differently: {tokens[:20]} instead of {probe['tokens'][:20]} for the "
                f"message {probe['messages'][-1]['content']!r}.",
                hint="Export with `--format merged`, and serve the model with another program.",
                param="format",
            )


def _weights(report: Report, folder: Path, title: str, *arguments: str) -> Any:
    return _run(report, folder, title, (sys.executable, "-m", "sage.libs.models.export.weights", *arguments))


def _run(report: Report, folder: Path, title: str, argv: Sequence[str], text: str = "") -> Any:
    def show() -> None:
        report(title, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))

    show()
    return run_step(argv, text, show)


def _needed_bytes(source: ModelSource, format_: ExportFormat, precision: str | None) -> float:
    if format_ is ExportFormat.ADAPTER:
        return sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    if format_ is ExportFormat.OPENVINO:
        return parameter_count(source) * (4 + OPENVINO_PRECISIONS[precision or "none"])
    weight_bytes = 4.0 if precision == "f32" else 2
    if format_ is not ExportFormat.MERGED:
        weight_bytes += PRECISIONS[precision or "bf16"]
    return parameter_count(source) * weight_bytes
