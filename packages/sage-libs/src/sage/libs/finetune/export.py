"""What a run leaves in its output folder: adapter, tokenizer, model card, and how it came about."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from sage.libs.finetune.output import RUN_FILE
from sage.libs.finetune.rundir import RunSpec, fsync_tree, replace_file

_CARD = """\
---
library_name: peft
base_model: {base_model}
tags: [lora, sage]
---

# {name}

A LoRA adapter of rank {rank} for `{base_model}`, trained with SAGE on `{dataset}`
(SHA-256 `{dataset_sha256}`), {step} of {total_steps} steps{heldout}.

    sage llm engine start {output} --engine-kind llm
"""


def export_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, spec: RunSpec, run: Path, metrics: dict[str, Any]
) -> None:
    """Write the adapter as it is now into the run's output folder; each file appears whole.

    metrics: what stands in `sage_run.json` beside the recipe; step and total_steps, and the held-out losses if known.
    """
    output = Path(spec.config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    aside = output / ".partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, save_embedding_layers=False)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(_card(spec, metrics, model.peft_config[model.active_adapter].r), encoding="utf-8")
    fsync_tree(aside)
    for file in sorted(aside.iterdir()):
        os.replace(file, output / file.name)
    aside.rmdir()
    record = {
        "task_id": spec.task_id,
        "run": str(run),
        "recipe": spec.config.model_dump(mode="json"),
        "dataset_sha256": spec.dataset_sha256,
        "metrics": metrics,
    }
    replace_file(output / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _card(spec: RunSpec, metrics: dict[str, Any], rank: int) -> str:
    before, after = metrics.get("heldout_loss_before"), metrics.get("heldout_loss")
    heldout = f"; held-out loss {before:.4f} before, {after:.4f} after" if before and after else ""
    return _CARD.format(
        base_model=spec.config.base_model,
        name=Path(spec.config.output_dir).name,
        rank=rank,
        dataset=Path(spec.config.dataset_path).name,
        dataset_sha256=spec.dataset_sha256,
        step=metrics["step"],
        total_steps=metrics["total_steps"],
        heldout=heldout,
        output=spec.config.output_dir,
    )
