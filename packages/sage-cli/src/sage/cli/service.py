"""The systemd user unit of the gateway."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from platformdirs.unix import Unix

from sage.common.errors import ConfigError, EngineError, NotFound
from sage.common.files import replace_file

UNIT = "sage-gateway.service"
#: Variables that the service inherits from the shell that installs it. All other settings belong in config.toml.
_INHERITED = ("SAGE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "PATH")
_SYSTEMCTL_SECONDS = 60
#: KillMode=process: systemd stops only the gateway, so engines survive a restart of the gateway.
#: OOMPolicy=continue: if the kernel kills an engine that needs too much memory, the gateway survives.
#: RestartPreventExitStatus=2: exit code 2 means that a setting is wrong, and a restart does not correct a wrong setting.
_TEMPLATE = """\
[Unit]
Description=SAGE gateway: manages the engines that train and serve language models

[Service]
Type=exec
{environment}
ExecStart={command}
KillMode=process
OOMPolicy=continue
Restart=on-failure
RestartSec=2
RestartPreventExitStatus=2

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True)
class Status:
    """Whether the service is installed, starts at login, and runs."""

    is_installed: bool
    enabled: str  #: the answer of `systemctl is-enabled`; "unknown" if systemctl does not work
    active: str  #: the answer of `systemctl is-active`; "unknown" if systemctl does not work


def unit_path() -> Path:
    """Return the path of the unit file, even if the file does not exist."""
    return Unix(appname="systemd", appauthor=False).user_config_path / "user" / UNIT


def unit_text() -> str:
    """Return the content of the unit file for the current Python environment and the current environment variables."""
    inherited = {name: value for name in _INHERITED if (value := os.environ.get(name))}
    if home := inherited.get("SAGE_HOME"):
        inherited["SAGE_HOME"] = str(Path(home).expanduser().absolute())
    environment = "\n".join(f"Environment={_quoted(f'{name}={value}')}" for name, value in inherited.items())
    command = " ".join(_quoted(word).replace("$", "$$") for word in (sys.executable, "-m", "sage.llm.gateway"))
    return _TEMPLATE.format(environment=environment, command=command)


def ignored_variables() -> list[str]:
    """Return the names of the SAGE_ environment variables that the service does not inherit."""
    return sorted(name for name in os.environ if name.startswith("SAGE_") and name not in _INHERITED)


def install() -> Path:
    """Write the unit file and return its path."""
    path = unit_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, unit_text().encode())
    return path


def uninstall() -> Path:
    """Remove the unit file and return its path. If systemctl works, first stop and disable the service.

    Raises NotFound if the unit file does not exist.
    """
    path = unit_path()
    if not path.exists():
        raise NotFound(code="service_not_installed", message=f"No service is installed: {path} does not exist.")
    if has_systemctl():
        _systemctl("disable", "--now", UNIT)
    path.unlink()
    if has_systemctl():
        _systemctl("daemon-reload")
    return path


def enable() -> None:
    """Start the service now and at each login.

    Raises ConfigError if the user's systemd does not answer, and EngineError if the service does not start.
    """
    if not has_systemctl():
        raise ConfigError(
            code="systemd_missing",
            message=f"The unit file was written, but the user's systemd does not answer, so {UNIT} was not started.",
            hint=f"In a login session of this user, run `{' && '.join(commands())}`.",
        )
    for arguments in (("daemon-reload",), ("enable", "--now", UNIT)):
        done = _systemctl(*arguments)
        if done.returncode:
            raise EngineError(
                code="service_failed",
                message=f"`systemctl --user {' '.join(arguments)}` failed: {done.stderr.strip()}.",
                hint=f"To see the log, run `journalctl --user --unit {UNIT}`.",
            )


def commands() -> list[str]:
    """Return the shell commands that start the service now and at each login."""
    return ["systemctl --user daemon-reload", f"systemctl --user enable --now {UNIT}"]


def status() -> Status:
    """Return the status of the service."""
    if not has_systemctl():
        return Status(unit_path().exists(), "unknown", "unknown")
    enabled, active = (_systemctl(verb, UNIT).stdout.strip() for verb in ("is-enabled", "is-active"))
    return Status(unit_path().exists(), enabled or "disabled", active or "inactive")


def has_systemctl() -> bool:
    """Return whether the user's systemd answers."""
    return shutil.which("systemctl") is not None and _systemctl("show", "--property=Version").returncode == 0


def _systemctl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["systemctl", "--user", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SYSTEMCTL_SECONDS, check=False)


def _quoted(word: str) -> str:
    """Quote a word for a unit file, in which % begins a specifier."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
