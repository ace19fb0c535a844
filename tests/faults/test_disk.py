"""A disk that fills up, and files that are damaged."""

import contextlib
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import SAMPLES, engine_of, list_engines, sage, wait_for
from training import TinyRun

from sage.cli import daemon
from sage.cli.backup import saving
from sage.common.errors import BackupError, SageError
from sage.common.paths import get_user_paths
from sage.libs.finetune.run.status import RunState

TIGHT, ROOMY = "size=700k", "size=64m"


@pytest.fixture
def tight_disk(sage_home: Path) -> Iterator[Path]:
    """Mount a file system at the folder of the run directories. The file system is too small for a run."""
    mount_point = sage_home / "data/models/finetuned"
    mount_point.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", TIGHT, "tmpfs", str(mount_point)], check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_a_run_that_fails_on_a_full_disk_can_be_resumed_and_has_the_same_result(
    tiny_model: Path, tmp_path: Path, tight_disk: Path
) -> None:
    options = {"save_steps": 1, "keep_checkpoints": 50, "max_steps": 20}
    run = TinyRun(tiny_model, tmp_path / "out", **options).start()
    status = run.until_ended()
    assert status.state is RunState.FAILED
    assert status.code == "disk_full"
    assert "is full" in str(status.message)
    assert "Free some space, then `resume`" in str(status.hint)
    saved = status.checkpoint_step
    assert saved
    subprocess.run(["mount", "-o", f"remount,{ROOMY}", str(tight_disk)], check=True)
    run.manager.resume(run.task_id)
    run.completed()
    assert run.events("started")[-1]["step"] == saved
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    assert run.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.long
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    options = {"save_steps": 4, "max_steps": 40, "keep_checkpoints": 2}
    run = TinyRun(tiny_model, tmp_path / "out", **options).start()
    wait_for(lambda: (run.status.checkpoint_step or 0) >= 8, "two checkpoints")
    run.manager.stop(run.task_id, force=True)
    run.until_ended()
    older, newer = sorted(run.path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2:]
    weights = newer / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    run.manager.resume(run.task_id)
    run.completed()
    assert any(newer.name in warning for warning in run.status.warnings)
    assert run.events("started")[-1]["step"] == int(older.name.split("-")[1])
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    assert run.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.long
@pytest.mark.timeout(600)  # several processes import torch
def test_interruptions_at_random_steps_do_not_change_the_result(tiny_model: Path, tmp_path: Path) -> None:
    options = {"save_steps": 4, "max_steps": 200, "pack_tokens": 256, "gradient_accumulation_steps": 2, "lora_dropout": 0.1}
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    chance = random.Random(4)
    run = TinyRun(tiny_model, tmp_path / "out", **options).start()
    for turn, step in enumerate(sorted(chance.sample(range(1, 160), 5))):
        process = run.at_step(step).manager.process(run.task_id)
        assert process is not None, f"the run ended before interruption {turn}"
        process.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
        run.until_ended()
        with (run.path / "events.jsonl").open("ab") as events:
            events.write(b'{"event": "st')  # an incomplete line, as after a kill during a write
        run.manager.resume(run.task_id)
    run.completed()
    assert len(run.events("started")) >= 4  # an interruption may come before the first step
    assert run.losses() == whole.losses()
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_the_control_plane_reports_a_full_disk_and_continues_when_space_is_free(
    tiny_model: Path, tmp_path: Path, tight_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tight_disk / "home"))
    start = ("llm", "engine", "start", str(tiny_model), "--engine-kind", "finetune", "--dataset", str(SAMPLES),
             "--output", str(tmp_path / "out"), "--max-steps", "1", "--no-wait")  # fmt: skip
    sage("llm", "engine", "list")
    filler = tight_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    # On a full disk, the gateway cannot renew its lease. This process sends the request before the lease expires.
    with pytest.raises(SageError, match="disk is full"):
        daemon.find_client().start_engine(model=str(tiny_model), engine_kind="llm")
    subprocess.run(["mount", "-o", f"remount,{ROOMY}", str(tight_disk)], check=True)
    engine = engine_of(sage(*start))
    wait_for(lambda: list_engines()[engine]["state"] == "completed", "the end")
    assert list(list_engines()) == [engine]
    sage("gateway", "stop")


def test_a_backup_that_fills_the_disk_leaves_no_file(
    tight_disk: Path, sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = get_user_paths().state_dir
    state.mkdir(parents=True)
    (state / "noise.log").write_bytes(random.Random(1).randbytes(2_000_000))
    monkeypatch.setattr(saving, "check_space", lambda *_: None)  # as if enough space was free when the backup began
    with pytest.raises(BackupError, match="is full"):
        saving.save(tight_disk / "sage.tar.gz", saving.Content(), lambda _: lambda _: None)
    assert list(tight_disk.iterdir()) == []
    assert (state / "noise.log").stat().st_size == 2_000_000
