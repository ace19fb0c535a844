"""Measure how a served model is paused for a training run and runs again, while a client sends one request per second.

The model and the run do not fit into `memory_limit_gb` together, and the run is started with `--on-busy preempt`.
The client retries a 503 after the time in `Retry-After`. Both values of the setting `paused_requests` are measured.
The table is written to `benchmarks/results/making_room.md`, or on a machine with a GPU to `gpu-making_room.md`.
"""

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import aiohttp
from machine import machine, results
from serving.home import gateway, start
from train import MODEL

from sage.libs.models.loading import local_folder
from sage.libs.models.resolve import resolve_model
from sage.llm.client import SageClient
from sage.llm.client.types import SETTLED, EngineState

DATA = Path(__file__).parents[1] / "examples/data/sample_train.jsonl"
LIMIT_GB, PACK_TOKENS = 2.5, 512
EVERY_SECONDS, QUIET_SECONDS = 1.0, 5.0
BODY = {
    "model": "served", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16,
    "temperature": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """What a client got for one request."""

    text: str
    seconds: float  #: from the first attempt to the answer
    refusals: int  #: number of 503 answers before the answer


@dataclass(frozen=True)
class Outcome:
    """What happened with one value of `paused_requests`."""

    seconds: dict[str, float]  #: duration of each phase
    replies: list[Reply]
    expected: str  #: the text of a correct answer

    def row(self, setting: str) -> tuple[str, ...]:
        """Return the outcome as a row of the table."""
        wrong = sum(reply.text != self.expected for reply in self.replies)
        longest_seconds = max(reply.seconds for reply in self.replies)
        refusals = sum(reply.refusals for reply in self.replies)
        phases = [f"{seconds:.1f} s" for seconds in self.seconds.values()]
        return (f"`{setting}`", *phases, str(len(self.replies)), str(wrong), str(refusals), f"{longest_seconds:.1f} s")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of the training run")
    parser.add_argument("--settings", default="hold,reject", help="values of the setting `paused_requests`")
    arguments = parser.parse_args()
    base = local_folder(resolve_model(MODEL))
    os.environ["SAGE_MEMORY_LIMIT_GB"] = str(LIMIT_GB)
    outcomes = {}
    for setting in arguments.settings.split(","):
        os.environ["SAGE_PAUSED_REQUESTS"] = setting
        with tempfile.TemporaryDirectory() as work, gateway(Path(work) / "home") as client:
            outcomes[setting] = asyncio.run(make_room(client, base, Path(work), arguments.steps))
    phases = next(iter(outcomes.values())).seconds
    head = ("paused_requests", *phases, "answers", "wrong answers", "503", "longest wait")
    rows = [head, ("---",) * len(head), *(outcome.row(setting) for setting, outcome in outcomes.items())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = (
        f"{machine()}; SmolLM2-135M; `memory_limit_gb` {LIMIT_GB}; a LoRA training of "
        f"{arguments.steps} steps of {PACK_TOKENS} tokens\nwith `--on-busy preempt`; one request every {EVERY_SECONDS:g} s, "
        "which is retried after a 503; each answer is compared with an answer\nbefore the training.\n\n"
    )
    results("making_room.md").write_text(f"{text}{table}\n")
    print(f"{text}{table}")


async def make_room(client: SageClient, base: Path, work: Path, steps: int) -> Outcome:
    """Serve the model, train, and wait until the model runs again. A client sends requests all the time."""
    served, _ = await asyncio.to_thread(start, client, base, "served", "transformers", {"dtype": "fp32"})
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        expected = (await ask(session, client.base_url)).text
        requests: list[asyncio.Task[Reply]] = []
        sender = asyncio.create_task(send(session, client.base_url, requests))
        await asyncio.sleep(QUIET_SECONDS)
        run_id = await asyncio.to_thread(train, client, base, work, steps)
        await asyncio.to_thread(wait_for_return, client, served.id, run_id)
        await asyncio.sleep(QUIET_SECONDS)
        sender.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sender
        replies = await asyncio.gather(*requests)
    return Outcome(phases(client, served.id, run_id), replies, expected)


async def send(session: aiohttp.ClientSession, url: str, requests: list[asyncio.Task[Reply]]) -> None:
    """Send a request every second, even if earlier requests have no answer yet."""
    while True:
        requests.append(asyncio.create_task(ask(session, url)))
        await asyncio.sleep(EVERY_SECONDS)


async def ask(session: aiohttp.ClientSession, url: str) -> Reply:
    """Return the answer to one request; a 503 is retried after the time that the gateway requests."""
    began, refusals = time.perf_counter(), 0
    while True:
        async with session.post(f"{url}/v1/chat/completions", json=BODY) as response:
            answer = await response.json()
            if response.status == 200:
                return Reply(answer["choices"][0]["message"]["content"], time.perf_counter() - began, refusals)
            if response.status != 503:
                raise RuntimeError(f"HTTP status {response.status}: {answer}")
            refusals += 1
            await asyncio.sleep(float(response.headers["Retry-After"]))


def train(client: SageClient, base: Path, work: Path, steps: int) -> str:
    """Start the run and return its id."""
    options = {
        "dataset_path": str(DATA), "output_dir": str(work / "out"), "max_steps": steps, "pack_tokens": PACK_TOKENS,
        "max_seq_length": PACK_TOKENS, "precision": "fp32", "use_8bit": False,
    }  # fmt: skip
    return client.start_engine(model=str(base), engine_kind="finetune", on_busy="preempt", options=options).id


def wait_for_return(client: SageClient, served_id: str, run_id: str) -> None:
    """Wait until the run has ended and the served model is running again."""
    while client.get_engine(run_id).state not in SETTLED or client.get_engine(served_id).state is not EngineState.RUNNING:
        time.sleep(0.2)


def phases(client: SageClient, served_id: str, run_id: str) -> dict[str, float]:
    """Return the duration of each phase in seconds, from the events of both engines."""
    served, run = times(client, served_id), times(client, run_id)
    training_ended = run[EngineState.COMPLETED]
    return {
        "drained and paused": (served[EngineState.PAUSED] - served[EngineState.STOPPING]).total_seconds(),
        "training": (training_ended - run[EngineState.STARTING]).total_seconds(),
        "back": (served[EngineState.RUNNING] - training_ended).total_seconds(),
    }


def times(client: SageClient, engine_id: str) -> dict[EngineState, datetime]:
    """Return the last time at which an engine entered each state."""
    return {event.after: event.at for event in client.get_events(engine_id) if event.after}


if __name__ == "__main__":
    main()
