"""Measure the time of each part of a training step, and compare it with the minimum time of the part's matrix products."""

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from train import MODEL, PACK_TOKENS

from sage.libs.finetune import FinetuneConfig, FinetuneManager
from sage.libs.finetune.data.tokenizing import IGNORED
from sage.libs.finetune.training.batching import Batch
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun
from sage.llm.control_plane.backends.speeds import processor

STEPS = 6
#: The autograd functions of each part. The time of a function includes all functions that it calls.
PARTS = {
    "feed-forward blocks": ("_GatedMlp", "_GatedMlpBackward"),
    "attention's projections": ("_Project", "_ProjectBackward"),
    "attention": ("_PackedAttention", "_PackedAttentionBackward"),
    "head and loss": ("_ChunkedLoss", "_ChunkedLossBackward"),
    "norms": ("_RmsNorm", "_RmsNormBackward"),
    "optimizer": ("Optimizer.step#AdamW.step",),
}


def products(run: TrainingRun, batch: Batch) -> dict[str, float]:
    """Return the number of floating-point operations of a step, by part.

    Only the matrix products with frozen weights and the products of attention are counted.
    """
    config = run.loaded.model.get_base_model().config
    tokens, layers, width = batch["input_ids"].numel(), config.num_hidden_layers, config.hidden_size
    head_width = width // config.num_attention_heads
    trained = int((batch["labels"] != IGNORED).sum())
    columns = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * head_width
    squares = float(sum(length**2 for length in batch["cu_seq_lens_q"].diff().tolist()))
    return {
        "feed-forward blocks": 2.0 * 2 * 3 * layers * tokens * width * config.intermediate_size,
        "attention's projections": 2.0 * 2 * layers * tokens * width * columns,
        # The forward pass has two matrix products, the backward pass four. The causal mask halves each product.
        "attention": 6.0 * 2 * layers * squares / 2 * width,
        "head and loss": 2.0 * 2 * trained * width * config.vocab_size,
    }


def peak_flops(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a matrix product with the shape of a feed-forward block.

    The operands fit into the cache.
    """
    left, right = torch.ones(832, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        left @ right.t()
        best = min(best, time.perf_counter() - began)
    return 2 * left.shape[0] * left.shape[1] * right.shape[0] / best


def main() -> None:
    """Profile `STEPS` training steps with packed samples, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/bench/alpaca_train.jsonl"))
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    manager = FinetuneManager(arguments.work.resolve() / "runs")
    output = arguments.work.resolve() / f"step-{time.time_ns()}"
    config = FinetuneConfig(
        base_model=MODEL, dataset_path=str(arguments.data), output_dir=str(output), pack_tokens=PACK_TOKENS,
        precision=arguments.precision,
    )  # fmt: skip
    run = TrainingRun(manager.run_directory(manager.create(config)), StopRequest())
    run.loaded.model.train()
    optimizer = torch.optim.AdamW([p for p in run.loaded.model.parameters() if p.requires_grad], lr=1e-4)
    batches = [run.loaded.collator([pack]) for pack in islice(run.data.packs, STEPS)]

    def step(batch: Batch) -> None:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        run.loss(run.loaded.model(**inputs, use_cache=False), batch["labels"], 100).backward()
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches:
        step(batch)
    began = time.perf_counter()
    for batch in batches:
        step(batch)
    seconds = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            step(batch)
    spent = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    whole = sum(spent.get(name, 0.0) for names in PARTS.values() for name in names)
    peak = peak_flops(run.loaded.precision.compute_dtype)
    needed = [products(run, batch) for batch in batches]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    print(
        f"{processor()}; {run.loaded.precision.reason}; {tokens / seconds:.0f} tokens/s; "
        f"matrix products reach {peak / 1e9:.0f} GFLOP/s\n"
    )
    print("| part | share of the time | minimum time of its products |\n|---|---|---|")
    for part, names in PARTS.items():
        share = sum(spent.get(name, 0.0) for name in names) / whole
        limit = sum(flops.get(part, 0.0) for flops in needed) / peak / (share * seconds)
        print(f"| {part} | {share:.1%} | {f'{limit:.0%} of the measured time' if limit else ''} |")


if __name__ == "__main__":
    main()
