"""Fine-tune in the foreground, without the control plane, for notebooks and batch jobs: `python -m sage.libs.finetune`.

On Ctrl-C or SIGTERM, the run saves a checkpoint and its current result, and stops. The command `resume` continues the run.
"""

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path

from sage.common.errors import RunError, SageError
from sage.common.model_names import absolute_name
from sage.common.progress_bar import ProgressBar, eta_text
from sage.common.settings import load_settings
from sage.libs.finetune.config import load_config
from sage.libs.finetune.manager import FinetuneManager
from sage.libs.finetune.run.status import ALIVE, RunState, RunStatus

_POLL_SECONDS = 0.2


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv` and return the exit code. 0: success, or the run was stopped; 1: failure; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m sage.libs.finetune", description="Fine-tune in the foreground.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train with the options of a YAML file")
    train.add_argument("--config", type=Path, required=True, help="YAML file with options of FinetuneConfig")
    resume = commands.add_parser("resume", help="continue a stopped or failed run")
    resume.add_argument("task", help="id of the run, as printed by `train`")
    commands.add_parser("list", help="list the runs")
    arguments = parser.parse_args(argv)
    manager = FinetuneManager(allow_reward_files=load_settings().allow_reward_files)
    try:
        match arguments.command:
            case "train":
                config = load_config(arguments.config)
                base_model = absolute_name(config.base_model, Path.cwd())
                task_id = manager.create(config.model_copy(update={"base_model": base_model}))
                manager.start_training(task_id)
            case "resume":
                task_id = arguments.task
                manager.resume(task_id)
            case _:
                for task_id in manager.list():
                    status = manager.status(task_id)
                    print(f"{task_id}  {status.state:<10} {status.step}/{status.total_steps or '?'}")
                return 0
        print(task_id, flush=True)
        return _finish(manager, task_id, _follow(manager, task_id))
    except SageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code


def _follow(manager: FinetuneManager, task_id: str) -> RunStatus:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: manager.stop(task_id))
    with ProgressBar(task_id) as bar:
        while True:
            status = manager.status(task_id)
            if status.state not in ALIVE:
                return status
            bar.show(
                status.message or status.state,
                status.step,
                status.total_steps,
                status.metrics.loss,
                eta_text(status.eta_seconds),
            )
            with contextlib.suppress(InterruptedError):
                time.sleep(_POLL_SECONDS)


def _finish(manager: FinetuneManager, task_id: str, status: RunStatus) -> int:
    output = manager.run_directory(task_id).read_spec().config.output_dir
    match status.state:
        case RunState.COMPLETED:
            print(f"Completed: the result is in {output}.", file=sys.stderr)
            return 0
        case RunState.STOPPED:
            print(
                f"Stopped at step {status.step}. To continue the run, use the command `resume {task_id}`.", file=sys.stderr
            )
            return 0
        case _:
            raise RunError(code=status.code or "failed", message=status.message or "The run failed.", hint=status.hint or "")


if __name__ == "__main__":
    sys.exit(main())
