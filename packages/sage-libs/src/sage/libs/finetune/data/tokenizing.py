"""Token ids, and which of them the loss covers: what the assistant says, at every turn, and nothing else.

Where the chat template marks its answers (`{% generation %}`), its marks are taken. Else the template itself is asked:
rendered up to an answer, with the generation prompt, and rendered with it, the difference is the answer with what ends it.
A template that rewrites earlier turns (one that drops old reasoning, say) has no such difference for them; then each answer
becomes a sample of its own, rendered as the model will see it when it answers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sage.common.errors import DatasetError
from sage.libs.finetune.data.samples import Chat, Fault, Sample

#: What of a chat the loss covers.
TrainOn = Literal["assistant", "last_turn", "all"]
#: The label that torch's cross-entropy leaves out.
IGNORED = -100
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """One sequence: `labels` are `ids` where the loss is, IGNORED elsewhere; same length."""

    ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        """How many positions the loss covers; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class EncodedDataset:
    """Sequences ready to be batched, and what was lost on the way to them."""

    sequences: list[Encoded] = field(default_factory=list)
    truncated: int = 0  #: cut at the cutoff
    dropped: int = 0  #: nothing to train on was left of them
    lengths: list[int] = field(default_factory=list)  #: in tokens, before the cut


def ensure_chat_template(tokenizer: Any) -> str | None:
    """Give a tokenizer without a chat template ChatML; return the warning to show, or None where it had one."""
    if tokenizer.chat_template:
        return None
    known = tokenizer.get_vocab()
    end = "<|im_end|>" if "<|im_end|>" in known else tokenizer.eos_token
    tokenizer.chat_template = CHATML.replace("END", end or "<|im_end|>")
    return f"The model has no chat template: ChatML is used, with {end!r} at the end of each turn, and saved with it."


def encode_dataset(
    samples: Iterable[Sample], tokenizer: Any, cutoff: int, train_on: TrainOn = "assistant"
) -> EncodedDataset:
    """Return the sequences of at most `cutoff` tokens that samples make.

    Raises DatasetError for a sample that the chat template refuses, and where nothing to train on is left.
    """
    result = EncodedDataset()
    for sample in samples:
        for encoded in encode_sample(sample, tokenizer, train_on):
            result.lengths.append(len(encoded.ids))
            cut = Encoded(encoded.ids[:cutoff], encoded.labels[:cutoff])
            result.truncated += len(encoded.ids) > cutoff
            if cut.trained_tokens:
                result.sequences.append(cut)
            else:
                result.dropped += 1
    if not result.sequences:
        raise DatasetError(
            code="dataset_too_long",
            message=f"All {result.dropped} samples are longer than the cutoff of {cutoff} tokens before the answer begins.",
            hint=f"Raise max_seq_length (the shortest sample has {min(result.lengths)} tokens) or shorten the prompts.",
            param="max_seq_length",
        )
    return result


def encode_sample(sample: Sample, tokenizer: Any, train_on: TrainOn = "assistant") -> list[Encoded]:
    """Return the sequences of one sample, whole; plain text is learnt whole in any case.

    Raises DatasetError with the sample's place where the chat template refuses it.
    """
    if isinstance(sample.content, str):
        ids = tokenizer(sample.content)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return [Encoded(ids, list(ids))]
    try:
        sequences = _encode_chat(sample.content, tokenizer)
    except Exception as error:  # jinja and templates raise what they like
        fault = Fault(sample.origin, f"the model's chat template refuses it: {error}")
        raise DatasetError(code="dataset_template", message=str(fault), param="dataset_path") from error
    match train_on:
        case "assistant":
            return sequences
        case "last_turn":
            return [_last_turn(sequences[-1])]
        case "all":
            return [Encoded(sequences[-1].ids, list(sequences[-1].ids))]


def _last_turn(encoded: Encoded) -> Encoded:
    """Return the sequence with the loss on its last answer only."""
    trained = [label != IGNORED for label in encoded.labels]
    end = len(trained) - trained[::-1].index(True) if True in trained else 0
    begin = next((at for at in range(end, 0, -1) if not trained[at - 1]), 0)
    return Encoded(encoded.ids, [label if begin <= at < end else IGNORED for at, label in enumerate(encoded.labels)])


def _encode_chat(chat: Chat, tokenizer: Any) -> list[Encoded]:
    answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i not in chat.untrained]
    if "{% generation %}" in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}") and not chat.untrained:
        marked = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = marked["input_ids"], marked["assistant_masks"]
        return [Encoded(ids, [i if trained else IGNORED for i, trained in zip(ids, mask, strict=True)])]
    whole = _render(chat, len(chat.messages), tokenizer)
    spans = [_span(chat, answer, whole, tokenizer) for answer in answers]
    if all(spans):
        return [_mask(whole, [span for span in spans if span], tokenizer)]
    sequences = []
    for answer in answers:
        text = _render(chat, answer + 1, tokenizer)
        span = _span(chat, answer, text, tokenizer) or _last_span(chat, answer, text, tokenizer)
        sequences.append(_mask(text, [span], tokenizer))
    return sequences


def _render(chat: Chat, count: int, tokenizer: Any, *, prompt: bool = False) -> str:
    """Return the text of the first `count` messages, with the prompt for an answer where `prompt` is set."""
    text = tokenizer.apply_chat_template(
        chat.messages[:count], tools=chat.tools, add_generation_prompt=prompt, tokenize=False
    )
    return str(text)


def _span(chat: Chat, answer: int, whole: str, tokenizer: Any) -> tuple[int, int] | None:
    """Return where in `whole` an answer stands, in characters, or None where the template rewrites it."""
    before = _render(chat, answer, tokenizer, prompt=True)
    through = _render(chat, answer + 1, tokenizer).rstrip()
    if through.startswith(before) and whole.startswith(through):
        return len(before), len(through)
    return None


def _last_span(chat: Chat, answer: int, text: str, tokenizer: Any) -> tuple[int, int]:
    """Return where the last answer stands, for a template whose generation prompt says more than its history."""
    before = _render(chat, answer, tokenizer, prompt=True)
    shared = next((at for at, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    return shared, len(text.rstrip())


def _mask(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> Encoded:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= begin and end <= stop and end > begin for start, stop in spans) else IGNORED
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return Encoded(encoded["input_ids"], labels)
