"""Checks of `sage doctor`: folders, database, clock, port, gateway and service."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import psutil

from sage.cli import daemon, service
from sage.cli.findings import WITHOUT_LOCAL, Finding, last_line
from sage.common.disks import free_bytes, nearest_existing
from sage.common.errors import SageError
from sage.common.paths import get_user_paths
from sage.common.settings import Settings

#: If less disk space than this is free, a warning is reported, because the checkpoints of a run need space.
_LOW_BYTES = 5 * 10**9
_CHECK_SECONDS = 60
#: A larger difference between clocks is reported, because times in lists and logs would be misleading.
_SKEW_SECONDS = 5.0
_REMEDY = "Correct SAGE_DATABASE_URL, or unset it to use SQLite in the state folder."


def folders() -> Iterator[Finding]:
    """Check whether the folders are writable, and whether their disks have free space."""
    paths = get_user_paths()
    used = {"config": paths.config_dir, "models": paths.data_dir, "state": paths.state_dir, "cache": paths.cache_dir}
    for name, folder in used.items():
        existing, left_bytes = nearest_existing(folder), free_bytes(folder)
        free = f"{left_bytes / 1e9:.1f} GB free" + (_copies() if name == "cache" else "")
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            problem, remedy = ("writable", "Make it writable") if existing.is_dir() else ("a folder", "Remove the file")
            yield Finding(name, "failed", f"{existing} is not {problem}.", f"{remedy}, or set SAGE_HOME to another folder.")
        elif left_bytes < _LOW_BYTES:
            yield Finding(
                name, "warning", f"{folder}: {free}", "Free up disk space, or set SAGE_HOME to a folder on another disk."
            )
        else:
            yield Finding(name, "ok", f"{folder}: {free}")


def database() -> Iterator[Finding]:
    """Check that the database can be read, that its schema is known, and that its clock agrees with this machine's clock."""
    if importlib.util.find_spec("sage.llm.control_plane") is None:
        yield Finding("database", "warning", "The control plane is not installed.", WITHOUT_LOCAL)
        return
    command = [sys.executable, "-m", "sage.llm.control_plane.store.check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("database", "failed", f"The database did not answer within {_CHECK_SECONDS} s.", _REMEDY)
        return
    if done.returncode:
        problem = last_line(done.stderr)
        yield Finding("database", "failed", f"The database cannot be checked: {problem}.", _REMEDY)
        return
    report = json.loads(done.stdout)
    yield _database(report)
    if report["revision"]:
        yield _clock(report)


def _database(report: dict[str, Any]) -> Finding:
    name, revision, newest = report["name"], report["revision"], report["newest_revision"]
    if report["fault"]:
        remedy = (
            _REMEDY
            if "://" in name
            else "Restore the file from a backup (`sage restore FILE --force`), or move the file away."
        )
        return Finding("database", "failed", f"{name} cannot be read: {report['fault']}.", remedy)
    if not report["exists"]:
        return Finding("database", "ok", f"{name} does not exist yet; the gateway creates the database")
    if revision is None:
        return Finding("database", "ok", f"{name} is empty; the gateway creates the tables")
    if revision > newest:
        message = f"{name} has schema {revision}; this version of SAGE supports at most schema {newest}."
        return Finding("database", "failed", message, "Upgrade SAGE, or use another database.")
    return Finding("database", "ok", f"{name}, schema {revision}" + ("" if revision == newest else ", will be migrated"))


def _clock(report: dict[str, Any]) -> Finding:
    skew_seconds, ahead_seconds = report["server_ahead_seconds"], report["newest_event_ahead_seconds"]
    if abs(skew_seconds) > _SKEW_SECONDS:
        relation = "behind" if skew_seconds > 0 else "ahead of"
        message = f"The clock of this machine is {abs(skew_seconds):.0f} s {relation} the clock of the database server."
        return Finding("clock", "warning", message, "Synchronize the clocks of both machines, for example with chrony.")
    if ahead_seconds > _SKEW_SECONDS:
        message = f"The clock was set back: the newest event is {ahead_seconds:.0f} s in the future."
        return Finding("clock", "warning", message, "Synchronize the clock, for example with `timedatectl set-ntp true`.")
    return Finding("clock", "ok", "agrees with the database")


def gateway(settings: Settings) -> Iterator[Finding]:
    """Check the running gateway. If no gateway runs, check whether the port in the settings is free."""
    try:
        client = daemon.find_client()
        health = daemon.find_health(client)
        if health is None:
            yield _port(settings)
            yield Finding("gateway", "ok", f"no gateway runs at {client.base_url}; commands that need a gateway start one")
            return
        daemon.refuse_foreign(client, health)
        client.models()  # this request checks the API key and the database
    except SageError as error:
        yield Finding("gateway", "failed", error.message, error.hint)
        return
    if health["version"] == version("sage-cli"):
        yield Finding("gateway", "ok", f"{client.base_url}, PID {health['pid']}")
        return
    remedy = "Run `sage gateway stop`. The next command starts the new version. Engines continue to run."
    yield Finding(
        "gateway",
        "warning",
        f"The gateway at {client.base_url} has version {health['version']}, but this command has another version.",
        remedy,
    )


def _port(settings: Settings) -> Finding:
    host, port = settings.gateway_host, settings.gateway_port
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        message = f"The gateway cannot listen on {host}:{port}: {error.strerror or error}{_owner(port)}."
        return Finding("port", "failed", message, "Stop the program on this port, or set SAGE_GATEWAY_PORT to a free port.")
    return Finding("port", "ok", f"{host}:{port} is free")


def _owner(port: int) -> str:
    """Return the part of a message that names the program listening on a port; "" if the program is not known."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return ""
    pids = [each.pid for each in connections if each.status == psutil.CONN_LISTEN and each.laddr[1:] == (port,) and each.pid]
    return f" (PID {pids[0]} listens there)" if pids else ""


def installed_service() -> Iterator[Finding]:
    """Check the systemd service, if it is installed."""
    found = service.status() if service.unit_path().exists() else None
    if found is None:
        return
    text = f"{service.unit_path()}; start at login: {found.enabled}; now: {found.active}"
    if found.active == "failed":
        yield Finding("service", "failed", text, f"To see the reason, run `journalctl --user --unit {service.UNIT}`.")
    else:
        yield Finding("service", "ok", text)


def _copies() -> str:
    """Return a text with the size of all model copies; "" if this installation cannot make copies."""
    if importlib.util.find_spec("sage.libs.models") is None:
        return ""
    from sage.libs.models.export.copies import copies_bytes

    return f", {copies_bytes() / 1e9:.1f} GB of model copies"
