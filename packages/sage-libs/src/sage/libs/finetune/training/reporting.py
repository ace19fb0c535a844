"""Progress and warnings of a run, to its events and its log."""

import logging
from pathlib import Path

from sage.common.training import ProgressEvent, WarningEvent
from sage.libs.finetune.data.findings import Code, Findings
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.training.stopping import StopRequest

logger = logging.getLogger(__name__)


class Reporter:
    """Appends progress and warnings to a run's events, and logs them."""

    def __init__(self, run: RunDirectory, stop: StopRequest, checked_model: str | None) -> None:
        """checked_model: the model that the samples are checked for; None: the user allows their warnings."""
        self._run, self._stop, self._checked_model = run, stop, checked_model
        self._reported: set[tuple[Path, Code]] = set()

    def progress(self, message: str) -> None:
        """Report what the run does."""
        self._run.append_event(ProgressEvent(message=message))
        logger.info("%s", message)

    def progress_unless_stopped(self, message: str) -> None:
        """Report what the run does; raises StopRequested if it was asked to stop."""
        self._stop.check()
        self.progress(message)

    def warn(self, message: str) -> None:
        """Report something that a user should know."""
        self._run.append_event(WarningEvent(message=message))
        logger.warning("%s", message)

    def adapted(self, message: str, halvings: int, checkpointing: bool) -> None:
        """Report that the steps use less memory from now on; a resumed run begins with these values."""
        self._run.append_event(WarningEvent(message=message, halvings=halvings, activation_checkpointing=checkpointing))
        logger.warning("%s", message)

    def findings(self, findings: Findings, path: Path) -> None:
        """Report the findings of a dataset or model, each once; raises DatasetError if the run would learn wrongly."""
        if self._checked_model is not None:
            findings.raise_for_warnings(path, self._checked_model)
        for finding in findings:
            if (path, finding.code) not in self._reported:
                self._reported.add((path, finding.code))
                self.warn(str(finding))
