"""Install and run earlier versions of SAGE from the repository's history, and read the files that they write.

`python tests/landed.py COMMIT` creates `tests/data/landed-COMMIT.tar.xz`, the SAGE_HOME after a crash of that version.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import ROOT, SAMPLES, free_port, make_tiny_model, wait_for

DATA = Path(__file__).parent / "data"
#: Folder in which archives are created. `unpack` replaces this folder in all stored paths.
_ORIGIN = Path("/tmp/sage-landed")
_ENDED = ("stopped", "completed", "failed")
#: Options of a run with many short steps (some milliseconds). A test can stop the run before its end and resume it.
RUN_OPTIONS = {
    "batch_size": 1, "max_steps": 400, "learning_rate": 1e-3, "precision": "fp32", "save_steps": 400, "keep_checkpoints": 1,
    "lora_rank": 2,
}  # fmt: skip


def install(commit: str, folder: Path) -> Path:
    """Install an earlier version into a new environment and return its interpreter.

    Only SAGE's packages are installed in that version; all other packages come from the running interpreter. The test is
    skipped if the repository does not contain the commit.
    """
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "packages"], capture_output=True, check=False)
    if archive.returncode != 0:
        pytest.skip(f"commit {commit} is not in this clone: {archive.stderr.decode(errors='replace').strip()}")
    source = folder / "source"
    source.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    # This .pth file adds folders to the import path. Python ignores the .pth files in these folders. One of the ignored
    # files would add the current version of SAGE to the import path.
    paths = [*sorted((source / "packages").glob("*/src")), Path(sysconfig.get_path("purelib"))]
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "landed.pth").write_text("".join(f"{path}\n" for path in paths))
    return environment / "bin" / "python"


class LandedGateway:
    """The gateway of an earlier version, controlled by plain HTTP requests."""

    def __init__(self, python: Path, home: Path, port: int) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAGE_", "PYTHONPATH"))}
        environment = {**kept, "SAGE_HOME": str(home), "SAGE_GATEWAY_PORT": str(port), "SAGE_RECONCILE_SECONDS": "0.1"}
        home.mkdir(parents=True, exist_ok=True)
        with (home / "landed-gateway.log").open("ab") as log:
            command = [str(python), "-m", "sage.llm.gateway"]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120)
        wait_for(self._is_up, "the earlier version's gateway")

    def _is_up(self) -> bool:
        assert self._process.poll() is None, "the earlier version's gateway exited"
        with contextlib.suppress(httpx.TransportError):
            return self._http.get("/health").is_success
        return False

    def start(self, model: Path, kind: str = "llm", **options: Any) -> str:
        """Start an engine and return its id."""
        body = {"model": str(model), "engine_kind": kind, "options": options}
        answer = self._http.post("/v1/management/engines/start", json=body)
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    def train(self, model: Path, output: Path, **options: Any) -> str:
        """Start a training run on the sample chats and return the engine's id."""
        return self.start(model, "finetune", dataset_path=str(SAMPLES), output_dir=str(output), **{**RUN_OPTIONS, **options})

    def engine(self, engine_id: str) -> dict[str, Any]:
        """Return an engine in the JSON format of that version's gateway."""
        return dict(self._http.get(f"/v1/management/engines/{engine_id}").json())

    def until(self, engine_id: str, *states: str) -> dict[str, Any]:
        """Wait until an engine is in one of the states, and return the engine."""

        def found() -> dict[str, Any] | None:
            engine = self.engine(engine_id)
            return engine if engine["state"] in states else None

        return wait_for(found, f"{engine_id}: {' or '.join(states)}")

    def stop_after(self, engine_id: str, step: int) -> None:
        """Wait until a run has trained `step` steps, then stop the run, which saves a checkpoint."""
        wait_for(lambda: ((self.engine(engine_id).get("training") or {}).get("step") or 0) >= step, f"step {step}")
        self.stop(engine_id)

    def stop(self, engine_id: str) -> None:
        """Stop an engine, and wait until it has stopped."""
        assert self._http.delete(f"/v1/management/engines/{engine_id}").is_success
        assert self.until(engine_id, *_ENDED)["state"] == "stopped"

    def kill(self) -> None:
        """Kill the gateway. The engines continue to run."""
        self._http.close()
        self._process.kill()
        self._process.wait()


def losses(home: Path, task_id: str) -> dict[int, float]:
    """Return the loss of each step of a run. If a step was trained twice, the second loss is returned."""
    events = (home / "data/models/finetuned" / task_id / "events.jsonl").read_text().splitlines()
    return {event["step"]: event["loss"] for event in map(json.loads, events) if event["event"] == "step"}


def unpack(name: str, root: Path) -> Path:
    """Unpack an archive from `DATA` into `root` and return its SAGE_HOME. Stored absolute paths are changed to `root`."""
    root.mkdir()
    with tarfile.open(DATA / name) as archive:
        archive.extractall(root)
    home = root / "home"
    for path in [*home.rglob("spec.json"), *home.rglob("events.jsonl"), *(root / "out").rglob("*.json")]:
        path.write_text(path.read_text().replace(str(_ORIGIN), str(root)))
    with contextlib.closing(sqlite3.connect(home / "state/engines.db")) as database, database:
        for column in ("model", "name", "options", "reason"):
            database.execute(f"UPDATE engines SET {column} = replace({column}, ?, ?)", (str(_ORIGIN), str(root)))
    return home


def _make(commit: str) -> None:
    """Create an archive with four engines: a completed run, a stopped run, a stopped llm engine and a running llm engine."""
    shutil.rmtree(_ORIGIN, ignore_errors=True)
    home, model = _ORIGIN / "home", _ORIGIN / "model"
    data = _ORIGIN / "train.jsonl"
    make_tiny_model(model, width=16, layers=1, tie_word_embeddings=True)
    data.write_text("".join(SAMPLES.read_text().splitlines(keepends=True)[:24]))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback((gateway := LandedGateway(install(commit, Path(folder)), home, free_port())).kill)
        options = {"dataset_path": str(data), "max_steps": 100, "save_steps": 50}
        completed = gateway.start(model, "finetune", output_dir=str(_ORIGIN / "out/whole"), **{**RUN_OPTIONS, **options})
        gateway.until(completed, "completed")
        stopped = gateway.start(model, "finetune", output_dir=str(_ORIGIN / "out/part"), **{**RUN_OPTIONS, **options})
        gateway.stop_after(stopped, 1)
        served, living = gateway.start(model), gateway.start(model)
        gateway.until(served, "running")
        gateway.stop(served)
        stack.callback(os.kill, gateway.until(living, "running")["pid"], signal.SIGKILL)
        gateway.kill()
    with contextlib.closing(sqlite3.connect(home / "state/engines.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for pattern in ("*.lock", "*.log", ".reserve", "gateway.json", "checkpoint-100/*"):
        for waste in home.rglob(pattern):
            waste.unlink()
    shutil.rmtree(home / "cache", ignore_errors=True)
    shutil.rmtree(_ORIGIN / "out/whole")
    with tarfile.open(DATA / f"landed-{commit}.tar.xz", "w:xz") as archive:
        for path in sorted(_ORIGIN.iterdir()):
            archive.add(path, path.name, filter=_anonymous)
    shutil.rmtree(_ORIGIN)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("commit")
    _make(options.parse_args().commit)
    sys.exit(0)
