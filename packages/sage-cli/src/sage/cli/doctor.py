"""Check this installation, and report what works, what is missing and how to fix it."""

import importlib.util
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Literal

import typer

from sage.cli import daemon
from sage.common.errors import SageError
from sage.common.paths import get_user_paths
from sage.common.settings import load_settings

#: If less disk space than this is free, a warning is reported, because the checkpoints of a run need space.
_LOW_BYTES = 5 * 10**9
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "gpus": gpus, "threads": torch.get_num_threads()}))
"""
_TORCH_SECONDS = 120
_WITHOUT_LOCAL = "Install it: pip install 'sage-cli[local]'."


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: Literal["ok", "warning", "failed"]
    message: str
    remedy: str = ""


def report(findings: Iterator[Finding], *, as_json: bool) -> None:
    """Print the findings. Exit with code 1 if a check has failed."""
    done = []
    for finding in findings:
        done.append(finding)
        if not as_json:
            typer.echo(f"{finding.state:<8} {finding.check:<14} {finding.message}")
            if finding.remedy:
                typer.echo(f"{'':<23} → {finding.remedy}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in done], indent=2))
    if any(finding.state == "failed" for finding in done):
        raise typer.Exit(1)


def everything() -> Iterator[Finding]:
    """Run all checks."""
    yield Finding("python", "ok", f"{platform.python_version()} in {sys.prefix}, sage {version('sage-cli')}")
    yield from _torch()
    yield from backends()
    yield from _folders()
    try:
        settings = load_settings()
    except SageError as error:
        yield Finding("settings", "failed", error.message, error.hint)
    else:
        if fake := settings.fake_devices:
            remedy = "To use the real GPUs, remove the setting, or unset SAGE_FAKE_DEVICES."
            yield Finding("fake_devices", "warning", f"The gateway uses fake GPUs: {fake}.", remedy)
        yield _database()
        yield _gateway()


def backends(name: str | None = None) -> Iterator[Finding]:
    """Check the environments of all backends, or the environment of one backend."""
    if importlib.util.find_spec("sage.llm.control_plane") is None:
        yield Finding("backends", "warning", "The control plane is not installed, so no backend can run.", _WITHOUT_LOCAL)
        return
    from sage.llm.control_plane.backends import environments, installation

    device = environments.device()
    names = [name] if name else sorted({backend for backend, kind in environments.ENVIRONMENTS if kind == device})
    for environment in map(environments.chosen, names):
        label, reinstall = environment.backend, f"`sage backend install {environment.backend}`"
        if not environment.is_installed:
            is_left = environment.folder.is_dir() or environment.outdated()
            what = "is incomplete or belongs to another release of SAGE" if is_left else "is not installed"
            state: Literal["ok", "failed"] = "failed" if name or is_left else "ok"
            yield Finding(label, state, f"The backend {label} {what}.", f"{reinstall} installs it.")
        elif fault := installation.fault(environment):
            remedy = f"Run `sage backend remove {label}`, then {reinstall}."
            yield Finding(label, "failed", f"The backend {label} cannot run: {fault}.", remedy)
        else:
            yield Finding(label, "ok", f"{environment.requirement} in {environment.folder}")


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "warning", "torch is not installed; training and transformers need it.", _WITHOUT_LOCAL)
        return
    from sage.libs.finetune import quantization

    done = subprocess.run(  # in a separate process, because the import of torch takes seconds and may fail
        [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False
    )
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["Python exited without a message"])[-1].rstrip(".")
        yield Finding("torch", "failed", f"torch cannot be imported: {problem}.", "Install torch again for this machine.")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    gpus = ", ".join(found["gpus"]) or "no GPU"
    yield Finding("torch", "ok", f"{found['version']}, {gpus}, {found['threads']} CPU threads")
    if quantization.has_gpu() and not found["gpus"]:
        remedy = "Install a build of torch for CUDA, and check `nvidia-smi`."
        yield Finding("gpu", "failed", "This machine has a GPU, but torch cannot use it.", remedy)
    if folder := quantization.find_bitsandbytes():
        yield Finding("bitsandbytes", "ok", f"in {folder}")
    elif found["gpus"]:
        remedy = "Install it to quantize base models: pip install 'sage-libs[quantization]'."
        yield Finding("bitsandbytes", "warning", "bitsandbytes is not installed.", remedy)


def _folders() -> Iterator[Finding]:
    paths = get_user_paths()
    for name, folder in (("models", paths.data_dir), ("state", paths.state_dir), ("cache", paths.cache_dir)):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free_bytes = shutil.disk_usage(existing).free
        free = f"{free_bytes / 1e9:.1f} GB free" + (_copies() if name == "cache" else "")
        if not os.access(existing, os.W_OK | os.X_OK):
            yield Finding(name, "failed", f"{existing} is not writable.", "Make the folder writable, or set SAGE_HOME.")
        elif free_bytes < _LOW_BYTES:
            yield Finding(
                name, "warning", f"{folder}: {free}", "Free up disk space, or set SAGE_HOME to a folder on another disk."
            )
        else:
            yield Finding(name, "ok", f"{folder}: {free}")


def _copies() -> str:
    if importlib.util.find_spec("sage.libs.models") is None:
        return ""
    from sage.libs.models.export.copies import copies_bytes

    return f", {copies_bytes() / 1e9:.1f} GB of model copies"


def _database() -> Finding:
    path = get_user_paths().state_dir / "engines.db"
    if load_settings().database_url:
        return Finding("database", "ok", "the database is on a server; the gateway checks it")
    if not path.exists():
        return Finding("database", "ok", f"{path} does not exist yet; the gateway creates it")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
            [answer] = database.execute("PRAGMA quick_check(1)").fetchone()
            [revision] = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except (sqlite3.Error, TypeError, ValueError) as error:
        return Finding(
            "database",
            "failed",
            f"{path} cannot be read: {error}.",
            "Restore the file from a backup, or move the file away.",
        )
    if answer != "ok":
        return Finding(
            "database", "failed", f"{path} is damaged: {answer}.", "Restore the file from a backup, or move the file away."
        )
    return Finding("database", "ok", f"{path}, schema {revision}")


def _gateway() -> Finding:
    try:
        client = daemon.find_client()
        health = daemon.find_health(client)
        if health is None:
            return Finding("gateway", "ok", f"no gateway runs at {client.base_url}; commands that need a gateway start one")
        daemon.refuse_foreign(client, health)
        client.models()  # this request checks the API key and the database
    except SageError as error:
        return Finding("gateway", "failed", error.message, error.hint)
    if health["version"] != version("sage-cli"):
        remedy = "Run `sage gateway stop`. The next command starts the new version. Engines continue to run."
        return Finding("gateway", "warning", f"The gateway at {client.base_url} has version {health['version']}.", remedy)
    return Finding("gateway", "ok", f"{client.base_url}, PID {health['pid']}")
