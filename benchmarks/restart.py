"""Measure a restart of the gateway while 16 clients ask a served model: with SIGTERM, and with SIGKILL.

Three times are measured, each from the signal: until the old gateway has exited, until the new gateway is ready, and until
a retrying client gets an answer of one token. The model's server keeps running, and the new gateway adopts the server.
The medians are printed.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import httpx
from serving.home import start, stop
from serving.load import ask
from train import MODEL

from sage.common.errors import SageError
from sage.common.processes import holder
from sage.libs.models.loading import local_folder
from sage.libs.models.resolve import resolve_model
from sage.llm.client import SageClient

SAGE = str(Path(sys.executable).with_name("sage"))
CLIENTS, ANSWER_TOKENS, POLL_SECONDS, WARM_SECONDS = 16, 32, 0.01, 5.0
COLUMNS = ("exited", "ready", "first answer")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--restarts", type=int, default=5, help="number of restarts with each signal")
    arguments = parser.parse_args()
    base = local_folder(resolve_model(arguments.model))
    print(f"| signal | {' | '.join(f'{name}, s' for name in COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    with tempfile.TemporaryDirectory() as home:
        os.environ.update({"SAGE_HOME": home, "SAGE_GATEWAY_PORT": str(free_port())})
        command("start")
        client = SageClient(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}")
        engine, _ = start(client, base, "served", "transformers", {"slots": CLIENTS + 1})
        try:
            with load(client.base_url):
                for sent in (signal.SIGTERM, signal.SIGKILL):
                    times = [restart(client, Path(home), sent) for _ in range(arguments.restarts)]
                    medians = [statistics.median(column) for column in zip(*times, strict=True)]
                    print(f"| {sent.name} | {' | '.join(f'{seconds:.2f}' for seconds in medians)} |", flush=True)
        finally:
            stop(client, engine.id)
            command("stop")


def restart(client: SageClient, home: Path, sent: signal.Signals) -> list[float]:
    """Send a signal to the gateway, start another gateway, and return the times of `COLUMNS` in seconds."""
    time.sleep(WARM_SECONDS)
    pid, began = client.health()["pid"], time.perf_counter()
    os.kill(pid, sent)
    retry(lambda: holder(home / "state/gateway.lock") is None)
    exited = time.perf_counter()
    starting = threading.Thread(target=command, args=("start",))
    starting.start()
    retry(lambda: httpx.get(f"{client.base_url}/ready", trust_env=False).is_success)
    ready = time.perf_counter()
    retry(lambda: client.chat("served", [{"role": "user", "content": "Hello"}], max_tokens=1) is not None)
    answered = time.perf_counter()
    starting.join()
    return [exited - began, ready - began, answered - began]


def retry(probe: Callable[[], bool]) -> None:
    """Call `probe` until it returns True."""
    while True:
        with contextlib.suppress(httpx.HTTPError, SageError):
            if probe():
                return
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def load(url: str) -> Iterator[None]:
    """Let `CLIENTS` clients request one answer after another, and retry after errors, until the block ends."""
    is_over = threading.Event()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while not is_over.is_set():
            with contextlib.suppress(aiohttp.ClientError, RuntimeError):
                await ask(session, url, "served", number, ANSWER_TOKENS)
            await asyncio.sleep(POLL_SECONDS)

    async def clients() -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(client(session, number) for number in range(CLIENTS)))

    thread = threading.Thread(target=asyncio.run, args=(clients(),))
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def command(name: str) -> None:
    """Start or stop the gateway with the command line."""
    subprocess.run([SAGE, "gateway", name], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port() -> int:
    """Return a free port on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
