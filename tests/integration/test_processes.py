"""Detached processes and the local launcher: launches, observations, and signals to whole sessions."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import wait_for

from sage.common import processes
from sage.common.errors import Conflict
from sage.common.identity import ProcessIdentity, session_members
from sage.common.processes import ProcessSpec, describe_exit, exit_code, holder, leftovers, spawn
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT, ProcessObservation, Signal
from sage.llm.control_plane.launchers.local import LocalLauncher

LAUNCHER = LocalLauncher()


def observe(*specs: ProcessSpec) -> list[ProcessObservation]:
    handles = [LAUNCHER.handle(spec) for spec in specs]
    found = asyncio.run(LAUNCHER.observe(handles))
    return [found[handle] for handle in handles]


def send(spec: ProcessSpec, kind: Signal) -> None:
    asyncio.run(LAUNCHER.signal(LAUNCHER.handle(spec), kind))


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[ProcessSpec]:
    """Yield the specification of a process that sleeps. After the test, all processes of its session are killed."""
    spec = ProcessSpec(("sleep", "60"), tmp_path / "sage" / "p.lock", tmp_path / "sage" / "p.log")
    yield spec
    send(spec, Signal.KILL)


def shell(spec: ProcessSpec, script: str) -> ProcessSpec:
    return ProcessSpec(("sh", "-c", script), spec.lock_path, spec.log_path)


def gone(spec: ProcessSpec) -> bool:
    return wait_for(lambda: holder(spec.lock_path) is None, "the end of the process")


def test_a_lock_is_held_until_its_process_exits(spec: ProcessSpec) -> None:
    process = spawn(spec)
    assert holder(spec.lock_path) == process
    assert (process.memory_bytes() or 0) > 0
    with pytest.raises(Conflict):
        spawn(spec)
    spec.lock_path.write_text("")  # as if the parent died before it wrote the identity of the process
    wait_for(lambda: holder(spec.lock_path) == process, "its environment")
    assert process.send_signal(signal.SIGKILL)
    gone(spec)
    assert not process.send_signal(signal.SIGKILL)
    assert process.memory_bytes() is None


def test_a_lock_file_of_an_older_version_is_read(spec: ProcessSpec) -> None:
    process = spawn(spec)
    spec.lock_path.write_text(json.dumps({"pid": process.pid, "start_time": 1764100000.12}))
    wait_for(lambda: holder(spec.lock_path) == process, "its environment")


@pytest.mark.parametrize("step_seconds", [3, -3600, 3600])
def test_setting_the_clock_does_not_change_the_identity_of_a_process(
    spec: ProcessSpec, monkeypatch: pytest.MonkeyPatch, step_seconds: int
) -> None:
    process, me = spawn(spec), ProcessIdentity.of(os.getpid())
    boot_time = psutil._pslinux.boot_time
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + step_seconds)
    assert holder(spec.lock_path) == process
    assert process.is_alive()
    assert me.is_alive()
    assert ProcessIdentity.of(os.getpid()) == me
    assert process.send_signal(signal.SIGTERM)
    gone(spec)


def test_neither_a_zombie_nor_another_process_with_the_same_pid_counts_as_alive() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not ProcessIdentity.of(child).is_alive()
    os.waitpid(child, 0)
    with pytest.raises(ProcessLookupError):
        ProcessIdentity.of(child)
    me = ProcessIdentity.of(os.getpid())
    assert not ProcessIdentity(me.pid, me.started + "0").is_alive()
    assert not ProcessIdentity.unknown().send_signal(signal.SIGKILL)


def test_a_process_is_not_reported_dead_if_no_descriptor_is_free(spec: ProcessSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    process = spawn(spec)

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            holder(spec.lock_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            process.is_alive()
    assert holder(spec.lock_path) == process


def test_a_kill_also_kills_the_children(spec: ProcessSpec) -> None:
    process = spawn(shell(spec, "sleep 61 & sleep 62 & sleep 63 & wait"))
    wait_for(lambda: len(session_members(process.pid)) == 4, "its children")
    send(spec, Signal.KILL)
    gone(spec)
    wait_for(lambda: not session_members(process.pid), "the end of its children")


def test_children_of_a_process_that_is_gone_are_found_and_killed(spec: ProcessSpec) -> None:
    process = spawn(shell(spec, "sleep 61 & exec sleep 62"))
    wait_for(lambda: len(session_members(process.pid)) == 2, "its child")
    assert leftovers(spec.lock_path) == []
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: leftovers(spec.lock_path), "the orphan")
    (found,) = observe(spec)
    assert (found.alive, found.leftovers) == (False, True)
    send(spec, Signal.KILL)
    wait_for(lambda: not session_members(process.pid), "the end of the orphan")
    assert not observe(spec)[0].leftovers
    gone(spec)


def test_a_process_is_observed_although_its_lock_file_was_removed(spec: ProcessSpec) -> None:
    process = spawn(spec)
    spec.lock_path.unlink()
    wait_for(lambda: observe(spec)[0].pid == process.pid, "its environment")
    send(spec, Signal.KILL)
    wait_for(lambda: not observe(spec)[0].alive, "the end of the process")


def test_the_oldest_process_of_a_lock_is_found_even_if_a_child_has_a_lower_pid(
    spec: ProcessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = spawn(shell(spec, "sleep 0.1; sleep 61 & wait"))

    def has_child() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return ["sleep", "61"] in [psutil.Process(pid).cmdline() for pid in session_members(process.pid)]
        return False

    wait_for(has_child, "its child")
    members = sorted(session_members(process.pid), key=lambda pid: pid == process.pid)
    monkeypatch.setattr(psutil, "pids", lambda: members)
    assert processes.find_by_environment([spec.lock_path]) == {spec.lock_path: process}


def test_a_suspended_process_stops_after_a_stop_signal(spec: ProcessSpec) -> None:
    process = spawn(shell(spec, "trap 'echo saved; exit 0' TERM; echo begun; while :; do sleep 0.02; done"))
    wait_for(lambda: "begun" in spec.log_path.read_text(), "its beginning")
    os.kill(process.pid, signal.SIGSTOP)
    send(spec, Signal.STOP)
    gone(spec)
    assert "saved" in spec.log_path.read_text()


@pytest.mark.parametrize(
    ("script", "description"),
    [
        ("exit 0", "exited with code 0"),
        ("exit 3", "exited with code 3"),
        ("kill -9 $$", "was killed by SIGKILL (out of memory?)"),
        ("kill -TERM $$", "was killed by SIGTERM"),
    ],
)
def test_the_exit_code_or_signal_of_a_process_is_known(spec: ProcessSpec, script: str, description: str) -> None:
    spawn(shell(spec, script))
    gone(spec)
    assert describe_exit(exit_code(spec.lock_path)) == description
    assert describe_exit(observe(spec)[0].exit_code) == description
    assert spec.lock_path not in processes._children
    assert describe_exit(None).startswith("exited")


def test_a_process_is_killed_if_its_identity_cannot_be_written(spec: ProcessSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def full(descriptor: int, identity: ProcessIdentity) -> None:
        begun.append(identity)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(processes, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            spawn(spec)
    assert not begun[0].is_alive()
    assert holder(spec.lock_path) is None


def test_locks_and_logs_can_be_read_by_their_user_only(spec: ProcessSpec) -> None:
    spawn(spec)
    modes = {path.stat().st_mode & 0o777 for path in (spec.lock_path, spec.log_path)}
    assert modes == {0o600}
    assert spec.log_path.parent.stat().st_mode & 0o777 == 0o700


def test_a_descriptor_is_inherited_under_its_number(spec: ProcessSpec) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        number = listener.fileno()
        inherited = f"readlink /proc/self/fd/{number}"
        spawn(ProcessSpec(("sh", "-c", inherited), spec.lock_path, spec.log_path, pass_fds=(number,)))
        gone(spec)
        assert spec.log_path.read_text().strip() == str(Path(f"/proc/self/fd/{number}").readlink())


def server(spec: ProcessSpec, port: int = 0) -> ProcessSpec:
    """Return the specification of a process that prints its port and the file behind its inherited descriptor."""
    argv = ("sh", "-c", 'echo "$0 $(readlink /proc/self/fd/$1)"; exec sleep 60', PORT_ARGUMENT, DESCRIPTOR_ARGUMENT)
    return dataclasses.replace(spec, argv=argv, port=port)


def launch(spec: ProcessSpec) -> str | None:
    return asyncio.run(LAUNCHER.launch(spec))


def test_a_process_gets_a_socket_on_which_the_launcher_already_listens(spec: ProcessSpec) -> None:
    address = launch(server(spec))
    assert address is not None
    host, port = address.split(":")
    with socket.create_connection((host, int(port))):
        pass
    wait_for(lambda: spec.log_path.read_text().startswith(f"{port} socket:"), "its port and socket")
    assert observe(spec)[0].address == address
    with pytest.raises(Conflict):
        asyncio.run(LAUNCHER.check_port(int(port)))


def test_the_address_is_known_to_a_launcher_that_did_not_start_the_process(spec: ProcessSpec) -> None:
    address, handle = launch(server(spec)), LAUNCHER.handle(spec)
    assert asyncio.run(LocalLauncher().observe([handle]))[handle].address == address


def test_a_second_launch_neither_starts_a_process_nor_changes_the_address(spec: ProcessSpec) -> None:
    address = launch(server(spec))
    (before,) = observe(spec)
    with pytest.raises(Conflict, match="already holds"):
        launch(server(spec))
    assert observe(spec)[0].pid == before.pid
    assert observe(spec)[0].address == address


def test_a_process_is_not_started_if_its_port_is_in_use(spec: ProcessSpec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(Conflict, match="cannot be used"):
        launch(server(spec, other.getsockname()[1]))
    assert not observe(spec)[0].alive


def test_a_process_that_does_not_listen_has_no_address(spec: ProcessSpec) -> None:
    assert launch(spec) is None
    (found,) = observe(spec)
    assert (found.alive, found.address, found.leftovers, found.exit_code) == (True, None, False, None)
    assert (found.memory_bytes or 0) > 0


def test_the_memory_of_a_process_includes_its_children(spec: ProcessSpec) -> None:
    process = spawn(shell(spec, "sleep 61 & sleep 62 & wait"))
    wait_for(lambda: len(session_members(process.pid)) == 3, "its children")
    own = psutil.Process(process.pid).memory_info().rss
    assert (observe(spec)[0].memory_bytes or 0) > own


def test_the_pids_are_listed_at_most_twice_to_observe_many_processes(
    tmp_path: Path, spec: ProcessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = spawn(spec)
    spec.lock_path.unlink()
    wait_for(lambda: observe(spec)[0].alive, "its environment")
    others = [ProcessSpec(("true",), tmp_path / f"{number}.lock", tmp_path / "log") for number in range(50)]
    listings: list[int] = []
    pids = psutil.pids
    monkeypatch.setattr(psutil, "pids", lambda: listings.append(0) or pids())
    found = observe(spec, *others)
    assert found[0].pid == alive.pid
    assert not any(other.alive for other in found[1:])
    assert len(listings) <= 2  # one to find processes by their environment, and one to find them by their session


def test_a_process_that_cannot_be_observed_is_omitted_and_the_others_are_observed(
    tmp_path: Path, spec: ProcessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn(spec)
    stale, opened = tmp_path / "stale.lock", os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if path == stale:
            raise OSError(116, "Stale file handle")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    found = asyncio.run(LAUNCHER.observe([str(stale), str(spec.lock_path)]))
    assert found.keys() == {str(spec.lock_path)}


def test_without_free_descriptors_no_process_is_observed_or_reported_dead(
    spec: ProcessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn(spec)
    spec.lock_path.unlink()

    def refuse() -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(psutil, "pids", refuse)
        assert asyncio.run(LAUNCHER.observe([str(spec.lock_path)])) == {}
