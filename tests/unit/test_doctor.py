"""The checks of `sage doctor`: each fault has a remedy."""

import shutil
import socket
import sqlite3
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sage.cli import doctor_machine, doctor_state
from sage.cli.findings import Finding
from sage.common.paths import get_user_paths, private_folder
from sage.common.settings import Settings, load_settings
from sage.llm.control_plane.store.check import Report, check
from sage.llm.control_plane.store.database import open_database


def database_findings(report: Report) -> list[Finding]:
    return [doctor_state._database(asdict(report)), doctor_state._clock(asdict(report))]


def test_a_database_is_checked_without_being_created_or_migrated(sage_home: Path) -> None:
    assert check(load_settings().store_url).exists is False
    path = private_folder(get_user_paths().state_dir) / "engines.db"
    sqlite3.connect(path).close()
    report = check(load_settings().store_url)
    assert (report.exists, report.revision) == (True, None)
    assert path.stat().st_size == 0
    assert [finding.state for finding in database_findings(report)] == ["ok", "ok"]


def test_a_clock_that_was_set_back_is_noticed() -> None:
    open_database(load_settings().store_url).dispose()
    future = datetime.now(UTC) + timedelta(hours=1)
    with closing(sqlite3.connect(get_user_paths().state_dir / "engines.db")) as connection, connection:
        connection.execute(
            "INSERT INTO engine_events (engine_id, kind, at, actor, reason) VALUES ('engine-a', 'created', ?, 'user', '')",
            (future.strftime("%Y-%m-%d %H:%M:%S.%f"),),
        )
    report = check(load_settings().store_url)
    database, clock = database_findings(report)
    assert (database.state, clock.state) == ("ok", "warning")
    assert report.newest_event_ahead_seconds == pytest.approx(3600, abs=60)
    assert "timedatectl" in clock.remedy


@pytest.mark.parametrize(
    ("changed", "check_name", "state", "text"),
    [
        ({"revision": "9999"}, "database", "failed", "supports at most"),
        ({"revision": "0001"}, "database", "ok", "will be migrated"),
        ({"fault": "it is damaged: x"}, "database", "failed", "sage restore"),
        ({"server_ahead_seconds": 60.0}, "clock", "warning", "60 s behind"),
        ({"server_ahead_seconds": -60.0}, "clock", "warning", "60 s ahead of"),
    ],
)
def test_faults_of_the_database_and_the_clock_have_remedies(
    changed: dict[str, Any], check_name: str, state: str, text: str
) -> None:
    report = Report(**{**asdict(Report("engines.db", revision="0001")), **changed})
    finding = {finding.check: finding for finding in database_findings(report)}[check_name]
    assert finding.state == state
    assert text in f"{finding.message} {finding.remedy}"
    assert bool(finding.remedy) == (state != "ok")


def test_an_unreachable_database_server_is_reported_without_its_password() -> None:
    report = check("postgresql://sage:secret-word@127.0.0.1:1/sage")
    assert report.fault
    assert "secret-word" not in str(report)
    assert "SAGE_DATABASE_URL" in doctor_state._database(asdict(report)).remedy


def test_a_port_that_another_program_uses_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = Settings(gateway_port=other.getsockname()[1])
        finding = doctor_state._port(settings)
    assert (finding.state, "SAGE_GATEWAY_PORT" in finding.remedy) == ("failed", True)
    assert doctor_state._port(settings).state == "ok"


def test_a_full_disk_and_a_file_in_the_place_of_a_folder_are_reported(
    sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sage_home.mkdir()
    (sage_home / "data").write_text("a file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    found = {finding.check: finding for finding in doctor_state.folders()}
    assert (found["models"].state, found["state"].state) == ("failed", "warning")
    assert all(finding.remedy for finding in found.values())


def test_a_dependency_with_an_unsuitable_version_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["rich>=999", "not-installed-anywhere", "another-missing; extra == 'x'", "psutil>=1"]
    monkeypatch.setattr(doctor_machine, "requires", lambda _: wanted)
    problems = list(doctor_machine._unsuitable("sage-cli"))
    assert [problem.split()[0] for problem in problems] == ["rich", "not-installed-anywhere"]
    assert [finding.state for finding in doctor_machine.packages()] == ["ok", "failed"]
