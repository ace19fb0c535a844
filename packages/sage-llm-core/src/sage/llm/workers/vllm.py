"""Start vLLM's server: create the model folder for vLLM, then replace this process with the server in vLLM's environment."""

import argparse
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from sage.common.logs import configure_logging
from sage.libs.models.export.copies import usable_copy
from sage.libs.models.export.folder import parameter_count
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model
from sage.llm.workers.failures import exit_on_error

_FP32_BYTES = 4


def serving_folder(source: ModelSource) -> Path:
    """Return a folder in `cache_dir/vllm` from which vLLM can serve a model. Create the folder if it does not exist.

    The folder contains the chat template and the end tokens that SAGE's own server also uses. An adapter is merged into
    its base model. For other models, the weight files are symbolic links.
    Raises SageError if the folder cannot be created.
    """
    from sage.libs.models.conversion import with_downloads
    from sage.libs.models.export.weights import write_dense
    from sage.libs.models.loading import local_folder

    source = with_downloads(source)
    is_adapter = source.kind is ModelKind.ADAPTER
    origin = source.folder if is_adapter else local_folder(source)

    def write(folder: Path) -> None:
        if is_adapter:
            write_dense(source.name, folder, fp32=True, with_modelfile=False)
        else:
            _write_links(origin, folder)

    needed_bytes = parameter_count(source) * _FP32_BYTES if is_adapter else 0
    return usable_copy("vllm", _key(source, origin), needed_bytes, write)


def _key(source: ModelSource, origin: Path) -> str:
    """Return a name for the folder. The name changes if a file of the model changes."""
    folders = [origin, source.base.folder] if source.base else [origin]
    files = sorted(file for folder in folders for file in folder.iterdir() if file.is_file())
    facts = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat())]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _write_links(origin: Path, folder: Path) -> None:
    from transformers import GenerationConfig

    from sage.libs.models.chat import ChatFormat, ensure_chat_template
    from sage.libs.models.loading import load_tokenizer, model_config

    tokenizer = load_tokenizer(origin)
    ensure_chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    config: Any = model_config(origin)
    has_settings = (origin / "generation_config.json").is_file()
    settings = GenerationConfig.from_pretrained(origin) if has_settings else GenerationConfig.from_model_config(config)
    settings.eos_token_id = ChatFormat(tokenizer).end_ids(settings.eos_token_id)
    settings.do_sample = True  # required by transformers to save sampling settings
    settings.save_pretrained(folder)
    for file in origin.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())


def main() -> None:
    """Replace this process with the server. If this fails, print the SageError as the last line and exit with code 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--interpreter", required=True, help="Python interpreter of vLLM's environment.")
    given, options = parser.parse_known_args()
    configure_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with exit_on_error():
        folder = serving_folder(resolve_model(given.model))
    script = Path(__file__).with_name("vllm_server.py")
    os.execv(given.interpreter, [given.interpreter, "-I", str(script), "--model", str(folder), *options])
