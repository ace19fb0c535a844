"""Token ids, and which of them the loss covers: what the assistant says, at every turn, and nothing else.

Where the chat template marks its answers (`{% generation %}`), its marks are taken. Else the template itself is asked:
rendered up to an answer, with the generation prompt, and rendered with it, the difference is the answer with what ends it.
A template that rewrites earlier turns (one that drops old reasoning, say) has no such difference for them; then each answer
becomes a sample of its own, rendered as the model will see it when it answers.
"""

import bisect
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

from sage.common.errors import DatasetError
from sage.libs.finetune.data.samples import Chat, Fault, Sample

#: What of a chat the loss covers.
TrainOn = Literal["assistant", "last_turn", "all"]
#: The label that torch's cross-entropy leaves out.
IGNORED = -100
#: So many samples are tokenised at once.
_BATCH = 256
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


@dataclass(frozen=True)
class _Rendered:
    """A sample as text, and where in it the loss is, in characters."""

    text: str
    spans: list[tuple[int, int]]


def ensure_chat_template(tokenizer: Any) -> str | None:
    """Give a tokenizer without a chat template ChatML; return the warning to show, or None where it had one."""
    if tokenizer.chat_template:
        return None
    known = tokenizer.get_vocab()
    end = "<|im_end|>" if "<|im_end|>" in known else tokenizer.eos_token
    tokenizer.chat_template = CHATML.replace("END", end or "<|im_end|>")
    return f"The model has no chat template: ChatML is used, with {end!r} at the end of each turn, and saved with it."


@dataclass
class Encoder:
    """Makes sequences of samples, and counts what was lost on the way."""

    tokenizer: Any
    cutoff: int  #: sequences have at most this many tokens
    train_on: TrainOn = "assistant"
    truncated: int = 0  #: cut at the cutoff
    dropped: int = 0  #: nothing to train on was left of them
    lengths: "array[int]" = field(default_factory=lambda: array("q"))  #: in tokens, before the cut

    def encode(self, samples: Iterable[Sample]) -> Iterator[Encoded]:
        """Yield the sequences that samples make.

        Raises DatasetError for a sample that the chat template refuses, and where nothing to train on is left.
        """
        kept = 0
        remaining = iter(samples)
        while batch := list(itertools.islice(remaining, _BATCH)):
            for encoded in encode_samples(batch, self.tokenizer, self.train_on):
                self.lengths.append(len(encoded.ids))
                cut = Encoded(encoded.ids[: self.cutoff], encoded.labels[: self.cutoff])
                self.truncated += len(encoded.ids) > self.cutoff
                if cut.trained_tokens:
                    kept += 1
                    yield cut
                else:
                    self.dropped += 1
        if not kept:
            raise DatasetError(
                code="dataset_too_long",
                message=f"All {self.dropped} samples are longer than the cutoff of {self.cutoff} tokens before the answer "
                "begins.",
                hint=f"Raise max_seq_length (the shortest sample has {min(self.lengths)} tokens) or shorten the prompts.",
                param="max_seq_length",
            )


def encode_samples(samples: Sequence[Sample], tokenizer: Any, train_on: TrainOn = "assistant") -> list[Encoded]:
    """Return the sequences of samples, whole; plain text is learnt whole in any case.

    Raises DatasetError with the sample's place where the chat template refuses it.
    """
    parts = [part for sample in samples for part in _parts(sample, tokenizer, train_on)]
    texts = [part.text for part in parts if isinstance(part, _Rendered)]
    # One call for all: the tokenizer works on as many cores as there are.
    tokenized = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else None
    rendered = iter(zip(tokenized["input_ids"], tokenized["offset_mapping"], strict=True)) if tokenized else iter(())
    return [_mask(*next(rendered), part.spans) if isinstance(part, _Rendered) else part for part in parts]


def _parts(sample: Sample, tokenizer: Any, train_on: TrainOn) -> "list[Encoded] | list[_Rendered]":
    if isinstance(sample.content, str):
        ids = tokenizer(sample.content)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return [Encoded(ids, list(ids))]
    try:
        marked = _marked(sample.content, tokenizer)
        if marked:
            return [_narrowed(marked, train_on)]
        rendered = _render_answers(sample.content, tokenizer)
    except Exception as error:  # jinja and templates raise what they like
        fault = Fault(sample.origin, f"the model's chat template refuses it: {error}")
        raise DatasetError(code="dataset_template", message=str(fault), param="dataset_path") from error
    last = rendered[-1]
    match train_on:
        case "assistant":
            return rendered
        case "last_turn":
            return [_Rendered(last.text, last.spans[-1:])]
        case "all":
            return [_Rendered(last.text, [(0, len(last.text))])]


def _narrowed(encoded: Encoded, train_on: TrainOn) -> Encoded:
    match train_on:
        case "assistant":
            return encoded
        case "last_turn":
            return _last_turn(encoded)
        case "all":
            return Encoded(encoded.ids, list(encoded.ids))


def _last_turn(encoded: Encoded) -> Encoded:
    """Return the sequence with the loss on its last answer only."""
    trained = [label != IGNORED for label in encoded.labels]
    end = len(trained) - trained[::-1].index(True) if True in trained else 0
    begin = next((at for at in range(end, 0, -1) if not trained[at - 1]), 0)
    return Encoded(encoded.ids, [label if begin <= at < end else IGNORED for at, label in enumerate(encoded.labels)])


def _marked(chat: Chat, tokenizer: Any) -> Encoded | None:
    """Return the sequence of a chat whose template marks its answers itself, else None."""
    if "{% generation %}" not in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}") or chat.untrained:
        return None
    marked = tokenizer.apply_chat_template(
        chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    return Encoded(ids, [i if trained else IGNORED for i, trained in zip(ids, mask, strict=True)])


def _render_answers(chat: Chat, tokenizer: Any) -> list[_Rendered]:
    """Return the chat with all its answers, or one text an answer where the template rewrites what came before."""
    answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i not in chat.untrained]
    whole = _render(chat, len(chat.messages), tokenizer)
    spans = [_span(chat, answer, whole, tokenizer) for answer in answers]
    if all(spans):
        return [_Rendered(whole, [span for span in spans if span])]
    rendered = []
    for answer in answers:
        text = _render(chat, answer + 1, tokenizer)
        span = _span(chat, answer, text, tokenizer) or _last_span(chat, answer, text, tokenizer)
        rendered.append(_Rendered(text, [span]))
    return rendered


def _render(chat: Chat, count: int, tokenizer: Any, *, prompt: bool = False) -> str:
    """Return the text of the first `count` messages, with the prompt for an answer where `prompt` is set."""
    text = tokenizer.apply_chat_template(
        chat.messages[:count], tools=chat.tools, add_generation_prompt=prompt, tokenize=False
    )
    return str(text)


def _span(chat: Chat, answer: int, whole: str, tokenizer: Any) -> tuple[int, int] | None:
    """Return where in `whole` an answer stands, in characters, or None where the template rewrites it."""
    before = _render(chat, answer, tokenizer, prompt=True)
    through = (whole if answer + 1 == len(chat.messages) else _render(chat, answer + 1, tokenizer)).rstrip()
    if through.startswith(before) and whole.startswith(through):
        return len(before), len(through)
    return None


def _last_span(chat: Chat, answer: int, text: str, tokenizer: Any) -> tuple[int, int]:
    """Return where the last answer stands, for a template whose generation prompt says more than its history."""
    before = _render(chat, answer, tokenizer, prompt=True)
    shared = next((at for at, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    return shared, len(text.rstrip())


def _mask(ids: list[int], places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Encoded:
    """Return tokens with the loss on those that stand in a span; places: where each stands, in characters, ascending."""
    labels = [IGNORED] * len(ids)
    for start, stop in spans:
        first = bisect.bisect_left(places, start, key=itemgetter(0))
        for at in range(first, bisect.bisect_left(places, stop, lo=first, key=itemgetter(0))):
            begin, end = places[at]
            if begin < end <= stop:
                labels[at] = ids[at]
    return Encoded(ids, labels)
