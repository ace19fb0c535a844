"""Compare SAGE's training speed with LLaMA-Factory and TRL on one machine: `make bench-train`.

The folder DATA contains the samples (`alpaca_train.jsonl`, `alpaca_eval.jsonl`). It also contains the scripts that run the
other trainers (`llamafactory_peer.sh`, `trl_peer.py`) and measure an adapter's held-out loss (`heldout_loss.py`).
All programs do the same training: SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, one epoch, loss on the completions.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sage.libs.finetune import FinetuneConfig, FinetuneManager
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.tokenizing import Encoder
from sage.libs.finetune.manager import WORKER_ENVIRONMENT
from sage.libs.models.loading import load_tokenizer, local_folder
from sage.libs.models.resolve import resolve_model
from sage.llm.control_plane.backends.speeds import processor

MODEL, CUTOFF = "smollm2-135m-instruct", 512
PACK_TOKENS = 800


@dataclass
class Run:
    """The measurements of one training run."""

    train_seconds: float
    other_seconds: float  #: time for start-up, loading and saving
    peak_bytes: int
    adapter: Path
    heldout_loss: float | None = None  #: None except for the first run of a row


class Bench:
    """Trains with SAGE, LLaMA-Factory or TRL; data: folder of samples and scripts; work: folder of the outputs."""

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data, work
        self.model = local_folder(resolve_model(MODEL))
        tokenizer = load_tokenizer(self.model)
        samples = read_samples(DatasetReport(data / "alpaca_train.jsonl"))
        self.tokens = sum(len(sequence.ids) for sequence in Encoder(tokenizer, CUTOFF).encode(samples))

    def ours(self, **options: Any) -> Run:
        """Train with SAGE in a worker process, as an engine does."""
        output = self.work / f"ours-{time.time_ns()}"
        manager = FinetuneManager(self.work / "runs")
        config = FinetuneConfig(
            base_model=str(self.model), dataset_path=str(self.data / "alpaca_train.jsonl"), output_dir=str(output),
            num_epochs=1, max_seq_length=CUTOFF, save_steps=10_000, **options,
        )  # fmt: skip
        seconds, peak_bytes, events = trained(manager, manager.create(config))
        # Time of the last event of each kind.
        times = {event["event"]: datetime.fromisoformat(event["time"]) for event in events}
        train = (times["step"] - times["started"]).total_seconds()
        return Run(train, seconds - train, peak_bytes, output)

    def llama_factory(self, mode: str, precision: str = "bf16") -> Run:
        """Train with LLaMA-Factory. The training time and the peak memory are read from the output of its script."""
        output = self.work / f"llama-factory-{time.time_ns()}"
        script = self.data / "llamafactory_peer.sh"
        text = script.read_text()
        if precision == "fp32":  # the script uses bf16, but some processors are faster in fp32
            text = text.replace("bf16: true", "bf16: false")
        argv = ["bash", "-c", text, str(script), str(self.work / "llama-factory"), str(self.model), str(output), mode]
        seconds, _, text = measured(argv)
        hours, minutes, rest = re.search(r"train_runtime\s*=\s*(\d+):(\d+):([\d.]+)", text).groups()  # type: ignore[union-attr]
        peak_kib = int(re.search(r"Maximum resident.*: (\d+)", text)[1])  # type: ignore[index]
        train = int(hours) * 3600 + int(minutes) * 60 + float(rest)
        return Run(train, seconds - train, peak_kib * 1024, output)

    def trl(self, precision: str) -> Run:
        """Train with TRL's SFTTrainer in a separate Python environment."""
        output, python = self.work / f"trl-{time.time_ns()}", self.work / "trl/bin/python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
            for wanted in ([f"torch=={torch.__version__.split('+')[0]}"], ["trl", "peft", "datasets"]):
                subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        data = str(self.data / "alpaca_train.jsonl")
        argv = [str(python), str(self.data / "trl_peer.py"), str(self.model), data, str(output), precision]
        seconds, peak_bytes, text = measured(argv)
        train = float(re.search(r"train_seconds ([\d.]+)", text)[1])  # type: ignore[index]
        return Run(train, seconds - train, peak_bytes, output)

    def heldout_loss(self, adapter: Path) -> float:
        """Return an adapter's loss on the held-out chats, in fp32. A script that does not use SAGE computes the loss."""
        argv = [sys.executable, str(self.data / "heldout_loss.py"), str(self.model), str(adapter)]
        return float(re.search(r"heldout_loss ([\d.]+)", measured(argv)[2])[1])  # type: ignore[index]


def _packed(how: str, **options: Any) -> tuple[str, Callable[[Bench], Run]]:
    """Return a row that trains with SAGE and packs samples to `PACK_TOKENS`, as in the packed rows of LLaMA-Factory.

    how: end of the row's title.  options: further options of FinetuneConfig.
    """
    return f"SAGE, packed to {PACK_TOKENS} tokens{how}", lambda b: b.ours(pack_tokens=PACK_TOKENS, **options)


ROWS: dict[str, tuple[str, Callable[[Bench], Run]]] = {
    "sage-packed": _packed(""),
    "sage": ("SAGE, four samples per micro-batch", lambda b: b.ours()),
    "sage-packed-bf16": _packed(", bf16", precision="bf16"),
    "sage-packed-whole": _packed(", base not quantized", quantization="none"),
    "sage-8bit": _packed(", bitsandbytes in 8 bits", quantization="8bit"),
    "sage-4bit": _packed(", bitsandbytes in 4 bits", quantization="4bit"),
    "sage-fp32": ("SAGE, four samples per micro-batch, fp32", lambda b: b.ours(precision="fp32")),
    "llama-factory-packed": ("LLaMA-Factory, bf16, neat packing to 800", lambda b: b.llama_factory("packed")),
    "llama-factory-packed-fp32": (
        "LLaMA-Factory, fp32, neat packing to 800",
        lambda b: b.llama_factory("packed", "fp32"),
    ),
    "llama-factory-bf16": ("LLaMA-Factory, bf16", lambda b: b.llama_factory("bf16")),
    "llama-factory-fp32": ("LLaMA-Factory, fp32", lambda b: b.llama_factory("fp32")),
    "trl-bf16": ("TRL SFTTrainer, bf16", lambda b: b.trl("bf16")),
    "trl-fp32": ("TRL SFTTrainer, fp32", lambda b: b.trl("fp32")),
}


def trained(manager: FinetuneManager, task: str) -> tuple[float, int, list[dict[str, Any]]]:
    """Train in a worker process; return the wall time in seconds, the peak memory in bytes, and the events of the run."""
    worker = [sys.executable, "-m", "sage.libs.finetune.worker", str(manager.run_directory(task).path)]
    seconds, peak_bytes, _ = measured(worker, WORKER_ENVIRONMENT)
    events = [event.model_dump(mode="json") for event, _ in manager.events(task)]
    assert events[-1]["event"] == "finished", manager.logs(task, 5)
    return seconds, peak_bytes, events


def measured(argv: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> tuple[float, int, str]:
    """Run a command; return the wall time in seconds, the peak memory of the process in bytes, and the printed text."""
    began = time.perf_counter()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        assert process.stdout
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(argv)} failed:\n{text[-3000:]}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024, text


def main() -> None:
    """Train each row once per round, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/bench"))
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to measure, separated by commas: " + ", ".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train"))
    arguments = parser.parse_args()
    bench = Bench(arguments.data.resolve(), arguments.work.resolve())
    runs: dict[str, list[Run]] = {name: [] for name in arguments.rows.split(",")}
    for turn in range(arguments.rounds):
        for name, done in runs.items():
            done.append(ROWS[name][1](bench))
            if not turn:
                done[0].heldout_loss = bench.heldout_loss(done[0].adapter)
            print(f"round {turn + 1}: {name}: {done[-1].train_seconds:.1f} s", file=sys.stderr, flush=True)
        write(arguments.out, runs, bench)  # after every round, so that an interruption does not lose earlier results


def write(out: Path, runs: dict[str, list[Run]], bench: Bench) -> None:
    """Write the results as JSON, as a table and as a chart."""
    rows = [row(name, done, bench) for name, done in runs.items()]
    machine = {
        "processor": processor(), "cores": os.cpu_count(), "bf16": bool(torch.cpu.get_capabilities().get("avx512_bf16")),
        "amx": bool(torch.cpu.get_capabilities().get("amx_bf16")), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}, "tokens": bench.tokens,
    }  # fmt: skip
    details = {name: [{**asdict(run), "adapter": None} for run in done] for name, done in runs.items()}
    out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows, "runs": details}, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(rows, machine))
    out.with_suffix(".svg").write_text(picture(rows))
    print(table(rows, machine), flush=True)


def row(name: str, runs: list[Run], bench: Bench) -> dict[str, Any]:
    """Return a row's results: median times of the runs, highest peak memory, and the held-out loss of the first run."""
    train = statistics.median(run.train_seconds for run in runs)
    return {
        "name": ROWS[name][0],
        "runs": len(runs),
        "train_seconds": round(train, 1),
        "tokens_per_second": round(bench.tokens / train),
        "peak_gb": round(max(run.peak_bytes for run in runs) / 1e9, 2),
        "other_seconds": round(statistics.median(run.other_seconds for run in runs), 1),
        "heldout_loss": runs[0].heldout_loss,
    }


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        "| trainer | runs | train seconds | tokens/s | peak RSS | start-up and saving | held-out loss |\n"
        + "|---" * 7
        + "|\n"
    )
    lines = [
        f"| {r['name']} | {r['runs']} | {r['train_seconds']} | {r['tokens_per_second']} | {r['peak_gb']} GB | "
        f"{r['other_seconds']} s | {r['heldout_loss']:.4f} |\n"
        for r in rows
    ]
    return f"{machine['processor']}, {machine['cores']} cores; {machine['tokens']} tokens.\n\n{head}{''.join(lines)}"


def picture(rows: list[dict[str, Any]]) -> str:
    """Return an SVG bar chart of the rows' speeds."""
    scale = 300 / max(r["tokens_per_second"] for r in rows)
    bars = "".join(
        f'<text x="300" y="{28 + 30 * i}" text-anchor="end">{r["name"]}</text>'
        f'<rect x="310" y="{12 + 30 * i}" width="{scale * r["tokens_per_second"]:.0f}" height="22" '
        f'fill="{"#2563eb" if r["name"].startswith("SAGE") else "#94a3b8"}"/>'
        f'<text x="{318 + scale * r["tokens_per_second"]:.0f}" y="{28 + 30 * i}">{r["tokens_per_second"]} tokens/s</text>'
        for i, r in enumerate(rows)
    )
    size = f'width="760" height="{20 + 30 * len(rows)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="14">{bars}</svg>\n'


if __name__ == "__main__":
    main()
