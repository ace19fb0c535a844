"""How the CPU cores are shared among engines."""

import pytest
from engines import record, server
from hypothesis import given
from hypothesis import strategies as st

from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.actions import Action, Launch, Transition
from sage.llm.control_plane.cores import Cores, share_cores, with_threads
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
        (launch(), [server(devices=CPU)], 5, 3),  # a training run has no options in its server
        (launch(options={"threads": 3}), [ON_CPU], None, 3),
        (launch(**TRAINING), [ON_CPU], 2, 2),
        (launch(threads=7), [ON_CPU], None, 4),
        (launch(threads=7, **RESUMED), [ON_CPU], None, 7),
        (launch(threads=None, **RESUMED), [ON_CPU], None, None),  # it began with the default of its program
        (launch(threads=7, **RESUMED), [ON_CPU], 2, 2),
        (Launch(record(), server(ServerState.PLANNED)), [ON_CPU], None, None),  # it already has its threads
    ],
)
def test_a_launch_on_the_cpu_gets_its_share_of_the_cores_and_a_resumed_run_keeps_its_threads(
    action: Launch, servers: list[ServerRecord], training_threads: int | None, threads: int | None
) -> None:
    [planned] = with_threads([action], servers, Cores(8, training_threads))
    assert isinstance(planned, Launch)
    assert planned.threads == threads


def test_engines_that_are_launched_together_share_the_cores_and_other_actions_are_not_changed() -> None:
    engines: list[EngineRecord] = [record(id=f"engine-{name}") for name in "abc"]
    actions: list[Action] = [*(Launch(engine, None) for engine in engines), Transition(record(), EngineState.STOPPED)]
    *launches, other = with_threads(actions, [], Cores(8))
    assert [action.threads for action in launches if isinstance(action, Launch)] == [3, 3, 2]
    assert other == actions[-1]
