"""Reasons that the control plane reports for the state of a training run."""

from sage.common.errors import NotFound, first_line
from sage.libs.finetune.run.status import RunState, RunStatus
from sage.llm.client.types import Reason

SETTLED = (RunState.STOPPED, RunState.COMPLETED, RunState.FAILED)
#: Exceptions that occur if the files of a run are missing or contain invalid events.
UNREADABLE = (NotFound, ValueError, KeyError, TypeError, AttributeError)


def failure_of(run: RunStatus) -> Reason | None:
    """Return why a run failed, or None if the run did not fail."""
    if run.state is not RunState.FAILED:
        return None
    return Reason(code=run.code or "failed", message=run.message or "The run failed.", hint=run.hint or "")


def crash_of(run: RunStatus) -> str | None:
    """Return at which step a run exited without reporting an error, or None if the run did not exit in this way."""
    if run.code != "worker_died":
        return None
    return f"step {run.step}" if run.is_loaded else f"loading at step {run.step}"


def unreadable(error: Exception) -> Reason:
    """Return the reason to report for a run whose files cannot be read."""
    if isinstance(error, NotFound):
        return Reason(code=error.code, message=error.message, hint=error.hint)
    return Reason(
        code="run_unreadable",
        message=f"The run's events cannot be read: {type(error).__name__}: {first_line(error)}.",
        hint="Fix or remove the invalid line in events.jsonl in the run directory.",
    )
