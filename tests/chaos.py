"""A random schedule of faults for the processes, files and database of one SAGE_HOME."""

import contextlib
import os
import random
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from clock import SteppedClock

#: For each role: text that the command line of its processes contains.
ROLES = {"gateway": "sage.llm.gateway", "run": "sage.libs.finetune.worker", "server": "sage.llm.workers"}
#: Mean seconds between two faults.
_PAUSE_SECONDS = 2.0
#: Minimum and maximum seconds that a fault lasts. The longest faults last longer than the lease of a control plane.
_DURATION_SECONDS = (0.5, 11.0)
_CLOCK_STEPS_SECONDS = (3, -3, 3600, -3600, 86_400)
#: Maximum seconds to wait for a run with a checkpoint.
_FIND_SECONDS = 5.0
Undo = Callable[[], object]


def processes(home: Path, role: str = "") -> list[psutil.Process]:
    """Return the processes that were started with this SAGE_HOME; role: a key of `ROLES`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_of_home = process.environ().get("SAGE_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE
            if is_of_home and ROLES.get(role, "") in " ".join(process.cmdline()):
                found.append(process)
    return found


class Chaos:
    """Injects one fault after another. A fault returns a function that ends the fault, or None if there was no target."""

    def __init__(self, home: Path, clock: SteppedClock, seed: int, *, is_disk_small: bool) -> None:
        """is_disk_small: `home` is on a small file system of its own, which may be filled."""
        self._home, self._clock = home, clock
        # The schedule depends only on the seed. The targets also depend on the processes and files that exist.
        self._schedule, self._random = random.Random(seed), random.Random(seed)
        self.injected: Counter[str] = Counter()  #: number of faults by kind
        self.log: list[str] = []
        self._undo: list[tuple[float, Undo]] = []
        self._faults = {
            **{f"kill -9 of a {role}": lambda role=role: self._kill(role) for role in ROLES},
            **{f"suspension of a {role}": lambda role=role: self._suspend(role) for role in ROLES},
            **{f"no file descriptors for a {role}": lambda role=role: self._use_up_descriptors(role) for role in ROLES},
            "kill -9 of all processes": self._kill_all,
            "SIGTERM to the gateway": self._terminate,
            "step of the clock": self._step_clock,
            "damaged newest checkpoint": self._damage,
            "locked database": self._lock_database,
        }  # fmt: skip
        if is_disk_small:
            self._faults["full disk"] = self._fill_disk

    def inject(self, seconds: float) -> None:
        """Inject faults for some seconds, then end all faults. Each round injects every kind once, in a random order."""
        began, order = time.monotonic(), list[str]()
        while (now := time.monotonic() - began) < seconds:
            order = order or self._schedule.sample(list(self._faults), len(self._faults))
            name = order.pop()
            pause, duration = self._schedule.expovariate(1 / _PAUSE_SECONDS), self._schedule.uniform(*_DURATION_SECONDS)
            if undo := self._faults[name]():
                self.injected[name] += 1
                self.log.append(f"{now:7.1f} s  {name} for {duration:.1f} s")
                self._undo.append((now + duration, undo))
            time.sleep(pause)
            for entry in [entry for entry in self._undo if entry[0] <= time.monotonic() - began]:
                self._end(entry)
        for entry in list(self._undo):
            self._end(entry)
        self._clock.set(0)

    def _end(self, entry: tuple[float, Undo]) -> None:
        self._undo.remove(entry)
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            entry[1]()

    def _any(self, role: str) -> psutil.Process | None:
        found = sorted(processes(self._home, role), key=lambda process: process.pid)
        return self._random.choice(found) if found else None

    def _kill(self, role: str) -> Undo | None:
        return self._signal(role, signal.SIGKILL)

    def _kill_all(self) -> Undo:
        for process in processes(self._home):
            with contextlib.suppress(psutil.Error):
                process.kill()
        return lambda: None

    def _terminate(self) -> Undo | None:
        return self._signal("gateway", signal.SIGTERM)

    def _suspend(self, role: str) -> Undo | None:
        return self._signal(role, signal.SIGSTOP)

    def _signal(self, role: str, number: int) -> Undo | None:
        process = self._any(role)
        if process is None:
            return None
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
        return (lambda: process.send_signal(signal.SIGCONT)) if number == signal.SIGSTOP else lambda: None

    def _use_up_descriptors(self, role: str) -> Undo | None:
        process = self._any(role)
        if process is None:
            return None
        try:
            soft, hard = process.rlimit(resource.RLIMIT_NOFILE)
            process.rlimit(resource.RLIMIT_NOFILE, (process.num_fds(), hard))
        except (psutil.Error, OSError):
            return None
        return lambda: process.rlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def _step_clock(self) -> Undo:
        self._clock.set(self._random.choice(_CLOCK_STEPS_SECONDS))
        return lambda: None

    def _damage(self) -> Undo | None:
        """Damage the newest checkpoint of a run and kill the run, so that an older checkpoint must be used."""
        deadline = time.monotonic() + _FIND_SECONDS
        while time.monotonic() < deadline:
            for process in self._random.sample(found := processes(self._home, "run"), len(found)):
                with contextlib.suppress(psutil.Error, OSError):
                    newest = _newest_weights(Path(process.cmdline()[-1]))
                    process.kill()
                    content = newest.read_bytes()
                    newest.write_bytes(content[: self._random.randrange(len(content))])
                    return lambda: None
            time.sleep(0.05)
        return None

    def _lock_database(self) -> Undo | None:
        with contextlib.suppress(sqlite3.Error):
            database = sqlite3.connect(self._home / "state/engines.db", timeout=1, isolation_level=None)
            database.execute("BEGIN IMMEDIATE")
            return database.close
        return None

    def _fill_disk(self) -> Undo:
        filler = self._home / "filler"
        for size in (65536, 512):
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(b"0" * size)
        return lambda: filler.unlink(missing_ok=True)


def _newest_weights(run: Path) -> Path:
    """Return the weights in the newest checkpoint of a run. Raises FileNotFoundError if there is no checkpoint."""
    found = max(run.glob("checkpoint-*/adapter_model.safetensors"), key=os.path.getmtime, default=None)
    if found is None:
        raise FileNotFoundError(run)
    return found
