"""One model serves one request at a time: a thread with a queue, and requests that can be given up at any moment."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from starlette.requests import Request

from sage.common.errors import Overloaded, SageError
from sage.llm.workers.failures import internal_error

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Job(Generic[T]):
    """The work of one request. Its pieces arrive in the event loop; it ends whatever its work raises."""

    def __init__(self) -> None:
        #: Set if nobody wants the rest; the work looks at it often.
        self.gone = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[T | SageError | None] = asyncio.Queue()

    def put(self, piece: T | SageError | None) -> None:
        """Hand a piece to the event loop; None ends the answer. For the thread that works."""
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, piece)

    def abandon(self, reason: SageError | None = None) -> None:
        """End the work; who still waits for its pieces gets `reason`."""
        if reason:  # before the work ends, or its end would be taken for that of the answer
            self.put(reason)
        self.gone.set()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        """Return the next piece. Raises the SageError that ended the work."""
        piece = await self._arrived.get()
        if piece is None:
            raise StopAsyncIteration
        if isinstance(piece, SageError):
            raise piece
        return piece


class Lane:
    """A thread that does one job after the other, in the order in which they came."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._jobs: WeakSet[Job[Any]] = WeakSet()

    def submit(self, work: Callable[[Job[T]], None]) -> Job[T]:
        """Queue work; an abandoned job whose turn comes is dropped."""
        job: Job[T] = Job()
        self._jobs.add(job)
        self._pool.submit(self._do, job, work)
        return job

    async def call(self, function: Callable[[], T]) -> T:
        """Return what `function` returns when its turn has come; if it is waited for no more, it is not called."""

        def work(job: Job[T]) -> None:
            job.put(function())

        job = self.submit(work)
        try:
            return await anext(job)
        finally:
            job.abandon()

    def close(self) -> None:
        """End all jobs, each with an error that tells why."""
        for job in list(self._jobs):
            message = "The engine is being stopped."
            job.abandon(Overloaded(code="engine_stopping", message=message, hint="Try again when it runs."))

    def _do(self, job: Job[T], work: Callable[[Job[T]], None]) -> None:
        if job.gone.is_set():
            return
        ending: SageError | None = Overloaded(code="out_of_memory", message="The engine ran out of memory.")
        try:
            work(job)
            ending = None
        except BaseException as error:  # noqa: BLE001 # whatever it is, somebody waits, and others wait behind
            ending = internal_error(error, self._name)
        finally:  # also if there is no memory left to describe the error
            job.put(ending)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; if the client disconnects first, cancel it and raise ClientGone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
