"""The table of backend environments, and when an environment counts as installed. The tests install no environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sage.common.errors import ConfigError, Conflict
from sage.common.processes import try_lock
from sage.llm.control_plane.backends import environments, installation, registry
from sage.llm.control_plane.backends.environments import ENVIRONMENTS, MARKER, Environment

TOY = Environment("toy", "toy-server", "1.0", download_bytes=1, disk_bytes=2, check="import toy_server")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, sage_home: Path) -> None:
    monkeypatch.setattr(environments, "device", lambda: "cpu")
    monkeypatch.setattr(environments, "ENVIRONMENTS", {**ENVIRONMENTS, ("toy", "cpu"): TOY})


def pretend_installed(version: str = "1.0") -> Path:
    """Create a folder that looks like a complete environment. Its interpreter is the interpreter of the tests."""
    folder = TOY.folder.with_name(f"toy-server-{version}")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / MARKER).write_text(json.dumps({"backend": "toy", "version": version}))
    return folder


def test_every_environment_states_its_sizes_and_pins_every_package() -> None:
    for environment in ENVIRONMENTS.values():
        assert environment.disk_bytes > environment.download_bytes > 0, environment.requirement
        pins = environment.pins().splitlines()
        assert environment.requirement in pins
        assert all("==" in pin for pin in pins if not pin.startswith("#"))


def test_a_backend_without_an_environment_runs_in_the_environment_of_sage() -> None:
    assert environments.environment("transformers") is None
    with pytest.raises(ConfigError, match="'transformers' has no separate environment") as caught:
        environments.chosen("transformers")
    assert "toy" in caught.value.hint


def test_an_environment_without_its_marker_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="'toy' is not installed") as caught:
        environments.interpreter("toy")
    assert (caught.value.code, caught.value.hint) == (
        "backend_not_installed", "Install it: `sage backend install toy`.",
    )  # fmt: skip
    folder = pretend_installed()
    assert environments.interpreter("toy") == str(folder / "bin" / "python")
    (folder / MARKER).unlink()
    assert not TOY.is_installed


def test_remove_deletes_all_versions_of_a_backend_and_no_other_backend() -> None:
    folders = [pretend_installed(), pretend_installed("0.9")]
    other = folders[0].with_name("other-2.0")
    other.mkdir()
    (other / MARKER).write_text(json.dumps({"backend": "other", "version": "2.0"}))
    assert installation.remove(TOY, print)
    assert not any(folder.exists() for folder in folders)
    assert other.exists()
    assert not installation.remove(TOY, print)


def test_remains_of_a_removal_are_deleted_but_a_running_installation_is_not() -> None:
    left, installing = (TOY.folder.with_name(name) for name in ("toy-server-0.9", "other-2.0"))
    for folder in (left, installing):
        (folder / "bin").mkdir(parents=True)
    lock = try_lock(installing.with_name("other-2.0.lock"))
    assert lock is not None
    assert not installation.remove(TOY, print)
    assert (left.exists(), installing.exists()) == (False, True)
    os.close(lock)
    pretend_installed()
    assert not installation.install(TOY, print)
    assert not installing.exists()


def test_the_next_installation_deletes_an_outdated_environment_that_no_process_uses() -> None:
    pretend_installed()
    outdated = pretend_installed("0.9")
    assert not installation.install(TOY, print)
    assert not outdated.exists()
    assert TOY.is_installed


def test_an_environment_in_use_is_not_removed() -> None:
    folder = pretend_installed()
    with subprocess.Popen([folder / "bin" / "python", "-c", "input()"], stdin=subprocess.PIPE) as user:
        with pytest.raises(Conflict, match=f"in use by the process {user.pid}"):
            installation.remove(TOY, print)
        assert TOY.is_installed
        user.communicate(b"\n")
    assert installation.remove(TOY, print)


def test_the_list_of_backends_says_which_are_installed() -> None:
    found = {backend.name: backend for backend in registry.list_backends()}
    assert found["transformers"].is_installed
    assert not found["transformers"].has_environment
