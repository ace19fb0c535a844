import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from sage.common.errors import ConfigError
from sage.libs.finetune.data.linting import check_dataset
from sage.libs.finetune.data.preferences import Method, parser_of
from sage.libs.finetune.data.values import RecordError
from sage.libs.finetune.run.rewards import check_reward_file, load_reward

CHAT = [{"role": "user", "content": "a"}]


def test_the_example_dataset_and_reward_file_are_valid() -> None:
    report = check_dataset(ROOT / "examples/data/sample_preferences.jsonl", parse=parser_of("dpo"))
    assert report.sample_count
    assert not report.faults
    check_reward_file(ROOT / "examples/reward.py")
    reward = load_reward(ROOT / "examples/reward.py")
    answers = [[{"role": "assistant", "content": content}] for content in ("yes", "a long answer", "a")]
    assert reward([CHAT] * 3, answers) == [-0.003, -0.013 - 1, -0.001 - 1]


@pytest.mark.parametrize("label", [True, "true", "True", 1, "1"])
def test_a_label_may_be_a_boolean_a_number_or_text(label: object) -> None:
    record = {"prompt": '[{"role": "user", "content": "a"}]', "completion": "b", "label": label}
    assert parser_of("kto")(record)[:2] == (
        "verdict", {"prompt": CHAT, "completion": [{"role": "assistant", "content": "b"}], "label": True},
    )  # fmt: skip


SYSTEM, GOOD, BAD = (
    {"role": role, "content": content} for role, content in (("system", "s"), ("assistant", "g"), ("assistant", "b"))
)
PAIR = {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "a", "chosen": "g", "rejected": "b"}, CHAT),
        ({"prompt": "a", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}, CHAT),
        ({"prompt": CHAT, "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}, CHAT),
        ({"prompt": "a", "chosen": [*CHAT, GOOD], "rejected": "b"}, CHAT),
        ({"prompt": json.dumps(CHAT), "chosen": json.dumps([*CHAT, GOOD]), "rejected": json.dumps([BAD])}, CHAT),
        ({"prompt": "a", "chosen": json.dumps([*CHAT, GOOD]), "rejected": json.dumps([*CHAT, BAD])}, CHAT),
        ({"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}, CHAT),
        ({"chosen": json.dumps([*CHAT, GOOD]), "rejected": json.dumps([*CHAT, BAD])}, CHAT),
        ({"prompt": "a", "chosen": [SYSTEM, *CHAT, GOOD], "rejected": [SYSTEM, *CHAT, BAD]}, [SYSTEM, *CHAT]),
        ({"prompt": [SYSTEM, *CHAT], "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}, [SYSTEM, *CHAT]),
        ({"prompt": CHAT, "chosen": [BAD, *CHAT, GOOD], "rejected": [BAD, *CHAT, BAD]}, [*CHAT, BAD, *CHAT]),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "g"},
          "rejected": {"from": "gpt", "value": "b"}, "system": "s"}, [SYSTEM, *CHAT]),
        ({"messages": CHAT, "chosen": GOOD, "rejected": BAD}, CHAT),
        ({"instruction": "a", "input": "", "chosen": "g", "rejected": "b"}, CHAT),
        ({"prompt": "a", "system": "s", "chosen": "g", "rejected": "b"}, [SYSTEM, *CHAT]),
        ({"prompt": "a", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD], "messages": [*CHAT, GOOD]}, CHAT),
    ],
)  # fmt: skip
def test_a_pair_contains_its_prompt_once(record: dict[str, Any], prompt: list[Any]) -> None:
    parsed = parser_of("dpo")(record)
    assert parsed.content == {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]}
    assert not parsed.ignored


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "a", "completion": "g"}, CHAT),
        ({"prompt": "a", "completion": [*CHAT, GOOD]}, CHAT),
        ({"prompt": CHAT, "completion": [GOOD, *CHAT, GOOD]}, [*CHAT, GOOD, *CHAT]),
        ({"messages": [*CHAT, BAD, *CHAT, GOOD]}, [*CHAT, BAD, *CHAT]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "g"}], "system": "s"},
            [SYSTEM, *CHAT],
        ),
        ({"instruction": "a", "output": "g"}, CHAT),
    ],
)
@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_a_label_applies_to_the_last_answer(record: dict[str, Any], prompt: list[Any], label: str) -> None:
    parsed = parser_of("kto")({**record, label: False})
    assert parsed.content == {"prompt": prompt, "completion": [GOOD], "label": False}
    assert not parsed.ignored


@pytest.mark.parametrize("answer", ['{"part": "seal"}', '["seal"]', "[]", '[{"role": "assistant", "content": "x"}]'])
def test_an_answer_that_is_json_is_kept_unchanged(answer: str) -> None:
    spoken = [{"role": "assistant", "content": answer}]
    assert parser_of("dpo")({"prompt": "a", "chosen": answer, "rejected": "b"}).content["chosen"] == spoken
    assert parser_of("kto")({"prompt": "a", "completion": answer, "label": 1}).content["completion"] == spoken


def test_tools_of_a_pair_reach_trl_as_text() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parser_of("dpo")({**PAIR, "tools": tools}).content["tools"] == json.dumps(tools)
    assert parser_of("orpo")({**PAIR, "tools": tools}).ignored == ("tools",)
    assert parser_of("dpo")({**PAIR, "score": 0.5}).ignored == ("score",)


@pytest.mark.parametrize(
    ("method", "record", "said"),
    [
        ("dpo", {"prompt": "a", "chosen": "g"}, "dpo needs the fields chosen, rejected; missing: rejected"),
        ("dpo", {"chosen": "g", "rejected": "b"}, "'prompt' is missing"),
        (
            "dpo",
            {"prompt": "other", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
            "chosen[0] is a user message that differs",
        ),
        ("dpo", {"prompt": "a", "chosen": [GOOD, *CHAT, GOOD], "rejected": [BAD]}, "'chosen' has a user message inside"),
        ("dpo", {"prompt": "a", "chosen": CHAT, "rejected": [*CHAT, BAD]}, "'chosen' is empty"),
        ("dpo", {"prompt": "a", "chosen": "g", "rejected": "g"}, "are equal"),
        ("dpo", {"prompt": "a", "chosen": {"x": 1}, "rejected": "g"}, "chosen must be text, found an object"),
        ("dpo", {"prompt": "a", "chosen": "g", "rejected": "b", "images": ["x"]}, "only text can be trained on"),
        ("dpo", {"prompt": "a", "chosen": "\ud83d", "rejected": "b"}, "chosen has an incomplete character"),
        ("kto", {"prompt": "a", "completion": "g"}, "kto needs the fields completion, label; missing: label"),
        ("kto", {"prompt": "a", "label": True}, "missing: completion"),
        ("kto", {"messages": CHAT, "label": True}, "'messages' is empty"),
        ("kto", {"prompt": "a", "completion": "g", "label": "good"}, "'label' must be true or false, found text"),
        ("grpo", {"prompt": "a", "solution": "\ud83d"}, "has an incomplete character"),
        ("grpo", 3, "a JSON object is expected"),
    ],
)
def test_a_record_that_is_no_preference_is_rejected(method: Method, record: Any, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        parser_of(method)(record)
    assert said in caught.value.message


def test_other_columns_of_a_prompt_reach_the_reward_function() -> None:
    assert parser_of("grpo")({"prompt": "a", "answer": 4, "unset": None})[1] == {"prompt": CHAT, "answer": 4}


def test_conversations_that_differ_before_the_last_answer_are_no_pair() -> None:
    ends = {end: [{"role": "user", "content": end}, {"role": "assistant", "content": "x"}] for end in ("chosen", "rejected")}
    with pytest.raises(RecordError, match="'prompt' is missing"):
        parser_of("dpo")(ends)


def test_a_missing_reward_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_reward_file(tmp_path / "none.py")
