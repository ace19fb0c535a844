"""`sage doctor`: what works, what is missing, and what to do about it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import sage


def findings(code: int = 0) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in json.loads(sage("doctor", "--json", check=code).stdout)}


def test_no_check_fails_on_a_missing_home_and_the_home_is_not_created(
    sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_FAKE_DEVICES", "2x24GiB")
    found = findings()
    assert (found["fake_devices"]["state"], "2x24GiB" in found["fake_devices"]["message"]) == ("warning", True)
    assert {
        "python",
        "packages",
        "devices",
        "torch",
        "config",
        "models",
        "state",
        "cache",
        "database",
        "port",
        "gateway",
        "vllm",
    } <= set(found)
    assert "failed" not in {finding["state"] for finding in found.values()}
    assert "`sage backend install vllm`" in found["vllm"]["remedy"]
    assert "no gateway runs" in found["gateway"]["message"]
    assert not sage_home.exists()


def test_a_failed_check_has_a_remedy_and_exit_code_1(sage_home: Path) -> None:
    state = sage_home / "state"
    state.mkdir(parents=True)
    (state / "engines.db").write_bytes(b"SQLite format 3\0" + b"garbage" * 1000)
    found = findings(code=1)["database"]
    assert found["state"] == "failed"
    assert "Restore the file from a backup" in found["remedy"]
    (sage_home / "config").mkdir()
    (sage_home / "config" / "config.toml").write_text("log_level = 'LOUD'\n")
    text = sage("doctor", check=1).stdout
    assert "failed   settings       A setting is invalid: log_level" in text
