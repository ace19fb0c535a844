"""First phase of a run: find the base model's files and load its tokenizer; no weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage.libs.finetune.data.findings import Findings
from sage.libs.finetune.data.inspection import inspect_end
from sage.libs.finetune.data.tokenizing import Encoder, TrainOn
from sage.libs.finetune.training.reporting import Reporter
from sage.libs.models.chat import ChatFormat, ensure_chat_template
from sage.libs.models.loading import check_vocabulary, embedding_rows, load_tokenizer, local_folder, tokenizer_folder
from sage.libs.models.resolve import ModelKind, resolve_model


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base model, and its loaded tokenizer."""

    folder: Path  #: contains the safetensors files and the config
    adapter: Path | None  #: folder of the adapter to train further; None: the given model is not an adapter
    tokenizer: Any
    chat_format: ChatFormat

    def encoder(self, max_seq_length: int, train_on: TrainOn) -> Encoder:
        """Return a new encoder for samples."""
        return Encoder(self.tokenizer, max_seq_length, train_on, embedding_rows(self.folder))


def open_base(name: str, report: Reporter) -> BaseFiles:
    """Resolve a model's name and load its tokenizer; raises ModelError."""
    report.progress("loading the tokenizer")
    source = resolve_model(name)
    folder = local_folder(source.base or source)
    tokenizer = load_tokenizer(tokenizer_folder(source, folder))
    check_vocabulary(tokenizer, folder)
    if warning := ensure_chat_template(tokenizer):
        report.warn(warning)
    chat_format = ChatFormat(tokenizer)
    inspect_end(folder, chat_format, found := Findings())
    report.findings(found, folder)
    return BaseFiles(folder, source.folder if source.kind is ModelKind.ADAPTER else None, tokenizer, chat_format)
