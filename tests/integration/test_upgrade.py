"""This version opens and migrates a home that an earlier version created, and resumes the engines."""

from pathlib import Path

import pytest
from landed import losses, unpack
from support import list_engines, sage, wait_for

#: Commits of earlier versions. Their databases have the migrations up to 0001 and up to 0002.
VERSIONS = ("327c568", "19fceff")


@pytest.mark.parametrize("version", [VERSIONS[0], pytest.param(VERSIONS[1], marks=pytest.mark.long)])
def test_the_home_of_an_earlier_version_is_migrated_and_its_engines_resume(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = unpack(f"landed-{version}.tar.xz", tmp_path / "landed")
    monkeypatch.setenv("SAGE_HOME", str(home))
    sage("gateway", "start")
    try:
        engines = list_engines()
        runs = {engine["state"]: engine for engine in engines.values() if engine["kind"] == "finetune"}
        served = {engine["state"]: engine for engine in engines.values() if engine["kind"] == "llm"}
        whole, part = runs["completed"], runs["stopped"]
        assert 0 < part["training"]["step"] < whole["training"]["step"] == 100
        stopped = served.pop("stopped")
        (killed,) = served.values()
        wait_for(lambda: list_engines()[killed["id"]]["state"] == "failed", "the engine that was killed")

        sage("llm", "engine", "resume", part["id"], "--wait")
        uninterrupted, resumed = losses(home, whole["task_id"]), losses(home, part["task_id"])
        assert list(resumed) == list(uninterrupted)
        # The archive was made on another machine, and processors differ in the last bits of a sum.
        assert resumed == pytest.approx(uninterrupted, rel=1e-3)

        sage("llm", "engine", "resume", stopped["id"])
        wait_for(lambda: list_engines()[stopped["id"]]["state"] == "running", "the engine that was stopped")
    finally:
        for engine in list_engines().values():
            sage("llm", "engine", "stop", engine["id"], "--force", check=None)
        sage("gateway", "stop")
