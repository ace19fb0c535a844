"""Which tokens the loss covers, with a real tokenizer and several kinds of chat templates."""

from pathlib import Path
from typing import Any

import pytest
from support import QWEN_TEMPLATE

from sage.common.errors import DatasetError
from sage.libs.finetune.data.samples import Chat, Origin, Sample
from sage.libs.finetune.data.tokenizing import IGNORED, Encoded, Encoder, TrainOn
from sage.libs.models.chat import ensure_chat_template
from sage.libs.models.loading import load_tokenizer

GENERATION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Omits the reasoning of all answers except the last answer, as the templates of reasoning models do.
REWRITING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Adds `<think>` at the end of the generation prompt, but not to earlier answers.
THINKING_TEMPLATE = REWRITING_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
TURNS = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def encode_sample(tokenizer: Any, content: Any, train_on: TrainOn = "assistant") -> list[Encoded]:
    encoder = Encoder(tokenizer, 10_000, train_on)
    return list(encoder.encode([Sample(Origin(Path("t.jsonl"), 3), "openai", content)]))


def encode(tokenizer: Any, messages: list[dict[str, Any]], **chat: Any) -> list[Encoded]:
    return encode_sample(tokenizer, Chat(messages, **chat))


def trained_text(tokenizer: Any, encoded: Encoded) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


@pytest.mark.parametrize("template", [QWEN_TEMPLATE, GENERATION_TEMPLATE])
def test_the_loss_covers_each_answer_and_its_end_token_and_nothing_else(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    [encoded] = encode(tokenizer, TURNS)
    assert trained_text(tokenizer, encoded) == "first answer<|im_end|>second answer<|im_end|>"
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip()
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.ids, strict=True))


@pytest.mark.parametrize("template", [QWEN_TEMPLATE, GENERATION_TEMPLATE, REWRITING_TEMPLATE])
def test_the_loss_can_cover_the_last_answer_alone_or_everything(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    [last] = encode_sample(tokenizer, Chat(TURNS), "last_turn")
    assert trained_text(tokenizer, last) == "second answer<|im_end|>"
    [everything] = encode_sample(tokenizer, Chat(TURNS), "all")
    assert everything.labels == everything.ids
    assert tokenizer.decode(everything.ids).startswith(tokenizer.apply_chat_template(TURNS[:3], tokenize=False))


def test_an_answer_that_repeats_the_question_is_not_mistaken_for_the_question(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "same"}, {"role": "assistant", "content": "same"}]
    [encoded] = encode(tokenizer, turns)
    assert trained_text(tokenizer, encoded) == "same<|im_end|>"
    trained_from = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    assert "assistant\n" in tokenizer.decode(encoded.ids[:trained_from])


def test_the_loss_does_not_cover_an_answer_with_weight_zero(tokenizer: Any) -> None:
    [encoded] = encode(tokenizer, TURNS, untrained=frozenset({1}))
    assert trained_text(tokenizer, encoded) == "second answer<|im_end|>"


def test_the_loss_covers_all_bytes_of_a_character(tokenizer: Any) -> None:
    [encoded] = encode(tokenizer, [{"role": "user", "content": "日本"}, {"role": "assistant", "content": "né 🦊 日本"}])
    assert trained_text(tokenizer, encoded) == "né 🦊 日本<|im_end|>"


def test_a_template_that_changes_earlier_answers_gives_one_sequence_for_each_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING_TEMPLATE
    turns = [{**t, "content": f"<think>hm</think>{t['content']}"} if t["role"] == "assistant" else t for t in TURNS]
    first, second = encode(tokenizer, turns)
    assert trained_text(tokenizer, first) == "<think>hm</think>first answer<|im_end|>"
    assert trained_text(tokenizer, second) == "<think>hm</think>second answer<|im_end|>"
    assert "<think>" not in tokenizer.decode(second.ids).split("second question")[0]


def test_a_prompt_that_ends_with_more_text_than_the_history_is_cut_before_this_text(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING_TEMPLATE
    [encoded] = encode(tokenizer, TURNS)
    assert trained_text(tokenizer, encoded) == "first answer<|im_end|>second answer<|im_end|>"


def test_the_loss_covers_plain_text_completely_and_an_end_token(tokenizer: Any) -> None:
    [encoded] = encode_sample(tokenizer, "once upon a time")
    assert tokenizer.decode(encoded.ids) == "once upon a time<|im_end|>"
    assert encoded.labels == encoded.ids


def test_a_model_without_a_template_gets_chatml_and_a_warning(tokenizer: Any) -> None:
    assert ensure_chat_template(tokenizer) is None
    tokenizer.chat_template = None
    warning = ensure_chat_template(tokenizer)
    assert warning is not None
    assert "ChatML" in warning
    [encoded] = encode(tokenizer, TURNS)
    assert trained_text(tokenizer, encoded) == "first answer<|im_end|>second answer<|im_end|>"


def test_the_error_for_a_record_that_the_template_rejects_names_its_line(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = r"t\.jsonl:3: the model's chat template rejects this record: roles must alternate"
    with pytest.raises(DatasetError, match=message):
        encode(tokenizer, TURNS)


def test_samples_longer_than_the_cutoff_are_cut_or_dropped_and_counted(tokenizer: Any) -> None:
    samples = [
        Sample(Origin(Path("t"), line), "openai", Chat([{"role": "user", "content": "q " * words}, TURNS[1]]))
        for line, words in enumerate((1, 10, 400), 1)
    ]
    encoder = Encoder(tokenizer, 64)
    sequences = list(encoder.encode(samples))
    assert max(len(sequence.ids) for sequence in sequences) <= 64
    assert len(sequences) + encoder.dropped == 3
    assert encoder.truncated == 1
    assert encoder.dropped == 1
    assert max(encoder.lengths) > 64
