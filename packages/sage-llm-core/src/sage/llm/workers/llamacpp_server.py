"""Serve a GGUF file with llama.cpp's HTTP server. This module runs in llama.cpp's environment, without SAGE's packages."""

import json
import os
import signal
import sys
from typing import Any

import xllamacpp

_F32, _BF16 = xllamacpp.ggml_type.GGML_TYPE_F32, xllamacpp.ggml_type.GGML_TYPE_BF16


def parameters(given: dict[str, Any]) -> Any:
    """Return the parameters of llama.cpp's server.  given: the options that `server_options` in llamacpp.py returns."""
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = given["model"], {given["name"]}
    params.hostnames, params.port = ["127.0.0.1"], given["port"]
    params.endpoint_metrics = True
    params.api_keys = [os.environ["SAGE_SERVER_KEY"]]  # without a key, web pages could use the server
    # All slots share one cache.
    params.n_ctx, params.n_parallel, params.kv_unified = given["cache_tokens"], given["slots"], True
    params.kv_unified_per_slot = given["context_tokens"]
    params.n_predict, params.use_jinja, params.ui = given["max_tokens"], True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    params.cpuparams.poll = 0  # waiting threads sleep, because a training run can need the cores
    if given["is_exact"]:
        params.cache_type_k = params.cache_type_v = _F32
    for name, value in given["sampling"].items():
        setattr(params.sampling, name, value)
    return params


def main() -> None:
    """Serve until SIGTERM or SIGINT, then exit immediately, even if answers are in progress."""
    given = json.loads(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    os.close(given["descriptor"])  # the launcher's socket, which reserved the port until now
    server = xllamacpp.Server(parameters(given))
    print(f"serving {given['name']} at {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)


if __name__ == "__main__":
    main()
