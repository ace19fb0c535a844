"""Serve chats and completions with OpenVINO: `python -m sage.llm.workers openvino --model M --port P`.

The server runs in the environment of the OpenVINO backend, and imports SAGE, torch and transformers from SAGE's environment.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from transformers import GenerationConfig

from sage.libs.models.export.cache import cached_openvino
from sage.libs.models.export.formats import OPENVINO_PRECISIONS, OpenVino
from sage.libs.models.loading import model_config
from sage.libs.models.resolve import resolve_model
from sage.llm.workers import server
from sage.llm.workers.generation import Engine, create_server
from sage.llm.workers.generator import Generator
from sage.llm.workers.paged import PagedRunner


class OpenVinoGenerator(Generator):
    """A model in OpenVINO's format."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Load the converted model. If the cache does not contain it yet, convert the model first.

        If the model is an adapter, the base model merged with the adapter is converted. Raises SageError.
        """
        source = resolve_model(given.model)
        folder = cached_openvino(source, given.quantize, OpenVino(Path(sys.executable)))
        config: Any = model_config(folder)
        self.folder = source.folder
        self.context_tokens = min(config.max_position_embeddings, given.context_tokens or config.max_position_embeddings)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.embeddings = config.vocab_size
        self.voice = self.voice_of(folder)
        self.runner = PagedRunner(folder, given.slots, self.context_tokens, given.threads)


def build(given: argparse.Namespace) -> FastAPI:
    """Load the model and return the server. Raises SageError."""
    return create_server(
        Engine(OpenVinoGenerator(given), given.max_tokens, given.slots, given.served_name, given.cache_tokens)
    )


def main() -> None:
    """Serve until SIGTERM."""
    options = server.parser()
    options.add_argument("--served-name", required=True, help="The model's name in requests.")
    options.add_argument("--quantize", choices=OPENVINO_PRECISIONS, required=True)
    options.add_argument("--slots", type=int, required=True, help="Maximum number of answers in progress at the same time.")
    options.add_argument(
        "--context-tokens", type=int, help="Context length in tokens; default and maximum: the context length of the model."
    )
    options.add_argument("--cache-tokens", type=int, help="Maximum total tokens of all prompts and answers in progress.")
    options.add_argument(
        "--max-tokens", type=int, required=True, help="Maximum tokens of an answer, if the request sets no maximum."
    )
    options.add_argument("--threads", type=int, required=True)
    given = options.parse_args()
    server.run(lambda: build(given), given)
