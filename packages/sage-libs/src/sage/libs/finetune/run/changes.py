"""Change options of a run while the run trains.

A request is stored in the file `options.json` of the run directory. Between two steps, the worker reads the file if the file
was replaced. If the file contains a new request, the worker appends the event `changed`, and then uses the new values. A
resumed run applies the changes that are recorded in its events.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from sage.common.errors import ConfigError, Conflict
from sage.common.files import replace_file
from sage.common.processes import held_lock
from sage.common.training import ChangedEvent, TrainingOptions
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunState, RunStatus
from sage.libs.finetune.run.summary import read_status


@dataclass(frozen=True)
class ChangeRequest:
    """The content of `options.json`."""

    revision: int  #: sequence number of the request in this run, from 1
    options: TrainingOptions


_REQUEST = TypeAdapter(ChangeRequest)


def request_change(run: RunDirectory, options: TrainingOptions) -> int:
    """Store a request and return its revision. If the previous request is not applied yet, combine both requests."""
    with held_lock(run.options_path.with_suffix(".lock")):
        pending, applied = read_request(run), read_status(run).change_revision
        if pending and pending.revision > applied:
            options = changed(pending.options, options)
        revision = max(applied, pending.revision if pending else 0) + 1
        replace_file(run.options_path, _REQUEST.dump_json(ChangeRequest(revision, options)), mode=0o600)
    return revision


def read_request(run: RunDirectory) -> ChangeRequest | None:
    """Return the request in `options.json`, or None if the file does not exist."""
    try:
        return _REQUEST.validate_json(run.options_path.read_bytes())
    except FileNotFoundError:
        return None


class RequestReader:
    """Reads `options.json` only if the file was replaced since the last read."""

    def __init__(self, run: RunDirectory) -> None:
        self._run, self._seen = run, (0, 0)

    def read(self) -> ChangeRequest | None:
        """Return the request in `options.json` if the file was replaced since the last call, else None."""
        try:
            found = self._run.options_path.stat()
        except FileNotFoundError:
            return None
        version = found.st_ino, found.st_mtime_ns
        if version == self._seen:
            return None
        self._seen = version
        return read_request(self._run)


def recorded_changes(run: RunDirectory) -> list[ChangedEvent]:
    """Return the changes in the events of a run, oldest request first."""
    return [event for event, _ in run.read_events() if isinstance(event, ChangedEvent)]


def configured_options(config: FinetuneConfig) -> TrainingOptions:
    """Return the options in a run's configuration. `max_steps` is None if `num_epochs` limits the training."""
    return TrainingOptions(
        learning_rate=config.learning_rate,
        max_steps=config.max_steps,
        early_stopping_patience=config.early_stopping_patience or 0,
    )


def options_at(configured: TrainingOptions, changes: Sequence[ChangedEvent], step: int) -> TrainingOptions:
    """Return the options that apply at a step. If several changes set the same option, the newest change applies."""
    for change in changes:
        if change.step <= step:
            configured = changed(configured, change.new)
    return configured


def changed(options: TrainingOptions, new: TrainingOptions) -> TrainingOptions:
    """Return a copy of `options` in which the values of `new` that are not None replace the old values."""
    return options.model_copy(update=new.model_dump(exclude_none=True))


def check_change(task_id: str, config: FinetuneConfig, status: RunStatus, options: TrainingOptions) -> None:
    """Raise ConfigError or Conflict if the options of a run cannot be changed in this way."""
    if status.state is RunState.COMPLETED:
        raise Conflict(
            code="run_completed",
            message=f"{task_id} is completed, so its options cannot be changed.",
            hint="To continue from a checkpoint of this run with other options, use `sage llm engine fork`.",
        )
    if not options.model_dump(exclude_none=True):
        raise _refused(
            "The request contains no option to change.",
            "Give at least one of learning_rate, max_steps, early_stopping_patience.",
        )
    if options.max_steps is not None and config.streaming:
        raise _refused(
            "max_steps of a run with streaming cannot be changed: the order of the samples depends on max_steps.",
            "Start a new run with another max_steps.", "max_steps",
        )  # fmt: skip
    if options.max_steps is not None and options.max_steps <= status.step:
        raise _refused(
            f"max_steps is {options.max_steps}, but {task_id} has already completed step {status.step}.",
            f"Give a number above {status.step}, or stop the run.", "max_steps",
        )  # fmt: skip
    if options.early_stopping_patience and not config.eval_steps:
        raise _refused(
            f"early_stopping_patience needs eval_steps, but {task_id} was started without eval_steps.",
            "Start a new run with held-out samples and eval_steps.", "early_stopping_patience",
        )  # fmt: skip


def _refused(message: str, hint: str, param: str | None = None) -> ConfigError:
    return ConfigError(code="change_refused", message=message, hint=hint, param=param)
