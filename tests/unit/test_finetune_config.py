import dataclasses
import inspect
from pathlib import Path

import pytest

from sage.common.errors import ConfigError
from sage.common.validation import validated
from sage.libs.finetune.config import FinetuneConfig, load_config
from sage.llm.control_plane.executors.finetune_executor import FinetuneEngine, FinetuneEngineConfig

NEEDED = {"base_model": "m", "dataset_path": "/d.jsonl", "output_dir": "/o"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lora_rank", 0), ("learning_rate", -1), ("lora_dropout", 1.0), ("batch_size", 0), ("num_epochs", 0),
        ("max_seq_length", 1), ("precision", "fp8"), ("eval_split", 0.9), ("seed", -1), ("save_steps", 0), ("lora_rnak", 8),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_value_names_the_option(option: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(FinetuneConfig, {**NEEDED, option: value})
    assert caught.value.exit_code == 2
    assert caught.value.param == option
    assert option in caught.value.message


def test_the_error_names_the_first_missing_option_and_counts_the_others() -> None:
    with pytest.raises(ConfigError, match="base_model: is required") as caught:
        validated(FinetuneConfig, {})
    assert "2 more errors: dataset_path, output_dir" in caught.value.hint


def test_only_one_source_of_held_out_samples_is_allowed() -> None:
    with pytest.raises(ConfigError, match="not both"):
        validated(FinetuneConfig, {**NEEDED, "eval_path": "/e.jsonl", "eval_split": 0.1})
    with pytest.raises(ConfigError, match="need held-out samples"):
        validated(FinetuneConfig, {**NEEDED, "eval_steps": 5})
    with pytest.raises(ConfigError, match="keep_best need eval_steps"):
        validated(FinetuneConfig, {**NEEDED, "eval_path": "/e.jsonl", "keep_best": True})


def test_paths_become_absolute() -> None:
    config = validated(FinetuneConfig, {**NEEDED, "dataset_path": "d.jsonl"})
    assert config.dataset_path == str(Path("d.jsonl").absolute())


def test_a_run_file_is_read_and_its_errors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\ndataset_path: d.jsonl\noutput_dir: out\nlora_rank: 4\n")
    assert load_config(path).lora_rank == 4
    path.write_text("base_model: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    path.write_text("- a list")
    with pytest.raises(ConfigError, match="a mapping"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_the_fields_and_defaults_of_the_engine_config_are_fixed() -> None:
    expected = {
        "base_model": None, "dataset_path": None, "output_dir": None, "lora_rank": 8, "lora_alpha": 16,
        "learning_rate": 1e-4, "num_epochs": 3, "batch_size": 4, "max_seq_length": 512, "use_8bit": True,
        "resume_from_checkpoint": None,
    }  # fmt: skip
    fields = {
        f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(FinetuneEngineConfig)
    }
    assert fields == expected
    for name, default in expected.items():
        if default is not None:
            assert FinetuneConfig.model_fields[name].default == default
    assert FinetuneEngine.engine_kind == "finetune"
    for method in ("start", "stop", "get_status", "get_logs"):
        assert inspect.iscoroutinefunction(getattr(FinetuneEngine, method))
    assert inspect.signature(FinetuneEngine.get_logs).parameters["tail"].default == 100


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"finetuning_type": "full", "use_dora": True}, "omit use_dora"),
        ({"method": "dpo", "pack_tokens": 800}, "method dpo does not accept pack_tokens"),
        ({"method": "dpo", "dataset_path": "a.jsonl=2"}, "dataset weights"),
        ({"method": "grpo"}, "reward_file is required for method grpo"),
        ({"reward_file": "r.py"}, "not accepted for other methods"),
        ({"method": "grpo", "reward_file": "r.py", "num_generations": 3}, "a multiple of num_generations"),
        ({"dataset_path": ["a.jsonl=0"]}, "a weight must be a number above 0"),
        ({"dataset_path": []}, "dataset_path"),
    ],
)
def test_options_that_exclude_each_other_are_named(options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        validated(FinetuneConfig, {**NEEDED, **options})


def test_datasets_may_have_weights() -> None:
    config = validated(FinetuneConfig, {**NEEDED, "dataset_path": ["/a.jsonl", "b.jsonl=0.5"]})
    assert [(source.path, source.weight) for source in config.sources] == [
        (Path("/a.jsonl"), 1), (Path("b.jsonl").absolute(), 0.5),
    ]  # fmt: skip
    assert FinetuneConfig.model_validate(config.model_dump(mode="json")) == config
