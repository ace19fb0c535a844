"""Publish checkpoints for serving: link the files into a folder that remains when the run removes the checkpoint."""

import os
import shutil
from pathlib import Path

from sage.common.errors import ModelError
from sage.libs.finetune.run.rundir import RunDirectory

#: Suffixes of the checkpoint files that are published: the adapter and its tokenizer. `_OF_TRAINER` lists exceptions.
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".safetensors", ".txt"})
_OF_TRAINER = frozenset({"trainer_state.json", "manifest.json"})
#: Number of published checkpoints to keep: the newest, and the previous one, which running requests can still use.
_KEPT = 2


def publish_checkpoint(run: RunDirectory, step: int) -> Path:
    """Publish a checkpoint as a folder of hard links and return the folder. Keep the previous folder; remove older folders.

    Raises ModelError if the checkpoint contains no adapter, and OSError if the checkpoint was removed.
    """
    checkpoint, target = run.path / f"checkpoint-{step}", run.served_path / f"step-{step}"
    if not target.is_dir():
        files = [file for file in checkpoint.iterdir() if file.suffix in _SUFFIXES and file.name not in _OF_TRAINER]
        if not (checkpoint / "adapter_config.json").is_file():
            raise ModelError(code="no_adapter", message=f"{checkpoint} is a whole model, not an adapter.")
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in files:
            os.link(file, partial / file.name)
        os.replace(partial, target)
    published = sorted(run.served_path.glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    for folder in published[:-_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
    return target
