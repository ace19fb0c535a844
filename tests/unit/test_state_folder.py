"""A state folder: whose it is, and which database belongs to it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import chat_record, write_jsonl

from sage.common.errors import ConfigError
from sage.common.paths import get_user_paths, private_file
from sage.common.settings import load_settings
from sage.libs.finetune import FinetuneManager
from sage.llm.client.types import EngineKind, StartRequest
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.manager import ControlPlaneManager


def test_another_home_on_the_same_database_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_DATABASE_URL", f"sqlite:///{tmp_path}/shared.db")
    ControlPlaneManager(load_settings())
    ControlPlaneManager(load_settings())
    owner = (get_user_paths().state_dir / "node-id").read_text().strip()
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="belongs to another state folder") as caught:
        ControlPlaneManager(load_settings())
    assert caught.value.code == "database_in_use"
    (get_user_paths().state_dir / "node-id").write_text(owner)  # as the hint says
    ControlPlaneManager(load_settings())


def test_the_state_folder_of_before_is_closed_to_others() -> None:
    state = get_user_paths().state_dir
    (state / "engines" / "engine-a").mkdir(parents=True, mode=0o755)
    (state / "engines" / "engine-a" / "engine.log").write_text("a prompt")
    (state / "engines.db").touch(0o644)
    state.chmod(0o755)
    ControlPlaneManager(load_settings())
    assert {path.stat().st_mode & 0o077 for path in (state, *state.rglob("*"))} == {0}


def test_a_state_folder_that_cannot_be_used_is_told() -> None:
    home = get_user_paths().state_dir.parent
    home.mkdir()
    (home / "state").write_text("a file")
    with pytest.raises(ConfigError, match=r"The state folder .* cannot be used"):
        ControlPlaneManager(load_settings())


def test_what_a_killed_gateway_prepared_for_an_engine_that_it_did_not_keep_is_discarded(tmp_path: Path) -> None:
    samples, model = write_jsonl(tmp_path / "s.jsonl", [chat_record("q", "a")]), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"w": np.zeros(1)}, model / "model.safetensors")
    options = {"dataset_path": str(samples), "output_dir": str(tmp_path / "out")}
    request = StartRequest(model=str(model), engine_kind=EngineKind.FINETUNE, options=options)
    mark = private_file(get_user_paths().state_dir / "preparing" / "engine-unkept")

    async def killed_and_started_again() -> None:
        await FinetuneExecutor(LocalLauncher()).prepare("engine-unkept", request)
        manager = ControlPlaneManager(load_settings())
        await manager.open()
        while mark.exists():
            await asyncio.sleep(0.01)
        run = (await manager.start_engine(request)).id
        await manager.close()
        assert FinetuneManager().list() == [f"task-{run.removeprefix('engine-')}"]
        assert not list(mark.parent.iterdir())

    asyncio.run(killed_and_started_again())
