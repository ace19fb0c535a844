"""Write the result of a run to its output folder: adapter or model, tokenizer, model card, and `sage_run.json`."""

import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from sage.common.files import fsync_path, fsync_tree
from sage.libs.finetune.run.output import check_owner, write_record
from sage.libs.finetune.run.rundir import RunSpec
from sage.libs.finetune.training.model import Trainable, save_model
from sage.libs.models.fingerprint import fingerprint

_CARD = """\
---
library_name: {library}
base_model: {base_model}
tags: [{tag}, sage]
---

# {name}

{what} `{base_model}`, trained with SAGE on {dataset}
(SHA-256 `{dataset_sha256}`), {steps}{heldout}.

    sage llm engine start {output} --engine-kind llm
"""


def export_result(
    model: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    spec: RunSpec,
    run: Path,
    source: Path,
    metrics: dict[str, Any],
    memory: dict[str, int | None],
) -> None:
    """Write the current trained weights to the output folder; each file is replaced atomically.

    source: folder of the base model.
    metrics: step, total_steps, and held-out losses (None: not measured).
    memory: estimated memory and measured peak, in bytes. `sage_run.json` contains the metrics and the memory.
    """
    output = Path(spec.config.output_dir)
    check_owner(output, spec.task_id)
    output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "task_id": spec.task_id,
        "run": str(run),
        "recipe": spec.config.model_dump(mode="json"),
        "dataset_sha256": spec.dataset_sha256,
        "base_sha256": fingerprint(source),
        "metrics": metrics,
        "memory": memory,
        **({"forked_from": spec.forked_from} if spec.forked_from else {}),
    }
    aside = output / ".partial"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, aside, source)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(_card(model, spec, metrics), encoding="utf-8")
    fsync_tree(aside)
    for file in sorted(path for path in aside.rglob("*") if path.is_file()):
        target = output / file.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        os.replace(file, target)
        fsync_path(target.parent)
    shutil.rmtree(aside)
    write_record(output, record)


def _card(model: Trainable, spec: RunSpec, metrics: dict[str, Any]) -> str:
    is_adapter = isinstance(model, PeftModel)
    before, after = metrics.get("heldout_loss_before"), metrics.get("heldout_loss")
    heldout = f"; held-out loss {before:.4f} before, {after:.4f} after" if before and after else ""
    return _CARD.format(
        library="peft" if is_adapter else "transformers",
        tag="lora" if is_adapter else "full",
        what=f"A LoRA adapter of rank {model.peft_config[model.active_adapter].r} for" if is_adapter else "All weights of",
        base_model=spec.config.base_model,
        name=Path(spec.config.output_dir).name,
        dataset=", ".join(f"`{source.path.name}`" for source in spec.config.sources),
        dataset_sha256=spec.dataset_sha256,
        steps=f"{metrics['step']} of {metrics['total_steps']} steps" if metrics["total_steps"] else "0 steps",
        heldout=heldout,
        output=spec.config.output_dir,
    )
