"""Messages of the command line about a gateway in the background."""

from types import SimpleNamespace

import pytest

from sage.cli import daemon
from sage.common.errors import EngineError


@pytest.mark.parametrize(("pid", "advice"), [(0, "fuser"), (4711, "kill -9 4711")])
def test_a_gateway_that_does_not_exit_is_named_and_pid_0_is_never_killed(
    pid: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = SimpleNamespace(pid=pid, send_signal=lambda _: False)
    monkeypatch.setattr(daemon, "holder", lambda _: stuck)
    monkeypatch.setattr(daemon, "_START_SECONDS", 0.0)
    with pytest.raises(EngineError) as error:
        daemon.stop()
    assert advice in error.value.hint
    assert "kill -9 0" not in error.value.hint
