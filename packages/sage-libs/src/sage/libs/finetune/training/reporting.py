"""Report progress and warnings of a run in its events and its log."""

import logging
from pathlib import Path

from sage.common.training import ProgressEvent, WarningEvent
from sage.libs.finetune.data.findings import Code, Findings
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.training.stopping import StopRequest

logger = logging.getLogger(__name__)


class Reporter:
    """Appends progress and warnings to the events of a run, and writes them to the log."""

    def __init__(self, run: RunDirectory, stop: StopRequest, checked_model: str | None) -> None:
        """checked_model: the model's name, shown in the error about dataset warnings. None: such warnings raise no error."""
        self._run, self._stop, self._checked_model = run, stop, checked_model
        self._reported: set[tuple[Path, Code]] = set()

    def progress(self, message: str) -> None:
        """Report the run's current activity."""
        self._run.append_event(ProgressEvent(message=message))
        logger.info("%s", message)

    def progress_unless_stopped(self, message: str) -> None:
        """Report the run's current activity; raises StopRequested if a stop was requested."""
        self._stop.check()
        self.progress(message)

    def warn(self, message: str) -> None:
        """Report a warning to the user."""
        self._run.append_event(WarningEvent(message=message))
        logger.warning("%s", message)

    def adapted(self, message: str, halvings: int, checkpointing: bool) -> None:
        """Report that the next steps use less memory. A resumed run starts with the same `halvings` and `checkpointing`.

        halvings: each micro-batch is computed in up to 2^halvings parts.  checkpointing: whether activations are recomputed.
        """
        self._run.append_event(WarningEvent(message=message, halvings=halvings, activation_checkpointing=checkpointing))
        logger.warning("%s", message)

    def findings(self, findings: Findings, path: Path) -> None:
        """Report each finding once. Raises DatasetError if there are warnings that the user does not allow."""
        if self._checked_model is not None:
            findings.raise_for_warnings(path, self._checked_model)
        for finding in findings:
            if (path, finding.code) not in self._reported:
                self._reported.add((path, finding.code))
                self.warn(str(finding))
