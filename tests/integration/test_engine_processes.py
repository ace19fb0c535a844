"""Inference engines as processes. A small HTTP server that loads no model replaces the inference server."""

import asyncio
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from pydantic import BaseModel
from serving import until
from support import free_port

from sage.common.errors import Conflict, NotFound, Overloaded
from sage.common.identity import session_members
from sage.common.settings import load_settings
from sage.libs.models.resolve import ModelSource
from sage.llm.client.types import EngineKind, EngineState, EngineView, RestartPolicy, StartRequest
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.transformers import TransformersBackend, TransformersOptions
from sage.llm.control_plane.executors import inference_executor
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, ProcessObservation
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.manager import ControlPlaneManager

S = EngineState
SERVER = """
import http.server, json, os, signal, socket, subprocess, sys
options = json.loads(sys.argv[1])
print("Loading weights: 100%|##########| 9/9", file=sys.stderr, flush=True)
if options["child"]:
    subprocess.Popen(["sleep", "60"])
if options["ignores_sigterm"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if options["exits"] is not None:
    print(options["says"], file=sys.stderr, flush=True)
    sys.exit(options["exits"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        models = [{"id": sys.argv[3]}]
        body = json.dumps({"status": "ok", "engine": os.environ["SAGE_ENGINE_ID"], "data": models}).encode()
        self.send_response(200 if options["answers"] else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[2]))
server.serve_forever(0.01)
"""


class Options(TransformersOptions):
    answers: bool = True
    child: bool = False
    ignores_sigterm: bool = False
    exits: int | None = None
    says: str = ""


class StubBackend(TransformersBackend):
    options: ClassVar[type[BaseModel]] = Options

    def argv(self, model: str, served_name: str, options: Any) -> tuple[str, ...]:
        return (sys.executable, "-S", "-c", SERVER, options.model_dump_json(), DESCRIPTOR_ARGUMENT, served_name)

    def memory_bytes(self, model: ModelSource, options: Any) -> int | None:
        return None


@pytest.fixture
def model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.BACKENDS, "transformers", StubBackend())
    for name, value in (("RECONCILE", 0.02), ("STOP", 0.5)):
        monkeypatch.setenv(f"SAGE_{name}_SECONDS", str(value))
    monkeypatch.setattr(inference_executor, "_HEALTH_SECONDS", 0.2)
    return str(tiny_model)


def run(test: Callable[[ControlPlaneManager], Awaitable[None]]) -> None:
    async def main() -> None:
        manager = ControlPlaneManager(load_settings())
        await manager.open()
        try:
            await test(manager)
        finally:
            await manager.close()

    asyncio.run(main())


async def start(manager: ControlPlaneManager, model: str, name: str | None = None, port: int | None = None, **options: Any
                ) -> EngineView:  # fmt: skip
    return await manager.start_engine(StartRequest(model=model, name=name, port=port, options=options))


async def started(manager: ControlPlaneManager, model: str, name: str | None = None, **options: Any) -> EngineView:
    return await until(manager, (await start(manager, model, name, **options)).id, S.RUNNING)


def test_only_one_of_several_starts_with_the_same_port_creates_an_engine(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        port = free_port()
        results = await asyncio.gather(*(start(manager, model, port=port) for _ in range(4)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, Conflict)]
        assert [error.code for error in refused] == ["port_taken"] * 3
        (engine,) = [result for result in results if isinstance(result, EngineView)]
        assert (await until(manager, engine.id, S.RUNNING)).port == port
        with pytest.raises(Conflict, match=f"Port {port} cannot be used"):
            await start(manager, model, port=port)

    run(test)


def test_a_port_that_another_program_has_is_refused_at_once(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(Conflict, match="Address already in use"):
            await start(manager, model, port=other.getsockname()[1])
        assert await manager.list_engines() == []

    run(test)


def test_no_other_program_can_bind_an_engine_s_port_while_the_engine_starts(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await start(manager, model, port=free_port(), answers=False)
        await until(manager, engine.id, S.STARTING)
        while (view := await manager.get_engine(engine.id)).port is None:
            await asyncio.sleep(0.01)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="Address already in use"):
                other.bind(("127.0.0.1", view.port))

    run(test)


def test_the_answer_of_another_engine_or_program_does_not_make_an_engine_ready(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, model)
        record = manager._store.get(engine.id)
        (server,) = manager._store.servers(record.node)
        executor, alive = manager._executors[EngineKind.LLM], ProcessObservation(alive=True)
        assert (await executor.probe(record, server, alive)).ready
        assert not (await executor.probe(record, dataclasses.replace(server, id="server-other"), alive)).ready

    run(test)


def test_the_running_version_serves_until_the_new_version_runs_and_also_if_the_new_version_fails(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        old = await started(manager, model, "words")
        failing = await start(manager, model, "words", exits=1)
        assert manager.find("words", EngineKind.LLM).engine_id == old.id
        await until(manager, failing.id, S.FAILED)
        assert manager.find("words", EngineKind.LLM).engine_id == old.id
        new = await started(manager, model, "words")
        assert manager.find("words", EngineKind.LLM).engine_id == new.id

    run(test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": 3, "says": "No model here."}, "The engine's process exited with code 3: No model here."),
        ({"exits": 3}, "The engine's process exited with code 3."),  # the last line of the log is a progress bar
        ({"exits": 0, "says": "Goodbye."}, "The engine's process exited with code 0."),
    ],
)
def test_the_reason_contains_the_exit_code_and_the_error_that_the_process_printed(
    model: str, options: dict[str, Any], message: str
) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await start(manager, model, **options)
        reason = (await until(manager, engine.id, S.FAILED)).reason
        assert reason is not None
        assert (reason.code, reason.message) == ("engine_died", message)

    run(test)


def test_an_engine_that_keeps_exiting_fails_after_its_last_restart_and_the_hint_shows_the_end_of_its_log(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage.llm.control_plane.queueing.backoff_seconds", lambda restarts: 0.01 * restarts)

    async def test(manager: ControlPlaneManager) -> None:
        options = {"exits": 1, "says": "no space for the weights"}
        request = StartRequest(model=model, restart_policy=RestartPolicy.UNLESS_STOPPED, options=options)
        failed = await until(manager, (await manager.start_engine(request)).id, S.FAILED)
        assert failed.reason is not None
        assert failed.restarts == 5
        assert failed.reason.hint.splitlines()[-2:] == [
            "  no space for the weights", f"The whole log: `sage llm engine logs {failed.id}`.",
        ]  # fmt: skip
        assert (await manager.get_logs(failed.id)).count("no space for the weights") == 6

    run(test)


def test_a_killed_engine_fails_with_the_name_of_the_signal_and_can_be_resumed(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, model)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        reason = (await until(manager, engine.id, S.FAILED)).reason
        assert reason is not None
        assert reason.message == "The engine's process was killed by SIGKILL (out of memory?)."
        await manager.resume_engine(engine.id)
        await until(manager, engine.id, S.RUNNING)

    run(test)


@pytest.mark.parametrize("how", ["force", "after SIGTERM was ignored", "its main process is killed"])
def test_no_process_of_an_engine_is_left_over(model: str, how: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, model, child=True, ignores_sigterm=True)
        assert engine.pid is not None
        assert len(session_members(engine.pid)) == 2
        if how == "its main process is killed":
            os.kill(engine.pid, signal.SIGKILL)
            await until(manager, engine.id, S.FAILED)
        else:
            await manager.stop_engine(engine.id, force=how == "force")
            await until(manager, engine.id, S.STOPPED)
        assert session_members(engine.pid) == []
        await manager.remove_engine(engine.id)

    run(test)


def test_an_engine_that_starts_too_slowly_is_killed_and_then_fails(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_ENGINE_START_SECONDS", "0.3")

    async def test(manager: ControlPlaneManager) -> None:
        engine = await start(manager, model, answers=False)
        failed = await until(manager, engine.id, S.FAILED)
        assert failed.reason is not None
        assert failed.reason.code == "start_timeout"
        assert failed.pid is None
        with pytest.raises(NotFound):
            manager.find(engine.id, EngineKind.LLM)

    run(test)


def test_a_forced_stop_is_stored_and_the_next_control_plane_completes_it(model: str) -> None:
    async def begin(manager: ControlPlaneManager) -> None:
        engine = await started(manager, model, "e")
        for task in manager._tasks:  # this control plane makes no more decisions
            task.cancel()
        await manager.stop_engine(engine.id, force=True)

    async def go_on(manager: ControlPlaneManager) -> None:
        (engine,) = await manager.list_engines()
        assert (await until(manager, engine.id, S.STOPPED)).pid is None
        assert [event.after for event in await manager.get_events(engine.id)][-2:] == [S.STOPPING, S.STOPPED]

    run(begin)
    run(go_on)


@pytest.mark.parametrize("step_seconds", [3, -3600, 3600])
def test_a_step_of_the_wall_clock_does_not_affect_engines(
    model: str, monkeypatch: pytest.MonkeyPatch, step_seconds: int
) -> None:
    monkeypatch.setenv("SAGE_STOP_SECONDS", "600")

    class Stepped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=step_seconds)

    async def go_on(manager: ControlPlaneManager) -> None:
        (before,) = await manager.list_engines()
        assert before.state is S.RUNNING
        after = await started(manager, model, "e")
        assert manager.find("e", EngineKind.LLM).engine_id == after.id
        assert [engine.id for engine in await manager.list_engines()] == [before.id, after.id]
        for engine in (before, after):
            await manager.stop_engine(engine.id)
            assert (await until(manager, engine.id, S.STOPPED)).pid is None

    async def begin(manager: ControlPlaneManager) -> None:
        await started(manager, model, "e")
        boot_time = psutil._pslinux.boot_time
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + step_seconds)
        monkeypatch.setattr("sage.llm.control_plane.creation.datetime", Stepped)

    run(begin)
    run(go_on)


def test_an_engine_that_does_not_answer_is_reported_and_gets_no_requests_until_it_answers_again(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_ENGINE_UNRESPONSIVE_SECONDS", "0.5")

    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, model, "e")
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        while manager.is_responsive(engine.id):
            await asyncio.sleep(0.02)
        view = await manager.get_engine(engine.id)
        assert view.state is S.RUNNING
        assert view.reason is not None
        assert view.reason.code == "engine_unresponsive"
        assert "has not answered for" in view.reason.message
        with pytest.raises(Overloaded, match="does not respond"):
            manager.find("e", EngineKind.LLM)
        os.kill(engine.pid, signal.SIGCONT)
        while not manager.is_responsive(engine.id):
            await asyncio.sleep(0.02)
        assert manager.find("e", EngineKind.LLM).engine_id == engine.id
        assert (await manager.get_engine(engine.id)).reason is None
        os.kill(engine.pid, signal.SIGSTOP)
        await manager.stop_engine(engine.id)
        await until(manager, engine.id, S.STOPPED)

    run(test)


def test_an_engine_that_cannot_be_observed_is_listed_with_the_others(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        first, second = await started(manager, model, "a"), await started(manager, model, "b")
        observe = LocalLauncher.observe

        async def without_first(self: LocalLauncher, handles: Any) -> Any:
            found = await observe(self, handles)
            return {handle: process for handle, process in found.items() if first.id not in handle}

        monkeypatch.setattr(LocalLauncher, "observe", without_first)
        deadline = time.monotonic() + 60
        while (await manager.get_engine(first.id)).reason is None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        views = {view.id: view for view in await manager.list_engines()}
        assert (views[first.id].state, views[second.id].reason) == (S.RUNNING, None)
        reason = views[first.id].reason
        assert reason is not None
        assert "cannot be observed" in reason.message

    run(test)


def test_if_an_engine_is_removed_and_resumed_at_once_one_of_the_two_requests_is_refused(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        for _ in range(5):
            engine = await started(manager, model)
            await manager.stop_engine(engine.id)
            await until(manager, engine.id, S.STOPPED)
            removed, resumed = await asyncio.gather(
                manager.remove_engine(engine.id), manager.resume_engine(engine.id), return_exceptions=True
            )
            if removed is None:
                assert isinstance(resumed, NotFound)
                assert not Path(engine.log_path).exists()
            else:
                assert isinstance(removed, Conflict)
                await until(manager, engine.id, S.RUNNING)

    run(test)


def test_a_log_that_is_too_long_is_cut_and_its_offsets_remain_valid(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_LOG_LIMIT_MB", "1")
    monkeypatch.setattr("sage.llm.control_plane.manager._LOGS_SECONDS", 0.02)

    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, model)
        log, before = Path(engine.log_path), Path(engine.log_path).read_bytes()
        lines = b"".join(b"line %d\n" % i for i in range(200_000))
        with log.open("ab") as file:
            file.write(lines)
        while log.stat().st_size or not list(log.parent.glob("engine.log.*")):
            await asyncio.sleep(0.02)
        assert await manager.get_logs(engine.id, 2) == ["line 199998", "line 199999"]
        end = len(before) + len(lines)
        assert await manager.log_offset(engine.id, 100, 10**30) == end
        assert await manager.log_offset(engine.id, 1) == end - len(b"line 199999\n")
        assert await manager.log_offset(engine.id, 100, 5) == end - 500_000  # the first byte that is still there
        assert sum(path.stat().st_size for path in log.parent.glob("engine.log*")) == 500_000

    run(test)


def test_a_hung_server_is_killed_and_restarted_if_its_policy_says_so(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_ENGINE_UNRESPONSIVE_SECONDS", "0.5")

    async def test(manager: ControlPlaneManager) -> None:
        request = StartRequest(model=model, restart_policy=RestartPolicy.ON_FAILURE)
        engine = await until(manager, (await manager.start_engine(request)).id, S.RUNNING)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        while (view := await manager.get_engine(engine.id)).restarts == 0:
            await asyncio.sleep(0.02)
        while view.state is not S.RUNNING:
            await asyncio.sleep(0.02)
            view = await manager.get_engine(engine.id)
        assert view.pid != engine.pid
        reasons = [event.reason for event in await manager.get_events(engine.id) if event.after is S.FAILED]
        assert len(reasons) == 1
        assert "did not answer for" in reasons[0]

    run(test)


def test_a_standby_serves_reads_and_inference_but_refuses_writes_until_it_takes_over(model: str) -> None:
    async def test(active: ControlPlaneManager) -> None:
        standby = ControlPlaneManager(load_settings(), standby=True)
        await standby.open()
        try:
            engine = await started(active, model, "e")
            assert (active.role, standby.role) == ("active", "standby")
            while not any(route.engine_id == engine.id for route in standby.served()):  # the standby reads the change feed
                await asyncio.sleep(0.02)
            upstream = await standby.running("e", EngineKind.LLM, wait_seconds=30)
            assert (upstream.engine_id, upstream.address) == (engine.id, engine.address)
            assert [view.state for view in await standby.list_engines()] == [S.RUNNING]
            for write in (standby.stop_engine, standby.resume_engine, standby.remove_engine, standby.pause_engine):
                with pytest.raises(Overloaded, match="is on standby; the active gateway is http") as caught:
                    await write(engine.id)
                assert caught.value.code == "standby"
            await active.close()
            while standby.role == "standby":
                await asyncio.sleep(0.02)
            await standby.stop_engine(engine.id)
            assert (await until(standby, engine.id, S.STOPPED)).pid is None
        finally:
            await standby.close()

    run(test)


def test_a_request_waits_for_a_starting_engine_and_its_error_says_why_the_engine_failed(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await start(manager, model, "e")
        upstream = await manager.running("e", EngineKind.LLM, wait_seconds=30)
        assert upstream.engine_id == engine.id
        assert [route.engine_id for route in manager.served()] == [engine.id]
        await start(manager, model, "f", exits=3, says="No model here.")
        with pytest.raises(Overloaded, match="No model here"):
            await manager.running("f", EngineKind.LLM, wait_seconds=30)
        await start(manager, model, "g", answers=False)
        with pytest.raises(Overloaded, match="is still"):
            await manager.running("g", EngineKind.LLM, wait_seconds=0.1)

    run(test)


def test_an_engine_that_a_user_paused_has_no_process_and_refuses_requests_until_it_is_resumed(model: str) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, model)
        await manager.pause_engine(engine.id)
        assert (await until(manager, engine.id, S.PAUSED)).pid is None
        with pytest.raises(Overloaded) as caught:
            await manager.running(engine.name, EngineKind.LLM, wait_seconds=30)
        assert caught.value.code == "engine_paused"
        await manager.resume_engine(engine.id)
        await until(manager, engine.id, S.RUNNING)
        assert await manager.counts() == {(EngineKind.LLM, S.RUNNING): 1}
        page = await manager.page_engines(limit=1, states=[S.RUNNING])
        assert ([view.id for view in page.data], page.last_id, page.has_more) == ([engine.id], engine.id, False)

    run(test)
