"""The command line finds the gateway in the background, and reports why a gateway does not start or exit."""

import errno
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from sage.cli import daemon
from sage.common.errors import EngineError
from sage.common.identity import ProcessIdentity
from sage.common.paths import get_user_paths
from sage.common.settings import load_settings
from sage.llm.gateway.instance import publish_address


def test_an_active_former_standby_is_found_although_a_suspended_gateway_holds_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    get_user_paths().state_dir.mkdir(parents=True)
    publish_address(load_settings().model_copy(update={"gateway_port": 4711}))
    suspended = ProcessIdentity(os.getppid(), "")
    monkeypatch.setattr(daemon, "holder", lambda _: suspended)
    assert daemon.find_client().base_url == "http://127.0.0.1:4711"


@pytest.mark.parametrize("changed", [{"started": "an earlier boot/5"}, {"pid": 2**22 + 1}, {"pid": "x"}, {"started": None}])
def test_an_address_published_by_an_exited_gateway_is_not_used(changed: dict[str, object], sage_home: Path) -> None:
    get_user_paths().state_dir.mkdir(parents=True)
    publish_address(load_settings().model_copy(update={"gateway_port": 4711}))
    saved = sage_home / "state/gateway.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | changed))
    assert daemon.find_client().base_url == load_settings().gateway_url


@pytest.mark.parametrize(("pid", "advice"), [(0, "fuser"), (4711, "kill -9 4711")])
def test_the_error_names_a_gateway_that_does_not_exit_but_never_advises_to_kill_pid_0(
    pid: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = SimpleNamespace(pid=pid, send_signal=lambda _: False)
    monkeypatch.setattr(daemon, "holder", lambda _: stuck)
    monkeypatch.setattr(daemon, "_START_SECONDS", 0.0)
    with pytest.raises(EngineError) as error:
        daemon.stop()
    assert advice in error.value.hint
    assert "kill -9 0" not in error.value.hint


@pytest.mark.parametrize("log", ["", "sage gateway: cannot write ", "another line\n"])
def test_a_full_disk_is_reported_if_the_gateway_could_not_write_its_own_error(
    log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.log_path().parent.mkdir(parents=True)
    daemon.log_path().write_text(f"line of an earlier start\n{log}")

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    error = daemon._failed(len("line of an earlier start\n"))
    assert str(error).startswith("The gateway did not start: No space left on device: ")
