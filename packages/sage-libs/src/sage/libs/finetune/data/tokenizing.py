"""Token ids, and which of them the loss covers: what the assistant says, at every turn, and nothing else.

Each answer is trained as the served model gives it: behind the very tokens of its prompt, and with the token that ends it.
If the template marks answers itself (`{% generation %}`), its marks are taken. Else the answer is what a rendering with it
has more than the prompt for it. Answers of one chat share a sequence if each prompt continues, token for token, what came
before. If not (a template drops old reasoning, a token straddles the beginning of an answer), the answer is a sequence of
its own.
"""

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sage.common.errors import DatasetError
from sage.libs.finetune.data.findings import Code, Findings
from sage.libs.finetune.data.inspection import inspect_answer, inspect_fields, inspect_prompt, inspect_tokens
from sage.libs.finetune.data.samples import Chat, Fault, Sample
from sage.libs.models.chat import ChatFormat

#: What of a chat the loss covers.
TrainOn = Literal["assistant", "last_turn", "all"]
#: The label that torch's cross-entropy leaves out.
IGNORED = -100
#: So many samples are tokenised at once.
_BATCH = 256
#: A token that straddles the beginning of an answer shows in so much text on either side.
_EDGE_CHARACTERS = 24
#: How many faults an error message spells out.
_SHOWN_FAULTS = 3


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
class _Answer:
    """An answer as text: what the model is shown, what it shall say, and the token to put behind that."""

    prompt: str
    text: str
    end: int | None = None


@dataclass(frozen=True)
class _Sequence:
    """Answers of which each prompt continues what came before; what the tokenizer puts before a plain text."""

    answers: list[_Answer]
    #: Prompt, answer, what follows until the next answer, answer, …
    parts: list[str]
    prefix: list[int] = field(default_factory=list)


@dataclass
class Encoder:
    """Makes sequences of samples, and counts what was lost on the way."""

    tokenizer: Any
    cutoff: int  #: sequences have at most this many tokens
    train_on: TrainOn = "assistant"
    embedding_rows: int | None = None  #: the model has no embedding for ids from here on
    truncated: int = 0  #: cut at the cutoff
    dropped: int = 0  #: the cutoff left nothing of them to train on
    untrained: int = 0  #: nothing of them is trained on, whatever the cutoff
    lengths: "array[int]" = field(default_factory=lambda: array("q"))  #: in tokens, before the cut
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        self.format = ChatFormat(self.tokenizer)
        ends = {self.tokenizer.eos_token_id}
        if self.tokenizer.chat_template:
            ends |= {self.format.answer_end(), self.format.answer_end(calls=True)}
        self._end_ids = sorted(end for end in ends if end is not None)
        self._end_texts = tuple(self.tokenizer.convert_ids_to_tokens(self._end_ids))
        #: Samples that the chat template refuses, or that have tokens which the model does not know.
        self.faults: list[Fault] = []

    def settings(self) -> list[Any]:
        """Return what, beside the samples, the sequences depend on."""
        vocabulary, template = self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template
        return [vocabulary, template, self._end_ids, self.embedding_rows, self.cutoff, self.train_on]

    def encode(self, samples: Iterable[Sample]) -> Iterator[Encoded]:
        """Yield the sequences that samples make.

        Raises DatasetError at the end, with their places, for samples that the chat template refuses, and if nothing to
        train on is left.
        """
        kept = 0
        remaining = iter(samples)
        while batch := list(itertools.islice(remaining, _BATCH)):
            for encoded in itertools.chain.from_iterable(self.encode_whole(batch)):
                self.lengths.append(len(encoded.ids))
                cut = Encoded(encoded.ids[: self.cutoff], encoded.labels[: self.cutoff])
                self.truncated += len(encoded.ids) > self.cutoff
                if cut.trained_tokens:
                    kept += 1
                    yield cut
                else:
                    self.dropped += 1
        self.raise_for_faults()
        if not kept:
            raise self._nothing_kept()

    def encode_whole(self, samples: Sequence[Sample]) -> list[list[Encoded]]:
        """Return the sequences of each sample, uncut; plain text is learnt whole in any case."""
        plans = [self._plan(sample) for sample in samples]
        sequences = [sequence for plan in plans for sequence in plan or ()]
        # One call for all: the tokenizer works on as many cores as there are.
        ids = iter(self.format.split_ids([sequence.parts for sequence in sequences]))
        torn = self._torn(sequences)
        encoded: list[list[Encoded]] = []
        for sample, plan in zip(samples, plans, strict=True):
            made: list[Encoded] = []
            for sequence in plan or ():
                parts = next(ids)
                made += self._one_by_one(sequence) if next(torn) else [_assembled(sequence, parts)]
            encoded.append([] if plan is None else self._checked(sample, made))
        return encoded

    def _torn(self, sequences: list[_Sequence]) -> Iterator[bool]:
        """Yield for each sequence whether an answer in it, as history of the next one, has other tokens than as an answer.

        That is so if a token straddles its beginning. Its end is a token by itself.
        """
        edges = [[_edge(answer) for answer in sequence.answers[:-1]] for sequence in sequences]
        flat = [edge for each in edges for edge in each]
        wholes, halves = self.format.ids([before + after for before, after in flat]), self.format.split_ids(flat)
        whole_edges = iter([whole == [*before, *after] for whole, (before, after) in zip(wholes, halves, strict=True)])
        for each in edges:
            found = [next(whole_edges) for _ in each]
            yield not all(found)

    def _one_by_one(self, sequence: _Sequence) -> list[Encoded]:
        alone = [_Sequence([answer], [answer.prompt, answer.text]) for answer in sequence.answers]
        split = self.format.split_ids([each.parts for each in alone])
        return [_assembled(*each) for each in zip(alone, split, strict=True)]

    def raise_for_faults(self) -> None:
        """Raise DatasetError, with their places, for the samples that the chat template or the model does not take."""
        if self.faults:
            shown = " ".join(str(fault) for fault in self.faults[:_SHOWN_FAULTS])
            more = len(self.faults) - _SHOWN_FAULTS
            message = f"{shown}{f' (and {more} more)' if more > 0 else ''}"
            hint = "Fix these records, or use a model that takes them."
            raise DatasetError(code="dataset_template", message=message, hint=hint, param="dataset_path")

    def _checked(self, sample: Sample, sequences: list[Encoded]) -> list[Encoded]:
        """Return what is trained of a sample's sequences, and note what is wrong with them."""
        if not any(sequence.trained_tokens for sequence in sequences):
            self.untrained += 1
            self.findings.add(Code.NOTHING_TRAINED, sample.origin)
            return []
        for sequence in sequences:
            if self.embedding_rows and (beyond := max(sequence.ids)) >= self.embedding_rows:
                token = self.tokenizer.convert_ids_to_tokens(beyond)
                self.faults.append(Fault(sample.origin, f"the model has no embedding for the token {token!r} ({beyond})."))
                return []
            inspect_tokens(sample, sequence.ids, sequence.labels, self.tokenizer.bos_token_id, self._end_ids, self.findings)
        match self.train_on:
            case "assistant":
                return sequences
            case "last_turn":
                return [_last_turn(sequences[-1])]
            case "all":
                return [Encoded(sequences[-1].ids, [*sequences[-1].ids])]

    def _nothing_kept(self) -> DatasetError:
        if not self.dropped:
            return DatasetError(
                code="nothing_to_train",
                message=f"Nothing is trained on in any of the {self.untrained} samples: every answer has weight 0, or the "
                "chat template marks none of them.",
                hint='Remove "weight": 0 from the answers to train on, or use a model with another chat template.',
                param="dataset_path",
            )
        return DatasetError(
            code="dataset_too_long",
            message=f"All {self.dropped} samples are longer than the cutoff of {self.cutoff} tokens before the answer "
            "begins.",
            hint=f"Raise max_seq_length (the shortest sample has {min(self.lengths)} tokens) or shorten the prompts.",
            param="max_seq_length",
        )

    def _plan(self, sample: Sample) -> list[_Sequence] | None:
        """Return what a sample's sequences are made of, or None if the chat template refuses it."""
        inspect_fields(sample, self.findings)
        if isinstance(sample.content, str):
            return [self._plain(sample.content)]
        try:
            return list(self._shared(self._answers(sample, sample.content)))
        except Exception as error:  # noqa: BLE001 - jinja and templates raise what they like
            self.faults.append(Fault(sample.origin, f"the model's chat template refuses it: {error}"))
            return None

    def _plain(self, text: str) -> _Sequence:
        whole = text.rstrip()
        ends = bool(self._end_texts) and whole.endswith(self._end_texts)
        answer = _Answer("", whole) if ends else _Answer("", text, self.tokenizer.eos_token_id)
        return _Sequence([answer], ["", answer.text], self.format.prefix_of(text))

    def _answers(self, sample: Sample, chat: Chat) -> list[_Answer]:
        trained = [at for at, m in enumerate(chat.messages) if m["role"] == "assistant" and at not in chat.untrained]
        marked = None if chat.untrained else self.format.render_marked(chat.messages, chat.tools)
        if marked is None:
            answers = [self._answer(sample, chat, at) for at in trained]
        else:
            text, spans = marked
            answers = [self._ended(_Answer(text[:begin], text[begin:end]), text[end:]) for begin, end in spans]
            for at in trained if answers else ():
                inspect_answer(sample, chat.messages[at], "".join(answer.text for answer in answers), self.findings)
        if answers:
            asked = chat.messages[: trained[-1]]
            inspect_prompt(sample, asked, chat.tools, answers[-1].prompt, self.findings)
        return answers

    def _answer(self, sample: Sample, chat: Chat, at: int) -> _Answer:
        """Return the answer `messages[at]` behind the prompt that a served model gets for it."""
        before, message = chat.messages[:at], chat.messages[at]
        whole = self.format.render([*before, message], chat.tools)
        prompt = self.format.render(before, chat.tools, prompt=True) if before else self.format.opening(whole)
        if whole.startswith(prompt):
            answer = self._ended(_Answer(prompt, whole[len(prompt) :]), calls=bool(message.get("tool_calls")))
        else:
            answer = self._reopened(sample, chat, at, whole, prompt)
        inspect_answer(sample, message, answer.text, self.findings)
        return answer

    def _reopened(self, sample: Sample, chat: Chat, at: int, whole: str, prompt: str) -> _Answer:
        """Return an answer whose prompt says more than the history: it begins the reasoning, which history leaves out."""
        header = self.format.header(chat.messages[:at], chat.tools, whole)
        opening = prompt.removeprefix(header).strip()
        content, reasoning = chat.messages[at]["content"], chat.messages[at].get("reasoning_content")
        if reasoning and opening == "<think>":
            content = f"{opening}\n{reasoning}\n</think>\n\n{content}"
        if opening and content.startswith(opening):
            text = content.removeprefix(opening)
            return self._ended(_Answer(prompt, text.lstrip("\n") if prompt.endswith("\n") else text))
        self.findings.add(Code.PROMPT_DIFFERS, sample.origin, repr(opening or prompt[-20:]))
        return self._ended(_Answer(header, whole[len(header) :]))

    def _ended(self, answer: _Answer, rest: str = "", *, calls: bool = False) -> _Answer:
        """Return an answer up to its end; rest: what the template writes behind it."""
        text = answer.text.rstrip()
        if text.endswith(self._end_texts):
            return _Answer(answer.prompt, text)
        for end in self._end_texts:
            if rest.startswith(end):
                return _Answer(answer.prompt, answer.text + end)
        return _Answer(answer.prompt, text, self.format.answer_end(calls=calls))

    def _shared(self, answers: list[_Answer]) -> Iterator[_Sequence]:
        """Yield sequences of answers of which each prompt continues what came before."""
        so_far = ""
        sequence = _Sequence([], [])
        for answer in answers:
            if sequence.answers and not answer.prompt.startswith(so_far):
                yield sequence
                sequence, so_far = _Sequence([], []), ""
            sequence.answers.append(answer)
            sequence.parts.extend((answer.prompt[len(so_far) :], answer.text))
            end = "" if answer.end is None else self.tokenizer.convert_ids_to_tokens(answer.end)
            so_far = f"{answer.prompt}{answer.text}{end}"
        if sequence.answers:
            yield sequence


def _edge(answer: _Answer) -> tuple[str, str]:
    return answer.prompt[-_EDGE_CHARACTERS:], answer.text[:_EDGE_CHARACTERS]


def _assembled(sequence: _Sequence, parts: list[list[int]]) -> Encoded:
    """Return a sequence; parts: the tokens of its parts."""
    ids, labels = [*sequence.prefix], [*sequence.prefix]
    for answer, prompt_ids, answer_ids in zip(sequence.answers, parts[::2], parts[1::2], strict=True):
        trained = answer_ids if answer.end is None else [*answer_ids, answer.end]
        ids += prompt_ids + trained
        labels += [IGNORED] * len(prompt_ids) + trained
    return Encoded(ids, labels)


def _last_turn(encoded: Encoded) -> Encoded:
    """Return the sequence with the loss on its last answer only."""
    trained = [label != IGNORED for label in encoded.labels]
    end = len(trained) - trained[::-1].index(True)
    begin = next((at for at in range(end, 0, -1) if not trained[at - 1]), 0)
    return Encoded(encoded.ids, [label if begin <= at < end else IGNORED for at, label in enumerate(encoded.labels)])
