"""`sage llm engine prune`: which engines are deleted, and which are kept."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from engine_views import engine_view

from sage.cli.pruning import prune, selected
from sage.common.errors import Conflict, NotFound, SageError
from sage.llm.client.types import EngineView


def ended(days_ago: float, **values: Any) -> EngineView:
    at = datetime.now(UTC) - timedelta(days=days_ago)
    return engine_view(**{"id": f"engine-{days_ago}", "state": "completed", "state_at": at, **values})


class Client:
    """Records the ids of removed engines. `errors` contains, for some ids, the error that a removal raises."""

    def __init__(self, *engines: EngineView, errors: dict[str, SageError] | None = None) -> None:
        self.engines, self.errors, self.removed = engines, errors or {}, list[str]()

    def list_engines(self, *, states: Any) -> list[EngineView]:
        return [engine for engine in self.engines if engine.state in states]

    def remove_engine(self, engine_id: str) -> None:
        if error := self.errors.get(engine_id):
            raise error
        self.removed.append(engine_id)


def pruned(client: Client, days: float = 30, *, unfinished: bool = False, dry_run: bool = False) -> list[Any]:
    return prune(client, older_than_days=days, unfinished=unfinished, dry_run=dry_run)  # type: ignore[arg-type]


def test_only_engines_that_ended_long_ago_are_selected() -> None:
    engines = [ended(31), ended(29)]
    assert selected(engines, 30, unfinished=False) == engines[:1]
    assert selected(engines, 0, unfinished=False) == engines


@pytest.mark.parametrize(
    ("values", "is_kept"),
    [
        ({"state": "stopped"}, True),
        ({"state": "failed"}, True),
        ({"state": "completed"}, False),
        ({"state": "failed", "kind": "llm"}, False),
    ],
)
def test_a_run_that_can_be_resumed_is_kept_unless_unfinished_runs_are_selected(
    values: dict[str, str], is_kept: bool
) -> None:
    engine = ended(40, **values)
    assert (selected([engine], 30, unfinished=False) == []) is is_kept
    assert selected([engine], 30, unfinished=True) == [engine]


def test_active_engines_are_never_removed() -> None:
    client = Client(ended(40, state="running"), ended(40))
    assert len(pruned(client, 0)) == len(client.removed) == 1


def test_a_dry_run_reports_the_size_and_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1000))
    client = Client(ended(40, run_dir=str(tmp_path)))
    [removal] = pruned(client, dry_run=True)
    assert (removal.freed_bytes, client.removed) == (1000, [])


def test_an_engine_that_is_needed_is_kept_with_the_reason_and_the_others_are_removed() -> None:
    busy = Conflict(code="still_running", message="engine-42 has a checkpoint that engine-b serves.")
    gone = NotFound(code="engine_not_found", message="No engine 'engine-41'.")
    client = Client(ended(42), ended(41), ended(40), errors={"engine-42": busy, "engine-41": gone})
    removals = pruned(client)
    assert [(each.engine.id, each.kept_because) for each in removals] == [("engine-42", busy.message), ("engine-40", "")]
    assert client.removed == ["engine-40"]
