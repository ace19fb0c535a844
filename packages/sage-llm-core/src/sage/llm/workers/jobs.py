"""Jobs, which can be cancelled at any time, and the threads that run jobs."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from starlette.requests import Request

from sage.common.errors import Overloaded, SageError
from sage.llm.workers.failures import internal_error, is_device_lost

T = TypeVar("T")


class ClientGone(Exception):
    """The client disconnected before the answer was complete."""


class Job(Generic[T]):
    """The work of one request. A worker thread delivers pieces of the result to the event loop."""

    def __init__(self, on_finish: Callable[[], None] = lambda: None) -> None:
        """on_finish: called in the event loop when the work has ended, even if the job was cancelled."""
        #: Set when the job is cancelled. The worker thread must check this event often.
        self.gone = threading.Event()
        self._on_finish = on_finish
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[T | SageError | None] = asyncio.Queue()

    def put(self, piece: T | SageError | None) -> None:
        """Deliver a piece to the event loop; None ends the answer."""
        self._call(self._arrived.put_nowait, piece)

    def finish(self, ending: SageError | None) -> None:
        """Tell the event loop that the work has ended.  ending: the error that ended the work, or None."""
        self._call(self._finish, ending)

    def _finish(self, ending: SageError | None) -> None:
        self._on_finish()
        self._on_finish = lambda: None  # a JobThread that ends can finish a job a second time
        self._arrived.put_nowait(ending)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # raised if the process is ending and has closed the event loop
            self._loop.call_soon_threadsafe(function, *arguments)

    def abandon(self, reason: SageError | None = None) -> None:
        """Cancel the job. If `reason` is given, the consumer of the pieces receives `reason` as an exception."""
        if reason:  # this must be done before `gone` is set, because a worker that sees `gone` ends the answer
            self.put(reason)
        self.gone.set()

    def fail(self, error: BaseException, doing: str) -> None:
        """Cancel the job because of an unexpected exception.

        If the process cannot use its GPU any more, raise the exception again, so that the thread and then the server end.
        """
        if is_device_lost(error):
            raise error
        reason: SageError = Overloaded(code="out_of_memory", message="The engine ran out of memory.")
        with contextlib.suppress(Exception):  # `internal_error` can fail if no memory is free
            reason = internal_error(error, doing)
        self.abandon(reason)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
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
        """Queue a function as a job, and return the job."""
        job: Job[T] = Job()
        self._jobs.add(job)
        self._pool.submit(self._do, job, work)
        return job

    async def call(self, function: Callable[[], T]) -> T:
        """Queue a function, wait until the thread has called the function, and return the result.

        If the caller is cancelled before the function is called, the function is not called.
        """

        def work(job: Job[T]) -> None:
            job.put(function())

        job = self.submit(work)
        try:
            return await anext(job)
        finally:
            job.abandon()

    def close(self) -> None:
        """Cancel all jobs with an error which says that the engine is stopping."""
        for job in list(self._jobs):
            job.abandon(engine_stopping())

    def _do(self, job: Job[T], work: Callable[[Job[T]], None]) -> None:
        if job.gone.is_set():
            job.finish(None)
            return
        try:
            work(job)
        except BaseException as error:  # noqa: BLE001 # the client must receive an error
            job.fail(error, self._name)
        job.finish(None)


class JobThread:
    """A thread that works on several jobs at once. If the thread ends unexpectedly, all jobs end with an error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: WeakSet[Job[Any]] = WeakSet()
        self._lock = threading.RLock()  # reentrant, because a signal handler can call `close` at any time
        self._ending: Callable[[], SageError] | None = None  #: returns the error for new jobs; None: new jobs are accepted
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def check(self) -> None:
        """Raise SageError if the thread has ended or was closed."""
        if self._ending:
            raise self._ending()

    def close(self) -> None:
        """Cancel all jobs with an error which says that the engine is stopping."""
        self._end(engine_stopping)

    def _track(self, job: Job[Any]) -> None:
        """Register a job, so that it ends when the thread ends. Raises SageError if the thread has ended or was closed."""
        with self._lock:
            self.check()
            self._jobs.add(job)

    def _work(self) -> None:
        """Process jobs until `close` is called.

        Implementations must catch an exception in one job, so that other jobs continue.
        """
        raise NotImplementedError

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 # the clients must receive an error
            for job in self._end(_thread_ended):
                job.finish(None)
            internal_error(error, self._name)

    def _end(self, ending: Callable[[], SageError]) -> list[Job[Any]]:
        with self._lock:
            self._ending = ending
            jobs = list(self._jobs)
        for job in jobs:
            job.abandon(ending())
        return jobs


def engine_stopping() -> SageError:
    """Return the error for answers that end because the engine is being stopped."""
    message = "The engine is being stopped."
    return Overloaded(code="engine_stopping", message=message, hint="Retry when the engine runs again.")


def _thread_ended() -> SageError:
    message = "The engine can no longer answer, because the thread that runs its model has ended after an internal error."
    return SageError(code="internal_error", message=message, hint="Restart the engine. The engine's log has the traceback.")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If the client disconnects first, cancel `work` and raise ClientGone."""
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
