"""Run the slow checks of engines in the background, in separate threads and event loops."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sage.common.errors import SageError, first_line
from sage.common.shortages import is_shortage
from sage.llm.client.types import EngineKind, Reason
from sage.llm.control_plane.executors.base import Executor
from sage.llm.control_plane.plan import Validation
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.store.records import EngineRecord

logger = logging.getLogger(__name__)
#: Maximum number of concurrent validations for each kind of engine.
_MAX_VALIDATIONS = 2
#: Seconds to wait after a shortage, before the validation is repeated.
_RETRY_SECONDS = 1.0


class Validator:
    """Validates engines and keeps the results until they are stored."""

    def __init__(self, executors: Mapping[EngineKind, Executor], on_done: Callable[[], None]) -> None:
        self._executors, self._on_done = executors, on_done
        self._pools = {kind: Pool(f"validate-{kind}", _MAX_VALIDATIONS) for kind in executors}
        self._tasks: dict[str, asyncio.Task[Validation]] = {}

    def begin(self, engine: EngineRecord) -> None:
        """Start the validation of an engine, unless the validation has already started."""
        if engine.id not in self._tasks:
            self._tasks[engine.id] = task = asyncio.create_task(self._validate(engine))
            task.add_done_callback(lambda _: self._on_done())

    def is_running(self, engine_id: str) -> bool:
        """Return whether the validation of an engine is running."""
        task = self._tasks.get(engine_id)
        return task is not None and not task.done()

    def results(self, engines: Collection[str]) -> dict[str, Validation]:
        """Return the progress and results of validations, and delete the results of engines that are not in `engines`."""
        for engine_id in self._tasks.keys() - set(engines):
            if self._tasks[engine_id].done():
                del self._tasks[engine_id]
        return {
            engine_id: task.result() if task.done() else Validation(is_done=False) for engine_id, task in self._tasks.items()
        }

    async def close(self) -> None:
        """Cancel the running validations."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for pool in self._pools.values():
            pool.close()

    async def _validate(self, engine: EngineRecord) -> Validation:
        try:
            return Validation(is_done=True, values=await self._checked(engine))
        except SageError as error:
            reason = Reason(code=error.code, message=error.message, hint=error.hint)
        except Exception as error:
            logger.warning("%s cannot be validated", engine.id, exc_info=error)
            reason = Reason(code="validation_failed", message=f"The engine cannot be checked: {first_line(error)}.")
        return Validation(is_done=True, reason=reason)

    async def _checked(self, engine: EngineRecord) -> Mapping[str, Any]:
        """Run the checks of an engine, and repeat them after a shortage, for example of file descriptors."""
        pool = self._pools[engine.kind]
        while True:
            try:
                return await pool.run(self._check, engine)
            except (SageError, OSError) as error:
                if not is_shortage(error):
                    raise
                logger.warning("%s cannot be validated, retrying: %s", engine.id, error)
                await asyncio.sleep(_RETRY_SECONDS)

    def _check(self, engine: EngineRecord) -> Mapping[str, Any]:
        """Run the checks in a separate event loop, so that they do not use the threads of the main event loop."""
        return asyncio.run(self._executors[engine.kind].validate(engine))
