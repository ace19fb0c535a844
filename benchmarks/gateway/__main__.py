"""Measure the time and memory that proxies in front of an engine need: SAGE's gateway, nginx, vllm-router and LiteLLM.

Each proxy forwards requests on loopback to the same upstream, which returns a fixed chat completion. The tables are printed
and written to `benchmarks/results/gateway.md`. The file also names the proxies that cannot be installed.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gateway import load
from gateway.load import Figures
from gateway.programs import PEERS, PROXIES, Program, UnusableError, upstream

from sage.llm.control_plane.backends.speeds import processor

_RESULTS = Path(__file__).parents[1] / "results/gateway.md"
_BENCH = Path(__file__).parents[2] / ".bench/gateway"
_CONNECTIONS = (1, 16, 256)
_LONG_PROMPT_TOKENS = 50_000
_SOAK_REQUESTS = 100_000


@dataclass(frozen=True)
class Case:
    """A kind of request, and the upstream's delay."""

    title: str
    delay_ms: float = 0
    streams: bool = False
    prompt_tokens: int = 30
    connections: tuple[int, ...] = _CONNECTIONS


CASES = (
    Case("A fixed answer"),
    Case("A fixed answer after 20 ms", delay_ms=20),
    Case("A stream of 32 events", streams=True),
    Case("A prompt of 50,000 tokens", prompt_tokens=_LONG_PROMPT_TOKENS, connections=(1, 16)),
)
_COLUMNS = (
    "proxy", "connections", "requests/s", "median ms", "p99 ms", "added median ms", "added p99 ms", "CPU ms/request", "MB",
    "errors",
)  # fmt: skip


def main() -> None:
    """Measure all cases, and print and write the results."""
    arguments = _arguments()
    _BENCH.mkdir(parents=True, exist_ok=True)
    lines = [
        "# What the gateway costs", "",
        f"`python benchmarks/gateway`, {arguments.seconds:g} s per row. {processor()}, {os.cpu_count()} cores, "
        f"{platform.platform()}, Python {platform.python_version()}. Load: {load.name()}, on the same cores.",
    ]  # fmt: skip
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if arguments.case in case.title:
                lines += ["", f"## {case.title}", "", *_measure(case, arguments, Path(folder), missing)]
        if arguments.soak:
            lines += ["", "## Memory", "", _soak(arguments.port, Path(folder))]
    if missing:
        lines += ["", "Not measured: ", "", *(f"- {peer}: {reason}" for peer, reason in missing.items())]
    print("\n".join(lines))
    arguments.output.write_text("\n".join(lines) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/gateway", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="duration of each measurement")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"proxies, separated by commas; default: {','.join(PEERS)}")
    parser.add_argument("--case", default="", help="measure only the cases whose titles contain this text")
    parser.add_argument(
        "--soak", action=argparse.BooleanOptionalAction, default=True, help="also measure the memory after many requests"
    )
    parser.add_argument("--port", type=int, default=18_900, help="first of two ports to use")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="file to write")
    return parser.parse_args()


def _measure(case: Case, arguments: argparse.Namespace, folder: Path, missing: dict[str, str]) -> Iterator[str]:
    """Measure a case with each proxy, and yield the lines of its table.

    missing: for each proxy that cannot be measured, the reason; this function adds entries.
    """
    port: int = arguments.port
    # For streams, a delay above zero selects upstream.py, because nginx cannot send event streams.
    with upstream(port, case.delay_ms or (1e-6 if case.streams else 0), folder) as server:
        yield f"Upstream: {server}."
        yield ""
        yield f"| {' | '.join(_COLUMNS)} |"
        yield f"|---|{'---:|' * (len(_COLUMNS) - 1)}"
        alone: dict[int, Figures] = {}
        for proxy in ("direct", "sage", *filter(None, arguments.peers.split(","))):
            if proxy in missing:
                continue
            try:
                with PROXIES[proxy](port, port + 1, _BENCH) as program:
                    for connections in case.connections:
                        _say(f"{case.title}: {program.name}, {connections} connections")
                        figures, cpu_ms = _figures(program, case, connections, arguments.seconds, folder)
                        yield _row(program, connections, figures, alone.setdefault(connections, figures), cpu_ms)
            except UnusableError as error:
                missing[proxy] = str(error)


def _figures(program: Program, case: Case, connections: int, seconds: float, folder: Path) -> tuple[Figures, float]:
    """Measure a case with one program. Return the figures, and the program's CPU time per request in milliseconds."""
    body = folder / "body.json"
    prompt = "word " * case.prompt_tokens
    request = {"model": program.model, "messages": [{"role": "user", "content": prompt}], "stream": case.streams}
    body.write_text(json.dumps(request))
    program.ask(body.read_bytes())
    load.measure(program.url, connections, min(1, seconds), body)
    before = program.cpu_seconds()
    figures = load.measure(program.url, connections, seconds, body)
    return figures, (program.cpu_seconds() - before) / max(figures.requests, 1) * 1000


def _row(program: Program, connections: int, figures: Figures, alone: Figures, cpu_ms: float) -> str:
    if not figures.requests:
        return f"| {program.name} | {connections} | 0 | | | | | | | {figures.errors} |"
    cells = [program.name, connections, f"{figures.per_second:,.0f}", f"{figures.median_ms:.2f}", f"{figures.p99_ms:.2f}"]
    if figures is alone:
        cells += ["", "", "", ""]
    else:
        added = (figures.median_ms - alone.median_ms, figures.p99_ms - alone.p99_ms)
        cells += [*(f"{added_ms:.2f}" for added_ms in added), f"{cpu_ms:.3f}", f"{program.memory_mb():.0f}"]
    return f"| {' | '.join(map(str, [*cells, figures.errors]))} |"


def _soak(port: int, folder: Path) -> str:
    """Measure the memory of SAGE's gateway before and after many requests, and return a sentence about it."""
    with upstream(port, 0, folder), PROXIES["sage"](port, port + 1, _BENCH) as program:
        case = CASES[0]
        figures, _ = _figures(program, case, 16, 2, folder)
        before_mb, requests = program.memory_mb(), 0
        while requests < _SOAK_REQUESTS:
            _say(f"memory: {requests:,} of {_SOAK_REQUESTS:,} requests")
            figures, _ = _figures(program, case, 16, 10, folder)
            requests += figures.requests
        return f"SAGE's gateway has {before_mb:.1f} MB, and {program.memory_mb():.1f} MB after {requests:,} more requests."


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
