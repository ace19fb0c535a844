"""Start llama.cpp's server: find or create the GGUF file of a model, then replace this process with the server."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from sage.common.logs import configure_logging
from sage.libs.models.export.cache import cached_gguf
from sage.libs.models.export.formats import PRECISIONS, LlamaCpp
from sage.libs.models.resolve import ModelKind, resolve_model
from sage.llm.control_plane.backends.llamacpp import CONTEXT_TOKENS, SLOT_TOKENS
from sage.llm.workers.failures import exit_on_error

#: Sampling parameters. Keys: names in generation_config.json. Values: name in llama.cpp, and default value.
_SAMPLING = {"temperature": ("temp", 1.0), "top_p": ("top_p", 1.0), "top_k": ("top_k", 0), "min_p": ("min_p", 0.0),
             "repetition_penalty": ("penalty_repeat", 1.0)}  # fmt: skip


def server_options(given: argparse.Namespace) -> dict[str, Any]:
    """Create the GGUF file if it does not exist, and return the options of `llamacpp_server`.

    Raises SageError if the model is not found or cannot be converted.
    """
    source = resolve_model(given.model)
    if source.kind is ModelKind.GGUF and given.precision is None:
        file, defaults = next(source.folder.glob("*.gguf")), dict[str, Any]()
    else:
        file, defaults = cached_gguf(source, given.precision or "f32", LlamaCpp(given.interpreter))
    limit = given.context_tokens or CONTEXT_TOKENS
    context_tokens = min(limit, defaults.get("context_tokens", limit))
    chosen = defaults.get("sampling", {})
    return {
        "model": str(file), "name": given.served_name, "port": given.port, "descriptor": given.fd,
        "slots": given.slots, "context_tokens": context_tokens, "threads": given.threads, "max_tokens": given.max_tokens,
        "cache_tokens": given.cache_tokens or max(context_tokens, given.slots * SLOT_TOKENS),
        "is_exact": given.precision in (None, "f32") and bool(defaults),
        "sampling": {name: chosen.get(key, value) for key, (name, value) in _SAMPLING.items()},
    }  # fmt: skip


def main() -> None:
    """Replace this process with the server. After a SageError, print the error as the last log line and exit with code 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-name", required=True, help="The model's name in requests.")
    parser.add_argument("--interpreter", type=Path, required=True, help="Python interpreter of llama.cpp's environment.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--fd", type=int, required=True, help="File descriptor of a socket that reserves the port until the server listens."
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="Precision of the weights. Default: the precision of the GGUF file, or f32 if the model is not a GGUF file.",
    )
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--context-tokens", type=int)
    parser.add_argument("--cache-tokens", type=int)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    configure_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `sys.exit` also ends a running conversion
    with exit_on_error():
        options = server_options(given)
    script = str(Path(__file__).with_name("llamacpp_server.py"))
    os.execv(given.interpreter, [str(given.interpreter), script, json.dumps(options)])
