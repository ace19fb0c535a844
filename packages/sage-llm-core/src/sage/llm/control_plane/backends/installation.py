"""Install, check and remove the environments of backends."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sage.common.errors import BackendError, Conflict
from sage.common.files import replace_file
from sage.common.paths import get_user_paths, private_file, private_folder
from sage.common.processes import try_lock
from sage.llm.control_plane.backends.environments import MARKER, Environment, processes

Report = Callable[[str], None]
_POLL_SECONDS = 0.2
_CHECK_SECONDS = 180
#: Number of lines at the end of pip's output in which SAGE searches for the reason of a failure.
_TAIL_LINES = 200
#: Texts in pip's output which show that the package index cannot be reached.
_UNREACHABLE = ("NewConnectionError", "Failed to establish", "ConnectTimeout", "ReadTimeout", "ProxyError", "SSLError",
                "NameResolutionError", "Temporary failure in name resolution", "No route to host")  # fmt: skip
#: Texts in pip's output which show that the disk is full.
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
#: Environment variables that would make pip install into another folder, or use packages of another environment.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV")


def install(environment: Environment, report: Report) -> bool:
    """Install an environment, or return False if the environment is already installed.

    A failed or interrupted installation is removed.  report: receives each line of pip's output.
    Raises BackendError if the package index cannot be reached, the disk has too little free space, or pip fails.
    """
    with _lock(environment, report) as lock:
        is_new = not environment.is_installed
        _delete_incomplete(environment)
        if is_new:
            shutil.rmtree(environment.folder, ignore_errors=True)  # a killed installation may have left files
            _check_space(environment)
            try:
                _make(environment, lock, report)
            except BaseException:
                shutil.rmtree(environment.folder, ignore_errors=True)
                raise
        for folder in environment.outdated():
            if not processes(folder):
                _delete(folder)
        return is_new


def remove(environment: Environment, report: Report) -> bool:
    """Delete all environments of a backend, or return False if none exist. Raises Conflict if an environment is in use."""
    with _lock(environment, report):
        folders = [folder for folder in (environment.folder, *environment.outdated()) if folder.is_dir()]
        if running := [pid for folder in folders for pid in processes(folder)]:
            raise Conflict(
                code="backend_in_use",
                message=f"The backend '{environment.backend}' is in use by the process {running[0]}.",
                hint="First stop the engines that use this backend; `sage llm engine list` shows the running engines.",
            )
        for folder in folders:
            _delete(folder)
        _delete_incomplete(environment)
        return bool(folders)


def fault(environment: Environment) -> str | None:
    """Run the check of an installed backend. Return why the check failed, or None if the check succeeded."""
    try:
        done = subprocess.run(
            [environment.python, "-c", environment.check], capture_output=True, text=True, timeout=_CHECK_SECONDS,
            check=False, env=_variables(), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its check did not finish within {_CHECK_SECONDS} s"
    except OSError as error:
        return f"its interpreter {environment.python} does not start: {error.strerror}"
    lines = done.stderr.strip().splitlines() or [f"its check exited with code {done.returncode}"]
    return lines[-1] if done.returncode else None


def log_path(environment: Environment) -> Path:
    """Return the path of the log of the last installation."""
    return get_user_paths().state_dir / "backends" / f"{environment.distribution}.log"


def _delete(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _delete_incomplete(environment: Environment) -> None:
    """Delete the incomplete folders of other environments. The caller must hold the lock of `environment`."""
    for folder in environment.incomplete():
        if (lock := try_lock(folder.with_name(f"{folder.name}.lock"))) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _make(environment: Environment, lock: int, report: Report) -> None:
    folder = private_folder(environment.folder)
    temporary = private_folder(folder / "tmp")
    pins = folder / "pins.txt"
    pins.write_text(environment.pins(), encoding="utf-8")
    log_path(environment).unlink(missing_ok=True)

    def run(*argv: str | Path) -> None:
        _run(environment, [str(argument) for argument in argv], temporary, lock, report)

    def install(requirement: str, *options: str) -> None:
        run(*pip, "install", "--progress-bar", "off", "--constraint", pins, *options, requirement)

    pip = (environment.python, "-m", "pip")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    run(environment.python, "-m", "ensurepip", "--default-pip")
    for requirement in environment.before:
        try:
            install(requirement)
        except BackendError:
            if not environment.index:
                raise
            install(requirement, "--extra-index-url", environment.index)
    install(environment.requirement)
    if environment.unwanted:
        run(*pip, "uninstall", "--yes", *environment.unwanted)
    shutil.rmtree(temporary)
    marker = {"backend": environment.backend, "version": environment.version}
    replace_file(folder / MARKER, json.dumps(marker).encode())


def _run(environment: Environment, argv: Sequence[str], temporary: Path, lock: int, report: Report) -> None:
    """Run a command, which inherits the lock. Even if this process is killed, new installations wait for the command."""
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with (
        private_file(log_path(environment)).open("a", encoding="utf-8") as log,
        subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**_variables(), "TMPDIR": str(temporary)}, pass_fds=(lock,), start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            for line in process.stdout or ():
                log.write(line)
                tail.append(line.strip())
                report(line.rstrip())
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise _failure(environment, list(tail))


def _failure(environment: Environment, lines: list[str]) -> BackendError:
    name, output = environment.backend, "\n".join(lines)
    if any(word in output for word in _FULL):
        return _full(environment, f"The disk became full while the backend '{name}' was installed.")
    if any(word in output for word in _UNREACHABLE):
        return BackendError(
            code="index_unreachable",
            message=f"The backend '{name}' was not installed: the package index cannot be reached.",
            hint="Check the network, or set PIP_INDEX_URL to another index, or PIP_FIND_LINKS to a folder of wheels. "
            "The incomplete installation was removed.",
        )
    errors = [line for line in lines if line.startswith(("ERROR:", "Error:"))]
    return BackendError(
        code="backend_install_failed",
        message=f"The backend '{name}' was not installed: {(errors or lines or ['pip failed'])[-1].rstrip('.')}.",
        hint=f"See pip's output in {log_path(environment)}; the incomplete installation was removed.",
    )


def _check_space(environment: Environment) -> None:
    free_bytes = shutil.disk_usage(private_folder(environment.folder.parent)).free
    need_bytes = environment.disk_bytes + environment.download_bytes
    if free_bytes < need_bytes:
        need, free = f"{need_bytes / 1e9:.1f} GB", f"{free_bytes / 1e9:.1f} GB"
        raise _full(environment, f"The backend '{environment.backend}' needs {need} of disk space; {free} are free.")


def _full(environment: Environment, problem: str) -> BackendError:
    hint = f"Free some space on the disk of {environment.folder.parent}, or set SAGE_HOME to a folder on another disk."
    return BackendError(code="disk_full", message=problem, hint=hint)


def _variables() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    return {**inherited, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONNOUSERSITE": "1"}


@contextlib.contextmanager
def _lock(environment: Environment, report: Report) -> Iterator[int]:
    path = environment.folder.with_name(f"{environment.folder.name}.lock")
    is_told = False
    while (lock := try_lock(path)) is None:
        if not is_told:
            report(f"Waiting for another command that installs or removes the backend '{environment.backend}'.")
            is_told = True
        time.sleep(_POLL_SECONDS)
    try:
        yield lock
    finally:
        os.close(lock)
