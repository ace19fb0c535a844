"""How the CPU cores are shared among engines."""

import asyncio
from typing import Any

import pytest
from engines import record, server
from hypothesis import given
from hypothesis import strategies as st

from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.actions import Action, Launch, Transition
from sage.llm.control_plane.core_balance import CoreBalancer
from sage.llm.control_plane.cores import Cores, CpuServer, cpu_servers, new_threads, share_cores, with_threads
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState


@pytest.mark.parametrize(
    ("cores", "requested", "expected"),
    [
        (8, [], []),
        (8, [None], [8]),
        (8, [None, None], [4, 4]),
        (8, [None, None, None], [3, 3, 2]),
        (8, [2, None], [2, 6]),
        (8, [None, 3, None], [3, 3, 2]),
        (8, [8, None], [8, 1]),
        (8, [16], [16]),
        (2, [None, None, None], [1, 1, 1]),
        (2, [4, None, None], [4, 1, 1]),
        (1, [None], [1]),
    ],
)
def test_engines_share_the_cores_equally_and_keep_the_threads_that_a_user_requested(
    cores: int, requested: list[int | None], expected: list[int]
) -> None:
    engines = {f"engine-{number}": threads for number, threads in enumerate(requested)}
    assert list(share_cores(cores, engines).values()) == expected


@given(st.integers(1, 256), st.lists(st.none() | st.integers(1, 64), max_size=40))
def test_the_threads_add_up_to_the_cores_if_there_are_enough_cores(cores: int, requested: list[int | None]) -> None:
    engines = {f"engine-{number}": threads for number, threads in enumerate(requested)}
    shared = share_cores(cores, engines)
    assert all(shared[engine] == threads for engine, threads in engines.items() if threads)
    assert all(threads >= 1 for threads in shared.values())
    least = sum(threads or 1 for threads in requested)
    if least <= cores:
        expected = cores if None in requested else least
        assert sum(shared.values()) == expected


CPU, GPU, TRAINING = ("cpu",), ("cuda:0",), {"kind": EngineKind.FINETUNE}
RESUMED = {**TRAINING, "server_id": "server-a"}
ON_CPU, ON_GPU = server(devices=CPU, options={"threads": None}), server(devices=GPU, options={})


def launch(devices: tuple[str, ...] | None = CPU, **values: object) -> Launch:
    return Launch(record(**values), None, devices=devices)


@pytest.mark.parametrize(
    ("action", "servers", "training_threads", "threads"),
    [
        (launch(), [], None, 8),
        (launch(devices=None), [], None, 8),
        (launch(), [ON_CPU], None, 4),
        (launch(**TRAINING), [ON_CPU], None, 4),
        (launch(), [ON_GPU], None, 8),
        (launch(devices=GPU), [ON_CPU], None, None),
        (launch(), [server(ServerState.CLOSING, devices=CPU)], None, 8),
        (launch(), [server(devices=CPU, options={"threads": 6})], None, 2),
        (launch(), [server(devices=CPU)], 5, 3),  # the server record of a training run has no options
        (launch(options={"threads": 3}), [ON_CPU], None, 3),
        (launch(**TRAINING), [ON_CPU], 2, 2),
        (launch(threads=7), [ON_CPU], None, 4),
        (launch(threads=7, **RESUMED), [ON_CPU], None, 7),
        (launch(threads=None, **RESUMED), [ON_CPU], None, None),  # the run began with the default number of threads
        (launch(threads=7, **RESUMED), [ON_CPU], 2, 2),
        (Launch(record(), server(ServerState.PLANNED)), [ON_CPU], None, None),  # the server already has a number of threads
    ],
)
def test_a_launch_on_the_cpu_gets_its_share_of_the_cores_and_a_resumed_run_keeps_its_threads(
    action: Launch, servers: list[ServerRecord], training_threads: int | None, threads: int | None
) -> None:
    [planned] = with_threads([action], servers, Cores(8, training_threads))
    assert isinstance(planned, Launch)
    assert planned.threads == threads


def on_cpu(name: str, threads: int | None, *, adjusts: bool = True, active: bool = True) -> CpuServer:
    return CpuServer(name, threads, is_adjustable=adjusts, is_active=active)


@pytest.mark.parametrize(
    ("servers", "changed"),
    [
        ([], {}),
        ([on_cpu("a", 8)], {}),
        ([on_cpu("a", 4), on_cpu("idle", 4, active=False)], {"a": 8}),
        ([on_cpu("a", 8), on_cpu("b", 8)], {"a": 4, "b": 4}),
        ([on_cpu("a", 8), on_cpu("run", 4, adjusts=False)], {"a": 4}),
        ([on_cpu("a", 4), on_cpu("run", None, adjusts=False)], {"a": 1}),  # the run uses all cores
        ([on_cpu("idle", 8, active=False), on_cpu("run", 4, adjusts=False)], {}),
    ],
)
def test_active_servers_share_the_cores_of_idle_servers(servers: list[CpuServer], changed: dict[str, int]) -> None:
    assert new_threads(8, servers) == changed


def test_only_ready_servers_that_report_their_threads_are_adjusted() -> None:
    engines = [record(EngineState.RUNNING, id=f"engine-{name}", server_id=f"server-{name}", threads=2) for name in "abcdef"]
    fields: dict[str, dict[str, Any]] = {
        "a": {"devices": CPU, "options": {}}, "b": {"devices": GPU, "options": {}},
        "c": {"devices": CPU, "options": {"threads": 3}}, "d": {"devices": CPU, "options": {}},
        "e": {"devices": CPU, "options": {}},
    }  # fmt: skip
    servers = {f"server-{name}": server(id=f"server-{name}", **values) for name, values in fields.items()}
    ready = Observed(alive=True, ready=True, threads=4, is_active=False)
    observed = {f"engine-{name}": ready for name in "abcf"} | {
        "engine-d": Observed(alive=True, ready=True), "engine-e": Observed(alive=True, threads=4),
    }  # fmt: skip
    assert cpu_servers(engines, servers, observed, Cores(8)) == [
        on_cpu("server-a", 4, active=False), on_cpu("server-c", 4, adjusts=False, active=False),
        on_cpu("server-d", 2, adjusts=False),
    ]  # fmt: skip


def test_a_failed_change_is_repeated_and_only_one_change_is_in_progress() -> None:
    calls: list[int] = []

    async def refuse(_: ServerRecord, threads: int) -> None:
        calls.append(threads)
        raise OSError("no answer")

    async def test() -> None:
        balancer = CoreBalancer(Cores(8), refuse)
        engines = [record(EngineState.RUNNING, server_id="server-a")]
        observed = {"engine-a": Observed(alive=True, ready=True, threads=4)}
        for _ in range(2):
            balancer.balance(engines, {"server-a": ON_CPU}, observed)
        while balancer._changes:
            await asyncio.sleep(0)
        assert calls == [8]
        balancer.balance(engines, {"server-a": ON_CPU}, observed)
        while balancer._changes:
            await asyncio.sleep(0)
        await balancer.close()

    asyncio.run(test())
    assert calls == [8, 8]


def test_engines_that_are_launched_together_share_the_cores_and_other_actions_are_not_changed() -> None:
    engines: list[EngineRecord] = [record(id=f"engine-{name}") for name in "abc"]
    actions: list[Action] = [*(Launch(engine, None) for engine in engines), Transition(record(), EngineState.STOPPED)]
    *launches, other = with_threads(actions, [], Cores(8))
    assert [action.threads for action in launches if isinstance(action, Launch)] == [3, 3, 2]
    assert other == actions[-1]
