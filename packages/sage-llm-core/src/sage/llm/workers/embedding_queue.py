"""Form batches of embedding inputs, with a fair share for each waiting request."""

import heapq
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

from sage.llm.workers.jobs import Job, JobThread

T = TypeVar("T")
#: Inputs with at most this number of tokens form one class, because all such inputs take about the same time.
_SHORTEST_CLASS_TOKENS = 16


@dataclass(eq=False)
class Request:
    """A request and the vectors that have been computed so far."""

    job: Job[Any]
    inputs: int  #: number of inputs
    vectors: dict[int, Any] = field(default_factory=dict)  #: by position of the input

    def add(self, position: int, vector: Any) -> None:
        """Store the vector of an input. When the vectors of all inputs are stored, deliver them to the job."""
        self.vectors[position] = vector
        if len(self.vectors) == self.inputs:
            self.job.put([self.vectors[at] for at in range(self.inputs)])


class Entry(NamedTuple, Generic[T]):
    """A waiting input. The entries of a length class are served in ascending order of `turn`, then of `order`."""

    turn: float  #: the time at which the input is complete in the simulation of `FairQueue`; the unit is tokens
    order: int  #: sequence number of the input; decides between inputs with the same `turn`
    tokens: int
    request: Request
    position: int  #: position among the inputs of the request
    given: T


class FairQueue(Generic[T]):
    """Inputs of several requests, in classes of similar length: up to 16 tokens, 17 to 32, 33 to 64, and so on.

    All inputs of a batch belong to the same class. The class is chosen by fair queueing (Demers, Keshav and Shenker 1989).
    Fair queueing simulates that all requests are computed at the same time and with equal shares. In the simulation, the
    inputs of each request are computed in ascending order of length. The next batch begins with the input that is complete
    first in the simulation.
    """

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: maximum number of tokens in a batch, with padding. A longer input is computed alone."""
        self._max_tokens = max_tokens
        self._classes: defaultdict[int, list[Entry[T]]] = defaultdict(list)  #: key: padded length; value: heap of inputs
        self._waiting: Counter[Request] = Counter()
        self._served, self._order = 0.0, count()  #: `_served`: current time in the simulation, in tokens

    def add(self, request: Request, inputs: Sequence[T], lengths: Sequence[int]) -> None:
        """Add the inputs of a request.  lengths: number of tokens of each input."""
        turn = self._served
        self._waiting[request] = len(inputs)
        for index in sorted(range(len(inputs)), key=lengths.__getitem__):
            tokens = lengths[index]
            turn += tokens
            padded = max(_SHORTEST_CLASS_TOKENS, 1 << (tokens - 1).bit_length())
            heapq.heappush(self._classes[padded], Entry(turn, next(self._order), tokens, request, index, inputs[index]))

    def take(self) -> list[Entry[T]]:
        """Remove and return the next batch, or [] if no input waits."""
        batch: list[Entry[T]] = []
        while self._classes and not batch:
            padded, heap = min(self._classes.items(), key=lambda item: item[1][0])
            sharing = len(self._waiting)
            while heap and len(batch) < max(1, self._max_tokens // padded):
                entry = heapq.heappop(heap)
                self._waiting[entry.request] -= 1
                if not self._waiting[entry.request]:
                    del self._waiting[entry.request]
                if not entry.request.job.gone.is_set():
                    batch.append(entry)
            self._served += sum(entry.tokens for entry in batch) / sharing
            if not heap:
                del self._classes[padded]
        return batch


class Batcher(JobThread, Generic[T]):
    """A thread that computes the vectors of the inputs in a FairQueue, one batch after another."""

    def __init__(self, embed: Callable[[list[T]], Sequence[Any]], max_tokens: int) -> None:
        self._embed, self._queue = embed, FairQueue[T](max_tokens)
        self._changed = threading.Condition()
        super().__init__("Embedding")

    def submit(self, inputs: Sequence[T], lengths: Sequence[int]) -> Job[list[Any]]:
        """Add a request to the queue. The returned job delivers the list of vectors in the order of the inputs.

        Raises SageError if the thread has ended or was closed.
        """
        request = Request(Job(), len(inputs))
        self._track(request.job)
        with self._changed:
            self._queue.add(request, inputs, lengths)
            self._changed.notify()
        return request.job

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (batch := self._queue.take()):
                    self._changed.wait()
            self._compute(batch)

    def _compute(self, batch: list[Entry[T]]) -> None:
        """Compute a batch. If the batch fails, compute each input alone, so that only requests with a failing input fail."""
        try:
            computed = list(zip(batch, self._embed([entry.given for entry in batch]), strict=True))
        except BaseException as error:  # noqa: BLE001 # the thread must continue, because clients wait for results
            if len(batch) == 1:
                batch[0].request.job.fail(error, "Embedding")
                return
        else:
            for entry, vector in computed:
                entry.request.add(entry.position, vector)
            return
        for entry in batch:
            if not entry.request.job.gone.is_set():
                self._compute([entry])
