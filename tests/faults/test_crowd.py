"""A load test with many clients that connect and disconnect at random times."""

import asyncio
import os
from pathlib import Path

import pytest
from crowd import SPARE_DESCRIPTORS, Crowd
from support import list_engines, sage


@pytest.mark.long
def test_many_clients_that_disconnect_at_random_cause_no_errors_and_no_leaks(tiny_model: Path) -> None:
    sage("llm", "engine", "start", str(tiny_model), "--name", "tiny")
    report = asyncio.run(Crowd(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}", "tiny", seconds=20).run())
    print(report)
    assert report.asked > 256
    assert report.left > 0
    assert report.answered > 0
    assert (report.server_errors, report.failed) == (0, 0)
    assert report.descriptors[1] <= report.descriptors[0] + SPARE_DESCRIPTORS
    assert report.memory_bytes[1] < report.memory_bytes[0] + 64e6
    assert [engine["state"] for engine in list_engines().values()] == ["running"]
