"""Random faults while runs train and models serve: each run gives the exact result, and no event is lost."""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos import Chaos, processes
from chaos_users import Asker, Follower, Trainer, User
from clock import SteppedClock
from support import SAMPLES, make_tiny_model, sage, wait_for
from training import TinyRun

from sage.llm.client import SageClient
from sage.llm.client.types import SETTLED

_SECONDS = float(os.environ.get("SAGE_CHAOS_SECONDS", "120"))
_SEED = int(os.environ.get("SAGE_CHAOS_SEED", "1"))
_KEEP = os.environ.get("SAGE_CHAOS_KEEP")  #: folder for a copy of the SAGE_HOME after the test
_RUNS = max(20, round(_SECONDS / 6))
#: Runs differ only in their seed. The adapter of each seed is known from a run without faults.
_SEEDS = (1, 2, 3)
_OPTIONS: dict[str, Any] = {
    "batch_size": 1, "max_steps": 60, "save_steps": 4, "learning_rate": 1e-2, "precision": "fp32", "lora_dropout": 0.1,
}  # fmt: skip
_SETTINGS = {
    "MEMORY_LIMIT_GB": "4", "TRAINING_THREADS": "1", "ENGINE_UNRESPONSIVE_SECONDS": "4", "STOP_SECONDS": "5",
    "REQUEST_WAIT_SECONDS": "5", "LOG_LEVEL": "DEBUG",
}  # fmt: skip
#: The only allowed reasons for a failure. Each of them follows from a fault that the test injects.
_TRUE_REASONS = re.compile(
    "killed by SIGKILL|without reporting an error|exit code is unknown|did not answer for"
    "|No space left|is full|Too many open files"
)


@pytest.fixture
def small_disk(sage_home: Path) -> Iterator[bool]:
    """Mount a small file system at the SAGE_HOME. Yields False if that is not permitted."""
    sage_home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(sage_home)]
    is_mounted = subprocess.run(mount, check=False).returncode == 0
    yield is_mounted
    for process in processes(sage_home):
        with contextlib.suppress(psutil.Error):
            process.kill()
    if _KEEP:
        shutil.copytree(sage_home, _KEEP, ignore=lambda *_: {"filler"})
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(sage_home)], check=True)


@pytest.mark.long
@pytest.mark.skipif(not SteppedClock.is_available(), reason="there is no C compiler to build a clock that can be set")
@pytest.mark.timeout(_SECONDS + 1200)
def test_after_random_faults_every_run_is_exact_and_nothing_is_lost_or_left_behind(
    tmp_path: Path, sage_home: Path, small_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _SETTINGS.items():
        monkeypatch.setenv(f"SAGE_{name}", value)
    clock = SteppedClock(tmp_path)
    models = {"first": tmp_path / "first", "second": tmp_path / "second"}
    make_tiny_model(models["first"])
    make_tiny_model(models["second"], width=48)
    runs = _requests(models["first"], sage_home / "out")

    def start_gateway() -> None:
        if not processes(sage_home, "gateway"):
            sage("gateway", "start", check=None, env=clock.environment)

    start_gateway()
    base_url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}"
    client = SageClient(base_url)
    for name, folder in models.items():
        client.start_engine(model=str(folder), name=name, restart_policy="unless-stopped")
    wait_for(lambda: all(engine.state == "running" for engine in client.list_engines()), "the models")
    asker, follower, trainer = Asker(base_url, [*models]), Follower(base_url), Trainer(base_url, runs, start_gateway)
    users: list[User] = [asker, follower, trainer]
    for user in users:
        user.start()
    chaos = Chaos(sage_home, clock, _SEED, is_disk_small=small_disk)
    try:
        chaos.inject(_SECONDS)
        wait_for(lambda: trainer.is_done, "the end of all runs", 900)
        before = asker.answered.copy()
        wait_for(lambda: all(asker.answered[model] > before[model] for model in models), "answers of both models")
    finally:
        for user in (asker, trainer):
            user.stop()
        _report(chaos, users, trainer, asker)
    for engine in client.list_engines():
        if engine.kind != "finetune":
            client.stop_engine(engine.id)
    wait_for(lambda: all(engine.state in SETTLED for engine in client.list_engines()), "the stops")
    wait_for(lambda: follower.ids[-1] == client.changes("latest").last_id, "the last event")
    sage("gateway", "stop")
    follower.stop()

    wait_for(lambda: not processes(sage_home), "the end of all processes", 20)
    assert [bug for user in users for bug in user.bugs] == []
    assert follower.ids == list(range(1, len(follower.ids) + 1))
    assert [reason for reason in trainer.failures if not _TRUE_REASONS.search(reason)] == []
    _check_database(sage_home / "state/engines.db")
    _check_adapters(models["first"], tmp_path, runs)


def _requests(model: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Return the request of each run by its output folder. A third of the runs is restarted only by the user."""
    policies = ("no", "on-failure", "unless-stopped")
    return {
        str(root / str(number)): {
            "model": str(model), "engine_kind": "finetune", "restart_policy": policies[number % 3],
            "options": {
                "dataset_path": str(SAMPLES), "output_dir": str(root / str(number)), "seed": _SEEDS[number // 3 % 3],
                **_OPTIONS,
            },
        }
        for number in range(_RUNS)
    }  # fmt: skip


def _report(chaos: Chaos, users: list[User], trainer: Trainer, asker: Asker) -> None:
    print(f"\nseed {_SEED}: {sum(chaos.injected.values())} faults in {_SECONDS:.0f} s, {_RUNS} runs")
    for name, count in sorted(chaos.injected.items()):
        print(f"{count:5}  {name}")
    print("\n".join(chaos.log))
    print("answers:", dict(asker.answered))
    for user in users:
        print(f"errors of {type(user).__name__}:", dict(user.errors), *user.bugs)
    print("failures:", *(f"{count:5}  {reason}" for reason, count in trainer.failures.items()), sep="\n")


def _check_database(path: Path) -> None:
    """Check that no server or reservation is left, and that the events of each engine are a chain of its states."""
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT id, reserved_bytes FROM servers").fetchall() == []
    states: dict[str, str] = {}
    for engine, before, after in database.execute(
        "SELECT engine_id, before, after FROM engine_events WHERE after IS NOT NULL ORDER BY id"
    ):
        assert states.get(engine) == before
        states[engine] = after
    assert states == dict(database.execute("SELECT id, state FROM engines").fetchall())
    database.close()


def _check_adapters(model: Path, folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Check that each run has the adapter of a run without faults, bit for bit."""
    whole = {
        seed: TinyRun(model, folder / f"whole-{seed}", seed=seed, **_OPTIONS).trained().adapter_bytes() for seed in _SEEDS
    }
    assert len(set(whole.values())) == len(_SEEDS)
    for output, request in runs.items():
        assert (Path(output) / "adapter_model.safetensors").read_bytes() == whole[request["options"]["seed"]], output
