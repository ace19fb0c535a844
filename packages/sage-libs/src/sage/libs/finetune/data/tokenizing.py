"""Tokenize samples, and mark the tokens to train on: by default, the tokens of the assistant's answers.

If the chat template marks answers (`{% generation %}`) and no answer is excluded from training, each marked part of the
rendered chat is an answer. Otherwise, an answer is the text that follows its prompt in the rendered chat.

A token sequence can contain several answers of a chat. If the prompt of an answer begins with the text of the current
sequence, the answer is added to the sequence. Otherwise, the answer begins a new sequence. This happens, for example, if the
template removes the reasoning from earlier answers.

If the tokenizer would put the end of a prompt and the beginning of its answer into one token, the sequence is split: each
answer becomes a separate sequence.
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

#: The part of a chat to train on: all answers, the last answer, or all tokens.
TrainOn = Literal["assistant", "last_turn", "all"]
#: Label that torch's cross-entropy ignores.
IGNORED = -100
_BATCH = 256
#: Number of characters to tokenize before and after the beginning of an answer, to find a token that contains characters of
#: both the prompt and the answer.
_EDGE_CHARACTERS = 24
_SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Encoded:
    """A token sequence. `labels` has one entry per token: the id of a trained token, or IGNORED for any other token."""

    ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss covers. The first token is not counted, because the model never predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class _Answer:
    """An answer: the text of its prompt, the text to learn, and the id of the end token to append (None: no token)."""

    prompt: str
    text: str
    end: int | None = None


@dataclass(frozen=True)
class _Sequence:
    """One or more answers that become one token sequence."""

    answers: list[_Answer]
    #: Two texts for each answer: first the part of the prompt after the previous answer, then the answer. For the first
    #: answer, this part is the whole prompt.
    parts: list[str]
    prefix: list[int] = field(default_factory=list)  #: token ids that the tokenizer adds before a plain text; [] for a chat


@dataclass
class Encoder:
    """Converts samples to token sequences, and counts truncated and dropped sequences."""

    tokenizer: Any
    cutoff: int  #: maximum number of tokens of a sequence
    train_on: TrainOn = "assistant"
    embedding_rows: int | None = None  #: number of rows of the embedding matrix; each token id must be smaller
    truncated: int = 0  #: number of sequences that were truncated to `cutoff` tokens
    dropped: int = 0  #: number of sequences that were dropped, because no trained token was left
    untrained: int = 0  #: number of samples without any tokens to train on
    lengths: "array[int]" = field(default_factory=lambda: array("q"))  #: number of tokens of each sequence before truncation
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        self.format = ChatFormat(self.tokenizer)
        ends = {self.tokenizer.eos_token_id}
        if self.tokenizer.chat_template:
            ends |= {self.format.answer_end(), self.format.answer_end(calls=True)}
        self._end_ids = sorted(end for end in ends if end is not None)
        self._end_texts = tuple(self.tokenizer.convert_ids_to_tokens(self._end_ids))
        #: One fault for each sample that the chat template rejects, or that contains a token for which the model has no
        #: embedding.
        self.faults: list[Fault] = []

    def settings(self) -> list[Any]:
        """Return the values for the cache key: all values that influence the sequences, except the samples."""
        vocabulary, template = self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template
        return [vocabulary, template, self._end_ids, self.embedding_rows, self.cutoff, self.train_on]

    def encode(self, samples: Iterable[Sample]) -> Iterator[Encoded]:
        """Yield the sequences of the samples, truncated to `cutoff` tokens.

        After the last sample, raises DatasetError if `faults` is not empty, or if nothing is left to train on.
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
        """Return the sequences of each sample, without truncation."""
        plans = [self._plan(sample) for sample in samples]
        sequences = [sequence for plan in plans for sequence in plan or ()]
        # Tokenize all parts in one call, so that the tokenizer uses all cores.
        ids = iter(self.format.split_ids([sequence.parts for sequence in sequences]))
        straddled = self._straddled(sequences)
        encoded: list[list[Encoded]] = []
        for sample, plan in zip(samples, plans, strict=True):
            made: list[Encoded] = []
            for sequence in plan or ():
                parts = next(ids)
                made += self._separately(sequence) if next(straddled) else [_assembled(sequence, parts)]
            encoded.append([] if plan is None else self._checked(sample, made))
        return encoded

    def _straddled(self, sequences: list[_Sequence]) -> Iterator[bool]:
        """Yield for each sequence whether a token would contain both the end of a prompt and the beginning of its answer.

        A server tokenizes the whole prompt of a later answer as one text. This prompt would contain such a token, but the
        training sequence would not, because prompts and answers are tokenized separately for training. The last
        answer is not checked, because no prompt contains the last answer. The ends of answers are not checked, because the
        end token never contains other text.
        """
        edges = [[_edge(answer) for answer in sequence.answers[:-1]] for sequence in sequences]
        flat = [edge for each in edges for edge in each]
        wholes, halves = self.format.ids([before + after for before, after in flat]), self.format.split_ids(flat)
        whole_edges = iter([whole == [*before, *after] for whole, (before, after) in zip(wholes, halves, strict=True)])
        for each in edges:
            found = [next(whole_edges) for _ in each]
            yield not all(found)

    def _separately(self, sequence: _Sequence) -> list[Encoded]:
        alone = [_Sequence([answer], [answer.prompt, answer.text]) for answer in sequence.answers]
        split = self.format.split_ids([each.parts for each in alone])
        return [_assembled(*each) for each in zip(alone, split, strict=True)]

    def raise_for_faults(self) -> None:
        """Raise DatasetError if `faults` is not empty."""
        if self.faults:
            shown = " ".join(str(fault) for fault in self.faults[:_SHOWN_FAULTS])
            more = len(self.faults) - _SHOWN_FAULTS
            message = f"{shown}{f' (and {more} more)' if more > 0 else ''}"
            hint = "Fix these records, or use another model."
            raise DatasetError(code="dataset_template", message=message, hint=hint, param="dataset_path")

    def _checked(self, sample: Sample, sequences: list[Encoded]) -> list[Encoded]:
        if not any(sequence.trained_tokens for sequence in sequences):
            self.untrained += 1
            self.findings.add(Code.NOTHING_TRAINED, sample.origin)
            return []
        for sequence in sequences:
            if self.embedding_rows and (beyond := max(sequence.ids)) >= self.embedding_rows:
                token = self.tokenizer.convert_ids_to_tokens(beyond)
                self.faults.append(
                    Fault(sample.origin, f"the model has no embedding for the token {token!r} (token id {beyond}).")
                )
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
                message=f"None of the {self.untrained} samples has an answer to train on: all answers have weight 0, or the "
                "chat template marks no answer.",
                hint='Remove "weight": 0 from the answers to train on, or use a model with another chat template.',
                param="dataset_path",
            )
        return DatasetError(
            code="dataset_too_long",
            message=f"In all {self.dropped} sequences, the answer begins after the cutoff of {self.cutoff} tokens, so no "
            "token is left to train on.",
            hint=f"Raise max_seq_length (the shortest sequence has {min(self.lengths)} tokens) or shorten the prompts.",
            param="max_seq_length",
        )

    def _plan(self, sample: Sample) -> list[_Sequence] | None:
        inspect_fields(sample, self.findings)
        if isinstance(sample.content, str):
            return [self._plain(sample.content)]
        try:
            return list(self._merged_sequences(self._answers(sample, sample.content)))
        except Exception as error:  # noqa: BLE001 - templates raise all kinds of exceptions
            self.faults.append(Fault(sample.origin, f"the model's chat template rejects this record: {error}"))
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
            answers = [self._with_end(_Answer(text[:begin], text[begin:end]), text[end:]) for begin, end in spans]
            for at in trained if answers else ():
                inspect_answer(sample, chat.messages[at], "".join(answer.text for answer in answers), self.findings)
        if answers:
            asked = chat.messages[: trained[-1]]
            inspect_prompt(sample, asked, chat.tools, answers[-1].prompt, self.findings)
        return answers

    def _answer(self, sample: Sample, chat: Chat, at: int) -> _Answer:
        before, message = chat.messages[:at], chat.messages[at]
        whole = self.format.render([*before, message], chat.tools)
        prompt = self.format.render(before, chat.tools, prompt=True) if before else self.format.opening(whole)
        if whole.startswith(prompt):
            answer = self._with_end(_Answer(prompt, whole[len(prompt) :]), calls=bool(message.get("tool_calls")))
        else:
            answer = self._rewritten(sample, chat, at, whole, prompt)
        inspect_answer(sample, message, answer.text, self.findings)
        return answer

    def _rewritten(self, sample: Sample, chat: Chat, at: int, whole: str, prompt: str) -> _Answer:
        """Return the answer `messages[at]`, whose prompt is not a prefix of the rendered chat.

        For example, the prompt ends with `<think>`, but the template omits the reasoning in the rendered chat.
        """
        header = self.format.header(chat.messages[:at], chat.tools, whole)
        opening = prompt.removeprefix(header).strip()
        content, reasoning = chat.messages[at]["content"], chat.messages[at].get("reasoning_content")
        if reasoning and opening == "<think>":
            content = f"{opening}\n{reasoning}\n</think>\n\n{content}"
        if opening and content.startswith(opening):
            text = content.removeprefix(opening)
            return self._with_end(_Answer(prompt, text.lstrip("\n") if prompt.endswith("\n") else text))
        self.findings.add(Code.PROMPT_DIFFERS, sample.origin, repr(opening or prompt[-20:]))
        return self._with_end(_Answer(header, whole[len(header) :]))

    def _with_end(self, answer: _Answer, rest: str = "", *, calls: bool = False) -> _Answer:
        """Add the end token to an answer.

        rest: the text that the template writes after the answer.  calls: whether the answer has tool calls.
        """
        text = answer.text.rstrip()
        if text.endswith(self._end_texts):
            return _Answer(answer.prompt, text)
        for end in self._end_texts:
            if rest.startswith(end):
                return _Answer(answer.prompt, answer.text + end)
        return _Answer(answer.prompt, text, self.format.answer_end(calls=calls))

    def _merged_sequences(self, answers: list[_Answer]) -> Iterator[_Sequence]:
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
    """parts: token ids of `sequence.parts`."""
    ids, labels = [*sequence.prefix], [*sequence.prefix]
    for answer, prompt_ids, answer_ids in zip(sequence.answers, parts[::2], parts[1::2], strict=True):
        trained = answer_ids if answer.end is None else [*answer_ids, answer.end]
        ids += prompt_ids + trained
        labels += [IGNORED] * len(prompt_ids) + trained
    return Encoded(ids, labels)


def _last_turn(encoded: Encoded) -> Encoded:
    trained = [label != IGNORED for label in encoded.labels]
    end = len(trained) - trained[::-1].index(True)
    begin = next((at for at in range(end, 0, -1) if not trained[at - 1]), 0)
    return Encoded(encoded.ids, [label if begin <= at < end else IGNORED for at, label in enumerate(encoded.labels)])
