"""The systemd unit of the gateway."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sage.cli import service
from sage.common.errors import ConfigError, NotFound


@pytest.fixture(autouse=True)
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for the unit; the tests cannot reach the systemd of the user who runs them."""
    for name in [name for name in os.environ if name.startswith("SAGE_") and name != "SAGE_HOME"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    return tmp_path / "config"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("folder", ["home", 'a home with 100 % "quotes" and a \\ backslash'])
def test_systemd_accepts_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / folder))
    path = service.install()
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "--user", "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    complaints = [line for line in done.stderr.splitlines() if service.UNIT in line]
    assert (done.returncode, complaints) == (0, [])


def test_the_unit_stops_only_the_gateway_and_uses_this_environment(config_folder: Path, sage_home: Path) -> None:
    path = service.install()
    assert path == config_folder / "systemd" / "user" / "sage-gateway.service"
    lines = path.read_text().splitlines()
    assert {"KillMode=process", "OOMPolicy=continue", "Restart=on-failure"} <= set(lines)
    assert f'ExecStart="{sys.executable}" "-m" "sage.llm.gateway"' in lines
    assert f'Environment="SAGE_HOME={sage_home}"' in lines


def test_an_api_key_in_the_environment_is_named_and_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_API_KEY", "secret-key")
    assert service.ignored_variables() == ["SAGE_API_KEY"]
    assert "secret-key" not in service.unit_text()


def test_without_systemd_the_commands_to_start_the_service_are_shown() -> None:
    service.install()
    with pytest.raises(ConfigError, match="systemd does not answer") as refused:
        service.enable()
    assert "systemctl --user enable --now sage-gateway.service" in refused.value.hint
    assert service.status() == service.Status(is_installed=True, enabled="unknown", active="unknown")


def test_uninstall_removes_the_unit_and_reports_a_missing_one() -> None:
    path = service.install()
    assert service.uninstall() == path
    assert not path.exists()
    with pytest.raises(NotFound, match="No service is installed"):
        service.uninstall()
