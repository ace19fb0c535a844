"""Which version of a run is served, and by which engine."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_views import training_progress
from engines import record, server
from serving import HostingBackend, make_adapter
from store_promises import lease_of

from sage.common.errors import ConfigError
from sage.libs.models.fingerprint import version
from sage.llm.client.types import DesiredState, EngineKind, EngineState, StartRequest
from sage.llm.control_plane import publisher
from sage.llm.control_plane.actions import Publish
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.creation import served_run
from sage.llm.control_plane.executors.adapter_client import AdapterClient
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.executors.inference_executor import InferenceExecutor
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.publisher import Publisher
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.served_run import ServedRun, due
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.store.store import StaleWrite, Store
from sage.llm.control_plane.writing import Writer

S = EngineState
RUN: dict[str, Any] = {"id": "engine-run", "kind": EngineKind.FINETUNE}


def seen(checkpoint_step: int | None, ended: EngineState | None = None, step: int = 11) -> Observed:
    training = training_progress(step=step, total_steps=99, checkpoint_step=checkpoint_step)
    return Observed(alive=ended is None, ended=ended, training=training)


@pytest.mark.parametrize(
    ("serve", "observed", "expected"),
    [
        (None, seen(5, S.COMPLETED), None),
        ({}, seen(None), None),
        ({}, seen(5), None),
        ({}, seen(5, S.COMPLETED), "result"),
        ({}, seen(5, S.STOPPED), "result"),
        ({}, seen(5, S.FAILED), None),
        ({"is_complete": True}, seen(5, S.COMPLETED), None),
        ({"checkpoints": True}, seen(None), None),
        ({"checkpoints": True}, seen(5), 5),
        ({"checkpoints": True, "step": 5}, seen(5), None),
        ({"checkpoints": True, "step": 5}, seen(10), 10),
        ({"checkpoints": True}, seen(5, S.FAILED), None),
        ({"checkpoints": True}, seen(99, step=99), None),  # the last step: the result is served instead
        ({"checkpoints": True, "step": 5}, seen(10, S.COMPLETED), "result"),
        ({"after_step": 5}, seen(5), None),
        ({"after_step": 5}, seen(6), 6),
        ({"after_step": 0}, seen(None), None),
        ({"checkpoints": True}, Observed(alive=True), None),
    ],
)
def test_checkpoints_and_the_result_of_a_run_are_served_as_requested(
    serve: dict[str, Any] | None, observed: Observed, expected: object
) -> None:
    engine = record(S.RUNNING, serve=serve and {"name": "tuned", **serve} if serve != {} else {"name": "tuned"}, **RUN)
    action = due(engine, observed)
    assert (action and ("result" if action.step is None else action.step)) == expected
    assert action is None or action == Publish(engine, action.step)


def test_the_engine_has_the_requested_name_else_the_name_of_the_run_else_of_the_output_folder() -> None:
    def name(**fields: Any) -> str:
        values = {"model": "m", "engine_kind": "finetune", "serve": {}, "options": {"output_dir": "/models/out"}, **fields}
        served = served_run(StartRequest.model_validate(values))
        assert served
        return served.name

    assert (name(), name(name="run"), name(name="run", serve={"name": "x"})) == ("out", "run", "x")
    with pytest.raises(ConfigError, match="Use --serve-as NAME") as caught:
        name(options={"output_dir": "/models/my result"})
    assert caught.value.param == "serve.name"
    with pytest.raises(ConfigError, match="only a training run has a result"):
        name(engine_kind="llm")
    assert served_run(StartRequest(model="m")) is None


class World:
    """A store with a run, and a publisher. Each published checkpoint is a folder with a new adapter."""

    def __init__(self, folder: Path, base: Path, *marks: str, **serve: Any) -> None:
        self.folder, self.base, self.marks = folder, base, marks
        self.store = Store(open_database(f"sqlite:///{folder}/engines.db"))
        self.lease = lease_of(self.store)
        self.output = make_adapter(folder / "out", base, *marks)
        values = {"name": "tuned", "checkpoints": True, **serve}
        options = {"output_dir": str(self.output)}
        self.store.add(record(S.RUNNING, serve=values, options=options, **RUN), "user", self.lease)
        inference = InferenceExecutor(LocalLauncher(), AdapterClient())
        executors: Any = {EngineKind.FINETUNE: self, EngineKind.LLM: inference}
        pool = Pool("store", 1)
        write = Writer(pool, lambda: self.lease)
        self.publisher = Publisher(self.store, pool, executors, RoutingTable("n"), write)

    async def publish_checkpoint(self, _: EngineRecord, step: int) -> Path:
        folder = self.folder / f"step-{step}"
        return folder if folder.exists() else make_adapter(folder, self.base, *self.marks)

    def publish(self, step: int | None) -> None:
        asyncio.run(self.publisher.publish(self.store.get("engine-run"), step))

    def serve(self) -> ServedRun:
        found = ServedRun.of(self.store.get("engine-run"))
        assert found
        return found

    def engine(self) -> EngineRecord:
        return self.store.get(self.serve().engine_id or "")

    def change(self, *states: EngineState, **values: Any) -> EngineRecord:
        """Move the engine that serves the run through these states, as the reconciler does."""
        for state in states:
            self.store.transition(self.engine(), state, actor="r", lease=self.lease, **values)
        return self.engine()

    def run(self) -> EngineRecord:
        """Move the engine to the state running, with the adapter that was published last."""
        self.change(S.QUEUED, base=str(self.base), adapter=self.engine().model)
        return self.change(S.STARTING, S.RUNNING)


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    for name in ("hosting", "transformers"):
        monkeypatch.setitem(registry.BACKENDS, name, HostingBackend())
    return lambda *marks, **serve: World(tmp_path, tiny_model, *marks, **serve)


def test_the_first_version_creates_the_engine_and_the_next_ones_replace_its_adapter(world: Callable[..., World]) -> None:
    w = world()
    w.publish(5)
    first = w.engine()
    assert (first.name, first.model, first.state, w.serve().step) == ("tuned", f"{w.folder}/step-5", S.VALIDATING, 5)
    w.run()
    w.publish(10)
    second = w.engine()
    assert (second.id, second.adapter, second.revision) == (first.id, f"{w.folder}/step-10", first.revision + 1)
    assert (second.state, w.serve().is_complete) == (S.RUNNING, False)
    w.publish(None)
    assert (w.engine().adapter, w.engine().model, w.serve().is_complete) == (str(w.output), str(w.output), True)
    assert len(w.store.page(limit=9)[0]) == 2


def test_a_newer_version_is_not_published_while_the_engine_is_validating(world: Callable[..., World]) -> None:
    w = world()
    w.publish(5)
    with pytest.raises(StaleWrite):
        w.publish(10)
    assert w.serve().step == 5


def test_the_engine_gets_the_backend_and_options_of_a_server_with_the_same_base(world: Callable[..., World]) -> None:
    w = world()
    options = {"load_seconds": 7.0}
    host = server(backend="hosting", model=str(w.base), model_version=version(w.base), options=options, shared=True)
    base = w.store.add(record(id="engine-base"), "user", w.lease)
    w.store.transition(base, S.STARTING, actor="r", lease=w.lease, put_server=host, server_id=host.id)
    w.publish(5)
    assert (w.engine().backend, w.engine().options["load_seconds"]) == ("hosting", 7.0)
    assert w.engine().backend_reason == "a server of this backend has loaded the base model"


def test_an_adapter_that_needs_a_server_of_its_own_is_served_when_the_run_has_ended(world: Callable[..., World]) -> None:
    w = world("dora")
    w.publish(5)
    assert (w.serve().engine_id, w.serve().step) == (None, 5)
    w.publish(None)
    assert (w.engine().model, w.serve().is_complete) == (str(w.output), True)


def test_an_engine_that_merged_a_checkpoint_is_replaced_by_an_engine_with_the_result(world: Callable[..., World]) -> None:
    w = world()
    w.publish(5)
    merged = w.change(S.QUEUED, S.STARTING, S.RUNNING)
    w.publish(None)
    assert (w.engine().id != merged.id, w.engine().name, w.engine().model) == (True, "tuned", str(w.output))
    assert w.store.get(merged.id).desired is DesiredState.STOPPED


def test_an_engine_that_merged_a_checkpoint_keeps_its_name_when_a_newer_checkpoint_is_saved(
    world: Callable[..., World],
) -> None:
    w = world()
    w.publish(5)
    merged = w.change(S.QUEUED, S.STARTING, S.RUNNING)
    w.publish(10)
    assert (w.engine(), w.serve().step) == (merged, 10)  # it still answers with step 5


def test_an_engine_with_the_result_is_created_only_if_the_previous_engine_is_stopped(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    w.publish(5)
    merged = w.change(S.QUEUED, S.STARTING, S.RUNNING)
    with monkeypatch.context() as patched:
        patched.setattr(w.store, "get", lambda _: dataclasses.replace(merged, version=merged.version - 1))
        with pytest.raises(StaleWrite):
            asyncio.run(w.publisher.publish(Store.get(w.store, "engine-run"), None))
    assert (len(w.store.page(limit=9)[0]), w.engine()) == (2, merged)
    w.publish(None)
    assert (w.store.get(merged.id).desired, w.engine().id != merged.id) == (DesiredState.STOPPED, True)


def unreadable(_: EngineRecord) -> None:
    raise OSError("too many open files")


@pytest.mark.parametrize("step", [5, None])
def test_a_version_that_could_not_be_read_is_published_later(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    w = world()

    with monkeypatch.context() as patched:
        patched.setattr(publisher, "placement", unreadable)
        for _ in range(3):
            with pytest.raises(OSError, match="too many open files"):
                w.publish(step)
    assert (w.serve().engine_id, w.serve().step, w.serve().is_complete) == (None, 0, False)
    w.publish(step)
    assert w.engine().state is S.VALIDATING


def test_a_result_that_cannot_be_read_for_a_minute_does_not_keep_the_run_from_ending(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    monkeypatch.setattr(publisher, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(publisher, "placement", unreadable)
    w.publish(None)
    assert (w.serve().engine_id, w.serve().is_complete) == (None, True)


def test_an_engine_that_a_user_stopped_or_removed_is_not_started_again(world: Callable[..., World]) -> None:
    w = world()
    w.publish(5)
    w.run()
    w.store.set_desired(w.engine(), DesiredState.STOPPED, force=False, actor="user", lease=w.lease)
    w.change(S.STOPPING, S.STOPPED)
    w.publish(None)
    assert (w.engine().state, w.engine().model) == (S.STOPPED, str(w.output))  # `resume` serves the result
    w.store.remove(w.engine(), actor="user", lease=w.lease)
    w.publish(10)
    assert (w.store.get("engine-run").serve, len(w.store.page(limit=9)[0])) == (None, 1)


def test_an_engine_that_failed_with_a_checkpoint_is_started_again_with_the_result(world: Callable[..., World]) -> None:
    w = world()
    w.publish(5)
    w.change(S.FAILED)
    w.publish(10)
    assert (w.engine().state, w.engine().model) == (S.FAILED, f"{w.folder}/step-10")
    w.publish(None)
    assert (w.engine().state, w.engine().model) == (S.VALIDATING, str(w.output))


def test_a_result_that_cannot_be_loaded_does_not_keep_the_run_from_ending(world: Callable[..., World]) -> None:
    w = world()
    (w.output / "adapter_model.safetensors").unlink()
    w.publish(None)
    assert (w.serve().engine_id, w.serve().is_complete) == (None, True)


def test_no_engine_is_created_if_the_record_of_the_run_has_changed_meanwhile(world: Callable[..., World]) -> None:
    w = world()
    stale = dataclasses.replace(w.store.get("engine-run"), version=99)
    with pytest.raises(StaleWrite):
        asyncio.run(w.publisher.publish(stale, 5))
    assert len(w.store.page(limit=9)[0]) == 1
