"""Checkpoints as models that can be served while the run continues and removes its older checkpoints."""

import os
import shutil
from pathlib import Path

from sage.common.errors import ModelError
from sage.libs.finetune.run.rundir import RunDirectory

#: The files of an adapter and its tokenizer, by their suffix, and those of the Trainer with the same suffixes.
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".safetensors", ".txt"})
_OF_TRAINER = frozenset({"trainer_state.json", "manifest.json"})
#: The published checkpoint before the newest one may still answer requests.
_KEPT = 2


def publish_checkpoint(run: RunDirectory, step: int) -> Path:
    """Return the folder of a published checkpoint, made of hard links, and remove older ones except the one before.

    Raises ModelError if the checkpoint holds no adapter, OSError if it has been removed meanwhile.
    """
    checkpoint, target = run.path / f"checkpoint-{step}", run.served_path / f"step-{step}"
    if not target.is_dir():
        files = [file for file in checkpoint.iterdir() if file.suffix in _SUFFIXES and file.name not in _OF_TRAINER]
        if not (checkpoint / "adapter_config.json").is_file():
            raise ModelError(code="no_adapter", message=f"{checkpoint} holds a whole model instead of an adapter.")
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
