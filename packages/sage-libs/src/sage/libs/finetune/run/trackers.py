"""The experiment trackers to which a run can report its steps."""

import importlib.util
from collections.abc import Sequence
from typing import Literal

from sage.common.errors import ConfigError

Tracker = Literal["tensorboard", "mlflow", "trackio", "wandb"]
#: The packages for each tracker. A tracker needs only one of its packages. Error messages recommend the first package.
_PACKAGES: dict[Tracker, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Raise ConfigError for the first tracker that has no installed package."""
    for tracker in trackers:
        packages = _PACKAGES[tracker]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise ConfigError(
                code="tracker_missing",
                message=f"report_to {tracker} needs the package {packages[0]}, which is not installed.",
                hint=f"Install it: `pip install {packages[0]}`.",
                param="report_to",
            )
