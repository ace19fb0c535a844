"""Merges of adapters in the background: when the merger starts, when servers are swapped, and how the old server ends."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from engines import record, server

from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import DesiredState, EngineState, OnBusy
from sage.llm.control_plane.actions import Action, EndMerge, SendSignal, SetDesired, StartMerge, SwapServers, UnloadAdapter
from sage.llm.control_plane.backends import environments, registry
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import Signal
from sage.llm.control_plane.merger import _merger_of
from sage.llm.control_plane.plan import Limits, Snapshot, plan
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.watch import Watch

S = EngineState
TIMES: dict[str, Any] = dict.fromkeys(("created_at", "state_at"), datetime.now(UTC))
LIMITS = Limits(start_seconds=300, stop_seconds=20)
BASE = server(id="server-base", model="/base", options={}, served_name="sage-base-1", shared=True)
MERGED = server(id="server-m", model="/x")
STOPPED: dict[str, Any] = {"desired": DesiredState.STOPPED}


def tuned(**values: Any) -> EngineRecord:
    fields = {"id": "engine-x", "state": S.RUNNING, "base": "/base", "adapter": "/x", "revision": 1,
              "served_as": "sage-x-1", "server_id": "server-base", "merger_id": "engine-m"}  # fmt: skip
    return record(**{**fields, **TIMES, **values})


def merger(state: EngineState = S.RUNNING, **values: Any) -> EngineRecord:
    server_id = None if state is S.QUEUED else "server-m"
    return record(
        state, **{"id": "engine-m", "server_id": server_id, "merges": "engine-x", "dedicated": True, **TIMES, **values}
    )


def swapped(state: EngineState = S.STOPPING) -> EngineRecord:
    """Return the merger after the swap: it has the adapter of the other engine, and must stop."""
    at_base = {"server_id": "server-base", "base": "/base", "adapter": "/x", "served_as": "sage-x-1"}
    return merger(state, **at_base, **STOPPED)


def planned(*engines: EngineRecord, models: tuple[str, ...] = ("sage-x-1",), state_seconds: float = 60) -> dict[str, Action]:
    """Return the action of each engine, by its id; every server answers, and has loaded `models`."""
    observed = Observed(alive=True, ready=True, models=frozenset({"sage-base-1", *models}))
    servers = {host.id: host for host in (BASE, MERGED)}
    watches = {engine.id: Watch(engine.state, state_seconds=state_seconds, served_seconds=60) for engine in engines}
    seen = {engine.id: observed for engine in engines if engine.server_id}
    return {action.engine.id: action for action in plan(Snapshot(engines, servers, seen, watches, {}, LIMITS))}


def test_the_servers_are_swapped_when_the_merger_answers() -> None:
    waiting = tuned(merger_id="")
    assert planned(waiting) == {waiting.id: StartMerge(waiting)}
    for state in (S.VALIDATING, S.STARTING):
        assert "engine-x" not in planned(tuned(), merger(state), state_seconds=0)
    assert planned(tuned(), merger()) == {"engine-x": SwapServers(tuned(), BASE, merger(), MERGED)}
    assert planned(tuned()) == {"engine-x": EndMerge(tuned())}  # the merger has failed or was stopped
    assert planned(tuned(merger_id=None)) == {}


@pytest.mark.parametrize("other", [[], [tuned(merger_id=None)], [tuned(merger_id="engine-y")], [tuned(**STOPPED)]])
def test_a_merger_whose_result_is_not_needed_is_stopped(other: list[EngineRecord]) -> None:
    action = planned(*other, merger())["engine-m"]
    assert action == SetDesired(merger(), DesiredState.STOPPED)
    assert isinstance(planned(*other, merger(S.QUEUED))["engine-m"], SetDesired)


def test_the_server_of_the_base_ends_after_the_answers_with_the_adapter_are_complete() -> None:
    last = swapped()
    assert planned(last, state_seconds=1) == {}  # gateways may still send requests
    assert planned(last) == {last.id: UnloadAdapter(last, BASE, "sage-x-1")}
    ended = planned(last, models=(), state_seconds=10)[last.id]
    assert isinstance(ended, SendSignal)
    assert (ended.signal, ended.closes) == (Signal.STOP, True)
    killed = planned(merger(S.STOPPING, force=True, **STOPPED))["engine-m"]
    assert isinstance(killed, SendSignal)
    assert killed.signal is Signal.KILL


def test_a_base_server_that_has_other_engines_unloads_the_adapter_and_continues() -> None:
    base = record(S.RUNNING, id="engine-base", base="/base", server_id="server-base", served_as="sage-base-1", revision=1)
    leaving = swapped()
    assert planned(base, leaving, state_seconds=10) == {leaving.id: UnloadAdapter(leaving, BASE, "sage-x-1")}


@pytest.mark.parametrize(
    ("given", "backend", "device", "expected"),
    [
        ({"dtype": "auto", "slots": 3}, "llamacpp", "cpu", {"dtype": "fp32", "slots": 3, "context_tokens": 99}),
        ({"dtype": "bf16"}, "llamacpp", "cpu", {"dtype": "bf16", "context_tokens": 99, "quantize": "none"}),
        ({"dtype": "auto"}, "vllm", "cuda", {"dtype": "bf16", "context_tokens": 99}),
        ({"dtype": "auto", "max_tokens": 7}, "transformers", "cpu", {"dtype": "auto", "max_tokens": 7}),
    ],
)
def test_a_merger_has_the_precision_context_and_slots_of_the_engine_and_the_fastest_backend(
    given: dict[str, Any], backend: str, device: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "device", lambda: device)
    monkeypatch.setattr(environments, "is_installed", lambda name: name in ("transformers", backend))
    source = ModelSource("x", ModelKind.ADAPTER, Path("/x"))
    monkeypatch.setattr("sage.llm.control_plane.merger.resolve_model", lambda _: source)
    options = registry.complete_options("transformers", given)
    found = _merger_of(
        tuned(options=options, on_busy=OnBusy.PREEMPT, base_version="v", threads=2), Observed(alive=True, context_tokens=99)
    )
    assert (found.backend, found.dedicated, found.merges, found.merger_id) == (backend, True, "engine-x", None)
    assert (found.on_busy, found.base_version, found.threads) == (OnBusy.FAIL, None, None)  # mergers do not preempt engines
    assert expected.items() <= found.options.items()
    assert found.name != "m"
