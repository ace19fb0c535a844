"""The users of a gateway during a chaos test: one sends prompts, one reads the change feed, one starts and resumes runs."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from sage.common.errors import SageError
from sage.llm.client import SageClient
from sage.llm.client.types import EngineView

PROMPTS = ("Once upon a time", "The capital of France is", "1, 2, 3,", "def main():")
_REQUEST_SECONDS, _RETRY_SECONDS = 15.0, 0.2


class User:
    """Calls `act` repeatedly in a thread until `stop` is called. Errors of the gateway and the connection are counted."""

    def __init__(self, base_url: str) -> None:
        self.client = SageClient(base_url, timeout_seconds=_REQUEST_SECONDS)
        self.errors: Counter[str] = Counter()
        self.bugs: list[str] = []  #: everything that must not happen, even during a fault
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def act(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.act()
            except (SageError, httpx.HTTPError) as error:
                self.errors[getattr(error, "code", type(error).__name__)] += 1
                time.sleep(_RETRY_SECONDS)
            except Exception as error:  # noqa: BLE001 - reported at the end of the test
                self.bugs.append(repr(error))
                time.sleep(_RETRY_SECONDS)


class Asker(User):
    """Sends prompts to the models in turn, without a pause, and compares each answer with the answer before the faults."""

    def __init__(self, base_url: str, models: list[str]) -> None:
        super().__init__(base_url)
        self._http = httpx.Client(base_url=base_url, timeout=_REQUEST_SECONDS, trust_env=False)
        self._questions = itertools.cycle((model, prompt) for prompt in PROMPTS for model in models)
        self.expected = {
            question: self._ask(*question) for question in itertools.islice(self._questions, len(PROMPTS) * len(models))
        }
        self.answered: Counter[str] = Counter()  #: number of answers by model

    def act(self) -> None:
        model, prompt = next(self._questions)
        text = self._ask(model, prompt)
        self.answered[model] += 1
        if text != self.expected[model, prompt]:
            self.bugs.append(f"{model} answered {text!r} to {prompt!r}")

    def _ask(self, model: str, prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = self._http.post("/v1/completions", json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])


class Follower(User):
    """Reads the change feed; a new connection continues after the last event."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self.ids: list[int] = []

    def act(self) -> None:
        for event in self.client.follow_changes(self.ids[-1] if self.ids else 0, patience_seconds=0):
            self.ids.append(event.id)
            if self._stopped.is_set():
                return


class Trainer(User):
    """Keeps the gateway running, starts each run once, and resumes each engine that failed."""

    def __init__(self, base_url: str, runs: Mapping[str, dict[str, Any]], gateway: Callable[[], object]) -> None:
        """runs: the request of each run by its output folder; gateway: starts the gateway if it does not run."""
        super().__init__(base_url)
        self._runs, self._gateway = runs, gateway
        self.failures: Counter[str] = Counter()  #: number of failures by reason
        self.engines: list[EngineView] = []

    @property
    def is_done(self) -> bool:
        return self._runs.keys() <= {engine.output_dir for engine in self.engines if engine.state == "completed"}

    def act(self) -> None:
        self._gateway()
        self.engines = self.client.list_engines()
        started = {engine.output_dir for engine in self.engines}
        for output in self._runs.keys() - started:
            self.client.start_engine(**self._runs[output])
        for engine in self.engines:
            # If the answer to a start request was lost, the run was started twice. Only one of the engines owns the folder.
            if engine.state == "failed" and engine.reason and engine.reason.code != "output_unusable":
                self.client.resume_engine(engine.id)
                self.failures[f"{engine.reason.code}: {engine.reason.message}"] += 1
        time.sleep(0.5)
