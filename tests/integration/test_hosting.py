"""Server processes that host several engines. A short server program replaces the server of a real model."""

import asyncio
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from serving import HostingBackend, answered, make_adapter, run, start, started, until

from sage.common.paths import get_user_paths
from sage.llm.client.types import EngineState, RestartPolicy
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.executors.adapter_client import AdapterClient
from sage.llm.control_plane.manager import ControlPlaneManager

S = EngineState
ON_FAILURE = RestartPolicy.ON_FAILURE


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "hosting", HostingBackend())
    for name, value in (("RECONCILE", 0.02), ("STOP", 5)):
        monkeypatch.setenv(f"SAGE_{name}_SECONDS", str(value))


@pytest.fixture
def adapters(tmp_path: Path, tiny_model: Path) -> list[Path]:
    return [make_adapter(tmp_path / f"adapter-{number}", tiny_model) for number in range(3)]


def folders() -> set[str]:
    return {folder.name for folder in (get_user_paths().state_dir / "engines").glob("*")}


def test_an_adapter_without_a_backend_in_its_request_joins_the_server_of_its_base(
    tiny_model: Path, adapters: list[Path]
) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model, options={"load_seconds": 0.01})
        joined = await started(manager, adapters[0], backend="auto")
        assert (joined.backend, joined.server_id) == ("hosting", base.server_id)
        assert joined.backend_reason == "a server of this backend has loaded the base model"

    run(test)


def test_an_adapter_joins_the_server_of_its_base_and_leaves_it(tiny_model: Path, adapters: list[Path]) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model, name="base")
        joined = await started(manager, adapters[0], name="tuned")
        assert (joined.pid, joined.server_id) == (base.pid, base.server_id)
        assert (base.form, joined.form) == ("whole model", f"adapter on {base.server_id}")
        assert (joined.slots, joined.context_tokens) == (4, 512)
        assert joined.log_path == base.log_path
        assert await answered(manager, "tuned") == str(adapters[0])
        assert await answered(manager, "base") == str(tiny_model)
        await manager.stop_engine(joined.id)
        await until(manager, joined.id, S.STOPPED)
        assert await answered(manager, "base") == str(tiny_model)
        await manager.remove_engine(joined.id)
        assert await answered(manager, "base") == str(tiny_model)
        assert folders() == {base.id}
        assert await manager.get_logs(base.id) is not None
        await manager.stop_engine(base.id)
        await until(manager, base.id, S.STOPPED)
        await manager.remove_engine(base.id)
        assert folders() == set()

    run(test)


def test_an_adapter_does_not_join_a_server_that_loaded_older_files_of_its_base(tiny_model: Path, tmp_path: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base = shutil.copytree(tiny_model, tmp_path / "base")
        older = await started(manager, base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
        newer = await started(manager, make_adapter(tmp_path / "a", base))
        same = await started(manager, make_adapter(tmp_path / "b", base))
        assert newer.server_id == same.server_id != older.server_id

    run(test)


def test_the_memory_of_a_server_is_counted_once(tiny_model: Path, adapters: list[Path]) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engines = [await started(manager, model) for model in (tiny_model, *adapters)]
        views = [await manager.get_engine(engine.id) for engine in engines]
        assert [view.memory_bytes is not None for view in views] == [True, False, False, False]

    run(test)


def test_a_dedicated_engine_and_an_adapter_that_cannot_join_get_separate_servers(
    tiny_model: Path, tmp_path: Path, adapters: list[Path]
) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model)
        dedicated = await started(manager, adapters[0], dedicated=True)
        dora = await started(manager, make_adapter(tmp_path / "d", tiny_model, "dora"))
        assert len({base.pid, dedicated.pid, dora.pid}) == 3
        assert (dedicated.form, dora.form) == (
            "merged, because a separate server was requested",
            "merged, because it uses DoRA",
        )
        assert await answered(manager, dora.id) == str(tmp_path / "d")
        assert (await started(manager, tiny_model)).pid not in {base.pid, dedicated.pid, dora.pid}

    run(test)


@pytest.mark.parametrize("is_alone", [True, False])
def test_an_adapter_that_a_shared_server_refuses_gets_a_separate_server(
    tiny_model: Path, tmp_path: Path, adapters: list[Path], is_alone: bool
) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        other = None if is_alone else await started(manager, adapters[0])
        refused = await start(manager, make_adapter(tmp_path / "r", tiny_model, "refused"))
        view = await until(manager, refused.id, S.RUNNING)
        assert (view.form or "").endswith("cannot be loaded into a running server: its rank is too large")
        assert view.restarts == 0
        assert await answered(manager, refused.id) == str(tmp_path / "r")
        if other:
            assert await answered(manager, other.id) == str(adapters[0])
            assert view.pid != other.pid

    run(test)


def test_adapters_that_start_together_share_a_new_server_until_the_server_is_full(
    adapters: list[Path],
) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        options = {"start_seconds": 0.3, "max_adapters": 2}
        engines = [await start(manager, folder, options=options) for folder in adapters]
        views = [await until(manager, engine.id, S.RUNNING) for engine in engines]
        assert sorted(Counter(view.pid for view in views).values()) == [1, 2]  # any two adapters may share a server
        for folder, view in zip(adapters, views, strict=True):
            assert await answered(manager, view.id) == str(folder)

    run(test)


@pytest.mark.parametrize("force", [False, True])
def test_a_server_process_ends_when_its_last_engine_is_stopped(tiny_model: Path, adapters: list[Path], force: bool) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base, first, second = [await started(manager, model) for model in (tiny_model, *adapters[:2])]
        await manager.stop_engine(base.id, force=force)
        await until(manager, base.id, S.STOPPED)
        assert await answered(manager, first.id) == str(adapters[0])
        await manager.remove_engine(base.id)
        assert await answered(manager, first.id) == str(adapters[0])
        await asyncio.gather(*(manager.stop_engine(engine.id, force=force) for engine in (first, second)))
        for engine in (first, second):
            await until(manager, engine.id, S.STOPPED)
        assert base.pid is not None
        assert not Path(f"/proc/{base.pid}").exists()
        for engine in (first, second):
            await manager.remove_engine(engine.id)
        assert folders() == set()

    run(test)


def test_an_adapter_that_was_stopped_by_force_is_unloaded_later(tiny_model: Path, adapters: list[Path]) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base, joined = [await started(manager, model) for model in (tiny_model, adapters[0])]
        await manager.stop_engine(joined.id, force=True)
        await until(manager, joined.id, S.STOPPED)
        (server,) = manager._store.servers(base.node)
        while await AdapterClient().loaded(server) != {server.served_name}:
            await asyncio.sleep(0.02)

    run(test)


def test_a_killed_server_is_restarted_once_with_all_its_engines(tiny_model: Path, adapters: list[Path]) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        models = (tiny_model, *adapters)
        engines = [await started(manager, model, restart_policy=ON_FAILURE) for model in models]
        before = {manager._store.get(engine.id).served_as for engine in engines}
        assert engines[0].pid is not None
        os.kill(engines[0].pid, signal.SIGKILL)
        for engine in engines:
            while (await manager.get_engine(engine.id)).restarts != 1:
                await asyncio.sleep(0.01)
        views = [await until(manager, engine.id, S.RUNNING) for engine in engines]
        assert len({view.pid for view in views}) == 1
        for model, view in zip(models, views, strict=True):
            assert await answered(manager, view.id) == str(model)
        names = {manager._store.get(view.id).served_as for view in views}
        assert len(names) == 4
        assert not names & before  # an internal name is never used twice

    run(test)


def test_a_loading_adapter_and_a_running_adapter_are_adopted_by_the_next_control_plane(
    tiny_model: Path, adapters: list[Path]
) -> None:
    async def begin(manager: ControlPlaneManager) -> None:
        options = {"load_seconds": 1.0}
        await started(manager, tiny_model, name="base", options=options)
        await started(manager, adapters[0], name="running", options=options)
        loading = await start(manager, adapters[1], name="loading", options=options)
        await until(manager, loading.id, S.STARTING)
        for task in manager._tasks:
            task.cancel()

    async def go_on(manager: ControlPlaneManager) -> None:
        engines = {engine.name: engine for engine in await manager.list_engines()}
        assert await answered(manager, "running") == str(adapters[0])
        await until(manager, engines["loading"].id, S.RUNNING)
        assert await answered(manager, "loading") == str(adapters[1])
        assert {engine.restarts for engine in await manager.list_engines()} == {0}
        assert len({engine.pid for engine in await manager.list_engines()}) == 1

    run(begin)
    run(go_on)


def test_an_engine_that_resumes_joins_the_server_that_it_left(tiny_model: Path, adapters: list[Path]) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        first, second = [await started(manager, folder) for folder in adapters[:2]]
        await manager.stop_engine(first.id)
        await until(manager, first.id, S.STOPPED)
        await manager.resume_engine(first.id)
        view = await until(manager, first.id, S.RUNNING)
        assert view.pid == second.pid
        assert await answered(manager, first.id) == str(adapters[0])
        base = await started(manager, tiny_model)  # no engine has served the base model of this server yet
        assert base.pid == second.pid
        assert await answered(manager, base.id) == str(tiny_model)

    run(test)


def test_no_request_is_dropped_while_other_adapters_are_stopped_and_resumed(tiny_model: Path, tmp_path: Path) -> None:
    models = [make_adapter(tmp_path / f"a{number}", tiny_model) for number in range(30)]

    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model, name="base")
        engines = [await start(manager, model, name=model.name) for model in models]
        for engine in engines:
            await until(manager, engine.id, S.RUNNING)
        stays, goes = list(zip(models, engines, strict=True))[:15], engines[15:]
        is_over = False

        async def ask(model: Path, engine_id: str) -> int:
            asked = 0
            while not is_over:
                assert await answered(manager, engine_id) == str(model)
                await asyncio.sleep(0.02)
                asked += 1
            return asked

        asking = [asyncio.create_task(ask(model, engine.id)) for model, engine in [(tiny_model, base), *stays]]
        for _ in range(2):
            await asyncio.gather(*(manager.stop_engine(engine.id) for engine in goes))
            for engine in goes:
                await until(manager, engine.id, S.STOPPED)
            for engine in goes:
                await manager.resume_engine(engine.id)
            for engine in goes:
                await until(manager, engine.id, S.RUNNING)
        is_over = True
        assert all(await asyncio.gather(*asking))
        assert {(await manager.get_engine(engine.id)).pid for engine in engines} == {base.pid}

    run(test)


def test_an_adapter_on_a_running_base_is_served_within_two_seconds(tiny_model: Path, adapters: list[Path]) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        await started(manager, tiny_model)
        begin = time.monotonic()
        engine = await start(manager, adapters[0])
        assert await answered(manager, engine.id) == str(adapters[0])
        assert time.monotonic() - begin < 20  # at most 2 s if the machine has no other work

    run(test)
