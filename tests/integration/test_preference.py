"""Training on preferences and rewards with the methods of TRL."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import write_jsonl
from training import TinyRun

from sage.common.errors import ConfigError, Conflict, DatasetError
from sage.common.training import WarningEvent

REWARD = "def reward(prompts, completions, wanted, **_):\n    return [c.count(w) for c, w in zip(completions, wanted)]\n"
QUESTIONS = [f"Is {number} a number?" for number in range(16)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"prompt": question, "chosen": "Yes, it is.", "rejected": "No."} for question in QUESTIONS],
    "kto": [{"prompt": q, "completion": ["No.", "Yes."][n % 2], "label": bool(n % 2)} for n, q in enumerate(QUESTIONS)],
    "grpo": [{"prompt": question, "wanted": "e"} for question in QUESTIONS],
}
ROWS["orpo"] = ROWS["dpo"]


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Return the options of a run for each method, and allow reward files."""
    monkeypatch.setenv("SAGE_ALLOW_REWARD_FILES", "true")
    (tmp_path / "reward.py").write_text(REWARD)
    more = {"grpo": {"reward_file": str(tmp_path / "reward.py"), "max_completion_length": 8}}
    return {
        method: {
            "dataset_path": str(write_jsonl(tmp_path / f"{method}.jsonl", rows)),
            "method": method,
            **more.get(method, {}),
        }
        for method, rows in ROWS.items()
    }


@pytest.mark.parametrize("method", ["dpo", pytest.param("grpo", marks=pytest.mark.long)])
def test_a_resumed_run_gives_the_same_result_as_an_uninterrupted_run(
    tiny_model: Path, tmp_path: Path, options: dict[str, dict[str, Any]], method: str
) -> None:
    steps = {"max_steps": 8, "save_steps": 100}
    whole = TinyRun(tiny_model, tmp_path / "whole", **options[method], **steps).trained()
    cut = TinyRun(tiny_model, tmp_path / "cut", **options[method], **steps).stopped_at(2)
    assert 2 <= cut.status.step < 8
    assert load_file(cut.output / "adapter_model.safetensors")
    assert cut.resumed().losses() == whole.losses()
    assert cut.adapter_bytes() == whole.adapter_bytes()
    figures = [event["reward" if method == "grpo" else "reward_accuracy"] for event in whole.events("step")]
    assert all(figure is not None for figure in figures)
    if method == "dpo":
        assert whole.losses()[8] < whole.losses()[1]
        assert figures[-1] == 1


@pytest.mark.parametrize("method", ["orpo", "kto"])
def test_orpo_and_kto_reduce_the_loss(
    tiny_model: Path, tmp_path: Path, options: dict[str, dict[str, Any]], method: str
) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", **options[method], max_steps=4).trained()
    losses = run.losses()
    assert len(losses) == run.status.total_steps == 4
    assert losses[4] < losses[1]
    assert any(
        weight.any() for name, weight in load_file(run.output / "adapter_model.safetensors").items() if "lora_B" in name
    )


def test_dpo_continues_the_training_of_an_sft_adapter(
    tiny_model: Path, tmp_path: Path, options: dict[str, dict[str, Any]]
) -> None:
    first = TinyRun(tiny_model, tmp_path / "first", max_steps=2).trained()
    second = TinyRun(first.output, tmp_path / "second", **options["dpo"], max_steps=3).trained()
    assert second.losses()[1] == pytest.approx(
        0.6931, abs=1e-3
    )  # ln 2, because the reference model is the adapter that is trained
    config = json.loads((second.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert not (second.output / "ref").exists()


@pytest.mark.parametrize(
    ("method", "record", "told"),
    [
        ("dpo", {"prompt": "a", "chosen": "b"}, "missing: rejected"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal"),
        ("dpo", {"chosen": "b", "rejected": "c"}, "'prompt' is missing"),
        ("orpo", {"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
        ("kto", {"prompt": "a", "completion": "b", "label": "perhaps"}, "must be true or false"),
        ("dpo", {"messages": []}, "dpo needs the fields chosen, rejected"),
        ("kto", {}, "kto needs the fields"),
        ("kto", [], "a JSON object is expected"),
    ],
)
def test_an_invalid_record_is_reported_before_the_run_starts(
    tiny_model: Path, tmp_path: Path, method: str, record: Any, told: str
) -> None:
    data = write_jsonl(tmp_path / "bad.jsonl", [ROWS[method][0], record])
    with pytest.raises(DatasetError, match=f"bad.jsonl:2: .*{told}"):
        TinyRun(tiny_model, tmp_path / "out", method=method, dataset_path=str(data))


def test_chosen_and_rejected_may_be_whole_conversations(tiny_model: Path, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Is 1 a number?"}]
    record = {end: [*asked, {"role": "assistant", "content": end}] for end in ("chosen", "rejected")}
    data = write_jsonl(tmp_path / "pairs.jsonl", [record] * 4)
    assert TinyRun(tiny_model, tmp_path / "out", method="dpo", dataset_path=str(data)).path.is_dir()


def test_tool_calls_in_a_table_keep_their_own_arguments() -> None:
    from sage.libs.finetune.training.preference import table_of

    def spoken(**message: Any) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "", **message}]}

    calls = [[{"function": {"name": name, "arguments": {name: 1}}}] for name in "fg"]
    rows = [spoken(tool_calls=calls[0]), spoken(tool_calls=calls[1]), spoken(reasoning_content="r")]
    assert list(table_of(rows)) == rows


def test_reward_files_are_checked_and_rejected_unless_they_are_allowed(
    tiny_model: Path, tmp_path: Path, options: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = tmp_path / "reward.py"
    for content, told in (("def other(): ...", "defines no function `reward`"), ("def reward(:", "is not valid Python")):
        reward.write_text(content)
        with pytest.raises(ConfigError, match=told):
            TinyRun(tiny_model, tmp_path / "out", **options["grpo"])
    reward.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        TinyRun(tiny_model, tmp_path / "out", **options["grpo"])
    reward.write_text("def reward(prompts, completions, **_):\n    return [1.0]\n")
    status = TinyRun(tiny_model, tmp_path / "out", **options["grpo"]).start().until_ended()
    assert "returned 1 numbers for 4 completions" in str(status.message)
    run = TinyRun(tiny_model, tmp_path / "out3", **options["grpo"])
    run.manager.check_resumable(run.task_id)
    reward.write_text(reward.read_text() + "# or otherwise\n")
    with pytest.raises(Conflict, match=r"has changed since the run began.*reward\.py"):
        run.manager.check_resumable(run.task_id)
    monkeypatch.delenv("SAGE_ALLOW_REWARD_FILES")
    with pytest.raises(ConfigError, match="Reward files are disabled"):
        TinyRun(tiny_model, tmp_path / "out2", **options["grpo"])


def test_a_run_without_enough_memory_continues_with_half_the_micro_batch(
    tiny_model: Path, tmp_path: Path, options: dict[str, dict[str, Any]]
) -> None:
    out_of_memory = (
        "from pathlib import Path\nused = Path(__file__).with_name('used')\n\ndef reward(prompts, completions, **_):\n"
        "    used.write_text(used.read_text() + 'x' if used.exists() else 'x')\n"
        "    if len(used.read_text()) == 3:\n        raise MemoryError('out of memory')\n"
        "    return [len(text) for text in completions]\n"
    )
    (tmp_path / "reward.py").write_text(out_of_memory)
    run = TinyRun(tiny_model, tmp_path / "out", **options["grpo"], max_steps=4, save_steps=2).start()
    process = run.manager.process(run.task_id)
    run.completed()
    assert run.status.halvings == 1
    assert run.status.warnings[-1].startswith("Out of memory: the micro-batch size is now 2 instead of 4")
    assert [event["step"] for event in run.events("started")] == [0, 2]
    assert [event["step"] for event in run.events("step")] == [1, 2, 3, 4]
    assert process
    assert f"{process.pid}" in str(run.path.joinpath("worker.lock").read_text())


@pytest.mark.parametrize("method", ["dpo", pytest.param("kto", marks=pytest.mark.long)])
def test_smaller_micro_batches_train_the_same_samples_in_each_step(
    tiny_model: Path, tmp_path: Path, options: dict[str, dict[str, Any]], method: str
) -> None:
    common = {**options[method], "max_steps": 3, "batch_size": 4, "lora_dropout": 0.0}
    whole = TinyRun(tiny_model, tmp_path / "whole", **common).trained()
    halved = TinyRun(tiny_model, tmp_path / "halved", **common)
    halved.manager.run_directory(halved.task_id).append_event(WarningEvent(message="m", halvings=1))
    halved.trained()
    assert halved.status.total_steps == 3
    if method == "dpo":  # the loss of kto depends on the other samples of a micro-batch
        assert halved.losses() == pytest.approx(whole.losses(), rel=1e-3)
