"""Compare SAGE's training step on a GPU with TRL, TRL with Liger kernels, and Unsloth.

The models are SmolLM2-135M and larger models with random weights. The values of the weights do not change the speed.
The peers are TRL and Unsloth. Each peer runs in a separate Python environment: `--plain PYTHON` (trl, peft, datasets),
`--liger PYTHON` (also liger-kernel), `--unsloth PYTHON` (unsloth). A peer whose option is missing is not measured.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from train import MODEL, measured
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sage.libs.finetune import FinetuneConfig, FinetuneManager
from sage.libs.models.loading import load_tokenizer, local_folder
from sage.libs.models.resolve import resolve_model

#: Configurations with the published shapes of Llama-3.2-1B and Qwen2.5-7B, and of a tiny model to test this benchmark.
SHAPES = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "tiny": LlamaConfig(
        vocab_size=49_152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip


def model_folder(name: str, work: Path) -> Path:
    """Return the folder of the 135M model, or of a model with random weights, which the first call creates."""
    real = local_folder(resolve_model(MODEL))
    folder = work / "models" / name
    if name == MODEL or (folder / "config.json").exists():
        return real if name == MODEL else folder
    tokenizer = load_tokenizer(real)
    config = SHAPES[name]
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ours(model: Path, data: Path, work: Path, tokens: int, steps: int, quantization: str = "none") -> dict[str, float]:
    """Train with SAGE in a worker process; return tokens/s (without the first third of steps) and peak memory.

    quantization: the value of the run's option: `none`, `8bit` or `4bit`.
    """
    manager = FinetuneManager(work / "runs")
    config = FinetuneConfig(
        base_model=str(model), dataset_path=str(data), output_dir=str(work / f"gpu-{time.time_ns()}"), pack_tokens=tokens,
        max_seq_length=tokens, max_steps=steps, save_steps=10_000, quantization=quantization, warmup_steps=0,
    )  # fmt: skip
    task = manager.create(config)
    measured([sys.executable, "-m", "sage.libs.finetune.worker", str(manager.run_directory(task).path)])
    events = [event.model_dump(mode="json") for event, _ in manager.events(task) if event.event in ("started", "step")]
    begin, *ends = (datetime.fromisoformat(event["time"]) for event in events)
    # `tokens_per_second` of an event is the mean over all steps so far.
    tokens_per_step = events[-1]["tokens_per_second"] * (ends[-1] - begin).total_seconds() / len(ends)
    warm = len(ends) // 3
    seconds = (ends[-1] - ends[warm]).total_seconds() / (len(ends) - 1 - warm)
    return {"tokens_per_second": tokens_per_step / seconds, "peak_bytes": max(event["memory_bytes"] for event in events[1:])}


def peer(python: str, kind: str, model: Path, data: Path, tokens: int, steps: int) -> dict[str, float]:
    """Train with a peer in its environment; return tokens/s and peak memory."""
    script = str(Path(__file__).with_name("gpu_peer.py"))
    text = measured([python, script, kind, str(model), str(data), str(tokens), str(steps)])[2]
    return dict(json.loads(re.search(r"FIGURES (.*)", text)[1]))  # type: ignore[index]


def main() -> None:
    """Run SAGE and the peers alternately, print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/bench/alpaca_train.jsonl"))
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--models", default=f"{MODEL},llama-3.2-1b,qwen2.5-7b")
    parser.add_argument("--plain", help="Python interpreter of an environment with TRL")
    parser.add_argument("--liger", help="Python interpreter of an environment with TRL and Liger kernels")
    parser.add_argument("--unsloth", help="Python interpreter of an environment with Unsloth")
    parser.add_argument("--quantized", default="", help="also measure SAGE with these values of `quantization`: 8bit,4bit")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.md"))
    arguments = parser.parse_args()
    work, data = arguments.work.resolve(), arguments.data.resolve()
    kinds = [kind for kind in ("plain", "liger", "unsloth") if getattr(arguments, kind)]
    quantized = [value for value in arguments.quantized.split(",") if value]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [f"{device}; packed to {arguments.tokens} tokens; {arguments.rounds} rounds.", ""]
    lines += ["| model | trainer | tokens/s | peak memory |", "|---|---|---|---|"]
    for name in arguments.models.split(","):
        model = model_folder(name, work)
        runs: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(arguments.rounds):
            runs["SAGE"].append(ours(model, data, work, arguments.tokens, arguments.steps))
            for value in quantized:
                runs[f"SAGE, {value}"].append(ours(model, data, work, arguments.tokens, arguments.steps, value))
            for kind in kinds:
                runs[kind].append(peer(getattr(arguments, kind), kind, model, data, arguments.tokens, arguments.steps))
        for trainer, done in runs.items():
            speed = statistics.median(run["tokens_per_second"] for run in done)
            peak = max(run["peak_bytes"] for run in done) / 1e9
            lines.append(f"| {name} | {trainer} | {speed:.0f} | {peak:.2f} GB |")
            print(lines[-1], flush=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
