"""Run the steps of an export as processes. The last line that a step prints is a JSON object with the result."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sage.common.error_codes import error_class
from sage.common.errors import ModelError, SageError

_POLL_SECONDS = 0.5


def run_step(argv: Sequence[str], text: str = "", while_running: Callable[[], None] = lambda: None) -> Any:
    """Run a step to its end and return the value that it printed. If an exception is raised before the end, kill the step.

    text: standard input of the step.  while_running: called regularly until the step ends.
    Raises the SageError that the step printed, or ModelError with the last line of the step's log.
    """
    # Block SIGINT and SIGTERM until the step can be killed. Otherwise, the step could outlive this process. In the
    # step, both signals stay blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            output, log = _communicate(process, text, while_running)
        except BaseException:
            process.kill()
            process.wait()
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    result = _last_object(output)
    if "error" in result:
        error = result["error"]
        raise error_class(error["code"])(code=error["code"], message=error["message"], hint=error["hint"])
    if process.returncode or "value" not in result:
        last = (log.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise ModelError(code="export_failed", message=f"The export failed: {last[:500]}", param="model")
    return result["value"]


def finish_step(work: Callable[[], Any]) -> NoReturn:
    """Call `work`, print the returned value or the raised SageError as the last line of the output, and exit."""
    try:
        result, code = {"value": work()}, 0
    except SageError as error:
        result, code = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}, 1
    print(json.dumps(result))
    sys.exit(code)


def _communicate(process: subprocess.Popen[str], text: str, while_running: Callable[[], None]) -> tuple[str, str]:
    given: str | None = text
    while True:
        try:
            return process.communicate(given, timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            given = None
            while_running()


def _last_object(output: str) -> dict[str, Any]:
    try:
        found = json.loads((output.strip().splitlines() or ["{}"])[-1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
