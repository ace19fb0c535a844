"""Write the model card of an export."""

import json
import re
from pathlib import Path
from typing import Any

from sage.libs.models.export.formats import ExportFormat
from sage.libs.models.resolve import ModelSource

_USE = {
    ExportFormat.ADAPTER: 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")',
    ExportFormat.MERGED: 'AutoModelForCausalLM.from_pretrained("{folder}")',
    ExportFormat.GGUF: "llama-server --model {folder}/model.gguf --jinja",
    ExportFormat.OPENVINO: 'openvino_genai.LLMPipeline("{folder}", "CPU")',
    ExportFormat.OLLAMA: "ollama create {folder} --file {folder}/Modelfile",
}
_GGUF = {ExportFormat.GGUF, ExportFormat.OLLAMA}
_LIBRARY = {ExportFormat.ADAPTER: "peft", ExportFormat.MERGED: "transformers",
            ExportFormat.OPENVINO: "openvino"}  # fmt: skip


def write_card(folder: Path, target_name: str, source: ModelSource, format_: ExportFormat, precision: str | None) -> None:
    """Write README.md: a description of the model and its training data, and how to use the model."""
    record = _json(source.folder / "sage_run.json")
    recipe, metrics = record.get("recipe", {}), record.get("metrics", {})
    base = recipe.get("base_model") or (source.base.name if source.base else source.name)
    tags = [tag for tag, is_set in (("lora", source.base), ("gguf", format_ in _GGUF), ("sage", True)) if is_set]
    head = {
        "library_name": _LIBRARY.get(format_), "base_model": base, "tags": f"[{', '.join(tags)}]",
        "license": _licence((source.base or source).folder),
    }  # fmt: skip
    lines = ["---", *(f"{key}: {value}" for key, value in head.items() if value), "---", "", f"# {target_name}", ""]
    lines.append(f"Exported with SAGE from `{source.name}`. Base model: `{base}`.")
    if precision:
        lines.append(f"Precision of the weights: {precision}.")
    lines += ["", *_training(recipe, metrics), "    " + _USE[format_].format(base=base, folder=target_name), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _training(recipe: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    paths = recipe.get("dataset_path")
    if not paths:
        return []
    datasets = [Path(path).name for path in ([paths] if isinstance(paths, str) else paths)]
    lines = [f"- Dataset: {', '.join(f'`{name}`' for name in datasets)}"]
    if metrics.get("total_steps"):
        lines.append(f"- Steps: {metrics.get('step')} of {metrics['total_steps']}")
    if metrics.get("heldout_loss_before") and metrics.get("heldout_loss"):
        before, after = metrics["heldout_loss_before"], metrics["heldout_loss"]
        lines.append(f"- Held-out loss: {before:.4f} before training, {after:.4f} after training")
    shown = ("lora_rank", "lora_alpha", "learning_rate", "num_epochs", "max_seq_length")
    lines.append("- Recipe: " + ", ".join(f"{key} {recipe[key]}" for key in shown if recipe.get(key) is not None))
    return [*lines, ""]


def _licence(folder: Path) -> str | None:
    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
    except (OSError, IndexError, ValueError):
        return None
    found = re.search(r"^license:\s*(\S+)", head, re.MULTILINE)
    return found[1] if found else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
