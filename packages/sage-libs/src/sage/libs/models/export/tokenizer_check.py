"""Tokenize prompts with llama.cpp, as one step of an export. SAGE compares the tokens with the tokens of transformers.

The step runs in the interpreter of llama.cpp's environment, and imports no module of SAGE.
"""

import http.client
import json
import sys
from typing import Any

import xllamacpp


def tokens_of(address: str, messages: list[dict[str, Any]]) -> list[int]:
    """Return the token ids of a chat's prompt; the server at `address` renders and tokenizes the prompt."""
    prompt = _post(address, "/apply-template", {"messages": messages})["prompt"]
    request = {"content": prompt, "add_special": True, "parse_special": True}
    return list(_post(address, "/tokenize", request)["tokens"])


def _post(address: str, path: str, body: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return json.load(connection.getresponse())


def main() -> None:
    """Read chats from standard input, and print the token ids of their prompts. The command-line argument is a GGUF file."""
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 512, 1, False, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    chats = json.load(sys.stdin)
    print(json.dumps({"value": [tokens_of(server.listening_address, chat) for chat in chats]}))


if __name__ == "__main__":
    main()
