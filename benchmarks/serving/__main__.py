"""Measure the installed backends with SmolLM2-135M-Instruct.

The cases are the base model, one adapter and 16 adapters, with direct requests and with requests through the gateway.
The results are printed and written to `serving.md` and `serving.json` in `benchmarks/results`, or on a machine with a GPU to
`gpu-serving.md` and `gpu-serving.json`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from machine import machine
from train import MODEL

from sage.libs.models.loading import local_folder
from sage.libs.models.resolve import resolve_model
from sage.llm.client.types import BackendView
from serving import report
from serving.home import gateway
from serving.measuring import SAME_PRECISION, Result, run


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="transformers,vllm,llamacpp,openvino,openvino:int8",
                        help="names, separated by commas; NAME:int8 or NAME:int4 quantizes the weights")  # fmt: skip
    parser.add_argument(
        "--answers", type=int, default=16, help="answers with 16 requests at a time; an eighth of it with one"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: for transformers and vllm only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        home = Path(work)
        base = local_folder(resolve_model(MODEL))
        adapters = [home / "adapters" / f"adapter-{number:02}" for number in range(arguments.adapters)]
        making = [sys.executable, "-m", "serving.models", str(base), str(home / "adapters"), str(len(adapters))]
        # A separate process is used, because the script imports torch.
        subprocess.run(making, check=True, cwd=Path(__file__).parents[1])
        results = []
        with gateway(home) as client:
            known = {backend.name: backend for backend in client.backends()}
            for candidate in arguments.backends.split(","):
                result = _result(candidate, known, arguments.dtype)
                results.append(result)
                if result.reason:
                    continue
                try:
                    run(client, result, base, adapters, answers=arguments.answers, tokens=arguments.tokens)
                except Exception as error:  # noqa: BLE001 # continue with the other backends
                    result.reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        what = f"SmolLM2-135M-Instruct, answers of {arguments.tokens} tokens, adapters of rank 8 in all linear layers."
        print(report.write(results, machine(), what))


def _result(candidate: str, known: Mapping[str, BackendView], dtype: str) -> Result:
    name, _, quantize = candidate.partition(":")
    backend = known.get(name)
    if backend is None:
        return Result(name, "", "", reason="this version does not have this backend")
    options, precision = SAME_PRECISION.get(name, ({}, "the default"))
    if quantize:
        options, precision = {"quantize": quantize}, quantize
    elif "dtype" in options:
        options, precision = {"dtype": dtype}, dtype
    result = Result(name, backend.version, precision, options)
    result.reason = "" if backend.is_installed else f"not installed: `sage backend install {name}`"
    return result


if __name__ == "__main__":
    main()
