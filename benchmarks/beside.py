"""Measure how a served model and a training run on the same cores slow each other down.

The served model answers a request of 32 tokens every 2 seconds. The speed of the run is measured with and without the
requests, and the time of an answer with and without the run. The table is printed and written to
`benchmarks/results/beside.md`.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
from machine import machine
from serving.home import gateway, start, stop
from serving.load import ask
from train import MODEL

from sage.libs.models.loading import local_folder
from sage.libs.models.resolve import resolve_model
from sage.llm.client import SageClient

RESULTS = Path(__file__).parent / "results/beside.md"
DATA = Path(__file__).parents[1] / "examples/data/sample_train.jsonl"
EVERY_SECONDS, ANSWER_TOKENS = 2.0, 32


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="transformers")
    parser.add_argument("--seconds", type=float, default=60, help="duration of each of the three measurements")
    parser.add_argument("--threads", type=int, help="CPU threads for the model and for the run while both run; default: all")
    arguments = parser.parse_args()
    base = local_folder(resolve_model(MODEL))
    with tempfile.TemporaryDirectory() as work:
        with gateway(Path(work) / "alone") as client:
            served, _ = start(client, base, "served", arguments.backend, {})
            answers_alone = asyncio.run(answer_times(client, arguments.seconds))
            stop(client, served.id)
            alone = steps_per_second(client, train(client, base, Path(work)), lambda: time.sleep(arguments.seconds))
        if arguments.threads:
            os.environ["SAGE_TRAINING_THREADS"] = str(arguments.threads)
        with gateway(Path(work) / "beside") as client:
            start(client, base, "served", arguments.backend, {"threads": arguments.threads} if arguments.threads else {})
            answers: list[float] = []
            run = train(client, base, Path(work))
            beside = steps_per_second(
                client, run, lambda: answers.append(asyncio.run(answer_times(client, arguments.seconds)))
            )
            answers_beside = answers[0]
    rows = [
        ("training, steps/s", f"{alone:.2f}", f"{beside:.2f}", f"{beside / alone:.2f}"),
        ("an answer, median s", f"{answers_alone:.2f}", f"{answers_beside:.2f}", f"{answers_beside / answers_alone:.2f}"),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [("", "alone", "beside the other", "ratio"), ("---",) * 4, *rows])
    head = f"{machine()}; SmolLM2-135M; backend {arguments.backend}; {arguments.seconds:.0f} s each;" + (
        f" beside each other with {arguments.threads} thread(s) each;" if arguments.threads else ""
    )
    head += f" an answer of {ANSWER_TOKENS} tokens every {EVERY_SECONDS:g} s beside a LoRA training on the same cores."
    RESULTS.write_text(f"{head}\n\n{table}\n")
    print(f"{head}\n{table}")


def train(client: SageClient, base: Path, work: Path) -> str:
    """Start a run that does not end, and return its id after its first three steps, which are slower than later steps."""
    run = client.start_engine(
        model=str(base), engine_kind="finetune",
        options={
            "dataset_path": str(DATA), "output_dir": tempfile.mkdtemp(dir=work), "num_epochs": 10_000, "save_steps": 10_000,
        },
    )  # fmt: skip
    wait_for_step(client, run.id, 3)
    return run.id


def steps_per_second(client: SageClient, run: str, work: Callable[[], object]) -> float:
    """Call `work` while a run trains, stop the run, and return the run's steps per second during the call."""
    step, began = last_step(client, run), time.perf_counter()
    work()
    speed = (last_step(client, run) - step) / (time.perf_counter() - began)
    stop(client, run)
    return speed


async def answer_times(client: SageClient, seconds: float) -> float:
    """Return the median time of an answer. A request is sent every `EVERY_SECONDS`, but not before the previous answer."""
    times: list[float] = []
    ends_at = time.perf_counter() + seconds
    async with aiohttp.ClientSession() as session:
        await ask(session, client.base_url, "served", 0, ANSWER_TOKENS)
        while time.perf_counter() < ends_at:
            began = time.perf_counter()
            await ask(session, client.base_url, "served", len(times), ANSWER_TOKENS)
            times.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, EVERY_SECONDS - times[-1]))
    return statistics.median(times)


def wait_for_step(client: SageClient, run: str, step: int) -> None:
    """Wait until a run has completed the step `step`."""
    while last_step(client, run) < step:
        time.sleep(0.2)


def last_step(client: SageClient, run: str) -> int:
    """Return the number of steps that a run has completed."""
    training = client.get_engine(run).training
    return training.step if training else 0


if __name__ == "__main__":
    main()
