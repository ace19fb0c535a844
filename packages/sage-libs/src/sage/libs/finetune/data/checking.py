"""Convert samples to tokens with a model's chat template, to check or show the samples without training."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sage.libs.finetune.data.inspection import inspect_end
from sage.libs.finetune.data.samples import Chat, Sample
from sage.libs.finetune.data.tokenizing import Encoder, TrainOn
from sage.libs.models.chat import ensure_chat_template
from sage.libs.models.loading import check_vocabulary, embedding_rows, load_tokenizer, local_folder, tokenizer_folder
from sage.libs.models.resolve import resolve_model

#: Fields of a preference row that contain an answer to the prompt of the row.
_ANSWERS = ("chosen", "rejected", "completion")


def load_encoder(model: str, cutoff: int, train_on: TrainOn = "assistant") -> Encoder:
    """Return an encoder for a model. The encoder's `findings` contain the findings about the model.

    Raises SageError if the model or its tokenizer cannot be loaded.
    """
    source = resolve_model(model, Path.cwd())
    base = local_folder(source.base or source)
    tokenizer = load_tokenizer(tokenizer_folder(source, base))
    check_vocabulary(tokenizer, base)
    ensure_chat_template(tokenizer)
    encoder = Encoder(tokenizer, cutoff, train_on, embedding_rows(base))
    inspect_end(base, encoder.format, encoder.findings)
    return encoder


def as_chats(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield each sample as a chat or text. A preference row yields one chat per answer; a row without answers is skipped."""
    for sample in samples:
        if isinstance(sample.content, str | Chat):
            yield sample
            continue
        for answer in (sample.content[name] for name in _ANSWERS if name in sample.content):
            yield replace(sample, content=Chat([*sample.content["prompt"], *answer]))
