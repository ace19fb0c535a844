from pathlib import Path

import pytest
from support import ROOT

from sage.common.errors import ConfigError
from sage.libs.finetune.data.linting import check_dataset
from sage.libs.finetune.data.preferences import parser_of
from sage.libs.finetune.data.values import RecordError
from sage.libs.finetune.rewards import check_reward_file, load_reward

CHAT = [{"role": "user", "content": "a"}]


def test_the_examples_are_what_they_say() -> None:
    report = check_dataset(ROOT / "examples/data/sample_preferences.jsonl", parse=parser_of("dpo"))
    assert report.sample_count
    assert not report.faults
    check_reward_file(ROOT / "examples/reward.py")
    reward = load_reward(ROOT / "examples/reward.py")
    answers = [[{"role": "assistant", "content": content}] for content in ("yes", "a long answer", "a")]
    assert reward([CHAT] * 3, answers) == [-0.003, -0.013 - 1, -0.001 - 1]


@pytest.mark.parametrize("label", [True, "true", "True", 1, "1"])
def test_a_verdict_may_come_from_a_csv(label: object) -> None:
    record = {"prompt": '[{"role": "user", "content": "a"}]', "completion": "b", "label": label}
    assert parser_of("kto")(record)[:2] == (
        "verdict", {"prompt": CHAT, "completion": [{"role": "assistant", "content": "b"}], "label": True},
    )  # fmt: skip


def test_columns_of_a_prompt_reach_the_reward_function() -> None:
    assert parser_of("grpo")({"prompt": "a", "answer": 4, "unset": None})[1] == {"prompt": CHAT, "answer": 4}


def test_conversations_that_part_early_are_no_pair() -> None:
    ends = {end: [{"role": "user", "content": end}, {"role": "assistant", "content": "x"}] for end in ("chosen", "rejected")}
    with pytest.raises(RecordError, match="'prompt' is not there"):
        parser_of("dpo")(ends)


def test_a_reward_file_must_define_reward(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_reward_file(tmp_path / "none.py")
