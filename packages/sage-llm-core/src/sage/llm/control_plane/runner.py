"""Execute the actions of the plan: for each engine, at most one validation and one other action at a time."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from sage.common.errors import SageError, first_line
from sage.common.shortages import is_shortage
from sage.llm.client.types import SETTLED, EngineKind, EngineState, Reason
from sage.llm.control_plane.actions import (
    Action,
    EndMerge,
    Join,
    Launch,
    LoadAdapter,
    Publish,
    Revise,
    SendSignal,
    SetDesired,
    Sleep,
    StartMerge,
    SwapServers,
    Transition,
    UnloadAdapter,
    Validate,
    Wake,
)
from sage.llm.control_plane.adapters import leave
from sage.llm.control_plane.executors.adapter_client import AdapterClient, AdapterRefused
from sage.llm.control_plane.executors.base import Executor, Observed, server_id_of
from sage.llm.control_plane.launchers.base import Launcher, ProcessObservation, Signal
from sage.llm.control_plane.merger import Merger
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.publisher import Publisher
from sage.llm.control_plane.queueing import rank
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.sleeper import Sleeper
from sage.llm.control_plane.store.records import EngineRecord, Lease, ServerRecord, ServerState
from sage.llm.control_plane.store.store import LeaseLost, StaleWrite, Store
from sage.llm.control_plane.validation import Validator
from sage.llm.control_plane.writing import Writer

logger = logging.getLogger(__name__)
_MAX_ACTIONS = 16
#: Maximum seconds to wait for running actions when the control plane closes.
_CLOSE_SECONDS = 10.0
#: A queued or starting engine fails after `_MAX_FAILURES` failures of an action. A running engine that cannot load its
#: newer adapter keeps the previous adapter. The time until the next attempt doubles after each failure.
_MAX_FAILURES, _BACKOFF_SECONDS = 5, 0.1
#: Values of an engine's columns after the engine has left the queue.
_PLACED = {"queue_rank": None, "paused_by": None}


@dataclass
class _Trouble:
    action: type[Action]
    error: str = ""
    failures: int = 0  #: OSErrors, database errors and shortages (see `is_shortage`) are not counted
    retry_at_seconds: float = 0.0


class Runner:
    """Executes actions and stores their results, but only while this control plane holds the lease (the right to write)."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        executors: Mapping[EngineKind, Executor],
        launcher: Launcher,
        adapters: AdapterClient,
        routing: RoutingTable,
        lease: Callable[[], Lease | None],
        on_done: Callable[[], None] = lambda: None,
        variables: Callable[[Collection[str]], Mapping[str, str]] = lambda _: {},
    ) -> None:
        """on_done: called when an action has succeeded or was cancelled, and when an engine was validated or has failed.

        variables: takes ids of devices, and returns the environment variables that restrict a process to these devices. This
        function is called in a thread, because the function blocks.
        """
        self._variables = variables
        self._store, self._pool, self._executors = store, pool, executors
        self._launcher, self._adapters = launcher, adapters
        self._routing, self._lease, self._on_done = routing, lease, on_done
        self._commit = Writer(pool, self._held_lease)
        self._publisher = Publisher(store, pool, executors, routing, self._commit)
        self._merger = Merger(store, pool, executors, adapters, routing, self._commit)
        self.sleeper = Sleeper(store, pool, launcher, routing, self._held_lease)
        self.validator = Validator(executors, on_done)
        self.signalled: set[str] = set()  #: ids of engines that received the stop signal; the reconciler clears the set
        self._tasks: dict[str, tuple[Action, asyncio.Task[None]]] = {}
        self._launching: set[str] = set()
        self._slots = asyncio.Semaphore(_MAX_ACTIONS)
        self._troubles: dict[str, _Trouble] = {}

    def run(self, action: Action, observed: Observed | None, server: ServerRecord | None) -> None:
        """Start an action, unless another action of the engine is running, or the waiting time after a failure is not over.

        A validation can run at the same time as another action. If the engine must be killed, a running load or unload of
        the engine's adapter is cancelled.
        observed, server: the last observation and the server of the engine.
        """
        engine = action.engine
        if isinstance(action, Validate):
            self.validator.begin(engine)
        elif running := self._tasks.get(engine.id):
            if engine.force and isinstance(running[0], LoadAdapter | UnloadAdapter):
                running[1].cancel()
        elif not self._must_wait(action):
            task = asyncio.create_task(self._guarded(action, observed, server))
            self._tasks[engine.id] = action, task
            task.add_done_callback(functools.partial(self._done, engine.id))

    def _must_wait(self, action: Action) -> bool:
        trouble = self._troubles.get(action.engine.id)
        return trouble is not None and trouble.action is type(action) and time.monotonic() < trouble.retry_at_seconds

    async def idle(self, timeout_seconds: float | None = _CLOSE_SECONDS) -> None:
        """Wait until all running actions have ended, at most `timeout_seconds`."""
        if self._tasks:
            await asyncio.wait([task for _, task in self._tasks.values()], timeout=timeout_seconds)

    async def close(self) -> None:
        """Wait for the running actions, at most `_CLOSE_SECONDS`. Then cancel the validations and close the sleeper."""
        await self.idle()
        await self.validator.close()
        await self.sleeper.close()

    def forget_all_but(self, active: set[str]) -> None:
        """Delete the recorded failures of all engines that are not in `active`."""
        for engine_id in self._troubles.keys() - active:
            del self._troubles[engine_id]

    async def _guarded(self, action: Action, observed: Observed | None, server: ServerRecord | None) -> None:
        engine_id = action.engine.id
        # `_MAX_ACTIONS` does not limit the loads and unloads of adapters: a server that does not answer must not delay
        # actions on other servers.
        slots = contextlib.nullcontext() if isinstance(action, LoadAdapter | UnloadAdapter) else self._slots
        try:
            async with slots:
                await self._act(action, observed, server)
        except StaleWrite:
            logger.debug("the record of %s was changed after it was read; the next plan uses the new record", engine_id)
        except Exception as error:  # noqa: BLE001 - logged
            await self._note(action, server, error)
        else:
            self._troubles.pop(engine_id, None)
            self._on_done()

    async def _note(self, action: Action, server: ServerRecord | None, error: Exception) -> None:
        engine = action.engine
        trouble = self._troubles.setdefault(engine.id, _Trouble(type(action)))
        if trouble.error != repr(error):
            trouble.error = repr(error)
            logger.warning("%s: an action on this engine failed, retrying", engine.id, exc_info=error)
        if isinstance(error, OSError | SQLAlchemyError) or is_shortage(error):
            return
        trouble.action, trouble.failures = type(action), trouble.failures + 1
        trouble.retry_at_seconds = time.monotonic() + _BACKOFF_SECONDS * 2**trouble.failures
        if trouble.failures >= _MAX_FAILURES:
            # An error is ignored here, because this block runs again after the next failure of the action.
            with contextlib.suppress(StaleWrite, OSError, SQLAlchemyError):
                if engine.state in (EngineState.QUEUED, EngineState.STARTING):
                    await self._give_up(engine, server, _reason(error, type(action)))
                elif isinstance(action, LoadAdapter):
                    await self._keep_older(engine, action.server, _reason(error, LoadAdapter))
                    self._troubles.pop(engine.id, None)

    async def _give_up(self, engine: EngineRecord, server: ServerRecord | None, reason: Reason) -> None:
        failed = Transition(engine, EngineState.FAILED, reason)
        if server is None or engine.state is EngineState.QUEUED:
            await self._transition(failed, None)
        else:
            try:
                await self._transition(dataclasses.replace(failed, must_remain=True), server)
            except StaleWrite:
                await self._signal(SendSignal(engine, server, Signal.KILL, closes=True))
                await self._transition(failed, server)
        self._on_done()

    async def _act(self, action: Action, observed: Observed | None, server: ServerRecord | None) -> None:
        match action:
            case Launch(engine, planned):
                await self._launch(action, planned)
            case Join():
                await self._join(action)
            case Sleep() | Wake():
                await self.sleeper.act(action)
            case LoadAdapter(engine, target):
                await self._load(engine, target)
            case UnloadAdapter(engine, target, name):
                await self._unload(engine, target, name, observed)
            case Publish(engine, step):
                await self._publisher.publish(engine, step)
            case StartMerge() | SwapServers() | EndMerge():
                await self._merger.act(action, observed)
            case Revise(engine):
                await self._revise(engine, server, served_as=engine.internal_name)
            case SetDesired(engine, desired, paused_by):
                # Without `paused_by`, the pause ends, and the engine keeps its place in the queue.
                values = {"last_request_at": None, "paused_by": paused_by} if paused_by else {"queue_rank": rank(engine)[1]}
                written = await self._commit(self._store.set_desired, engine, desired, force=False, **values)
                self._routing.apply(written, server)
            case SendSignal():
                await self._signal(action)
            case Transition():
                await self._transition(action, server, observed)

    async def _join(self, action: Join) -> None:
        engine, server = action.engine, action.server
        joined: dict[str, Any] = {"revision": engine.revision + 1, "served_as": None, "threads": None, **_PLACED}
        if server.state is ServerState.SLEEPING:
            joined["join_values"] = {"state": ServerState.WAKING, "reserved_bytes": action.reserved_bytes}
        self._routing.apply(await self._write(engine, EngineState.STARTING, join_server=server.id, **joined), server)
        await self._clean(engine, server)

    async def _unload(self, engine: EngineRecord, server: ServerRecord, name: str, observed: Observed | None) -> None:
        self._held_lease()
        await self._adapters.unload(server, name)
        if engine.state is EngineState.STOPPING:
            await self._transition(leave(engine), server, observed)

    async def _launch(self, action: Launch, server: ServerRecord | None) -> None:
        engine = action.engine
        executor = self._executors[engine.kind]
        if server is None:
            revision = engine.revision + 1
            server = executor.plan_server(dataclasses.replace(engine, revision=revision), is_moved=action.is_moved)
            server = dataclasses.replace(server, devices=action.devices, reserved_bytes=action.reserved_bytes)
            if server.served_name:  # end an earlier process: that process expects an older model name in requests
                await self._end_process(server)
            planned = {"put_server": server, "server_id": server.id, "revision": revision, "served_as": None,
                       "threads": action.threads, **_PLACED}  # fmt: skip
            engine, before = await self._write(engine, EngineState.STARTING, **planned), engine
            self._routing.apply(engine, server)
            await self._clean(before, server)
        if server.id in self._launching:  # an earlier launch of this server has not ended yet
            raise StaleWrite(server.id)
        self._launching.add(server.id)
        try:
            await self._launch_process(executor, engine, server)
        finally:
            self._launching.discard(server.id)

    async def _launch_process(self, executor: Executor, engine: EngineRecord, server: ServerRecord) -> None:
        process = await self._process(server)
        if process.leftovers:
            await self._launcher.signal(server.handle, Signal.KILL)
            raise OSError(f"earlier processes of {server.id} were still running and were killed")
        address = process.address
        if not process.alive:
            self._held_lease()
            try:
                spec = await asyncio.to_thread(executor.spec, engine, server)
                variables = await asyncio.to_thread(self._variables, server.devices or ())
                address = await self._launcher.launch(dataclasses.replace(spec, env={**spec.env, **variables}))
            except TimeoutError:  # the process was possibly started, so the next plan observes it first
                raise
            except (SageError, OSError) as error:
                if is_shortage(error):  # the launch is retried, because the engine did not cause the shortage
                    raise
                await self._transition(Transition(engine, EngineState.FAILED, _reason(error, Launch)), server)
                return
        launched = functools.partial(self._store.update_server, server, lease=self._held_lease())
        server = await self._pool.run(launched, state=ServerState.LAUNCHED, address=address)
        self._routing.apply(engine, server)

    async def _end_process(self, server: ServerRecord) -> None:
        if (await self._process(server)).alive:
            self._held_lease()
            await self._launcher.signal(server.handle, Signal.KILL)
            raise OSError(f"an earlier process of {server.id} was still running and was killed")

    async def _process(self, server: ServerRecord) -> ProcessObservation:
        process = (await self._launcher.observe([server.handle])).get(server.handle)
        if process is None:
            raise OSError(f"the process of {server.id} cannot be observed")
        return process

    async def _clean(self, engine: EngineRecord, server: ServerRecord) -> None:
        """Remove the files of the engine's previous server, unless `server` or another engine uses these files."""
        last_id = server_id_of(engine)
        if last_id != server.id and not await self._pool.run(self._store.is_server_needed, last_id, engine.id):
            await self._executors[engine.kind].remove(engine)

    async def _load(self, engine: EngineRecord, server: ServerRecord) -> None:
        self._held_lease()
        try:
            await self._adapters.load(server, engine.internal_name, engine.adapter or "")
        except AdapterRefused as error:
            if engine.state is EngineState.STARTING:
                form = f"merged, because the adapter cannot be loaded into a running server: {error.message}"
                await self._revise(engine, server, base=None, adapter=None, form=form)
            else:
                await self._keep_older(engine, server, _reason(error, LoadAdapter))
            return
        if engine.state is EngineState.STARTING:
            loaded = {"served_as": engine.internal_name}
            await self._transition(Transition(engine, EngineState.RUNNING, values=loaded), server)
        else:
            await self._revise(engine, server, served_as=engine.internal_name)

    async def _keep_older(self, engine: EngineRecord, server: ServerRecord, reason: Reason) -> None:
        """Store why the newer adapter is not used, and set `model` and `adapter` to the version that is loaded.

        If no older version is loaded, the engine fails.
        """
        loaded = await self._adapters.folders(server)
        if engine.served_as is None or engine.served_as == engine.internal_name or engine.served_as not in loaded:
            await self._give_up(engine, server, reason)
            return
        problem = reason.message.rstrip(".")
        message = f"{server.id} cannot load {engine.adapter}: {problem}. The previous version is still used."
        logger.warning("%s: %s", engine.id, message)
        older = loaded[engine.served_as]
        versions = {"model": older, "adapter": older} if older else {}
        await self._revise(engine, server, reason=Reason(code="adapter_refused", message=message), **versions)

    async def _signal(self, action: SendSignal) -> None:
        lease, server = self._held_lease(), action.server
        if action.closes and server.shared and server.state is not ServerState.CLOSING:
            await self._pool.run(self._store.close_server, server, action.engine, lease=lease)
        await self._launcher.signal(server.handle, action.signal)
        if action.signal is Signal.STOP:
            self.signalled.add(action.engine.id)

    async def _transition(self, action: Transition, server: ServerRecord | None, observed: Observed | None = None) -> None:
        engine, state, values = action.engine, action.state, dict(action.values)
        is_unloaded = state in SETTLED or state is EngineState.PAUSED
        if is_unloaded:
            values |= {"leave_server": server.id if server else None, "must_remain": action.must_remain}
            if observed and observed.training:
                values["figures"] = observed.training.model_dump(mode="json")
        if action.restarts is None:
            engine = await self._write(engine, state, reason=action.reason, **values)
        else:
            engine = await self._restart(engine, action.restarts, action.reason, **values)
        self._routing.apply(engine, None if is_unloaded else server)
        if engine.merges and state is EngineState.STOPPED:
            await self._merger.remove(engine)

    async def _revise(self, engine: EngineRecord, server: ServerRecord | None, **values: Any) -> None:
        self._routing.apply(await self._commit(self._store.revise, engine, **values), server)

    async def _write(self, engine: EngineRecord, state: EngineState, **values: Any) -> EngineRecord:
        written: EngineRecord = await self._commit(self._store.transition, engine, state, **values)
        reason = values.get("reason")
        logger.info("%s: state %s → %s%s", engine.id, engine.state, state, f": {reason.message}" if reason else "")
        return written

    async def _restart(self, engine: EngineRecord, restarts: int, reason: Reason | None, **values: Any) -> EngineRecord:
        queued: EngineRecord = await self._commit(self._store.restart, engine, restarts=restarts, reason=reason, **values)
        logger.info("%s: state %s → %s → %s (restart %d): %s", engine.id, engine.state, EngineState.FAILED, queued.state,
                    restarts, reason.message if reason else "")  # fmt: skip
        return queued

    def _held_lease(self) -> Lease:
        lease = self._lease()
        if lease is None:
            raise LeaseLost("the lease is not held")
        return lease

    def _done(self, engine_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(engine_id, None)
        if task.cancelled():
            self._on_done()


def _reason(error: Exception, action: type[Action]) -> Reason:
    if isinstance(error, SageError):
        return Reason(code=error.code, message=error.message, hint=error.hint)
    is_load = action is LoadAdapter
    code, problem = "adapter_load_failed" if is_load else "launch_failed", first_line(error)
    failure = "The adapter could not be loaded" if is_load else "The engine could not be started"
    if isinstance(error, OSError):
        return Reason(code=code, message=f"{failure}: {problem}.")
    hint = "`sage gateway logs` shows the traceback."
    return Reason(code=code, message=f"{failure}: {type(error).__name__}: {problem}.", hint=hint)
