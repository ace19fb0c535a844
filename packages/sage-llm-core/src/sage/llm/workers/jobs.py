"""A thread with a queue that runs one job at a time; jobs can be cancelled at any moment."""

import asyncio
import contextlib
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
    """The client disconnected before the answer was complete."""


class Job(Generic[T]):
    """The work of one request. Pieces are delivered to the event loop; every exception ends the job."""

    def __init__(self, on_finish: Callable[[], None] = lambda: None) -> None:
        """on_finish: called in the event loop when the work has ended, also if it was cancelled."""
        #: Set when the job is cancelled; the work must check it often.
        self.gone = threading.Event()
        self._on_finish = on_finish
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[T | SageError | None] = asyncio.Queue()

    def put(self, piece: T | SageError | None) -> None:
        """Deliver a piece to the event loop; None ends the answer. Called by the worker thread."""
        self._call(self._arrived.put_nowait, piece)

    def finish(self, ending: SageError | None) -> None:
        """Deliver the end of the answer or its error. Called once, when the work has ended."""
        self._call(self._finish, ending)

    def _finish(self, ending: SageError | None) -> None:
        self._on_finish()
        self._arrived.put_nowait(ending)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the process ends
            self._loop.call_soon_threadsafe(function, *arguments)

    def abandon(self, reason: SageError | None = None) -> None:
        """Cancel the job; if `reason` is given, the consumer of its pieces receives it as an exception."""
        if reason:  # before `gone` is set: otherwise the end of the work would look like the end of the answer
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
    """A thread that runs jobs one at a time, in the order of arrival."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._jobs: WeakSet[Job[Any]] = WeakSet()

    def submit(self, work: Callable[[Job[T]], None]) -> Job[T]:
        """Queue work; a job that is cancelled before it starts is skipped."""
        job: Job[T] = Job()
        self._jobs.add(job)
        self._pool.submit(self._do, job, work)
        return job

    async def call(self, function: Callable[[], T]) -> T:
        """Queue a function and return its result. If the caller is cancelled before that, the function is not called."""

        def work(job: Job[T]) -> None:
            job.put(function())

        job = self.submit(work)
        try:
            return await anext(job)
        finally:
            job.abandon()

    def close(self) -> None:
        """Cancel all jobs with an error that the engine is stopping."""
        for job in list(self._jobs):
            job.abandon(engine_stopping())

    def _do(self, job: Job[T], work: Callable[[Job[T]], None]) -> None:
        if job.gone.is_set():
            job.finish(None)
            return
        ending: SageError | None = Overloaded(code="out_of_memory", message="The engine ran out of memory.")
        try:
            work(job)
            ending = None
        except BaseException as error:  # noqa: BLE001 # a client waits for the result, and other jobs are queued
            ending = internal_error(error, self._name)
        finally:  # the job must end even if there is not enough memory to build the error
            job.finish(ending)


def engine_stopping() -> SageError:
    """Return the error of answers that end because the engine is stopped."""
    message = "The engine is being stopped."
    return Overloaded(code="engine_stopping", message=message, hint="Retry when the engine runs again.")


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
