"""Compute the answers in progress as a batch. One thread runs one forward pass after another.

A slot is a place for one answer in the batch. A pass computes one token of each answer and a limited number of prompt
tokens. Therefore a long prompt does not stop the other answers.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from sage.llm.workers.adapters import Adapter
from sage.llm.workers.answers import Answer
from sage.llm.workers.jobs import Job, JobThread
from sage.llm.workers.packed import Abandoned, Part
from sage.llm.workers.runners import Runner
from sage.llm.workers.sampling import Piece

#: The batch remains active for this time after the last request has ended.
_ACTIVE_SECONDS = 10.0


@dataclass(eq=False)
class _Request:
    job: Job[Piece]
    waiting: deque[Answer]
    adapter: Adapter | None
    in_progress: int = 0


@dataclass(eq=False)
class _Row:
    answer: Answer
    request: _Request
    pending: list[int]  #: tokens that the model has not processed yet
    cache: Any = None

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt is not processed yet."""
        return not self.answer.tokens


class Batch(JobThread):
    """A thread that computes answers in batches."""

    def __init__(self, runner: Runner, slots: int, cache_tokens: int | None = None) -> None:
        """slots: maximum number of answers in progress.

        cache_tokens: maximum total number of tokens of the answers in progress and their prompts. None: no limit. If one
        prompt and its answer together exceed the limit, this answer is computed while no other answer is in progress.
        """
        self._runner, self._slots, self._cache_tokens = runner, slots, cache_tokens
        self._arrivals: SimpleQueue[_Request | Callable[[], None] | None] = SimpleQueue()
        self._requests: list[_Request] = []  #: in the order of arrival
        self._rows: list[_Row] = []
        self._is_open = True
        self._ended_at_seconds = -math.inf  #: when the last request ended
        self.threads = torch.get_num_threads()  #: number of CPU threads that compute a pass
        super().__init__("Generation")

    @property
    def slots_in_use(self) -> int:
        """The number of answers in progress."""
        return len(self._rows)

    @property
    def is_active(self) -> bool:
        """Whether a request is in progress, or has ended within the last `_ACTIVE_SECONDS`."""
        return bool(self._requests) or time.monotonic() - self._ended_at_seconds < _ACTIVE_SECONDS

    async def set_threads(self, threads: int) -> None:
        """Change the number of CPU threads before the next pass."""

        def change() -> None:  # torch changes this number only for the calling thread
            torch.set_num_threads(threads)
            self.threads = threads

        await self.between_passes(change)

    def submit(self, job: Job[Piece], answers: Sequence[Answer], adapter: Adapter | None = None) -> None:
        """Queue the answers of a request.

        adapter: None for the base model. Raises SageError if the thread has ended or was closed.
        """
        self._track(job)
        self._arrivals.put(_Request(job, deque(answers), adapter))

    async def between_passes(self, function: Callable[[], None]) -> None:
        """Call a function between two passes, and wait until it has returned. Raises SageError if the function fails."""
        job: Job[None] = Job()
        self._track(job)

        def work() -> None:
            try:
                function()
            except BaseException as error:  # noqa: BLE001 # the caller receives the error
                job.fail(error, "Generation")
            job.finish(None)

        self._arrivals.put(work)
        async for _ in job:
            pass

    def close(self) -> None:
        """End all answers with an error which says that the engine is stopping."""
        super().close()
        self._is_open = False
        self._arrivals.put(None)

    def _work(self) -> None:
        with torch.inference_mode():
            while self._is_open:
                self._receive()
                self._retire()
                self._admit()
                if parts := self._plan():
                    self._pass([row for row, _ in parts], [part for _, part in parts])

    def _receive(self) -> None:
        while not self._arrivals.empty() or not self._requests:
            arrived = self._arrivals.get()
            if arrived is None:
                return
            if isinstance(arrived, _Request):
                for answer in arrived.waiting:
                    _attempt(arrived, answer.begin)
                arrived.waiting = deque(answer for answer in arrived.waiting if not answer.has_ended)
                self._requests.append(arrived)
            else:
                arrived()

    def _retire(self) -> None:
        for row in [row for row in self._rows if row.answer.has_ended or row.request.job.gone.is_set()]:
            self._rows.remove(row)
            row.request.in_progress -= 1
        for request in list(self._requests):
            if not request.in_progress and (not request.waiting or request.job.gone.is_set()):
                self._requests.remove(request)
                self._ended_at_seconds = time.monotonic()
                request.job.finish(None)

    def _admit(self) -> None:
        """Give each free slot to the waiting request with the fewest answers in progress.

        If there are several such requests, the oldest of these requests gets the slot.
        """
        while len(self._rows) < self._slots and (waiting := [request for request in self._requests if request.waiting]):
            request = min(waiting, key=lambda request: request.in_progress)
            if not self._has_memory(request.waiting[0]):
                return
            request.in_progress += 1
            answer = request.waiting.popleft()
            self._rows.append(_Row(answer, request, answer.prompt))

    def _has_memory(self, answer: Answer) -> bool:
        used = sum(_tokens(row.answer) for row in self._rows)
        return not (self._rows and self._cache_tokens) or used + _tokens(answer) <= self._cache_tokens

    def _plan(self) -> list[tuple[_Row, Part]]:
        """Return the parts of the next pass: the last token of each answer, and prompt tokens up to the runner's limit."""
        chosen, room = list[tuple[_Row, Part]](), self._runner.prompt_tokens
        for row in list(self._rows):
            count = min(len(row.pending), self._runner.prompt_tokens)
            if row.is_reading:
                if count > room:
                    continue
                room -= count
                self._rows.remove(row)  # move the row to the end, so that the next pass starts with another prompt
                self._rows.append(row)
            if row.cache is None:
                row.cache = self._runner.new_cache(_tokens(row.answer))
            wants_all = row.is_reading and row.answer.scores_prompt
            chosen.append((row, Part(row.cache, row.pending[:count], wants_all, row.request.adapter)))
        return chosen

    def _pass(self, rows: list[_Row], parts: list[Part]) -> None:
        """Run one pass. If the pass fails, run each part alone, so that only answers whose part fails again get an error."""

        def check() -> None:
            if all(row.request.job.gone.is_set() for row in rows):
                raise Abandoned

        try:
            logits = self._runner.run(parts, check)
        except Abandoned:
            return
        except BaseException as error:  # noqa: BLE001 # the thread must continue, because clients wait for answers
            if len(rows) == 1:
                rows[0].request.job.fail(error, "Generation")
                return
        else:
            self._settle(rows, parts, logits)
            return
        for row, part in zip(rows, parts, strict=True):
            self._pass([row], [part])

    def _settle(self, rows: list[_Row], parts: list[Part], logits: list[Tensor]) -> None:
        try:
            best = torch.stack([own[-1] for own in logits]).argmax(-1).tolist()
        except BaseException as error:  # noqa: BLE001 # the pass cannot be repeated, because the caches have changed
            for row in rows:
                row.request.job.fail(error, "Generation")
            return
        for row, part, own, token in zip(rows, parts, logits, best, strict=True):
            row.pending = row.pending[len(part.tokens) :]
            _attempt(row.request, partial(self._advance, row, part, own, token))

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


def _tokens(answer: Answer) -> int:
    return len(answer.prompt) + answer.limit


def _attempt(request: _Request, work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 # an error in one request must not end the thread
        request.job.fail(error, "Generation")
