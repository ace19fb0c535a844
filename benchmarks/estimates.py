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

RESULTS = Path(__file__).parent / "results"
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
    model: str = MODEL

    def options(self) -> dict[str, Any]:
        """Return the options of the run, without its files."""
        lora = {"lora_rank": self.rank} if self.finetuning_type == "lora" else {"quantization": None}
        of_precision = _PRECISIONS[self.precision]
        return {"base_model": self.model, "pack_tokens": self.pack_tokens, "max_seq_length": self.sample_tokens,
                "max_steps": 2, "train_on": "all", "fast_kernels": self.fast_kernels, "gradient_checkpointing": "off",
                "finetuning_type": self.finetuning_type, "allow_warnings": True, **of_precision, **lora}  # fmt: skip


CASES = [
    *(
        Case(precision, rank, pack_tokens, 256)
        for precision, rank, pack_tokens in itertools.product(_PRECISIONS, (8, 64), (512, 2048, 8192))
    ),
    *(Case(precision, 8, 4096, length) for precision in _PRECISIONS for length in (1024, 4096)),
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
    if case.precision == "8-bit base":  # on a busy machine, the measured speed of int8 products would decide
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
        "peak_bytes": steps[-1].peak_memory_bytes, "estimated_bytes": started.estimated_memory_bytes,
        "precision": started.precision, "kernels": started.kernels,
    }  # fmt: skip


def main() -> None:
    """Measure the cases and print one JSON object for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="Run only the cases whose text contains this text.")
    given = parser.parse_args()
    for case in CASES:
        if given.only not in str(case):
            continue
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(case, Path(folder))
        print(json.dumps({**vars(case), **measured}), flush=True)


if __name__ == "__main__":
    main()
