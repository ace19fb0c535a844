"""The worker process, which executes one run: `python -m sage.libs.finetune.worker RUN_DIR`.

The process holds the run's lock, appends the run's events, and exits with code 0 if the run is completed or stopped.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from sage.common import disks
from sage.common.errors import RunError, SageError, first_line
from sage.common.imports import UNUSED_BY_LANGUAGE_MODELS, fast_imports
from sage.common.logs import configure_logging
from sage.common.paths import private_folder
from sage.common.processes import LOCK_FD_VARIABLE, try_lock, write_identity
from sage.common.training import FailedEvent, LaunchedEvent
from sage.libs.finetune.quantization import make_importable
from sage.libs.finetune.run.output import claim_output
from sage.libs.finetune.run.retrying import OUT_OF_MEMORY_EXIT, restart_with_less_memory
from sage.libs.finetune.run.rundir import RANK_VARIABLE, RunDirectory, SilentRunDirectory
from sage.libs.finetune.run.status import RunState
from sage.libs.finetune.run.summary import read_status, write_summary
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.models.memory import is_out_of_memory

logger = logging.getLogger(__name__)
#: If fewer bytes than this are free on the disk when an error occurs, the error is reported as a full disk.
_FULL_BYTES = 16 * 2**20
#: A run on several devices has one process per device. A process that is not the main process waits this number of seconds
#: before it reports an error. If the main process has exited by then, the error is not reported.
_LEADER_SECONDS = 1.0


def main(argv: list[str]) -> int:
    """Execute the run in the given folder; return the exit code."""
    if len(argv) != 1 or not (Path(argv[0]) / "spec.json").is_file():
        print("usage: python -m sage.libs.finetune.worker RUN_DIR (a folder with spec.json)", file=sys.stderr)
        return 2
    run = RunDirectory(Path(argv[0]).absolute())
    if RANK_VARIABLE in os.environ:
        return _follow(run)
    if LOCK_FD_VARIABLE not in os.environ:
        descriptor = try_lock(run.lock_path)
        if descriptor is None:
            print(f"A worker process is already running for {run.path}.", file=sys.stderr)
            return 1
        write_identity(descriptor)
        os.set_inheritable(descriptor, True)
        os.environ[LOCK_FD_VARIABLE] = str(descriptor)
        run.append_event(LaunchedEvent())
    configure_logging()
    warnings.simplefilter("ignore", FutureWarning)  # the warnings concern the code of libraries, which users cannot change
    stop = StopRequest()
    stop.install()
    try:
        private_folder(run.path)
        run.clear_staging()
        run.take_checkpoint_request()  # discard a checkpoint request that an earlier process did not handle
        run.reserve_space()
        spec = run.read_spec()
        claim_output(Path(spec.config.output_dir), spec.task_id, run.path)
        _train(run, stop)
        with contextlib.suppress(OSError):  # the summary is optional: it only makes reading the status faster
            write_summary(run)
    except Exception as error:  # noqa: BLE001 - any exception ends the run and is reported
        if is_out_of_memory(error):
            logger.info("%s", first_line(error))
            restart_with_less_memory(run, lambda: stop.requested)
        _fail(run, error)
        return 1
    return 0


def _follow(run: RunDirectory) -> int:
    configure_logging("WARNING")
    warnings.simplefilter("ignore", FutureWarning)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    leader = os.getppid()
    try:
        _train(SilentRunDirectory(run.path), StopRequest())
    except Exception as error:  # noqa: BLE001 - any exception ends the run and is reported
        if is_out_of_memory(error):
            logger.error("%s", first_line(error))
            os._exit(OUT_OF_MEMORY_EXIT)  # a normal exit would wait for the other processes
        time.sleep(_LEADER_SECONDS)
        if os.getppid() == leader:
            _fail(run, error)
        return 1
    return 0


def _fail(run: RunDirectory, error: Exception) -> None:
    logger.error("%s", "".join(traceback.format_exception(error)))
    run.release_space()
    if read_status(run).state is not RunState.FAILED:
        reported = _reported(error, run)
        run.append_event(FailedEvent(code=reported.code, message=reported.message, hint=reported.hint))


def _train(run: RunDirectory, stop: StopRequest) -> None:
    config = run.read_spec().config
    make_importable(config)
    # Both modules import torch, which takes seconds. They are imported here, after the signal handlers are installed.
    if config.method == "sft":
        with fast_imports(UNUSED_BY_LANGUAGE_MODELS):
            from sage.libs.finetune.training.trainer import TrainingRun as Run
    else:
        with fast_imports():
            from sage.libs.finetune.training.preference import PreferenceRun as Run
    Run(run, stop).train()


def _reported(error: Exception, run: RunDirectory) -> SageError:
    if isinstance(error, SageError):
        return error
    log = f"Full traceback: {run.log_path}."
    if _is_full(error, run.path):
        return RunError(
            code="disk_full",
            message=f"The disk of {_fullest(run)} is full: the run could not save files. Earlier checkpoints are intact.",
            hint="Free some space, then `resume` the run.",
        )
    if is_out_of_memory(error):
        return RunError(
            code="out_of_memory",
            message=f"Out of memory: {first_line(error)}.",
            hint="Start a new run with a smaller --batch-size or --max-seq-length.",
        )
    if isinstance(error, OSError) and error.filename:
        return RunError(
            code="file_unusable",
            message=f"{error.filename} cannot be used: {error.strerror}. Earlier checkpoints are intact.",
            hint=f"Solve this problem, then `resume` the run. {log}",
        )
    return RunError(
        code="training_failed", message=f"Training failed: {type(error).__name__}: {first_line(error)}.", hint=log
    )


def _is_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno:
        return disks.is_full(error)
    return shutil.disk_usage(folder).free < _FULL_BYTES or "No space left" in str(error)


def _fullest(run: RunDirectory) -> Path:
    folders = [run.path]
    with contextlib.suppress(Exception):  # for example, the spec cannot be read
        folders.append(Path(run.read_spec().config.output_dir))
    return min((folder for folder in folders if folder.is_dir()), key=lambda folder: shutil.disk_usage(folder).free)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
