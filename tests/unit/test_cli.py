import time
import typing
from collections.abc import Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from engine_views import engine_view, training_progress
from rich.console import Console

from sage.cli.commands.apps import dataset, engine, route
from sage.cli.listing import Selection, select
from sage.cli.render import bar, device_table, ending, engine_lines, engine_table, event_line, size
from sage.cli.starting import start_engine, start_time
from sage.cli.training_options import MODULE_FIELDS, OPTIONS, PATH_FIELDS, with_training_options
from sage.cli.waiting import failure
from sage.common import errors
from sage.common.errors import ConfigError
from sage.common.progress_bar import duration
from sage.common.training import FIGURES
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.data.preferences import Method
from sage.llm.client.types import (
    SUPPORTED_ENGINE_KINDS,
    Device,
    DeviceEngine,
    EngineEvent,
    EnginePage,
    EngineState,
    EngineView,
    OnBusy,
    RestartPolicy,
    RouteView,
)


def test_the_options_of_the_command_line_match_the_fields_of_a_run() -> None:
    fields = FinetuneConfig.model_fields
    assert {option.field for option in OPTIONS} == set(fields) - {"base_model"}
    for option in OPTIONS:
        if not fields[option.field].is_required():
            assert option.default == fields[option.field].default, option.field
    assert set(PATH_FIELDS) <= set(fields)
    assert [kind.value for kind in engine.Kind] == SUPPORTED_ENGINE_KINDS
    assert [state.value for state in engine.State] == [state.value for state in EngineState]
    assert [policy.value for policy in engine.Policy] == [policy.value for policy in RestartPolicy]
    assert [busy.value for busy in engine.Busy] == [busy.value for busy in OnBusy]
    assert [method.value for method in dataset.Method] == list(typing.get_args(Method))


def test_module_names_become_a_list_with_or_without_spaces_and_patterns_are_unchanged() -> None:
    given: dict[str, Any] = {}
    command = with_training_options(lambda **training: given.update(training))
    command(target_modules="q_proj, v_proj", exclude_modules="lm_head", modules_to_save="norm,embed_tokens")
    assert [given[name] for name in MODULE_FIELDS] == [["q_proj", "v_proj"], ["lm_head"], ["norm", "embed_tokens"]]
    for name in ("all-linear", r".*layers\.0\..*_proj"):
        command(target_modules=name)
        assert given["target_modules"] == name


def shown(*engines: EngineView) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(engine_table(engines))
    return capture.get()


def test_the_list_shows_state_progress_loss_and_eta() -> None:
    text = shown(engine_view(training=training_progress(loss=1.23456, eta_seconds=90.0), memory_bytes=1_500_000_000))
    for word in ("engine-a", "finetune", "running", "█████░░░░░  50%", "1.2346", "1m30s", "1.5GB"):
        assert word in text
    assert "estimating" in shown(engine_view(training=training_progress()))
    assert "48547" in shown(engine_view(kind="llm", port=48547))
    assert "/models/[/b]" in shown(engine_view(name="/models/[/b]"))  # shown as text, not interpreted as markup


def test_the_status_shows_the_reason_and_the_next_step() -> None:
    reason = {"code": "c", "message": "It died.", "hint": "Resume it."}
    lines = "\n".join(engine_lines(engine_view(state="failed", reason=reason, training=training_progress(warnings=["cut"]))))
    assert "It died. Resume it." in lines
    assert "warning            cut" in lines


def test_the_final_message_names_the_result_and_the_checkpoint() -> None:
    training = training_progress(checkpoint_step=5, heldout_loss_before=3.0, heldout_loss=1.0)
    assert ending(engine_view(state="stopped", training=training)) == (
        "engine-a is stopped at step 5 of 10: result in /out, checkpoint /run/checkpoint-5. Held-out loss 3.0000 → 1.0000."
    )
    assert ending(engine_view(state="stopped", kind="llm")) == "engine-a is stopped."


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (59.4, "59s"), (61, "1m01s"), (3600, "1h00m"), (90000, "1d01h")])
def test_durations_are_formatted_with_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_shares_are_formatted_with_units() -> None:
    assert [size(n) for n in (5, 5_000, 5_000_000, 5_000_000_000)] == ["5B", "5KB", "5MB", "5.0GB"]
    assert bar(0) == "░░░░░░░░░░   0%"
    assert bar(1) == "██████████ 100%"


@pytest.mark.parametrize("hint", ["", "The engine's log: `sage llm engine logs engine-a`."])
def test_a_failure_names_its_log_once(hint: str) -> None:
    told = failure(engine_view(state="failed", reason={"code": "engine_died", "message": "It died.", "hint": hint})).hint
    assert told == "The engine's log: `sage llm engine logs engine-a`."


@pytest.mark.parametrize("name", PATH_FIELDS)
def test_an_empty_path_does_not_mean_the_working_directory(name: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"{name} is empty"):
        with_training_options(lambda **_: None)(**{name: ""})


def test_every_figure_of_a_step_is_shown() -> None:
    lines = engine_lines(
        engine_view(training=training_progress(**{figure.name: 0.5 for figure in FIGURES if figure.unit != "bytes"}))
    )
    for figure in FIGURES:
        assert figure.unit == "bytes" or f"{figure.title.lower():<18} {figure.text(0.5)}" in lines


@pytest.mark.parametrize(("code", "exit_code"), [("config_invalid", 2), ("dataset_invalid", 1), ("worker_died", 1)])
def test_a_failed_engine_exits_with_the_code_of_its_error(code: str, exit_code: int) -> None:
    error = failure(engine_view(state="failed", reason={"code": code, "message": "No.", "hint": "Fix it."}))
    assert (error.code, error.exit_code) == (code, exit_code)
    assert error.hint.startswith("Fix it.")


def test_an_event_other_than_a_transition_is_shown_with_its_kind() -> None:
    fields = {"id": 1, "engine_id": "engine-a", "at": "2026-01-01T00:00:00Z", "actor": "user", "reason": ""}
    created = EngineEvent.model_validate({**fields, "kind": "created", "before": None, "after": "validating"})
    desired = EngineEvent.model_validate({**fields, "kind": "desired", "before": None, "after": None})
    assert "· → validating" in event_line(created)
    assert "desired" in event_line(desired)


def test_devices_are_shown_with_their_memory_and_the_engines_that_use_it() -> None:
    memory = {"memory_total_bytes": 2_000_000_000, "memory_used_bytes": 5_000_000}
    engines = [
        DeviceEngine(id="engine-a", name="[a]", memory_bytes=3_000_000, reserved_bytes=4_000_000),
        DeviceEngine(id="engine-b", name="b", memory_bytes=0),
    ]
    devices = [
        Device(node="n", kind="cuda", index=1, name="fake 2 GB", is_fake=True, temperature_celsius=41.0, **memory),
        Device(node="n", kind="cpu", index=0, name="X", memory_usable_bytes=10**9, engines=engines,
               utilization_percent=7.0, **memory),
    ]  # fmt: skip
    console = Console(width=200)
    with console.capture() as capture:
        console.print(device_table(devices))
    header, *rows = [line.split() for line in capture.get().splitlines()]
    assert header == ["DEVICE", "NAME", "USED", "TOTAL", "USABLE", "LOAD", "TEMP", "ENGINE", "MODEL", "MEMORY", "RESERVED"]
    assert rows == [
        ["cuda:1", "fake", "2", "GB", "5MB", "2.0GB", "41°C"],
        ["cpu", "X", "5MB", "2.0GB", "1.0GB", "7%", "engine-a", "[a]", "3MB", "4MB"],
        ["engine-b", "b", "0B"],
    ]


class Pages:
    """A client with four engines, of which two are settled."""

    engines = tuple(
        engine_view(id=f"engine-{i}", state=state, created_at=f"2026-01-0{i + 1}T00:00:00Z")
        for i, state in enumerate(("completed", "running", "failed", "queued"))
    )

    def list_engines(self, *, states: Any = (), kinds: Any = ()) -> list[EngineView]:
        return [e for e in self.engines if not states or e.state in states]

    def page_engines(self, *, limit: int, states: Any, kinds: Any, order: str) -> EnginePage:
        assert order == "desc"
        found = self.list_engines(states=states)[::-1]
        return EnginePage(data=found[:limit], first_id=None, last_id=None, has_more=len(found) > limit)


@pytest.mark.parametrize(
    ("selection", "ids", "has_more"),
    [
        (Selection(), "0123", False),
        (Selection(settled_limit=1), "123", True),
        (Selection(settled_limit=0), "13", True),
        (Selection(settled_limit=None), "0123", False),
        (Selection(states=("running", "completed")), "01", False),
        (Selection(states=("queued",)), "3", False),
    ],
)
def test_the_list_has_all_active_engines_and_the_newest_settled_ones(selection: Selection, ids: str, has_more: bool) -> None:
    client: Any = Pages()
    engines, more = select(client, selection)
    assert ("".join(e.id.removeprefix("engine-") for e in engines), more) == (ids, has_more)


def test_metadata_must_be_given_as_key_value_pairs() -> None:
    assert engine._note("a=b=c") == ("a", "b=c")
    with pytest.raises(errors.ConfigError, match="KEY=VALUE"):
        engine._note("a")


def test_a_route_is_set_with_weights_and_listed_with_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    view = RouteView.model_validate({
        "name": "prod", "fallback": "base", "updated_at": "2026-01-01T00:00:00Z",
        "engines": [
            {"engine": "new", "weight": 1, "engine_id": "engine-a", "state": "running"},
            {"engine": "old", "weight": 3},
        ],
    })  # fmt: skip
    client = SimpleNamespace(set_route=lambda *given: calls.append(given) or view, list_routes=lambda: [view])
    monkeypatch.setattr("sage.cli.daemon.connect", lambda: client)
    route.set_("prod", ["new=10", "a/b=90"], "base")
    route.set_("prod", ["new"], None)
    assert calls == [("prod", {"new": 10, "a/b": 90}, "base"), ("prod", {"new": 1}, None)]
    printed = capsys.readouterr()
    assert "no active engine has the id, name or model 'old'" in printed.err
    assert printed.out == "Requests for 'prod' are sent to: new, old.\n" * 2
    route.set_("prod", ["new"], None, json_=True)
    assert RouteView.model_validate_json(capsys.readouterr().out) == view
    for wrong in (["new=ten"], ["=10"], ["new=-1"], ["new", "new=2"], ["new=" + "9" * 5000]):
        with pytest.raises(errors.ConfigError):
            route.set_("prod", wrong, None)
    route.list_()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["prod", "new", "engine-a", "running", "25%"], ["prod", "old", "-", "-", "75%"], ["prod", "base", "fallback"],
    ]  # fmt: skip


def test_a_training_option_for_an_engine_that_serves_is_rejected_by_its_flag() -> None:
    with pytest.raises(errors.ConfigError, match="--use-8bit is an option of training runs") as caught:
        start_engine("model", "llm", {"use_8bit": False})
    assert "--engine-kind finetune" in caught.value.hint


NOON = datetime.fromisoformat("2030-05-01T12:00:00+02:00")


@pytest.fixture
def _berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22:00", "2030-05-01T22:00:00+02:00"),
        ("09:30", "2030-05-02T09:30:00+02:00"),
        ("12:00", "2030-05-02T12:00:00+02:00"),
        ("2031-01-31T06:00", "2031-01-31T06:00:00+01:00"),
        ("2031-01-31 06:00+00:00", "2031-01-31T06:00:00+00:00"),
    ],
)
@pytest.mark.usefixtures("_berlin")
def test_a_start_time_is_a_time_of_day_or_a_date_with_a_time(text: str, expected: str) -> None:
    assert start_time(text, NOON).isoformat() == expected


@pytest.mark.usefixtures("_berlin")
def test_a_time_of_day_after_the_end_of_summer_time_is_in_winter_time() -> None:
    assert (
        start_time("22:00", datetime.fromisoformat("2026-10-24T23:00:00+02:00")).isoformat() == "2026-10-25T22:00:00+01:00"
    )


@pytest.mark.parametrize("text", ["tonight", "25:00", "", "2030-13-01T00:00"])
def test_a_wrong_start_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a time"):
        start_time(text, NOON)
