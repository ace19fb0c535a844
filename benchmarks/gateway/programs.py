"""Start the programs of the benchmark: the upstream and the proxies. Each program is a process that listens on loopback."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from crowded_home import Crowd, crowded_home
from gateway.upstream import ANSWER, INNER_NAME, health

_HERE = Path(__file__).parent
_START_SECONDS = 120
#: Id and name of the benchmark's engine in SAGE's database. Requests to other proxies use the model name `INNER_NAME`.
_ENGINE_ID, _ENGINE_NAME = "engine-s000000000", "model-engine-s000000000"
#: Version 1.107 of litellm is excluded, because the package index warns that 1.107.0 is compromised.
REQUIREMENTS: Mapping[str, str] = {"vllm-router": "vllm-router", "litellm": "litellm[proxy]==1.106.*"}
PEERS = ("nginx", *REQUIREMENTS)


class UnusableError(Exception):
    """The error for a program that cannot be measured on this machine."""


@dataclass(frozen=True)
class Program:
    """A program that receives the requests of the benchmark."""

    name: str
    port: int
    model: str
    process: psutil.Process | None = None  #: None: requests go directly to the upstream

    @property
    def url(self) -> str:
        """Return the URL to which chat requests are sent."""
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def ask(self, body: bytes) -> None:
        """Send one request before the measurement, because the first request can take long.

        Raises UnusableError if the program does not answer.
        """
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})  # noqa: S310 - loopback
        try:
            urllib.request.urlopen(request, timeout=_START_SECONDS).close()  # noqa: S310
        except OSError as error:
            raise UnusableError(f"it does not answer a request: {error}") from error

    def memory_mb(self) -> float:
        """Return the resident memory of the program's processes, in MB."""
        return sum(process.memory_info().rss for process in self._processes()) / 1e6

    def cpu_seconds(self) -> float:
        """Return the user and system time of the program's processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def _processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)] if self.process else []


@contextlib.contextmanager
def upstream(port: int, delay_ms: float, folder: Path) -> Iterator[str]:
    """Run an upstream (the server behind the proxies) during the block, and yield the name of its program.

    The program is nginx if it is installed and `delay_ms` is 0; otherwise it is upstream.py.
    """
    if delay_ms == 0 and shutil.which("nginx"):
        locations = (
            f"location /v1/ {{ default_type application/json; return 200 '{ANSWER}'; }}"
            f"location /health {{ default_type application/json; return 200 '{health(_ENGINE_ID)}'; }}"
        )
        with _nginx(port, locations, folder / f"upstream-{port}"):
            yield "nginx"
    else:
        command = [sys.executable, _HERE / "upstream.py", port, delay_ms, _ENGINE_ID]
        with _running(command, f"http://127.0.0.1:{port}/health"):
            yield "upstream.py"


@contextlib.contextmanager
def direct(upstream_port: int, _port: int, _folder: Path) -> Iterator[Program]:
    """Yield a Program without a process, so that requests go directly to the upstream."""
    yield Program("direct", upstream_port, INNER_NAME)


@contextlib.contextmanager
def sage(upstream_port: int, port: int, folder: Path) -> Iterator[Program]:
    """Run SAGE's gateway. Its database contains a running engine with the upstream's address."""
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    with crowded_home(home, Crowd(hung=1)):
        with contextlib.closing(sqlite3.connect(home / "state/engines.db")) as store, store:
            store.execute("UPDATE servers SET address = ?", [f"127.0.0.1:{upstream_port}"])
            if any(column[1] == "served_as" for column in store.execute("PRAGMA table_info(engines)")):
                store.execute("UPDATE engines SET served_as = ?", [INNER_NAME])
        environment = {"SAGE_GATEWAY_PORT": str(port)}
        command = [sys.executable, "-m", "sage.llm.gateway"]
        with _running(command, f"http://127.0.0.1:{port}/ready", environment, folder / "sage.log") as process:
            yield Program("SAGE", port, _ENGINE_NAME, process)


@contextlib.contextmanager
def nginx(upstream_port: int, port: int, folder: Path) -> Iterator[Program]:
    """Run nginx as a proxy, with the settings for keep-alive and streams that its documentation recommends."""
    if not shutil.which("nginx"):
        raise UnusableError("nginx is not on the PATH")
    locations = (
        "location / { proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection '';"
        " proxy_buffering off; client_max_body_size 64m; client_body_buffer_size 1m; }"
    )
    engines = f"upstream engines {{ server 127.0.0.1:{upstream_port}; keepalive 256; }}"
    with _nginx(port, locations, folder / "proxy", engines) as process:
        yield Program("nginx", port, INNER_NAME, process)


@contextlib.contextmanager
def vllm_router(upstream_port: int, port: int, folder: Path) -> Iterator[Program]:
    """Run vllm-router in a separate Python environment."""
    command = [
        _installed("vllm-router", folder), "--worker-urls", f"http://127.0.0.1:{upstream_port}", "--host", "127.0.0.1",
        "--port", port, "--policy", "round_robin",
    ]  # fmt: skip
    with _running(command, f"http://127.0.0.1:{port}/health", log=folder / "vllm-router.log") as process:
        yield Program("vllm-router", port, INNER_NAME, process)


@contextlib.contextmanager
def litellm(upstream_port: int, port: int, folder: Path) -> Iterator[Program]:
    """Run LiteLLM's proxy in a separate Python environment."""
    model = {"model": f"openai/{INNER_NAME}", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"}
    config = folder / "litellm.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": INNER_NAME, "litellm_params": model}]}))
    command = [_installed("litellm", folder), "--config", config, "--host", "127.0.0.1", "--port", port]
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "NO_DOCS": "True",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}/health/liveliness"
    with _running(command, url, environment, folder / "litellm.log") as process:
        yield Program("LiteLLM", port, INNER_NAME, process)


PROXIES: Mapping[str, Callable[[int, int, Path], contextlib.AbstractContextManager[Program]]] = {
    "direct": direct, "sage": sage, "nginx": nginx, "vllm-router": vllm_router, "litellm": litellm,
}  # fmt: skip


def _installed(peer: str, folder: Path) -> Path:
    """Return the path of a proxy's program. If the program is missing, install it into `folder`.

    Raises UnusableError if the program cannot be installed.
    """
    environment = folder / peer
    program = environment / "bin" / peer
    if not program.exists():
        print(f"installing {REQUIREMENTS[peer]} into {environment}", file=sys.stderr)
        venv.create(environment, with_pip=True, clear=True)
        pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, REQUIREMENTS[peer]], capture_output=True, text=True, check=False)
        if done.returncode or not program.exists():
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise UnusableError((reasons or ["pip failed"])[-1])
    return program


@contextlib.contextmanager
def _nginx(port: int, locations: str, folder: Path, before: str = "") -> Iterator[psutil.Process]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = " ".join(f"{kind}_temp_path {folder / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder / 'pid'}; error_log {folder / 'error.log'};"
        "events { worker_connections 4096; }"
        f"http {{ access_log off; keepalive_requests 100000000; {paths} {before}"
        f" server {{ listen 127.0.0.1:{port}; location = /ready {{ return 200; }} {locations} }} }}"
    )
    command = ["nginx", "-c", folder / "nginx.conf", "-e", folder / "error.log"]
    with _running(command, f"http://127.0.0.1:{port}/ready") as process:
        yield process


@contextlib.contextmanager
def _running(
    command: Sequence[object], url: str, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[psutil.Process]:
    """Run a program during the block. The block begins when `url` answers. Raises UnusableError if `url` does not answer."""
    with (log or Path(os.devnull)).open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, **(environment or {})}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline_seconds = time.monotonic() + _START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline_seconds:
                raise UnusableError(f"{Path(str(command[0])).name} does not answer; see the log {log}")
            time.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - loopback
            return bool(answer.status == 200)
    except OSError:
        return False
