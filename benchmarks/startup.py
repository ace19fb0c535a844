"""Measure the start times of the command line and the gateway: the median of several runs, each in a new process."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 7
SAGE = str(Path(sys.executable).with_name("sage"))


def seconds(argv: list[str], env: dict[str, str]) -> float:
    """Return the median wall time of a command, in seconds. The first run is not counted."""
    times = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(argv, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    """Run the measurements and print the table."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "SAGE_HOME": home, "SAGE_GATEWAY_PORT": "18889"}
        rows = {
            "python -c pass": seconds([sys.executable, "-c", "pass"], env),
            "sage --help": seconds([SAGE, "--help"], env),
        }
        began = time.perf_counter()
        subprocess.run([SAGE, "gateway", "start"], check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows["sage gateway start, to its first answer (once, with a new database)"] = time.perf_counter() - began
        try:
            rows["sage llm engine list"] = seconds([SAGE, "llm", "engine", "list"], env)
        finally:
            subprocess.run([SAGE, "gateway", "stop"], check=True, env=env, stdout=subprocess.DEVNULL)
    for name, value in rows.items():
        print(f"{value:7.3f} s  {name}")


if __name__ == "__main__":
    main()
