"""Measure the control plane with 10,000 ended and 200 active engines: lists, routing, reconciler ticks, and idle writes.

One process (crowded_home.py) stands in for the processes of the active engines. The list is compared with a minimal
FastAPI route that returns the same JSON. The table is printed and written to `benchmarks/results/control_plane.md`.
"""

import argparse
import asyncio
import contextlib
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import httpx
import uvicorn
from crowded_home import MODEL, Crowd, crowded_home, engine_record, server_record
from fastapi import FastAPI
from machine import machine
from pydantic import BaseModel

from sage.common.settings import load_settings
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind, EngineState, StartRequest
from sage.llm.control_plane.backends.base import Capabilities, ServingOptions, WorkerBackend
from sage.llm.control_plane.backends.registry import BACKENDS
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.control_plane.plan import Limits, Snapshot, plan
from sage.llm.control_plane.watch import Watch

RESULTS = Path(__file__).parent / "results/control_plane.md"
SETTLED, LIVING = 10_000, 200
_PORT = 18_891
_LIST = "/v1/management/engines?limit=100"
#: Program of a server that imports only the standard library, so that it starts quickly.
_SERVER = """
import http.server, json, os, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"engine": os.environ["SAGE_ENGINE_ID"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[1]))
server.serve_forever(0.01)
"""


class _QuickBackend(WorkerBackend):
    name: ClassVar[str] = "quick"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset({EngineKind.LLM}), frozenset(ModelKind))
    options: ClassVar[type[BaseModel]] = ServingOptions
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable, "-S")

    def argv(self, model: str, served_name: str, options: Any) -> tuple[str, ...]:
        return (*self.interpreter, "-c", _SERVER, DESCRIPTOR_ARGUMENT)

    def memory_bytes(self, model: ModelSource, options: Any) -> None:
        return None


def median_ms(work: Callable[[], object], times: int) -> float:
    """Return the median wall time of a call, in milliseconds."""
    return statistics.median(_seconds(work) for _ in range(times)) * 1000


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextlib.contextmanager
def _gateway() -> Iterator[int]:
    """Run a gateway with the SAGE_HOME of this process, and yield the PID of the gateway."""
    environment = {**os.environ, "SAGE_GATEWAY_PORT": str(_PORT), "SAGE_LOG_LEVEL": "ERROR"}
    process = subprocess.Popen([sys.executable, "-m", "sage.llm.gateway"], env=environment)
    try:
        while True:
            assert process.poll() is None
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{_PORT}/ready", trust_env=False, timeout=60).raise_for_status()
                break
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def list_pages() -> Iterator[tuple[str, str]]:
    """Measure the first page of the list in both orders. Compare each with a minimal route that returns the same JSON."""
    with httpx.Client(base_url=f"http://127.0.0.1:{_PORT}", trust_env=False, timeout=60) as client:
        for order in ("asc", "desc"):
            route = f"{_LIST}&order={order}"
            content = client.get(route).raise_for_status().json()
            yield f"first page of the list, 100 engines, {order}", f"{median_ms(partial(client.get, route), 50):.1f} ms"
            yield "… a minimal FastAPI route that returns the same JSON", f"{_bare_route_ms(content):.1f} ms"


def _bare_route_ms(content: Any) -> float:
    """Return the median time of a request to a minimal FastAPI application in a child process, in milliseconds."""
    port = _PORT + 1
    child = os.fork()
    if child == 0:
        app = FastAPI()
        app.get("/")(lambda: content)
        uvicorn.run(app, port=port, log_config=None, access_log=False)
        os._exit(0)
    try:
        with httpx.Client(trust_env=False, timeout=60) as client:
            url = f"http://127.0.0.1:{port}/"
            while True:
                with contextlib.suppress(httpx.TransportError):
                    client.get(url)
                    break
                time.sleep(0.05)
            return median_ms(lambda: client.get(url), 50)
    finally:
        os.kill(child, 15)
        os.waitpid(child, 0)


def idle_bytes(pid: int, home: Path, seconds: float) -> Iterator[tuple[str, str]]:
    """Measure the bytes that an idle gateway writes to the disk, in total and between renewals of the lease."""
    time.sleep(3)  # wait until the gateway has finished its start
    renewed_at, writes, before, last = [], [], _expiry(home), _written_bytes(pid)
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        expiry, written = _expiry(home), _written_bytes(pid)
        if expiry != before:
            renewed_at.append(now)
        if written != last:
            writes.append((now, written - last))
        before, last = expiry, written
        time.sleep(0.02)
    between = sum(size for at, size in writes if all(abs(at - renewal) > 0.3 for renewal in renewed_at))
    yield (
        f"bytes that an idle gateway writes in {seconds:.0f} s, with {len(renewed_at)} renewals of the lease",
        (f"{sum(size for _, size in writes):,}"),
    )
    yield "… between the renewals", f"{between:,}"


def _written_bytes(pid: int) -> int:
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["write_bytes"])


def _expiry(home: Path) -> Any:
    with contextlib.closing(sqlite3.connect(f"file:{home / 'state/engines.db'}?mode=ro", uri=True)) as database:
        return database.execute("SELECT expires_at FROM leases").fetchone()


@contextlib.asynccontextmanager
async def _manager():  # type: ignore[no-untyped-def]
    manager = ControlPlaneManager(load_settings())
    await manager.open()
    try:
        yield manager
    finally:
        await manager.close()


async def routing_ms(engine: str) -> float:
    """Return the median time to find the engine for a model name in a request, in milliseconds."""
    async with _manager() as manager:
        await manager.running(engine, EngineKind.LLM, 60)
        return await _median_ms(lambda: manager.running(engine, EngineKind.LLM, 1), 5000)


async def tick_ms() -> float:
    """Return the median time of a reconciler tick after every engine was observed, in milliseconds."""
    async with _manager() as manager:
        await asyncio.sleep(3)
        return await _median_ms(lambda: manager._reconciler.tick(is_active=True), 50, pause_seconds=0.05)  # noqa: SLF001


async def start_seconds() -> float:
    """Return the seconds from the request to start an engine until the engine runs."""
    async with _manager() as manager:
        await asyncio.sleep(8)  # wait until the control plane has noticed that the other servers do not answer
        began = time.perf_counter()
        engine = await manager.start_engine(
            StartRequest(model=MODEL, engine_kind=EngineKind.LLM, backend="quick", name="quick")
        )
        await manager.running(engine.id, EngineKind.LLM, 120)
        seconds = time.perf_counter() - began
        await manager.stop_engine(engine.id, force=True)
        while (await manager.get_engine(engine.id)).state is not EngineState.STOPPED:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return seconds


async def _median_ms(work: Callable[[], Awaitable[object]], times: int, pause_seconds: float = 0.0) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        await work()
        taken.append(time.perf_counter() - began)
        if pause_seconds:
            await asyncio.sleep(pause_seconds)
    return statistics.median(taken) * 1000


def plan_ms(living: int) -> float:
    """Return the median time of `plan` for `living` active engines, in milliseconds."""
    found = [engine_record("n", number, f"engine-s{number}", EngineState.RUNNING) for number in range(living)]
    servers = {engine.server_id: server_record(engine, {}) for engine in found if engine.server_id}
    observed = {engine.id: Observed(alive=True, ready=True) for engine in found}
    watches = {engine.id: Watch(engine.state) for engine in found}
    snapshot = Snapshot(found, servers, observed, watches, {}, Limits(300, 20))
    return median_ms(lambda: plan(snapshot), 20)


def measure(root: Path, settled: int, idle_seconds: float) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each measurement."""
    with crowded_home(root / "full", Crowd(settled, LIVING)):
        with _gateway() as pid:
            yield from list_pages()
            yield from idle_bytes(pid, root / "full", idle_seconds)
        yield f"routing of an inference request, {settled + LIVING:,} engines", _us(routing_ms("model-engine-s000000007"))
    with crowded_home(root / "one", Crowd(0, 2)):
        yield "… 2 engines", _us(routing_ms("model-engine-s000000000"))
    for living in (50, 100, 200, 400):
        with crowded_home(root / str(living), Crowd(settled, living)):
            yield f"a tick of the reconciler, {living} active engines", f"{asyncio.run(tick_ms()):.1f} ms"
    with crowded_home(root / "few", Crowd(0, 100)):
        yield "… 100 active engines and no ended engine", f"{asyncio.run(tick_ms()):.1f} ms"
    BACKENDS[_QuickBackend.name] = _QuickBackend()
    for hung in (0, 100):
        with crowded_home(root / f"hung-{hung}", Crowd(0, 0, hung)):
            yield f"start of a healthy engine beside {hung} hung servers", f"{asyncio.run(start_seconds()):.2f} s"
    for living in (100, 1_000, 10_000):
        taken_ms = plan_ms(living)
        yield f"`plan` alone, {living:,} active engines", f"{taken_ms:.2f} ms ({taken_ms / living * 1000:.2f} µs per engine)"


def _us(taken_ms: Awaitable[float]) -> str:
    return f"{asyncio.run(taken_ms) * 1000:.0f} µs"  # type: ignore[arg-type]


def main() -> None:
    """Run the measurements, print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settled", type=int, default=SETTLED)
    parser.add_argument("--idle-seconds", type=float, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "SAGE_LOG_LEVEL": "ERROR"}
    lines = [
        f"{machine()}; all times are medians; one process stands in for the engines' processes.",
        "",
        "| what | cost |",
        "|---|---|",
    ]
    scratch = Path(".bench")  # not in /tmp: if /tmp is in memory, writes to it are not counted
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch.absolute()) as root:
        for name, figure in measure(Path(root), arguments.settled, arguments.idle_seconds):
            lines.append(f"| {name} | {figure} |")
            print(f"{figure:>24}  {name}", flush=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
