"""Run the answers in progress together, one forward pass after another, on one thread.

Before each pass, cancelled answers are removed from the batch and waiting answers are added. A pass computes one token of
each answer and a limited number of prompt tokens, so that a long prompt does not stop the other answers.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sage.common.errors import Overloaded, SageError
from sage.llm.workers.adapters import Adapter
from sage.llm.workers.answers import Answer
from sage.llm.workers.failures import internal_error
from sage.llm.workers.jobs import Job, engine_stopping
from sage.llm.workers.packed import Abandoned, Part
from sage.llm.workers.runners import Runner
from sage.llm.workers.sampling import Piece

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Request:
    """The answers of one request, which share a job."""

    job: Job[Piece]
    unfinished: int


@dataclass(eq=False)
class _Row:
    """An answer in the batch."""

    answer: Answer
    request: _Request
    adapter: Adapter | None
    pending: list[int]  #: tokens that the model has not seen yet
    cache: Any = None

    @property
    def is_reading(self) -> bool:
        """Whether the model has not yet read the whole prompt."""
        return not self.answer.tokens


class Batch:
    """A thread that runs answers."""

    def __init__(self, runner: Runner, slots: int) -> None:
        """slots: maximum number of answers in progress; further answers wait in the order of arrival."""
        self._runner, self._slots = runner, slots
        self._arrivals: SimpleQueue[_Row | Callable[[], None] | None] = SimpleQueue()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  #: answers in progress
        self._jobs: WeakSet[Job[Any]] = WeakSet()
        self._is_open = True
        threading.Thread(target=self._run, name="Generation", daemon=True).start()

    def submit(self, job: Job[Piece], answers: Sequence[Answer], adapter: Adapter | None = None) -> None:
        """Queue the answers of a request; the job is finished when all of them have ended. adapter: None for the base."""
        self._jobs.add(job)
        request = _Request(job, len(answers))
        for answer in answers:
            self._arrivals.put(_Row(answer, request, adapter, answer.prompt))

    async def between_passes(self, function: Callable[[], None]) -> None:
        """Call a function between two passes, and wait for it. Raises SageError if it fails."""
        job: Job[None] = Job()

        def work() -> None:
            ending: SageError | None = None
            try:
                function()
            except BaseException as error:  # noqa: BLE001 # the caller waits
                ending = internal_error(error, "Generation")
            job.finish(ending)

        self._arrivals.put(work)
        async for _ in job:
            pass

    def close(self) -> None:
        """End all answers with an error that the engine is stopping."""
        for job in list(self._jobs):
            job.abandon(engine_stopping())
        self._is_open = False
        self._arrivals.put(None)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._is_open:
                self._receive()
                self._retire()
                while self._waiting and len(self._rows) < self._slots:
                    self._rows.append(self._waiting.popleft())
                if parts := self._plan():
                    self._pass([row for row, _ in parts], [part for _, part in parts])

    def _receive(self) -> None:
        """Take the requests that have arrived; if there is nothing to do, wait for one."""
        while not self._arrivals.empty() or not (self._rows or self._waiting):
            arrived = self._arrivals.get()
            if arrived is None:
                return
            if isinstance(arrived, _Row):
                self._attempt(arrived, arrived.answer.begin)
                self._waiting.append(arrived)
            else:
                arrived()

    def _retire(self) -> None:
        """Remove answers that have ended or were cancelled."""
        for rows in (self._rows, self._waiting):
            for row in [row for row in rows if row.answer.has_ended or row.request.job.gone.is_set()]:
                rows.remove(row)
                row.request.unfinished -= 1
                if not row.request.unfinished:
                    row.request.job.finish(None)

    def _plan(self) -> list[tuple[_Row, Part]]:
        """Return the next pass: the last token of each answer, and tokens of prompts up to the runner's limit."""
        chosen, room = list[tuple[_Row, Part]](), self._runner.prompt_tokens
        for row in list(self._rows):
            count = min(len(row.pending), self._runner.prompt_tokens)
            if row.is_reading:
                if count > room:
                    continue
                room -= count
                self._rows.remove(row)  # the next pass begins with another prompt
                self._rows.append(row)
            if row.cache is None:
                row.cache = self._runner.new_cache(len(row.answer.prompt) + row.answer.limit)
            wants_all = row.is_reading and row.answer.scores_prompt
            chosen.append((row, Part(row.cache, row.pending[:count], wants_all, row.adapter)))
        return chosen

    def _pass(self, rows: list[_Row], parts: list[Part]) -> None:
        """Run one pass. If it fails, run each part alone, so that only the answers whose part fails again get an error."""

        def check() -> None:
            if all(row.request.job.gone.is_set() for row in rows):
                raise Abandoned

        try:
            logits = self._runner.run(parts, check)
        except Abandoned:
            return
        except BaseException as error:  # noqa: BLE001 # clients wait for the result, and other answers are in progress
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
        else:
            self._settle(rows, parts, logits)
            return
        for row, part in zip(rows, parts, strict=True):
            self._pass([row], [part])

    def _settle(self, rows: list[_Row], parts: list[Part], logits: list[Tensor]) -> None:
        """Pass each answer its logits, and choose the next token of each answer whose prompt is complete."""
        best = torch.stack([own[-1] for own in logits]).argmax(-1).tolist()
        for row, part, own, token in zip(rows, parts, logits, best, strict=True):
            row.pending = row.pending[len(part.tokens) :]
            self._attempt(row, partial(self._advance, row, part, own, token))

    def _advance(self, row: _Row, part: Part, logits: Tensor, best: int) -> None:
        answer = row.answer
        if part.wants_all_logits:
            answer.read(part.tokens, logits)
        if row.pending or answer.has_ended:
            return
        chooser = answer.chooser
        token = best if chooser.takes_the_best else chooser.choose(answer.tokens, logits[-1])
        answer.add(token, logits[-1])
        row.pending = [token]

    def _attempt(self, row: _Row, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 # clients wait for the result, and other answers are in progress
            self._fail(row, error)

    def _fail(self, row: _Row, error: BaseException) -> None:
        """End the request of a row with an error."""
        ending: SageError = Overloaded(code="out_of_memory", message="The engine ran out of memory.")
        try:
            ending = internal_error(error, "Generation")
        finally:  # the job must end even if there is not enough memory to build the error
            row.request.job.abandon(ending)
