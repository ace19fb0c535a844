import asyncio
import threading
from pathlib import Path

import pytest
from engines import record

from sage.common.processes import ProcessSpec
from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers import local
from sage.llm.control_plane.states import TRANSITIONS, IllegalTransition, check_transition
from sage.llm.control_plane.watch import Watch

S = EngineState
LIVES = Observed(alive=True)


def test_every_state_has_a_row_and_only_completed_is_final() -> None:
    assert set(TRANSITIONS) == set(EngineState)
    for state, after in TRANSITIONS.items():
        assert after or state is S.COMPLETED
    with pytest.raises(IllegalTransition):
        check_transition(S.COMPLETED, S.RUNNING)


def test_the_time_in_which_the_control_plane_itself_was_suspended_does_not_count() -> None:
    engine, watch = record(S.STARTING), Watch(S.STARTING, 100.0)
    for now_seconds in (101.0, 161.0, 162.0):  # suspended for a minute between the first two observations
        watch.look(engine, LIVES, now_seconds, 5)
    assert (watch.state_seconds, watch.silent_seconds) == (7, 0)


def test_silence_is_measured_while_an_engine_is_observed_running_and_ends_with_an_answer() -> None:
    engine, watch = record(S.RUNNING), Watch(S.RUNNING)
    for now_seconds, observed, silent_seconds in (
        (1.0, LIVES, 1),
        (2.0, LIVES, 2),
        (3.0, None, 2),  # without an observation, the silence neither grows nor ends
        (4.0, Observed(alive=True, ready=True), 0),
        (5.0, LIVES, 1),
    ):
        watch.look(engine, observed, now_seconds, 5)
        assert watch.silent_seconds == silent_seconds
    watch.look(record(S.STOPPING), LIVES, 6.0, 5)
    assert (watch.state, watch.state_seconds, watch.silent_seconds) == (S.STOPPING, 0, 0)
    run, watch = record(S.RUNNING, kind=EngineKind.FINETUNE), Watch(S.RUNNING)
    watch.look(run, LIVES, 1.0, 5)
    assert watch.silent_seconds == 0  # a run has no health check


def test_a_launch_that_hangs_delays_no_other_process_and_is_not_begun_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[ProcessSpec] = []
    release = threading.Event()

    def hangs(spec: ProcessSpec) -> str:
        begun.append(spec)
        release.wait(60)
        return "127.0.0.1:1"

    monkeypatch.setattr(local, "_launch", hangs)
    monkeypatch.setattr(local, "_LAUNCH_SECONDS", 0.05)
    spec = ProcessSpec((), tmp_path / "process.lock", tmp_path / "engine.log")

    async def test() -> None:
        launcher = local.LocalLauncher()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await launcher.launch(spec)
        assert not (await launcher.observe([str(spec.lock_path)]))[str(spec.lock_path)].alive
        release.set()
        monkeypatch.setattr(local, "_LAUNCH_SECONDS", 60)
        assert await launcher.launch(spec) == "127.0.0.1:1"

    asyncio.run(test())
    assert begun[0] == spec
    assert len(begun) <= 2  # there is a second launch if the first launch has ended before the last call
