"""For every chat template, training and serving use the same tokens before an answer and the same end token after it."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import DROPTHINK, FAMILIES, MARKS_NOTHING, SPACE, THINK, set_family
from support import QWEN_TEMPLATE

from sage.common.errors import DatasetError
from sage.libs.finetune.data.findings import Code
from sage.libs.finetune.data.samples import Chat, Origin, Sample
from sage.libs.finetune.data.tokenizing import IGNORED, Encoded, Encoder
from sage.libs.models.chat import ChatFormat, ensure_chat_template
from sage.libs.models.loading import load_tokenizer

TURNS = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "a\n\nb"},
    {"role": "assistant", "content": "\nIt is\n\n  four."},
    {"role": "user", "content": "And 日本?"},
    {"role": "assistant", "content": "<b>bold</b> né 🦊"},
]
CALL = {"id": "call00001", "type": "function", "function": {"name": "root", "arguments": {"x": 81}}}
CALLING = [
    {"role": "user", "content": "root of 81?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "9", "name": "root", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "nine"},
]
DROPTOOL = QWEN_TEMPLATE.replace("message['content']", "(message['content'] if message['role'] != 'tool' else '')")
TOOLS = [{"type": "function", "function": {"name": "root", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def sample(content: Any, line: int = 1) -> Sample:
    return Sample(Origin(Path("t.jsonl"), line), "openai", content)


def encoded(tokenizer: Any, *contents: Any, cutoff: int = 4096) -> tuple[list[Encoded], Encoder]:
    encoder = Encoder(tokenizer, cutoff)
    return list(encoder.encode(sample(content, line) for line, content in enumerate(contents, 1))), encoder


def answers_of(sequences: list[Encoded]) -> list[tuple[list[int], list[int]]]:
    """Return, for each answer in the sequences, the tokens before the answer and the tokens of the answer."""
    found = []
    for sequence in sequences:
        edges = [label != IGNORED for label in sequence.labels] + [False]
        begin = None
        for at, trained in enumerate(edges):
            if trained and begin is None:
                begin = at
            elif not trained and begin is not None:
                found.append((sequence.ids[:begin], sequence.ids[begin:at]))
                begin = None
    return found


def trained_text(tokenizer: Any, sequences: list[Encoded]) -> list[str]:
    return [tokenizer.decode(answer) for _, answer in answers_of(sequences)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_trained_after_the_prompt_tokens_that_serving_uses(tokenizer: Any, family: str) -> None:
    end = set_family(tokenizer, family)
    ensure_chat_template(tokenizer)
    chat_format = ChatFormat(tokenizer)
    sequences, encoder = encoded(tokenizer, Chat(TURNS))
    answers = answers_of(sequences)
    assert [prompt for prompt, _ in answers] == [chat_format.prompt_ids(TURNS[:at]) for at in (1, 3, 5)]
    for at, (_, answer) in zip((1, 3, 5), answers, strict=True):
        said, token = tokenizer.decode(answer[:-1]), tokenizer.decode(answer[-1:])
        assert said.removeprefix("<think>\n\n</think>\n\n").strip() == TURNS[at]["content"].strip()
        assert token == end
        assert answer[-1] in chat_format.end_ids(None)
    assert not len(encoder.findings)


@pytest.mark.parametrize("family", ["chatml", "mistral", "think", "named", "none"])
def test_tool_calls_are_trained_as_they_are_served(tokenizer: Any, family: str) -> None:
    set_family(tokenizer, family)
    ensure_chat_template(tokenizer)
    tools = None if family == "mistral" else TOOLS
    sequences, encoder = encoded(tokenizer, Chat(CALLING, tools))
    answers = answers_of(sequences)
    assert [prompt for prompt, _ in answers] == [ChatFormat(tokenizer).prompt_ids(CALLING[:at], tools) for at in (1, 3)]
    assert '"x": 81' in tokenizer.decode(answers[0][1])
    assert all(answer[-1] in ChatFormat(tokenizer).end_ids(None) for _, answer in answers)
    assert not len(encoder.findings)


@pytest.mark.parametrize(("template", "many"), [(SPACE.replace("eos_token", "'<|im_end|>'"), True), (QWEN_TEMPLATE, False)])
def test_answers_share_a_sequence_unless_a_token_spans_the_start_of_an_answer(
    tokenizer: Any, template: str, many: bool
) -> None:
    tokenizer.chat_template = template
    words = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the"}] * 2
    sequences, _ = encoded(tokenizer, Chat(words))
    assert trained_text(tokenizer, sequences) == ["the<|im_end|>", "the<|im_end|>"]
    assert len(sequences) == (2 if many else 1)


def test_chats_and_texts_begin_with_exactly_one_bos_token(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.chat_template = None
    ensure_chat_template(tokenizer)
    chat_format = ChatFormat(tokenizer)
    rendered = chat_format.render(TURNS)
    sequences, encoder = encoded(tokenizer, Chat(TURNS), "once upon a time", rendered)
    for sequence in sequences:
        assert sequence.ids[0] == bos
        assert bos not in sequence.ids[1:]
        assert sequence.ids[-2:].count(sequence.ids[-1]) == 1
    assert sequences[-1].ids == chat_format.text_ids(rendered.rstrip())
    assert chat_format.prompt_ids(TURNS[:1])[0] == bos
    assert not len(encoder.findings)


def test_reasoning_is_trained_from_its_field_and_from_the_content(tokenizer: Any) -> None:
    tokenizer.chat_template = THINK
    asked = {"role": "user", "content": "q"}
    field = Chat([asked, {"role": "assistant", "content": "four", "reasoning_content": "two and two"}])
    inline = Chat([asked, {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nfour"}])
    sequences, encoder = encoded(tokenizer, field, inline)
    assert trained_text(tokenizer, sequences) == ["<think>\ntwo and two\n</think>\n\nfour<|im_end|>"] * 2
    assert not len(encoder.findings)


def test_if_the_prompt_opens_the_reasoning_the_reasoning_is_trained_after_this_prompt(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = DROPTHINK
    asked = {"role": "user", "content": "q"}
    thought = [
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"},
        {"role": "assistant", "content": "four", "reasoning_content": "hm"},
    ]
    sequences, encoder = encoded(tokenizer, *(Chat([asked, answer]) for answer in thought))
    assert not len(encoder.findings)
    for sequence in sequences:
        assert answers_of([sequence])[0][0] == ChatFormat(tokenizer).prompt_ids([asked])
    assert trained_text(tokenizer, sequences) == ["hm\n</think>\n\nfour</s>"] * 2


def test_if_the_prompt_opens_the_reasoning_an_answer_without_reasoning_stays_complete_with_a_warning(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = DROPTHINK
    sequences, encoder = encoded(
        tokenizer, *(Chat([TURNS[0], {"role": "assistant", "content": said}]) for said in ("<th>x", "<b>"))
    )
    assert trained_text(tokenizer, sequences) == ["<th>x</s>", "<b></s>"]
    [finding] = encoder.findings
    assert (finding.code, finding.count, finding.places) == (Code.PROMPT_DIFFERS, 2, ["t.jsonl:1", "t.jsonl:2"])


@pytest.mark.parametrize(
    ("template", "chat", "code"),
    [
        (QWEN_TEMPLATE, Chat([TURNS[0], {**TURNS[1], "reasoning_content": "r"}]), Code.REASONING_LOST),
        (QWEN_TEMPLATE, Chat(CALLING), Code.CALLS_LOST),
        (DROPTOOL, Chat(CALLING), Code.MESSAGE_LOST),
        (QWEN_TEMPLATE, Chat(TURNS, TOOLS), Code.TOOLS_LOST),
        (QWEN_TEMPLATE.replace("message['content']", "message['content'][:9]"), Chat(TURNS[2:]), Code.ANSWER_LOST),
        (QWEN_TEMPLATE.replace("message['content']", "message['content'][:9]"), Chat(TURNS[:2]), Code.MESSAGE_LOST),
    ],
)  # fmt: skip
def test_content_that_the_template_loses_is_a_warning(tokenizer: Any, template: str, chat: Chat, code: Code) -> None:
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    _, encoder = encoded(tokenizer, chat)
    assert code in [finding.code for finding in encoder.findings.warnings]
    with pytest.raises(DatasetError) as caught:
        encoder.findings.raise_for_warnings("t.jsonl", "m")
    assert caught.value.code == "dataset_warnings"
    assert "t.jsonl:1" in caught.value.message


@pytest.mark.parametrize(
    ("ignored", "code"), [("messages[].loss_mask", "flag_ignored"), ("tools", "tools_lost"), ("source", "field_ignored")]
)
def test_fields_without_an_effect_are_reported(tokenizer: Any, ignored: str, code: str) -> None:
    encoder = Encoder(tokenizer, 512)
    encoder.encode_whole([Sample(Origin(Path("t.jsonl"), 1), "openai", Chat(TURNS), (ignored,))])
    [finding] = encoder.findings
    assert (finding.code, finding.details) == (code, [ignored])


def test_a_token_without_an_embedding_is_named_in_the_error(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<beyond>"]})
    encoder = Encoder(tokenizer, 512, embedding_rows=len(tokenizer) - 1)
    chats = [Chat(TURNS), Chat([{"role": "user", "content": "<beyond>"}, TURNS[1]])]
    with pytest.raises(DatasetError, match=r"t\.jsonl:2: the model has no embedding for the token '<beyond>'"):
        list(encoder.encode(sample(chat, line) for line, chat in enumerate(chats, 1)))


def test_a_model_without_any_end_token_gives_a_warning(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    _, encoder = encoded(tokenizer, Chat(TURNS[:2]))
    assert Code.NO_END_TOKEN in [finding.code for finding in encoder.findings.warnings]


def test_samples_with_nothing_to_train_on_are_counted_and_reported(tokenizer: Any) -> None:
    sequences, encoder = encoded(tokenizer, Chat(TURNS[:2], untrained=frozenset({1})), Chat(TURNS[:2]))
    assert len(sequences) == 1
    [finding] = encoder.findings
    assert (finding.code, finding.places) == (Code.NOTHING_TRAINED, ["t.jsonl:1"])


@pytest.mark.parametrize("untrained", [frozenset({1}), frozenset()])
def test_samples_with_nothing_to_train_on_are_not_reported_as_too_long(tokenizer: Any, untrained: frozenset[int]) -> None:
    tokenizer.chat_template = QWEN_TEMPLATE if untrained else MARKS_NOTHING
    with pytest.raises(DatasetError) as caught:
        encoded(tokenizer, *[Chat(TURNS[:2], untrained=untrained)] * 3)
    assert caught.value.code == "nothing_to_train"


def test_a_chat_that_the_assistant_begins_is_trained(tokenizer: Any) -> None:
    sequences, encoder = encoded(tokenizer, Chat([{"role": "assistant", "content": "Hello!"}, *TURNS[:2]]))
    assert trained_text(tokenizer, sequences) == ["Hello!<|im_end|>", "yes<|im_end|>"]
    assert not len(encoder.findings)


def test_every_record_that_the_template_rejects_is_named_in_the_error(tokenizer: Any) -> None:
    set_family(tokenizer, "gemma")
    system = {"role": "system", "content": "s"}
    chats = [Chat([system, *TURNS]) if line in (2, 5, 7) else Chat(TURNS) for line in range(1, 9)]
    with pytest.raises(DatasetError) as caught:
        encoded(tokenizer, *chats)
    assert caught.value.code == "dataset_template"
    assert all(f"t.jsonl:{line}:" in caught.value.message for line in (2, 5, 7))


def test_with_a_tokenizer_that_prepends_a_space_the_trained_tokens_are_those_of_the_whole_chat() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = {token: at for at, token in enumerate(["<unk>", "</s>", "▁", *map(chr, range(32, 127)), "▁yes", "▁q"])}
    llama = Tokenizer(models.BPE(letters, [("▁", "q")], unk_token="<unk>"))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('[I] ' + m.content + ' [/I]') if m.role == 'user' else ' ' + m.content + eos_token }}"
        "{% endfor %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "q"}] * 2
    chat_format = ChatFormat(tokenizer)
    assert not chat_format.is_concatenative
    sequences, _ = encoded(tokenizer, Chat(chat))
    assert sequences[0].ids == tokenizer(chat_format.render(chat), add_special_tokens=False)["input_ids"]
    assert [prompt for prompt, _ in answers_of(sequences)] == [chat_format.prompt_ids(chat[:at]) for at in (1, 3)]
