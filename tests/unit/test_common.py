from pathlib import Path

import pytest

from sage.common.counting import counted
from sage.common.errors import ConfigError, SageError
from sage.common.paths import get_user_paths, private_file, private_folder
from sage.common.settings import load_settings


def test_paths_follow_the_xdg_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SAGE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert get_user_paths().models_dir == tmp_path / ".local/share/sage/models"
    assert get_user_paths().state_dir == tmp_path / ".local/state/sage"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert get_user_paths().finetuned_dir == tmp_path / "data/sage/models/finetuned"


def test_sage_home_moves_all_folders(sage_home: Path) -> None:
    paths = get_user_paths()
    for folder in (paths.config_dir, paths.data_dir, paths.state_dir, paths.cache_dir, paths.models_dir):
        assert folder.is_relative_to(sage_home)
    assert not sage_home.exists()


def test_the_environment_overrides_the_file_and_the_file_overrides_the_defaults(
    sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGE_GATEWAY_PORT")
    assert load_settings().gateway_port == 8889
    config = get_user_paths().config_file
    config.parent.mkdir(parents=True)
    config.write_text('gateway_port = 9000\nlog_level = "DEBUG"\n')
    assert load_settings().gateway_url == "http://127.0.0.1:9000"
    monkeypatch.setenv("SAGE_GATEWAY_PORT", "9001")
    assert (load_settings().gateway_port, load_settings().log_level) == (9001, "DEBUG")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gateway_port = 0", "gateway_port"),
        ("gatewayport = 1", "gatewayport: is not a setting"),
        ("= 1", "Invalid"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_an_invalid_settings_file_is_named_in_the_error(
    sage_home: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes, said: str
) -> None:
    monkeypatch.delenv("SAGE_GATEWAY_PORT")
    config = get_user_paths().config_file
    config.parent.mkdir(parents=True)
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert said in caught.value.message
    assert str(config) in caught.value.hint


def test_a_gateway_that_listens_on_all_addresses_is_reached_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_GATEWAY_HOST", "0.0.0.0")
    assert load_settings().gateway_url.startswith("http://127.0.0.1:")
    monkeypatch.setenv("SAGE_GATEWAY_HOST", "::1")
    assert load_settings().gateway_url.startswith("http://[::1]:")


def test_every_error_has_a_status_and_an_exit_code() -> None:
    pending = [SageError]
    while pending:
        kind = pending.pop()
        pending += [child for child in kind.__subclasses__() if child.__module__ == SageError.__module__]
        assert 400 <= kind.http_status < 600
        assert kind.exit_code in (1, 2, 3)
        assert str(kind(code="c", message="What.", hint="Do.")) == "What. Do."


@pytest.mark.parametrize("name", ["API_KEY", "DATABASE_URL", "GATEWAY_HOST", "LOG_LEVEL"])
def test_a_setting_with_an_empty_value_is_unset(sage_home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected = load_settings()
    monkeypatch.setenv(f"SAGE_{name}", "")
    config = get_user_paths().config_file
    config.parent.mkdir(parents=True)
    config.write_text(f'{name.lower()} = ""\n')
    assert load_settings() == expected


def test_an_empty_variable_does_not_override_the_key_in_the_file(sage_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = get_user_paths().config_file
    config.parent.mkdir(parents=True)
    config.write_text('api_key = "from-file"\n')
    monkeypatch.setenv("SAGE_API_KEY", "")
    key = load_settings().api_key
    assert key is not None
    assert key.get_secret_value() == "from-file"


@pytest.mark.parametrize("key", ["schlüssel", "two words", " ", "tab\there", "line\n"])
def test_a_key_that_is_invalid_in_a_header_is_rejected_and_not_printed(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SAGE_API_KEY", key)
    with pytest.raises(ConfigError, match="api_key: must be printable ASCII") as caught:
        load_settings()
    assert key.strip() == "" or key not in str(caught.value)


def test_no_secret_is_printed_with_the_settings(sage_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_API_KEY", "hunter2")
    monkeypatch.setenv("SAGE_DATABASE_URL", "postgresql://sage:hunter2@host/sage")
    assert "hunter2" not in repr(load_settings()) + str(load_settings())
    config = get_user_paths().config_file
    config.parent.mkdir(parents=True)
    config.write_text('api_key = ["hunter2"]\n')
    monkeypatch.delenv("SAGE_API_KEY")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_only_the_user_can_access_the_folders_of_sage_and_other_folders_keep_their_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    state = tmp_path / "sage" / "state"
    state.parent.mkdir(mode=0o755)
    state.mkdir(mode=0o755)
    (state / "log").touch(0o644)
    private_file(state / "engines" / "new" / "log")
    private_file(state / "log")
    private_folder(state)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert {modes[path] for path in (state, state / "engines", state / "engines" / "new")} == {0o700}
    assert modes[state.parent] == 0o755


def test_a_noun_is_plural_unless_its_count_is_one() -> None:
    assert [counted(count, "fault") for count in (0, 1, 2)] == ["0 faults", "1 fault", "2 faults"]
