"""The runner executes several actions at a time, retries or cancels them, and gives up after repeated failures."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from engines import record, server
from store_promises import lease_of

from sage.common.errors import ConfigError, EngineError, RunError
from sage.common.processes import ProcessSpec
from sage.llm.client.types import DesiredState, EngineKind, EngineState
from sage.llm.control_plane import runner
from sage.llm.control_plane.actions import Launch, LoadAdapter, Transition
from sage.llm.control_plane.executors.adapter_client import AdapterRefused
from sage.llm.control_plane.launchers.base import ProcessObservation, Signal
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.runner import Runner
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState
from sage.llm.control_plane.store.store import Store

S = EngineState


class World:
    """A store with engines of one shared server, and a runner whose executor, launcher and adapters are this object."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(open_database(f"sqlite:///{folder}/engines.db"))
        self.lease = lease_of(self.store)
        self.done, self.launches, self.signals = 0, 0, list[Signal]()
        self.release = asyncio.Event()
        self.error: Exception | None = None
        self.loaded: dict[str, str | None] = {"sage-a-1": "/older"}

    def add(self, state: EngineState, host: ServerState = ServerState.LAUNCHED, **values: Any) -> EngineRecord:
        """Add an engine. Unless the engine is queued, it uses the shared server."""
        fields = {"base": "/base", "adapter": "/newer", "revision": 1, **values}
        engine = self.store.add(record(**fields), "user", self.lease)
        if state is S.QUEUED:
            return engine
        known = self.store.servers("n")
        server_values = (
            {"join_server": "server-a"} if known else {"put_server": server(host, shared=True), "server_id": "server-a"}
        )
        engine = self.move(engine, S.STARTING, **server_values)
        return engine if state is S.STARTING else self.move(engine, state, served_as="sage-a-1")

    def move(self, engine: EngineRecord, state: EngineState, **values: Any) -> EngineRecord:
        return self.store.transition(engine, state, actor="r", lease=self.lease, **values)

    def host(self) -> ServerRecord:
        (host,) = self.store.servers("n")
        return host

    def plan_server(self, engine: EngineRecord, *, is_moved: bool = False) -> ServerRecord:
        return server(ServerState.PLANNED)

    def spec(self, engine: EngineRecord, _: ServerRecord) -> ProcessSpec:
        if self.error:
            raise self.error
        return ProcessSpec((), Path("lock"), Path("log"))

    async def observe(self, handles: set[str]) -> dict[str, ProcessObservation]:
        return {handle: ProcessObservation(alive=False) for handle in handles}

    async def launch(self, spec: ProcessSpec) -> str:
        self.launches += 1
        self.launched = spec
        await self.release.wait()
        return "127.0.0.1:9000"

    async def signal(self, handle: str, signal: Signal) -> None:
        self.signals.append(signal)

    async def load(self, host: ServerRecord, name: str, folder: str) -> None:
        if self.error:
            raise self.error
        await self.release.wait()

    async def folders(self, host: ServerRecord) -> dict[str, str | None]:
        return self.loaded

    def note(self) -> None:
        self.done += 1

    def run(self, test: Callable[[Runner], Awaitable[None]]) -> None:
        async def main() -> None:
            parts: Any = self
            executors: Any = {EngineKind.LLM: self}
            held = Runner(
                self.store, Pool("store", 1), executors, parts, parts, RoutingTable("n"), lambda: self.lease, self.note,
                lambda devices: {"CUDA_VISIBLE_DEVICES": ",".join(devices)},
            )  # fmt: skip
            async with asyncio.timeout(20):
                await test(held)

        asyncio.run(main())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(runner, "_BACKOFF_SECONDS", 0.0)
    return World(tmp_path)


def test_a_launch_stores_devices_and_threads_and_restricts_the_process_to_the_devices(world: World) -> None:
    engine = world.add(S.QUEUED)

    async def test(runner: Runner) -> None:
        world.release.set()
        runner.run(Launch(engine, None, devices=("cuda:1", "cuda:3"), reserved_bytes=5, threads=4), None, None)
        while not world.done:
            await asyncio.sleep(0)

    world.run(test)
    assert world.store.get(engine.id).threads == 4
    assert (world.host().devices, world.host().reserved_bytes) == (("cuda:1", "cuda:3"), 5)
    assert world.launched.env == {"CUDA_VISIBLE_DEVICES": "cuda:1,cuda:3"}


def test_an_engine_that_waits_for_a_shared_launch_does_not_wake_the_reconciler(world: World) -> None:
    first, second = (world.add(S.STARTING, ServerState.PLANNED, id=name) for name in ("engine-a", "engine-b"))
    launch = world.host()

    async def test(runner: Runner) -> None:
        runner.run(Launch(first, launch), None, launch)
        while not world.launches:
            await asyncio.sleep(0)
        runner.run(Launch(second, launch), None, launch)
        while len(runner._tasks) > 1:
            await asyncio.sleep(0)
        assert world.done == 0
        world.release.set()
        await runner.idle()

    world.run(test)
    assert (world.launches, world.done, world.host().state) == (1, 1, ServerState.LAUNCHED)


def test_an_engine_that_is_killed_does_not_wait_until_its_adapter_is_loaded(world: World) -> None:
    engine = world.add(S.STARTING)

    async def test(runner: Runner) -> None:
        runner.run(LoadAdapter(engine, world.host()), None, world.host())
        await asyncio.sleep(0)
        desired = DesiredState.STOPPED
        stopped = world.store.set_desired(engine, desired, force=False, actor="user", lease=world.lease)
        runner.run(Transition(stopped, S.STOPPING), None, world.host())
        await asyncio.sleep(0)
        assert len(runner._tasks) == 1
        killed = world.store.set_desired(stopped, desired, force=True, actor="user", lease=world.lease)
        while not world.done:  # the next plan is made once the load is cancelled
            runner.run(Transition(killed, S.STOPPING), None, world.host())
            await asyncio.sleep(0)
        runner.run(Transition(killed, S.STOPPING), None, world.host())
        await runner.idle()

    world.run(test)
    assert world.store.get("engine-a").state is S.STOPPING


@pytest.mark.parametrize("state", [S.QUEUED, S.STARTING])
def test_an_engine_fails_with_the_error_if_the_same_action_fails_five_times(world: World, state: EngineState) -> None:
    engine = world.add(state, ServerState.PLANNED)
    world.error = AttributeError("no attribute 'threads'")

    async def test(runner: Runner) -> None:
        tries = 0
        while world.store.get("engine-a").state is not S.FAILED:
            current, hosts = world.store.get("engine-a"), world.store.servers("n")
            runner.run(Launch(current, hosts[0] if hosts else None), None, hosts[0] if hosts else None)
            await runner.idle()
            tries += 1
        assert 5 <= tries <= 6

    world.run(test)
    reason = world.store.get(engine.id).reason
    assert reason
    assert (reason.code, "no attribute 'threads'" in reason.message) == ("launch_failed", True)
    assert world.store.servers("n") == []


@pytest.mark.parametrize("others", [0, 1])
def test_the_server_of_a_failed_engine_is_killed_unless_other_engines_use_it(world: World, others: int) -> None:
    world.add(S.STARTING)
    if others:
        world.add(S.RUNNING, id="engine-b")
    world.error = AttributeError("warm_up")

    async def test(runner: Runner) -> None:
        for _ in range(5):
            runner.run(LoadAdapter(world.store.get("engine-a"), world.host()), None, world.host())
            await runner.idle()

    world.run(test)
    failed = world.store.get("engine-a")
    assert (failed.state, failed.reason and failed.reason.code) == (S.FAILED, "adapter_load_failed")
    assert (world.signals, len(world.store.servers("n"))) == ([] if others else [Signal.KILL], others)


def test_an_engine_is_launched_when_a_shortage_of_descriptors_is_over(world: World) -> None:
    world.add(S.QUEUED)
    world.error = RunError(code="io_error", message="no descriptor")
    world.error.__cause__ = OSError(errno.EMFILE, "Too many open files")

    async def test(runner: Runner) -> None:
        for _ in range(10):
            hosts = world.store.servers("n")
            runner.run(Launch(world.store.get("engine-a"), hosts[0] if hosts else None), None, hosts[0] if hosts else None)
            await runner.idle()
        assert (world.store.get("engine-a").state, world.launches) == (S.STARTING, 0)
        world.error = None
        world.release.set()
        runner.run(Launch(world.store.get("engine-a"), world.host()), None, world.host())
        await runner.idle()

    world.run(test)
    assert (world.store.get("engine-a").state, world.launches) == (S.STARTING, 1)


@pytest.mark.parametrize("error", [OSError("busy"), TimeoutError()])
def test_an_engine_does_not_fail_because_of_errors_of_the_system(world: World, error: Exception) -> None:
    world.add(S.STARTING)
    world.error = error

    async def test(runner: Runner) -> None:
        for _ in range(20):
            runner.run(LoadAdapter(world.store.get("engine-a"), world.host()), None, world.host())
            await runner.idle()

    world.run(test)
    assert world.store.get("engine-a").state is S.STARTING


def test_a_failed_action_is_delayed_before_it_is_repeated_and_a_different_action_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_BACKOFF_SECONDS", 60.0)
    engine = world.add(S.STARTING)
    world.error = ConfigError(code="c", message="m")

    async def test(runner: Runner) -> None:
        runner.run(LoadAdapter(engine, world.host()), None, world.host())
        await runner.idle()
        runner.run(LoadAdapter(engine, world.host()), None, world.host())
        assert runner._tasks == {}
        runner.run(Transition(engine, S.STOPPING), None, world.host())
        await runner.idle()

    world.run(test)
    assert world.store.get("engine-a").state is S.STOPPING


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (AdapterRefused(code="adapter_refused", message="its rank is too large"), 1),
        (EngineError(code="adapter_load_failed", message="its rank is too large"), runner._MAX_FAILURES),
        (RuntimeError("its rank is too large.\nMore."), runner._MAX_FAILURES),
    ],
)
def test_if_a_newer_version_cannot_be_loaded_the_older_one_is_served_and_the_status_has_the_reason(
    world: World, error: Exception, tries: int
) -> None:
    newer = world.store.revise(world.add(S.RUNNING), actor="r", lease=world.lease, revision=2, model="/newer")
    world.error = error

    async def load(runner: Runner) -> EngineRecord:
        runner.run(LoadAdapter(world.store.get("engine-a"), world.host()), None, world.host())
        await runner.idle()
        return world.store.get("engine-a")

    async def test(runner: Runner) -> None:
        for _ in range(tries):
            assert world.store.get("engine-a") == newer
            engine = await load(runner)
        assert engine.reason
        assert (engine.state, engine.served_as, engine.reason.code) == (S.RUNNING, "sage-a-1", "adapter_refused")
        assert engine.reason.message.startswith("server-a cannot load /newer: ")
        assert engine.reason.message.endswith("its rank is too large. The previous version is still used.")
        assert "started" not in engine.reason.message
        assert (engine.model, engine.adapter) == ("/older", "/older")
        world.loaded = {}  # the server no longer has the older version
        for _ in range(tries):
            engine = await load(runner)
        assert engine.state is S.FAILED

    world.run(test)
