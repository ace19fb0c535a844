import json
import typing
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from rich.console import Console

from sage.cli.commands.apps import dataset
from sage.cli.commands.apps.engine import Kind, ending
from sage.cli.render import bar, engine_lines, engine_table, size
from sage.cli.training_options import MODULE_FIELDS, OPTIONS, PATH_FIELDS, with_training_options
from sage.cli.waiting import failure
from sage.common import errors
from sage.common.progress_bar import duration
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.data.preferences import Method
from sage.llm.client import AsyncSageClient, SageClient, calls
from sage.llm.client.types import SUPPORTED_ENGINE_KINDS, EngineView, TrainingProgress


def test_the_options_of_the_command_line_are_those_of_a_run() -> None:
    fields = FinetuneConfig.model_fields
    assert {option.field for option in OPTIONS} == set(fields) - {"base_model"}
    for option in OPTIONS:
        if not fields[option.field].is_required():
            assert option.default == fields[option.field].default, option.field
    assert set(PATH_FIELDS) <= set(fields)
    assert [kind.value for kind in Kind] == SUPPORTED_ENGINE_KINDS
    assert [method.value for method in dataset.Method] == list(typing.get_args(Method))


def test_names_of_modules_are_a_list_with_or_without_spaces_and_patterns_stay() -> None:
    given: dict[str, Any] = {}
    command = with_training_options(lambda **training: given.update(training))
    command(target_modules="q_proj, v_proj", exclude_modules="lm_head", modules_to_save="norm,embed_tokens")
    assert [given[name] for name in MODULE_FIELDS] == [["q_proj", "v_proj"], ["lm_head"], ["norm", "embed_tokens"]]
    for name in ("all-linear", r".*layers\.0\..*_proj"):
        command(target_modules=name)
        assert given["target_modules"] == name


def view(**values: Any) -> EngineView:
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "id": "engine-a",
        "kind": "finetune",
        "model": "m",
        "name": "m",
        "state": "running",
        "created_at": now,
        "state_at": now,
        "log_path": "/log",
        "output_dir": "/out",
        "run_dir": "/run",
    }
    return EngineView(**{**fields, **values})  # fmt: skip


def progress(**values: Any) -> TrainingProgress:
    fields = dict.fromkeys(TrainingProgress.model_fields)
    return TrainingProgress(**{**fields, "step": 5, "total_steps": 10, "progress": 0.5, "warnings": [], **values})


def shown(*engines: EngineView) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(engine_table(engines))
    return capture.get()


def test_the_listing_shows_state_progress_loss_and_eta() -> None:
    text = shown(view(training=progress(loss=1.23456, eta_seconds=90.0), memory_bytes=1_500_000_000))
    for word in ("engine-a", "finetune", "running", "█████░░░░░  50%", "1.2346", "1m30s", "1.5GB"):
        assert word in text
    assert "estimating" in shown(view(training=progress()))
    assert "48547" in shown(view(kind="llm", port=48547))
    assert "/models/[/b]" in shown(view(name="/models/[/b]"))  # text, and no markup


def test_the_status_tells_the_reason_and_the_next_step() -> None:
    reason = {"code": "c", "message": "It died.", "hint": "Resume it."}
    lines = "\n".join(engine_lines(view(state="failed", reason=reason, training=progress(warnings=["cut"]))))
    assert "It died. Resume it." in lines
    assert "warning            cut" in lines


def test_an_ending_says_where_everything_is() -> None:
    training = progress(checkpoint_step=5, heldout_loss_before=3.0, heldout_loss=1.0)
    assert ending(view(state="stopped", training=training)) == (
        "engine-a is stopped at step 5 of 10: result in /out, checkpoint /run/checkpoint-5. Held-out loss 3.0000 → 1.0000."
    )
    assert ending(view(state="stopped", kind="llm")) == "engine-a is stopped."


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (59.4, "59s"), (61, "1m01s"), (3600, "1h00m"), (90000, "1d01h")])
def test_times_are_said_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_shares_are_said_as_people_do() -> None:
    assert [size(n) for n in (5, 5_000, 5_000_000, 5_000_000_000)] == ["5B", "5KB", "5MB", "5.0GB"]
    assert bar(0) == "░░░░░░░░░░   0%"
    assert bar(1) == "██████████ 100%"


@pytest.mark.parametrize(
    ("status", "code", "kind", "exit_code"),
    [
        (400, "dataset_invalid", errors.ModelError, 1), (400, "config_invalid", errors.ConfigError, 2),
        (401, "invalid_api_key", errors.Unauthorized, 1), (404, "engine_not_found", errors.NotFound, 1),
        (409, "not_resumable", errors.Conflict, 1), (503, "engine_starting", errors.Overloaded, 1),
        (500, "internal_error", errors.SageError, 1),
    ],
)  # fmt: skip
def test_an_error_over_the_wire_is_the_same_error_here(status: int, code: str, kind: type, exit_code: int) -> None:
    body = {"error": {"message": "What. Do.", "type": "t", "param": None, "code": code}}
    with pytest.raises(kind) as caught:
        calls.raise_for_error(httpx.Response(status, content=json.dumps(body)))
    assert isinstance(caught.value, errors.SageError)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)


def test_an_answer_that_is_no_gateway_s_is_an_error_too() -> None:
    with pytest.raises(errors.SageError, match="answered 500"):
        calls.raise_for_error(httpx.Response(500, content="<html>"))


def test_both_clients_have_the_same_methods() -> None:
    def methods(client: type) -> set[str]:
        return {name for name in vars(client) if not name.startswith("_")}

    assert methods(AsyncSageClient) == methods(SageClient)
    for name in methods(AsyncSageClient):
        assert (
            typing.get_type_hints(getattr(AsyncSageClient, name)).keys()
            <= typing.get_type_hints(getattr(SageClient, name)).keys()
        )


@pytest.mark.parametrize("engine_id", ["", "..", "../models", "engine-a/remove", "engine-a?force=true", "engine-a#"])
def test_what_is_no_id_reaches_no_other_route(engine_id: str) -> None:
    for call in (calls.get, calls.resume, calls.remove):
        with pytest.raises(errors.NotFound, match="No engine"):
            call(engine_id)
    assert calls.get("engine-a").path == "/v1/management/engines/engine-a"


@pytest.mark.parametrize("hint", ["", "Its log: `sage llm engine logs engine-a`."])
def test_a_failure_names_its_log_once(hint: str) -> None:
    told = failure(view(state="failed", reason={"code": "engine_died", "message": "It died.", "hint": hint})).hint
    assert told == "Its log: `sage llm engine logs engine-a`."


@pytest.mark.parametrize("name", PATH_FIELDS)
def test_an_empty_path_is_not_the_working_folder(name: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"{name} is empty"):
        with_training_options(lambda **_: None)(**{name: ""})
