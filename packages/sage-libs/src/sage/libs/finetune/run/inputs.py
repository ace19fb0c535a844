"""Check what a run needs besides its model: data, reward file and TRL."""

import hashlib
import importlib.util
from pathlib import Path

from sage.common.errors import ConfigError, Conflict
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.data.loading import dataset_hash
from sage.libs.finetune.run.rewards import check_reward_file
from sage.libs.finetune.run.rundir import RunSpec


def data_hash(config: FinetuneConfig) -> str:
    """Return the SHA-256 of the training data and the reward file. Raises DatasetError or ConfigError."""
    datasets = dataset_hash(*(dataset.path for dataset in config.sources))
    if not config.reward_file:
        return datasets
    check_reward_file(Path(config.reward_file))
    return hashlib.sha256(datasets.encode() + Path(config.reward_file).read_bytes()).hexdigest()


def check_data(task_id: str, spec: RunSpec) -> None:
    """Raise Conflict if the data has changed since the run was created."""
    if data_hash(spec.config) != spec.dataset_sha256:
        files = [str(dataset.path) for dataset in spec.config.sources]
        files += [spec.config.reward_file] if spec.config.reward_file else []
        raise Conflict(
            code="dataset_changed",
            message=f"The data of {task_id} has changed since the run began, so the run cannot be resumed "
            f"with the same result. Data: {', '.join(files)}.",
            hint="Restore the old data, or start a new run.",
        )


def check_method(config: FinetuneConfig, allow_reward_files: bool) -> None:
    """Raise ConfigError if TRL is not installed, or if the reward file is invalid or not allowed."""
    if importlib.util.find_spec("trl") is None:
        raise ConfigError(
            code="trl_missing",
            message=f"method {config.method} needs TRL, which is not installed.",
            hint="Install it: `pip install 'sage-libs[preference]'`.",
            param="method",
        )
    if not config.reward_file:
        return
    if not allow_reward_files:
        raise ConfigError(
            code="reward_files_off",
            message="Reward files are disabled, because a reward file could execute any Python code on this machine.",
            hint="To allow them, set SAGE_ALLOW_REWARD_FILES=true in the gateway's environment or in config.toml.",
            param="reward_file",
        )
    check_reward_file(Path(config.reward_file))
