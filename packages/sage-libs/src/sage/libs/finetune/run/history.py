"""Find out from earlier runs on this machine which number formats a new run will have, and how fast it will be."""

import contextlib
import heapq
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.quantization import find_bitsandbytes, may_quantize_base
from sage.libs.finetune.run.estimate import Formats
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.summary import read_status

_SEARCHED_RUNS = 100
#: Decisive options: the options that decide the number formats and the speed of a run.
_DECISIVE = ("base_model", "finetuning_type", "method", "precision", "use_8bit", "quantization", "fast_kernels")
#: Typical number of bytes per token in a dataset with English text.
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class EarlierRun:
    """The number formats and the speed of an earlier run."""

    formats: Formats
    tokens_per_second: float | None


def earlier_run(root: Path, config: FinetuneConfig) -> EarlierRun | None:
    """Return the number formats and the speed of the newest run that had the same decisive options as `config`.

    Returns None if there is no such run.

    root: folder of the run directories.
    """
    wanted = config.model_dump(mode="json", include=set(_DECISIVE))
    for run in _newest(root):
        # Skip damaged runs, and runs that a newer version of SAGE created.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(run.spec_path.read_bytes())["config"]
            if any(found[name] != value for name, value in wanted.items()):
                continue
            status = read_status(run)
            if status.bf16 is not None:
                formats = Formats(status.bf16, bool(status.bf16_products), status.base_bits, bool(status.int8_products))
                return EarlierRun(formats, status.metrics.tokens_per_second)
    return None


def default_formats(config: FinetuneConfig, device: str) -> Formats:
    """Return the number formats that a run will probably have, if there is no earlier run.

    If a measurement at the start of the run decides on a format, the format that needs the most memory is assumed.
    device: `cpu` or `cuda`.
    """
    if config.finetuning_type == "full":
        return Formats(bf16_products=config.precision == "bf16")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device == "cuda")
    bits = None if config.quantization in (None, "none") else int(config.quantization[0])
    return Formats(bf16, bf16, bits)


def smallest_formats(config: FinetuneConfig, formats: Formats, device: str) -> Formats:
    """Return the number formats that a run has if memory is scarce.  formats: those that it has otherwise."""
    may_quantize = device == "cuda" and may_quantize_base(config) and find_bitsandbytes() is not None
    return replace(formats, base_bits=8) if may_quantize and formats.base_bits is None else formats


def training_seconds(config: FinetuneConfig, tokens_per_second: float | None) -> float | None:
    """Return the expected duration of a run's steps, or None if the speed or the number of tokens is not known."""
    tokens = _tokens(config)
    return tokens / tokens_per_second if tokens and tokens_per_second else None


def _tokens(config: FinetuneConfig) -> float | None:
    if config.max_steps and config.pack_tokens:
        return config.max_steps * config.gradient_accumulation_steps * config.pack_tokens * config.num_processes
    if config.max_steps or not all(source.path.is_file() for source in config.sources):
        return None
    size_bytes = sum(source.path.stat().st_size * source.weight for source in config.sources)
    return config.num_epochs * (1 - config.eval_split) * size_bytes / _TOKEN_BYTES


def _newest(root: Path) -> Iterator[RunDirectory]:
    if not root.is_dir():
        return
    with os.scandir(root) as entries:
        changed = [(entry.stat().st_mtime, entry.path) for entry in entries if entry.is_dir()]
    yield from (RunDirectory(Path(path)) for _, path in heapq.nlargest(_SEARCHED_RUNS, changed))
