"""Report the steps of a run to experiment trackers, with the integrations of transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from sage.libs.finetune.run.trackers import Tracker, check_trackers


class Trackers(TrainerCallback):
    """Passes the Trainer's logs to trackers. A tracker that fails is removed with a warning, and the training continues."""

    def __init__(self, names: Sequence[Tracker], folder: Path, warn: Callable[[str], None]) -> None:
        """folder: folder for TensorBoard's files. Raises ConfigError if the package of a tracker is missing."""
        check_trackers(names)
        callbacks = get_reporting_integration_callbacks(list(names))
        self._callbacks = {name: callback() for name, callback in zip(names, callbacks, strict=True)}
        if (tensorboard := self._callbacks.get("tensorboard")) and tensorboard.logging_dir is None:
            tensorboard.logging_dir = str(folder)
        self._warn = warn
        self._context: tuple[TrainingArguments, TrainerState, TrainerControl] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **values: Any) -> None:
        """Start a run in each tracker."""
        self._context = args, state, control
        self._call("on_train_begin", **values)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **values: Any) -> None:
        """Report the logs of a step."""
        self._context = args, state, control
        self._call("on_log", **values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **values: Any) -> None:
        """End the run in each tracker."""
        self._call("on_train_end", **values)

    def add_heldout_loss(self, loss: float) -> None:
        """Report a held-out loss at the current step. Before the training begins, the loss is ignored."""
        if self._context and self._context[1].is_world_process_zero:
            self._call("on_log", logs={"eval_loss": loss})

    def _call(self, event: str, **values: Any) -> None:
        assert self._context
        for name, callback in list(self._callbacks.items()):
            try:
                getattr(callback, event)(*self._context, **values)
            except Exception as error:  # noqa: BLE001 - a tracker must not end the training
                del self._callbacks[name]
                self._warn(f"{name} failed and receives no further steps: {type(error).__name__}: {error}")
