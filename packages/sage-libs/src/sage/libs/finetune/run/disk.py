"""Check the free disk space before a run starts and before each checkpoint."""

import math
import shutil
from collections import defaultdict
from pathlib import Path

from sage.common.disks import nearest_existing
from sage.common.errors import Conflict, RunError
from sage.libs.finetune.config import FinetuneConfig

#: A checkpoint contains the trained parameters and AdamW's two moments. Each moment has the size of the trained parameters.
_COPIES = 3


def check_start(config: FinetuneConfig, trained_bytes: int, runs: Path) -> None:
    """Raise Conflict if the checkpoints and the result of a new run do not fit on the disk.

    trained_bytes: size of the trained parameters.  runs: folder of the run directories. This folder need not exist yet.
    """
    # The oldest checkpoint is removed after the newest checkpoint is complete, so one more checkpoint must fit.
    count = config.keep_checkpoints + 1 + config.keep_best
    if config.max_steps:
        count = min(count, math.ceil(config.max_steps / config.save_steps))
    needs = (
        (runs, count * _COPIES * trained_bytes),
        (Path(config.output_dir), trained_bytes),
    )
    needed_bytes: dict[int, int] = defaultdict(int)
    for folder, size_bytes in needs:
        existing = nearest_existing(folder)
        disk = existing.stat().st_dev
        needed_bytes[disk] += size_bytes
        total_bytes, _, free_bytes = shutil.disk_usage(existing)
        if needed_bytes[disk] > free_bytes and total_bytes:  # a virtual file system such as /proc has a size of 0
            raise Conflict(
                code="disk_too_small",
                message=f"The checkpoints and the result of this run need {_shown(needed_bytes[disk])} on the disk of "
                f"{existing}, but only {_shown(free_bytes)} are free.",
                hint="Free up disk space, or keep fewer checkpoints with --keep-checkpoints.",
            )


class CheckpointSpace:
    """Checks before each checkpoint of a run whether the checkpoint fits on the disk."""

    def __init__(self, run: Path, trained_bytes: int) -> None:
        """Estimate the size of a checkpoint from the size of the trained parameters."""
        self._run = run
        self._checkpoint_bytes = _COPIES * trained_bytes

    def written(self, checkpoint: Path) -> None:
        """Use the size of a checkpoint that was written, instead of the estimate."""
        self._checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

    def check(self) -> None:
        """Raise RunError if the next checkpoint does not fit."""
        free_bytes = shutil.disk_usage(self._run).free
        if free_bytes < self._checkpoint_bytes:
            raise RunError(
                code="disk_full",
                message=f"The disk of {self._run} is full: a checkpoint needs {_shown(self._checkpoint_bytes)}, "
                f"and {_shown(free_bytes)} are free. Earlier checkpoints are intact.",
                hint="Free up disk space, then resume the run.",
            )


def _shown(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
