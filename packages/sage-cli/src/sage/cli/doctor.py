"""Check this installation, and report what works, what is missing and how to fix it."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal

import typer

from sage.cli import doctor_machine, doctor_state
from sage.cli.findings import WITHOUT_LOCAL, Finding
from sage.common.errors import SageError
from sage.common.settings import load_settings


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
    yield from doctor_machine.packages()
    yield doctor_machine.devices()
    yield from doctor_machine.torch()
    yield from backends()
    yield from doctor_state.folders()
    try:
        settings = load_settings()
    except SageError as error:
        yield Finding("settings", "failed", error.message, error.hint)
    else:
        if fake := settings.fake_devices:
            remedy = "To use the real GPUs, remove the setting, or unset SAGE_FAKE_DEVICES."
            yield Finding("fake_devices", "warning", f"The gateway uses fake GPUs: {fake}.", remedy)
        yield from doctor_state.database()
        yield from doctor_state.gateway(settings)
    yield from doctor_state.installed_service()


def backends(name: str | None = None) -> Iterator[Finding]:
    """Check the environments of all backends, or the environment of one backend."""
    if importlib.util.find_spec("sage.llm.control_plane") is None:
        yield Finding("backends", "warning", "The control plane is not installed, so no backend can run.", WITHOUT_LOCAL)
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
