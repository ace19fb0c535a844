"""The model thread: which answers it computes in a pass, and what happens after an error."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sage.common.errors import SageError
from sage.llm.workers import batch as batch_module
from sage.llm.workers.batch import Batch
from sage.llm.workers.choosing import Chooser
from sage.llm.workers.jobs import Job
from sage.llm.workers.packed import Part
from sage.llm.workers.sampling import Piece, Sampling


class Runner:
    """A model with a vocabulary of four tokens. It records the first prompt tokens of each pass."""

    prompt_tokens = 100

    def __init__(self) -> None:
        self.passes: list[list[Any]] = []
        self.sizes = {0: 4}  #: size of the vocabulary, by the first token of a prompt

    def new_cache(self, _limit_tokens: int) -> list[int]:
        return []

    def run(self, parts: list[Part], _check: Callable[[], None]) -> list[Tensor]:
        for part in parts:
            part.cache.extend(part.tokens)
        self.passes.append([part.cache[0] for part in parts])
        return [torch.zeros(1, self.sizes.get(part.cache[0], 4)) for part in parts]


class Answer:
    """An answer that ends after `length` tokens, or fails at its start if `length` is negative."""

    scores_prompt, limit = False, 9

    def __init__(self, job: Job[Piece], name: int, length: int) -> None:
        self.prompt, self.length = [name], length
        self.tokens: list[int] = []
        self.chooser = Chooser(Sampling(max_tokens=9, temperature=0.0), None, [])
        self.has_ended = False
        self._job = job

    def begin(self) -> None:
        if self.length < 0:
            raise MemoryError

    def add(self, token: int, _logits: Tensor) -> None:
        self.tokens.append(token)
        self.has_ended = len(self.tokens) == self.length
        if self.has_ended:
            self._job.put(Piece(str(self.prompt[0])))


def submit(batch: Batch, name: int, answers: int = 1, length: int = 2) -> Job[Piece]:
    job: Job[Piece] = Job()
    batch.submit(job, [Answer(job, name, length) for _ in range(answers)])  # type: ignore[misc]
    return job


async def submitted_at_once(batch: Batch, *requests: tuple[int, int]) -> list[Job[Piece]]:
    """Submit requests before the next pass. requests: name and number of answers of each request."""
    may_continue = threading.Event()

    def hold() -> None:
        may_continue.wait(30)

    holding = asyncio.ensure_future(batch.between_passes(hold))
    await asyncio.sleep(0)
    jobs = [submit(batch, name, answers) for name, answers in requests]
    may_continue.set()
    await holding
    return jobs


async def texts_of(job: Job[Piece]) -> list[str]:
    return [piece.text async for piece in job]


def run(scenario: Callable[[Batch, Runner], Any], slots: int = 4) -> None:
    async def main() -> None:
        runner = Runner()
        batch = Batch(runner, slots)
        await asyncio.wait_for(scenario(batch, runner), 30)
        batch.close()

    asyncio.run(main())


def test_a_request_with_many_answers_shares_the_slots_with_later_requests() -> None:
    async def scenario(batch: Batch, runner: Runner) -> None:
        jobs = await submitted_at_once(batch, (1, 40), (2, 1), (3, 2))
        assert [len(await texts_of(job)) for job in jobs] == [40, 1, 2]
        assert sorted(runner.passes[0]) == [1, 1, 2, 3]
        assert max(at for at, names in enumerate(runner.passes) if 2 in names or 3 in names) < 4
        assert all(len(names) == 4 for names in runner.passes[:-2])  # no slot stays empty

    run(scenario)


def test_a_batch_is_active_until_some_seconds_after_its_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(batch: Batch, _: Runner) -> None:
        assert not batch.is_active
        [job] = await submitted_at_once(batch, (1, 1))
        assert await texts_of(job) == ["1"]
        assert batch.is_active
        monkeypatch.setattr(batch_module, "_ACTIVE_SECONDS", 0.0)
        assert not batch.is_active

    run(scenario)


def test_an_error_after_a_pass_fails_the_answers_of_the_pass_and_the_thread_continues() -> None:
    async def scenario(batch: Batch, runner: Runner) -> None:
        runner.sizes = {1: 5}  # the logits cannot be stacked
        for job in await submitted_at_once(batch, (1, 1), (2, 1)):
            with pytest.raises(SageError) as caught:
                await texts_of(job)
            assert (caught.value.code, caught.value.http_status) == ("internal_error", 500)
        assert await texts_of(submit(batch, 3)) == ["3"]

    run(scenario)


def test_an_answer_that_cannot_begin_fails_only_its_own_request() -> None:
    async def scenario(batch: Batch, _: Runner) -> None:
        failing, other = submit(batch, 1, answers=3, length=-1), submit(batch, 2)
        with pytest.raises(SageError, match="memory"):
            await texts_of(failing)
        assert await texts_of(other) == ["2"]
        batch.check()

    run(scenario)


def test_if_the_thread_ends_all_requests_are_answered_with_an_error_and_no_more_are_accepted() -> None:
    async def scenario(batch: Batch, runner: Runner) -> None:
        runner.new_cache = lambda _: 1 // 0  # type: ignore[assignment, method-assign]
        finished = asyncio.Event()
        job: Job[Piece] = Job(on_finish=finished.set)
        batch.submit(job, [Answer(job, 1, 2)])  # type: ignore[list-item]
        with pytest.raises(SageError, match="has ended") as caught:
            await texts_of(job)
        assert caught.value.http_status == 500
        await finished.wait()
        for refuse in (batch.check, lambda: submit(batch, 2)):
            with pytest.raises(SageError, match="has ended"):
                refuse()
        with pytest.raises(SageError, match="has ended"):
            await batch.between_passes(lambda: None)

    run(scenario)


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: device-side assert"), RuntimeError("CUDA error: lost")]
)
@pytest.mark.parametrize("requests", [1, 2])
def test_an_error_after_which_the_gpu_cannot_be_used_ends_the_thread(error: Exception, requests: int) -> None:
    async def scenario(batch: Batch, runner: Runner) -> None:
        def fail(*_: Any) -> list[Tensor]:
            raise error

        runner.run = fail  # type: ignore[method-assign]
        for job in await submitted_at_once(batch, *((name, 1) for name in range(requests))):
            with pytest.raises(SageError, match="can no longer answer"):
                await texts_of(job)
        with pytest.raises(SageError, match="can no longer answer"):
            batch.check()

    run(scenario)


def test_answers_wait_until_the_cache_has_room_for_them() -> None:
    async def main() -> None:
        runner = Runner()
        batch = Batch(runner, slots=4, cache_tokens=25)  # each answer needs 10
        jobs = await submitted_at_once(batch, (1, 2), (2, 1), (3, 1))
        assert [await texts_of(job) for job in jobs] == [["1", "1"], ["2"], ["3"]]
        assert max(map(len, runner.passes)) == 2
        large = Batch(runner, slots=4, cache_tokens=5)  # an answer that is too large is computed alone
        assert await texts_of(submit(large, 4)) == ["4"]
        batch.close()
        large.close()

    asyncio.run(asyncio.wait_for(main(), 30))
