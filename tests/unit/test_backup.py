"""Backups of a home in which no process runs: content, checksums, paths, and refusals."""

import gzip
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sage.cli.backup import saving
from sage.cli.backup.restoring import Restored, restore
from sage.cli.backup.saving import Content, save
from sage.common.errors import BackupError, ConfigError, Conflict
from sage.common.paths import get_user_paths, private_folder
from sage.common.processes import claimed_lock
from sage.common.settings import load_settings
from sage.llm.control_plane.node import open_state_folder
from sage.llm.control_plane.store.database import open_database

TASK = "task-aaaaaaaaaa"


def ignore(*_: object) -> Any:
    return lambda _: None


def backed_up(target: Path, **content: bool) -> Path:
    save(target, Content(**content), ignore)
    return target


def restored(backup: Path, *, force: bool = False, outputs: bool = True) -> Restored:
    return restore(backup, force=force, outputs=outputs, begin=ignore)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the folder of a home with a database, a key, settings, and one stopped run with its output folder."""
    paths = get_user_paths()
    node, database = open_state_folder(), open_database(load_settings().store_url)
    with closing(sqlite3.connect(paths.state_dir / "engines.db")) as connection, connection:
        connection.execute(
            "INSERT INTO servers (id, node, backend, model, state, handle, version, created_at) "
            f"VALUES ('server-a', '{node}', 'trainer', 'm', 'launched', '{paths.finetuned_dir / TASK}/worker.lock', 1, '')"
        )
        connection.execute(
            "INSERT INTO leases (node, fence, holder, host, pid, pid_started, url, expires_at) "
            f"VALUES ('{node}', 7, 'gateway', 'h', 1, '', '', '2999-01-01 00:00:00.000000')"
        )
    database.dispose()
    (paths.state_dir / "servers.key").write_bytes(b"key")
    (paths.state_dir / "gateway.json").write_text("{}")
    private_folder(paths.config_dir)
    paths.config_file.write_text("log_level = 'DEBUG'\n")
    run, output = private_folder(paths.finetuned_dir / TASK), tmp_path / "out"
    (run / "spec.json").write_text(
        json.dumps({"task_id": TASK, "config": {"output_dir": str(output), "base_model": f"{paths.data_dir}/base"}})
    )
    (run / "events.jsonl").write_text('{"event": "stopped", "time": "2026-01-01T00:00:00Z", "step": 4}\n')
    (run / "summary.json").write_text("{}")
    for step in (2, 4):
        (checkpoint := run / f"checkpoint-{step}").mkdir()
        (checkpoint / "optimizer.pt").write_bytes(bytes(100))
        (checkpoint / "manifest.json").write_text(json.dumps({"step": step, "files_sha256": {}}))
    output.mkdir()
    (output / "sage_run.json").write_text(json.dumps({"task_id": TASK, "run": str(run)}))
    (output / "adapter_model.safetensors").write_bytes(b"weights")
    return paths.state_dir.parent


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_restored_home_has_the_same_node_key_settings_runs_and_outputs(home: Path, tmp_path: Path) -> None:
    backup = backed_up(tmp_path / "sage.tar.gz")
    assert backup.stat().st_mode & 0o077 == 0
    paths, output = get_user_paths(), tmp_path / "out"
    before = [content_of(folder) for folder in (paths.config_dir, paths.data_dir, output)]
    node = open_state_folder()
    shutil.rmtree(home)
    shutil.rmtree(output)
    assert restored(backup).outputs == (output,)
    for omitted in ("summary.json", "checkpoint-2/optimizer.pt", "checkpoint-2/manifest.json"):
        del before[1][f"models/finetuned/{TASK}/{omitted}"]
    assert [content_of(folder) for folder in (paths.config_dir, paths.data_dir, output)] == before
    assert (open_state_folder(), (paths.state_dir / "servers.key").read_bytes()) == (node, b"key")
    assert not (paths.state_dir / "gateway.json").exists()


def test_the_lease_in_a_restored_database_is_free(home: Path, tmp_path: Path) -> None:
    backup = backed_up(tmp_path / "sage.tar.gz")
    shutil.rmtree(home)
    restored(backup)
    with closing(sqlite3.connect(get_user_paths().state_dir / "engines.db")) as connection:
        assert connection.execute("SELECT fence, holder FROM leases").fetchall() == [(7, None)]


def test_paths_are_changed_to_the_home_into_which_a_backup_is_restored(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = backed_up(tmp_path / "sage.tar.gz")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "new home"))
    restored(backup)
    paths = get_user_paths()
    run = paths.finetuned_dir / TASK
    assert json.loads((run / "spec.json").read_text())["config"]["base_model"] == f"{paths.data_dir}/base"
    assert json.loads((tmp_path / "out" / "sage_run.json").read_text())["run"] == str(run)
    with closing(sqlite3.connect(paths.state_dir / "engines.db")) as connection:
        assert connection.execute("SELECT handle FROM servers").fetchall() == [(f"{run}/worker.lock",)]


def test_an_output_folder_inside_the_folder_of_the_runs_is_restored_with_the_runs(home: Path, tmp_path: Path) -> None:
    runs = get_user_paths().finetuned_dir
    (tmp_path / "out").rename(runs / "adapter")
    spec = json.loads((runs / TASK / "spec.json").read_text())
    spec["config"]["output_dir"] = str(runs / "adapter")
    (runs / TASK / "spec.json").write_text(json.dumps(spec))
    result = restored(backed_up(tmp_path / "sage.tar.gz"), force=True)
    assert (result.outputs, result.skipped) == ((runs / "adapter",), ())
    assert (runs / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_all_checkpoints_are_included_on_request_and_outputs_can_be_omitted(home: Path, tmp_path: Path) -> None:
    backup = backed_up(tmp_path / "sage.tar.gz", all_checkpoints=True, outputs=False)
    shutil.rmtree(home)
    shutil.rmtree(tmp_path / "out")
    assert restored(backup).outputs == ()
    run = get_user_paths().finetuned_dir / TASK
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_its_run_removes_during_the_backup_is_replaced_by_the_newest_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = get_user_paths().finetuned_dir / TASK

    def train_on(folder: Path, _: int) -> None:
        if folder == tmp_path:  # the files of the run have been listed
            (run / "checkpoint-4").rename(run / "checkpoint-6")

    monkeypatch.setattr(saving, "check_space", train_on)
    backup = backed_up(tmp_path / "sage.tar.gz")
    shutil.rmtree(home)
    restored(backup)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6"}
    assert (run / "checkpoint-6" / "optimizer.pt").stat().st_size == 100


@pytest.mark.parametrize("damage", ["truncated", "changed", "not a backup"])
def test_a_damaged_backup_is_refused_before_anything_is_changed(home: Path, tmp_path: Path, damage: str) -> None:
    backup = backed_up(tmp_path / "sage.tar.gz")
    match damage:
        case "truncated":
            backup.write_bytes(backup.read_bytes()[: backup.stat().st_size // 2])
        case "changed":
            backup.write_bytes(gzip.compress(gzip.decompress(backup.read_bytes()).replace(b"weights", b"strange")))
        case _:
            backup.write_text("a text")
    before = content_of(home)
    with pytest.raises(BackupError, match=r"is not a complete backup: .* Nothing was changed"):
        restored(backup, force=True)
    assert content_of(home) == before


def test_a_restore_into_a_home_with_data_is_refused_and_with_force_renames_the_old_folders(
    home: Path, tmp_path: Path
) -> None:
    backup, state = backed_up(tmp_path / "sage.tar.gz"), get_user_paths().state_dir
    with pytest.raises(Conflict, match=r"engines\.db exists"):
        restored(backup)
    (state / "newer").touch()
    result = restored(backup, force=True)
    assert result.skipped == (tmp_path / "out",)
    assert [aside.name.partition(".before-")[0] for aside in result.set_aside] == ["finetuned", "config", "state"]
    assert (result.set_aside[-1] / "newer").exists()
    assert not (state / "newer").exists()


def test_a_restore_into_a_home_with_running_processes_is_refused(home: Path, tmp_path: Path) -> None:
    backup = backed_up(tmp_path / "sage.tar.gz")
    with (
        claimed_lock(get_user_paths().finetuned_dir / TASK / "worker.lock"),
        pytest.raises(Conflict, match="running process"),
    ):
        restored(backup, force=True)


def test_an_existing_file_is_not_overwritten(home: Path, tmp_path: Path) -> None:
    (tmp_path / "sage.tar.gz").write_text("important")
    with pytest.raises(Conflict, match="exists already"):
        backed_up(tmp_path / "sage.tar.gz")


def test_too_little_disk_space_is_reported_before_the_file_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(BackupError, match=r"too little free space: 0.00 GB are needed"):
        backed_up(tmp_path / "backups" / "sage.tar.gz")
    assert list((tmp_path / "backups").iterdir()) == []


def test_too_little_disk_space_is_reported_before_anything_is_restored(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup, before = backed_up(tmp_path / "sage.tar.gz"), content_of(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(BackupError, match="too little free space"):
        restored(backup, force=True)
    assert content_of(home) == before


def test_a_database_on_a_server_is_refused_and_the_error_does_not_contain_the_password(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_DATABASE_URL", "postgresql://sage:secret@db.example.com/sage")
    with pytest.raises(ConfigError, match="pg_dump") as refused:
        backed_up(tmp_path / "sage.tar.gz")
    assert "secret" not in str(refused.value)
    backup = backed_up(tmp_path / "sage.tar.gz", database=False)
    shutil.rmtree(home)
    restored(backup)
    assert not (get_user_paths().state_dir / "engines.db").exists()
