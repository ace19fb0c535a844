"""Measure training speed and peak memory for several sequence lengths, micro-batch sizes, LoRA ranks and dataset sizes.

Each measurement is a short run of SmolLM2-135M-Instruct in a separate process. The first step is a warm-up and does not
count.
"""

import argparse
import json
import random
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from train import MODEL, trained

from sage.libs.finetune import FinetuneConfig, FinetuneManager
from sage.llm.control_plane.backends.speeds import processor

STEPS = 4
CUTOFFS, MICRO_BATCHES, RANKS = (128, 512, 2048, 8192), (1, 2, 4, 8, 16), (8, 32, 128)
WORDS = ("the", "model", "learns", "from", "what", "it", "reads", "and", "answers", "with", "words", "people", "know")


def chat(words: int, number: int) -> dict[str, Any]:
    """Return a chat of `words` words. The answer has two fifths of the words. Each word is about one token."""
    chance = random.Random(number)  # noqa: S311 - the seed makes the chat reproducible
    said = [chance.choice(WORDS) for _ in range(words)]
    cut = 3 * words // 5
    messages = [("user", f"{number}: {' '.join(said[:cut])}"), ("assistant", " ".join(said[cut:]))]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def dataset(path: Path, samples: int, words: int) -> Path:
    """Write a dataset of chats, unless the file exists; return its path."""
    if not path.exists():
        with path.open("w") as file:
            file.writelines(json.dumps(chat(words, number)) + "\n" for number in range(samples))
    return path


def point(work: Path, data: Path, **options: Any) -> dict[str, float]:
    """Train `STEPS` steps; return tokens/s, peak memory in GB, and the seconds until training started."""
    manager = FinetuneManager(work / "runs")
    config = FinetuneConfig(
        base_model=MODEL, dataset_path=str(data), output_dir=str(work / f"growth-{time.time_ns()}"), max_steps=STEPS,
        save_steps=10_000, **options,
    )  # fmt: skip
    task = manager.create(config)
    began = time.time()
    _, peak_bytes, events = trained(manager, task)
    steps = [event for event in events if event["event"] == "step"]
    [started] = [seconds(event) for event in events if event["event"] == "started"]
    tokens = [event["tokens_per_second"] * (seconds(event) - started) for event in steps]
    speed = (tokens[-1] - tokens[0]) / (seconds(steps[-1]) - seconds(steps[0]))
    found = {"tokens_per_second": round(speed), "peak_gb": round(peak_bytes / 1e9, 2), "begin_s": round(started - began, 1)}
    print(data.name, options, found, file=sys.stderr, flush=True)
    return found


def seconds(event: dict[str, Any]) -> float:
    """Return the time of an event, in seconds since 1970."""
    return datetime.fromisoformat(event["time"]).timestamp()


def main() -> None:
    """Run the measurements, and write the results as JSON, as a table and as a chart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--samples", type=int, default=1_000_000, help="number of samples in the largest dataset")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth"))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(exist_ok=True)
    usual = dataset(work / "chats.jsonl", 1000, 150)
    panels: dict[str, dict[int, dict[str, float]]] = {
        "tokens a sample": {
            cutoff: point(work, dataset(work / f"long-{cutoff}.jsonl", 8, cutoff), batch_size=1, max_seq_length=cutoff)
            for cutoff in CUTOFFS
        },
        "samples a micro-batch": {size: point(work, usual, batch_size=size) for size in MICRO_BATCHES},
        "rank": {rank: point(work, usual, lora_rank=rank) for rank in RANKS},
    }
    large = dataset(work / f"chats-{arguments.samples}.jsonl", arguments.samples, 150)
    small = dataset(work / "chats-small.jsonl", 1000, 149)
    panels["samples"] = {1000: point(work, small), arguments.samples: point(work, large)}
    panels["samples, already tokenized"] = {1000: point(work, small), arguments.samples: point(work, large)}
    arguments.out.with_suffix(".json").write_text(json.dumps({"processor": processor(), "panels": panels}, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(panels))
    arguments.out.with_suffix(".svg").write_text(picture(panels))
    print(table(panels))


def table(panels: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        f"| {name} | {value:,} | {p['tokens_per_second']:.0f} | {p['peak_gb']} GB | {p['begin_s']} s |\n"
        for name, points in panels.items()
        for value, p in points.items()
    ]
    head = f"{processor()}\n\n| varied option | value | tokens/s | peak RSS | until the first step |\n" + "|---" * 5 + "|\n"
    return head + "".join(lines)


def picture(panels: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return an SVG with one bar chart per panel, which shows tokens/s and peak memory."""
    parts, height = [], 0
    for name, points in panels.items():
        parts.append(f'<text x="10" y="{height + 24}" font-weight="bold">{name}</text>')
        for row, (value, found) in enumerate(points.items()):
            y = height + 34 + 24 * row
            for x, key, scale, colour, unit in (
                (100, "tokens_per_second", 0.4, "#2563eb", "tokens/s"), (420, "peak_gb", 22, "#94a3b8", "GB"),
            ):  # fmt: skip
                width = scale * found[key]
                parts.append(f'<rect x="{x}" y="{y}" width="{width:.0f}" height="18" fill="{colour}"/>')
                parts.append(f'<text x="{x + width + 6:.0f}" y="{y + 14}">{found[key]} {unit}</text>')
            parts.append(f'<text x="92" y="{y + 14}" text-anchor="end">{value:,}</text>')
        height += 44 + 24 * len(points)
    size = f'width="760" height="{height + 10}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    main()
