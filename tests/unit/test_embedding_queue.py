"""Inputs of several embedding requests share batches, and no request makes another request wait long."""

import asyncio
import threading
from typing import Any

import pytest

from sage.common.errors import SageError
from sage.llm.workers.embedding_queue import Batcher, Entry, FairQueue, Request


class Gone:
    """Stands for a job: the queue reads only its event `gone`."""

    def __init__(self) -> None:
        self.gone = threading.Event()


def request(inputs: int) -> Request:
    return Request(Gone(), inputs)  # type: ignore[arg-type]


def add(queue: FairQueue[int], lengths: list[int]) -> Request:
    made = request(len(lengths))
    queue.add(made, lengths, lengths)
    return made


def taken(batch: list[Entry[int]]) -> list[int]:
    return [entry.given for entry in batch]


def test_requests_share_batches_of_similar_lengths_within_the_token_limit() -> None:
    queue = FairQueue[int](max_tokens=128)
    add(queue, [20, 90])
    add(queue, [30, 25, 100, 3])
    batches = []
    while batch := queue.take():
        batches.append(taken(batch))
        assert len(batch) == 1 or len(batch) * max(taken(batch)) <= 128
        assert min(taken(batch)) * 2 > max(taken(batch)) or max(taken(batch)) <= 16
    assert sorted(batches) == [[3], [20, 25, 30], [90], [100]]


def test_a_long_input_is_embedded_alone() -> None:
    queue = FairQueue[int](max_tokens=128)
    add(queue, [5000])
    assert taken(queue.take()) == [5000]


def test_a_short_request_waits_for_at_most_one_batch_of_long_requests() -> None:
    queue = FairQueue[int](max_tokens=1024)
    for _ in range(3):
        add(queue, [500] * 200)
    for _ in range(40):
        queue.take()
        add(queue, [10])
        assert taken(queue.take()) == [10]


def test_a_long_request_is_served_although_short_requests_keep_coming() -> None:
    queue = FairQueue[int](max_tokens=1024)
    add(queue, [500])
    waits = 0
    while taken(queue.take()) != [500]:
        add(queue, [10] * 64)
        waits += 1
    assert waits < 100


def test_inputs_of_a_client_that_disconnected_are_dropped() -> None:
    queue = FairQueue[int](max_tokens=1024)
    left = add(queue, [10, 11, 500])
    add(queue, [12])
    left.job.gone.set()
    assert taken(queue.take()) == [12]
    assert queue.take() == []


def test_vectors_are_returned_in_the_order_of_the_inputs() -> None:
    batches: list[list[int]] = []

    def embed(inputs: list[int]) -> list[str]:
        batches.append(inputs)
        return [f"vector of {given}" for given in inputs]

    async def scenario() -> list[Any]:
        batcher: Batcher[int] = Batcher(embed, max_tokens=64)
        asked = [[50, 3, 40], [3, 60], [1]]
        jobs = [batcher.submit(lengths, lengths) for lengths in asked]
        return [await anext(job) for job in jobs]

    expected = [[f"vector of {given}" for given in asked] for asked in ([50, 3, 40], [3, 60], [1])]
    assert asyncio.run(scenario()) == expected
    assert sorted(given for batch in batches for given in batch) == [1, 3, 3, 40, 50, 60]


def test_if_an_input_fails_only_its_request_fails() -> None:
    batches: list[list[int]] = []
    has_begun, may_continue = threading.Event(), threading.Event()

    def embed(inputs: list[int]) -> list[int]:
        batches.append(inputs)
        has_begun.set()
        may_continue.wait(30)
        if 13 in inputs:
            raise MemoryError
        return inputs

    async def scenario() -> list[list[int]]:
        batcher: Batcher[int] = Batcher(embed, max_tokens=96)
        first = batcher.submit([90], [90])
        has_begun.wait(30)
        before, failing, after = (batcher.submit(given, given) for given in ([5, 6], [13, 13], [7]))
        may_continue.set()
        await anext(first)
        with pytest.raises(SageError, match="memory"):
            await anext(failing)
        return [await anext(job) for job in (before, after)]

    assert asyncio.run(scenario()) == [[5, 6], [7]]
    assert sorted(batches[1]) == [5, 6, 7, 13, 13]
    assert batches.count([13]) == 1  # the second 13 is not computed, because its request has already failed


def test_if_the_thread_ends_all_requests_are_answered_with_an_error_and_no_more_are_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FairQueue, "take", lambda _: 1 // 0)

    async def scenario() -> None:
        batcher: Batcher[int] = Batcher(list, max_tokens=16)
        with pytest.raises(SageError, match="has ended"):
            await anext(batcher.submit([1], [1]))
        with pytest.raises(SageError, match="has ended"):
            batcher.check()
        with pytest.raises(SageError, match="has ended"):
            batcher.submit([2], [2])

    asyncio.run(scenario())


def test_a_queue_that_closes_ends_the_waiting_requests_with_an_error() -> None:
    may_end = threading.Event()

    def embed(inputs: list[int]) -> list[int]:
        may_end.wait(30)
        return inputs

    async def scenario() -> None:
        batcher: Batcher[int] = Batcher(embed, max_tokens=16)
        jobs = [batcher.submit([given], [given]) for given in range(1, 4)]
        batcher.close()
        for job in jobs:
            with pytest.raises(SageError, match="being stopped"):
                await anext(job)
        may_end.set()

    asyncio.run(scenario())
