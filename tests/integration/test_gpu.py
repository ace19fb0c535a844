"""`sage gpu` with a real gateway and a real engine."""

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
from support import SAGE, engine_of, sage


@pytest.mark.long
def test_fake_devices_and_the_memory_of_engines_are_shown_and_refreshed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_FAKE_DEVICES", "1x24GiB")
    monkeypatch.setenv("SAGE_MEMORY_LIMIT_GB", "4")
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model), "--name", "tiny"))
    fake, main = json.loads(sage("gpu", "--json").stdout)
    assert (fake["id"], fake["name"], fake["is_fake"], fake["memory_total_bytes"]) == (
        "cuda:0",
        "fake 24 GiB",
        True,
        24 * 2**30,
    )
    assert (main["id"], main["name"], main["memory_usable_bytes"]) == ("cpu", "main memory", 4 * 10**9)
    [placed] = fake["engines"]
    assert (placed["id"], placed["memory_bytes"]) == (engine, 0)
    assert placed["reserved_bytes"] > 0
    [user] = main["engines"]
    assert (user["id"], user["name"]) == (engine, "tiny")
    assert user["memory_bytes"] > 10**8
    assert engine in sage("gpu").stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*SAGE, "gpu", "--watch"], stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "200"}
    ) as watching:
        os.close(theirs)
        shown = ""
        while shown.count("fake 24 GiB") < 2:
            shown += os.read(ours, 4096).decode()
        watching.send_signal(signal.SIGINT)
    os.close(ours)
    assert watching.returncode == 130


def test_wrong_fake_devices_are_reported_by_the_command() -> None:
    done = sage("gpu", check=2, env={**os.environ, "SAGE_FAKE_DEVICES": "24GiB"})
    assert "fake_devices: must be COUNTxSIZE" in done.stderr
    assert "got '24GiB'" in done.stderr
