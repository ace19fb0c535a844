"""Environments of backends. The real pip installs them from a local package index, without network access."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import wait_for

#: Runs the command line with one environment, `toy`. The arguments are the disk space that `toy` needs in bytes, the
#: maximum size of a written file (-1: no limit), and the command.
TOY_SAGE = """
import resource, sys
from sage.cli import main
from sage.llm.control_plane.backends import environments
toy = environments.Environment("toy", "toy-server", "1.0", 1000, int(sys.argv[1]), "import toy_server")
environments.device = lambda: "cpu"
environments.ENVIRONMENTS = {("toy", "cpu"): toy}
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sys.argv = ["sage", *sys.argv[3:]]
main.main()
"""


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a package index with one version of `toy-server`, and return its folder. Pip uses no other index."""
    project = tmp_path / "index" / "toy-server"
    project.mkdir(parents=True)
    wheel = project / "toy_server-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_server.py", "print('ready')\n")
        archive.writestr("toy_server-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-server\nVersion: 1.0\n")
        archive.writestr("toy_server-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy_server-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (project / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    return project


def backend(*arguments: str, disk_bytes: int = 2000, limit_bytes: int = -1) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", TOY_SAGE, str(disk_bytes), str(limit_bytes), "backend", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    return output, errors


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "data" / "backends").iterdir() if path.suffix != ".lock")


def test_an_environment_is_installed_checked_and_removed(sage_home: Path) -> None:
    output, errors = done(backend("install", "toy", "--json"))
    folder = sage_home / "data" / "backends" / "toy-server-1.0"
    assert json.loads(output) == {"name": "toy", "version": "1.0", "folder": str(folder), "changed": True}
    assert "toy-server==1.0 for the device cpu needs 1KB to download, and 2KB of disk space." in errors
    assert not (folder / "tmp").exists()
    assert "already installed" in done(backend("install", "toy"))[1]
    [finding] = json.loads(done(backend("doctor", "toy", "--json"))[0])
    assert (finding["check"], finding["state"]) == ("toy", "ok")
    for module in folder.rglob("toy_server.py"):
        module.write_text("raise ImportError('libgomp.so.1 is missing')")
    output, _ = done(backend("doctor"), code=1)
    assert "The backend toy cannot run: ImportError: libgomp.so.1 is missing." in output
    assert "→ Run `sage backend remove toy`, then `sage backend install toy`." in output
    assert "is removed" in done(backend("remove", "toy"))[1]
    assert leftovers(sage_home) == []
    assert "not installed" in done(backend("doctor"))[0]
    assert "is not installed" in done(backend("doctor", "toy"), code=1)[0]


def test_two_installations_at_once_make_one_environment(sage_home: Path) -> None:
    first, second = backend("install", "toy", "--json"), backend("install", "toy", "--json")
    outcomes = [json.loads(done(process)[0])["changed"] for process in (first, second)]
    assert sorted(outcomes) == [False, True]
    assert leftovers(sage_home) == ["toy-server-1.0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_installation_leaves_nothing_behind(sage_home: Path, number: signal.Signals) -> None:
    process = backend("install", "toy")
    python = sage_home / "data" / "backends" / "toy-server-1.0" / "bin" / "python"
    wait_for(python.exists, "the environment has begun")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert leftovers(sage_home) == []


def test_an_installation_after_a_killed_one_starts_with_an_empty_folder(sage_home: Path) -> None:
    process = backend("install", "toy")
    folder = sage_home / "data" / "backends" / "toy-server-1.0"
    wait_for((folder / "bin" / "python").exists, "the environment has begun")
    process.kill()
    process.communicate()
    (folder / "old").touch()
    assert json.loads(done(backend("install", "toy", "--json"))[0])["changed"]
    assert not (folder / "old").exists()


def test_an_index_that_cannot_be_reached_is_named_as_the_reason(sage_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    _, errors = done(backend("install", "toy"), code=1)
    assert "The backend 'toy' was not installed: the package index cannot be reached." in errors
    assert "PIP_INDEX_URL" in errors
    assert leftovers(sage_home) == []


def test_a_version_that_the_index_lacks_is_named_as_the_reason(sage_home: Path, index: Path) -> None:
    (index / "index.html").write_text("")
    _, errors = done(backend("install", "toy"), code=1)
    assert "No matching distribution found for toy-server==1.0." in errors
    assert "toy-server.log" in errors
    assert leftovers(sage_home) == []


def test_too_little_disk_space_is_reported_before_any_file_is_created(sage_home: Path) -> None:
    _, errors = done(backend("install", "toy", disk_bytes=10**18), code=1)
    assert "needs 1000000000.0 GB of disk space" in errors
    assert leftovers(sage_home) == []


def test_a_disk_that_becomes_full_is_named_as_the_reason(sage_home: Path) -> None:
    _, errors = done(backend("install", "toy", limit_bytes=100_000), code=1)  # larger files cannot be written
    assert "The disk became full while the backend 'toy' was installed." in errors
    assert leftovers(sage_home) == []
