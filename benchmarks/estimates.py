"""Compare the estimated memory of training runs with the measured peak, and write benchmarks/results/estimates.md.

Each run has its own process and trains two steps, because the optimizer's state is allocated at the end of the first step.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sage.common.processes import spawn
from sage.common.training import StartedEvent, StepEvent
from sage.libs.finetune import FinetuneConfig, FinetuneManager
from sage.libs.finetune.run.estimate import Formats, TrainingMemory, expected_kernels
from sage.libs.models.architecture import Architecture
from sage.libs.models.resolve import resolve_model
from sage.llm.control_plane.backends.memory import sizes_of
from sage.llm.control_plane.backends.speeds import processor

_FILE = Path(__file__).parent / "results" / "estimates.json"
MODEL = "smollm2-135m-instruct"
#: About four tokens of SmolLM2.
_WORDS = "several small words follow "
_PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "use_8bit": False},
    "bf16": {"precision": "bf16", "use_8bit": False},
    "8-bit base": {"precision": "auto"},
}
#: A worker that uses SAGE's 8-bit base.
_INT8_WORKER = """
import sys
from sage.libs.finetune import worker
from sage.libs.finetune.kernels import int8
int8.measured_speedup = lambda *_: (2.0, "forced")
sys.exit(worker.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Case:
    """Options of one run."""

    precision: str
    rank: int
    pack_tokens: int
    sample_tokens: int
    fast_kernels: str = "auto"
    finetuning_type: str = "lora"

    @property
    def name(self) -> str:
        """The case as a short text, which is the key of its result."""
        return " ".join(map(str, vars(self).values()))

    def options(self) -> dict[str, Any]:
        """Return the options of the run, without its files."""
        lora = {"lora_rank": self.rank} if self.finetuning_type == "lora" else {"quantization": None}
        of_precision = _PRECISIONS[self.precision]
        return {"base_model": MODEL, "pack_tokens": self.pack_tokens, "max_seq_length": self.sample_tokens,
                "max_steps": 2, "train_on": "all", "fast_kernels": self.fast_kernels, "gradient_checkpointing": "off",
                "finetuning_type": self.finetuning_type, "allow_warnings": True, **of_precision, **lora}  # fmt: skip


CASES = [
    *(
        Case(precision, rank, pack_tokens, 256)
        for precision, rank, pack_tokens in itertools.product(_PRECISIONS, (8, 64), (512, 2048, 4096))
    ),
    *(Case(precision, 8, tokens, tokens) for precision in _PRECISIONS for tokens in (1024, 4096)),
    *(Case(precision, 8, 1024, 256, fast_kernels="off") for precision in ("fp32", "bf16")),
    Case("fp32", 8, 512, 256, finetuning_type="full"),
]


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Train two steps; return the peak memory and the number formats that were used."""
    words = _WORDS * (case.sample_tokens // 4)
    chat = {"messages": [{"role": "user", "content": "Write."}, {"role": "assistant", "content": words}]}
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for _ in range(4 * max(1, case.pack_tokens // case.sample_tokens))))
    manager = FinetuneManager(folder / "runs")
    config = FinetuneConfig.model_validate({**case.options(), "dataset_path": str(data), "output_dir": str(folder / "out")})
    task = manager.create(config)
    spec = manager.process_spec(task)
    # Without _INT8_WORKER, the worker measures int8 products and does not use them if a busy machine makes them slow.
    if case.precision == "8-bit base":
        spec = replace(spec, argv=(sys.executable, "-c", _INT8_WORKER, *spec.argv[3:]))
    spawn(spec)
    while manager.process(task):
        time.sleep(0.2)
    events = [event for event, _ in manager.events(task)]
    steps = [event for event in events if isinstance(event, StepEvent)]
    if len(steps) != 2:
        raise SystemExit("\n".join([f"{case} failed:", *manager.logs(task)]))
    started = next(event for event in events if isinstance(event, StartedEvent))
    return {
        "peak_bytes": steps[-1].peak_memory_bytes,
        "bf16": started.bf16,
        "bf16_products": started.bf16_products,
        "int8": started.int8_products,
    }


def estimated_bytes(case: Case, measured: dict[str, Any], sizes: Architecture) -> int:
    """Return the estimate for the number formats that the run had."""
    formats = Formats(measured["bf16"], measured["bf16_products"], None, measured["int8"])
    config = FinetuneConfig.model_validate({**case.options(), "dataset_path": "d", "output_dir": "o"})
    has_kernels = expected_kernels(config, formats)
    samples = max(1, case.pack_tokens // case.sample_tokens)
    return TrainingMemory(sizes, config, formats, has_kernels).at({case.sample_tokens: samples}).total_bytes


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the page with one row for each measured case."""
    sizes = sizes_of(resolve_model(MODEL))
    assert sizes
    lines = [
        f"{processor()}. SmolLM2-135M-Instruct, two steps, one process for each run. The estimate uses only the config",
        "and the headers of the weight files. `make bench-estimates` measures the cases that are not in estimates.json.",
        "",
        "| precision | step | rank | tokens | samples of | estimate | measured peak | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        if not (measured := results.get(case.name)):
            continue
        estimate, peak = estimated_bytes(case, measured, sizes), measured["peak_bytes"]
        products = "" if measured["bf16"] == measured["bf16_products"] else ", products in fp32"
        precision = f"{'8-bit base, ' if measured['int8'] else ''}{'bf16' if measured['bf16'] else 'fp32'}{products}"
        step = "full" if case.finetuning_type == "full" else "SAGE" if case.fast_kernels == "auto" else "PEFT"
        rank = "" if step == "full" else case.rank
        lines.append(
            f"| {precision} | {step} | {rank} | {case.pack_tokens:,} | {case.sample_tokens:,} "
            f"| {estimate / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {estimate / peak - 1:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the cases that have no result yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="Run only the cases whose text contains this text.")
    given = parser.parse_args()
    results = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    for case in CASES:
        if given.only in case.name and case.name not in results:
            with tempfile.TemporaryDirectory() as folder:
                results[case.name] = measure(case, Path(folder))
            print(case.name, results[case.name], flush=True)
            _FILE.write_text(json.dumps(results, indent=1) + "\n")
    _FILE.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
