"""A state folder: its id and its permissions."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sage.common.errors import ConfigError
from sage.common.paths import get_user_paths
from sage.llm.control_plane.node import node_id_path, open_state_folder


def test_a_state_folder_keeps_its_first_id() -> None:
    with ThreadPoolExecutor(4) as pool:
        [node] = set(pool.map(lambda _: open_state_folder(), range(8)))
    assert node.startswith("node-")
    assert open_state_folder() == node == node_id_path().read_text().strip()


def test_another_home_is_another_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = open_state_folder()
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "other"))
    assert open_state_folder() != first


def test_opening_a_state_folder_removes_the_access_of_other_users() -> None:
    state = get_user_paths().state_dir
    (state / "engines" / "engine-a").mkdir(parents=True, mode=0o755)
    (state / "engines" / "engine-a" / "engine.log").write_text("a prompt")
    (state / "engines.db").touch(0o644)
    state.chmod(0o755)
    open_state_folder()
    assert {path.stat().st_mode & 0o077 for path in (state, *state.rglob("*"))} == {0}


def test_a_state_folder_that_cannot_be_used_is_reported() -> None:
    home = get_user_paths().state_dir.parent
    home.mkdir()
    (home / "state").write_text("a file")
    with pytest.raises(ConfigError, match=r"The state folder .* cannot be used"):
        open_state_folder()
