"""The step of an export that compares llama.cpp's tokens with those of transformers.

It runs under the interpreter of llama.cpp's environment, and imports nothing of SAGE.
"""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def tokens_of(address: str, messages: list[dict[str, Any]]) -> list[int]:
    """Return the tokens of a chat's prompt, as the server makes them."""
    prompt = _post(f"{address}/apply-template", {"messages": messages})["prompt"]
    request = {"content": prompt, "add_special": True, "parse_special": True}
    return list(_post(f"{address}/tokenize", request)["tokens"])


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    """Print the tokens of each chat on standard input, with the GGUF file that the command line names."""
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 512, 1, False, True
    server = xllamacpp.Server(params)
    chats = json.load(sys.stdin)
    print(json.dumps({"value": [tokens_of(server.listening_address, chat) for chat in chats]}))


if __name__ == "__main__":
    main()
