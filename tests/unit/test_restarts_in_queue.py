"""The memory of an engine that waits before its restart."""

from datetime import UTC, datetime

from engines import record

from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.actions import Action, Launch
from sage.llm.control_plane.admission import DeviceMemory
from sage.llm.control_plane.plan import Limits, Snapshot, plan
from sage.llm.control_plane.queueing import Memory
from sage.llm.control_plane.watch import Watch

QUEUED, GB = EngineState.QUEUED, 10**9
#: The model was killed and waits for its restart. The run has waited longer. The memory suffices for only one of the two.
MODEL = record(QUEUED, id="engine-model", reserved_bytes=8 * GB, dedicated=True, restarts=1, last_event=9)
RUN = record(
    QUEUED, id="engine-run", kind=EngineKind.FINETUNE, backend="trainer", reserved_bytes=6 * GB, dedicated=True, last_event=1
)


def next_actions(queued_seconds: float) -> list[Action]:
    memory = Memory([DeviceMemory("cpu", 10 * GB)], datetime(2030, 1, 1, tzinfo=UTC))
    watches = {each.id: Watch(QUEUED, state_seconds=queued_seconds) for each in (MODEL, RUN)}
    return plan(Snapshot([MODEL, RUN], {}, {}, watches, {}, Limits(300, 20), memory))


def test_no_other_engine_gets_the_memory_of_an_engine_that_waits_before_its_restart() -> None:
    assert next_actions(queued_seconds=0) == []
    assert [(type(action), action.engine.id) for action in next_actions(queued_seconds=2)] == [(Launch, MODEL.id)]
