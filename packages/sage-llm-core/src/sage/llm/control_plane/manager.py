"""ControlPlaneManager: the main class of the control plane, with all operations on engines."""

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from sage.common.cgroups import available_cores
from sage.common.errors import NotFound, Overloaded, SageError
from sage.common.ids import random_suffix
from sage.common.logs import LogFile
from sage.common.paths import get_user_paths
from sage.common.server_keys import server_key
from sage.common.settings import Settings
from sage.llm.client.types import (
    SETTLED,
    SUPPORTED_ENGINE_KINDS,
    DesiredState,
    EngineKind,
    EngineState,
    EngineView,
    OnBusy,
    StartRequest,
)
from sage.llm.control_plane.activity import Activity
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.core_balance import CoreBalancer
from sage.llm.control_plane.cores import Cores
from sage.llm.control_plane.creation import default_policy, new_engine, served_run
from sage.llm.control_plane.executors.adapter_client import AdapterClient
from sage.llm.control_plane.executors.base import Executor, server_id_of
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.executors.inference_executor import InferenceExecutor
from sage.llm.control_plane.executors.placement import like_its_base
from sage.llm.control_plane.inventory import Inventory
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.lease import LeaseKeeper
from sage.llm.control_plane.measuring import Measuring
from sage.llm.control_plane.node import open_state_folder
from sage.llm.control_plane.node_memory import NodeMemory
from sage.llm.control_plane.plan import Limits
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.probes import Prober
from sage.llm.control_plane.queueing import rank
from sage.llm.control_plane.reads import EngineReads
from sage.llm.control_plane.reconciler import Reconciler
from sage.llm.control_plane.refusals import busy, ended, not_resumable, not_training, paused, standby, still_running
from sage.llm.control_plane.request_times import RequestTimes
from sage.llm.control_plane.routes import Routes
from sage.llm.control_plane.routing import Route, RoutingTable, Upstream
from sage.llm.control_plane.runner import Runner
from sage.llm.control_plane.served_run import ServedRun
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import EngineRecord, Lease, ServerRecord
from sage.llm.control_plane.store.store import LeaseLost, StaleWrite, Store
from sage.llm.control_plane.training_runs import TrainingRuns
from sage.llm.control_plane.views import Views
from sage.llm.control_plane.waiting import ACTOR, ATTEMPTS, Waiting
from sage.llm.control_plane.webhooks import Webhooks

__all__ = ["SUPPORTED_ENGINE_KINDS", "ControlPlaneManager"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
_STORE_THREADS = 8
#: Seconds between two checks of the log sizes.
_LOGS_SECONDS = 10.0


class ControlPlaneManager(EngineReads, Routes, Waiting, Measuring, TrainingRuns):
    """Starts, stops, resumes and describes the engines of this node.

    An engine is settled if it is stopped, completed or failed. If one node has several control planes, only the control
    plane that holds the node's lease (the right to change engines) is active. The other control planes are on standby: they
    answer reads and inference requests, and one of them takes over when the lease becomes free.
    """

    def __init__(self, settings: Settings, *, standby: bool = False) -> None:
        """Open the state folder and the database. Raises ConfigError if one of them cannot be used.

        standby: if True, no warning is logged when another control plane of this node is active.
        """
        self._settings, self._is_standby_expected = settings, standby
        self._node = open_state_folder()
        launcher, adapters = LocalLauncher(), AdapterClient()
        self._launcher, inference = launcher, InferenceExecutor(launcher, adapters)
        self._executors: Mapping[EngineKind, Executor] = {
            EngineKind.LLM: inference,
            EngineKind.EMBEDDING: inference,
            EngineKind.FINETUNE: FinetuneExecutor(
                launcher, allow_reward_files=settings.allow_reward_files, threads=settings.training_threads
            ),
        }
        self._store = Store(open_database(settings.store_url))
        self._pool = Pool("store", _STORE_THREADS)
        self._woken = asyncio.Event()
        self._keeper = LeaseKeeper(self._store, self._node, settings.gateway_url, self._on_lease)
        self._routing = RoutingTable(self._node, self._wake)
        self._activity = Activity(self._store, self._pool, self._routing, self._woken.set)
        self._prober = Prober(self._executors, launcher, self._woken.set)
        lease = lambda: self._keeper.lease  # noqa: E731
        self._inventory = Inventory(settings)
        self._runner = Runner(
            self._store, self._pool, self._executors, launcher, adapters, self._routing, lease, self._woken.set,
            self._inventory.variables,
        )  # fmt: skip
        limits = Limits(
            settings.engine_start_seconds,
            settings.stop_seconds,
            settings.engine_unresponsive_seconds,
            look_seconds=5 + 2 * settings.reconcile_seconds,
        )
        memory = NodeMemory(self._inventory.memory)
        cores = None if "OMP_NUM_THREADS" in os.environ else Cores(available_cores(), settings.training_threads)
        self._balancer = CoreBalancer(cores, adapters.set_threads) if cores else None
        self._reconciler = Reconciler(
            self._store, self._pool, self._node, self._prober, self._runner, limits, memory, cores, self._balancer
        )
        self.webhooks = Webhooks(self._store, self._pool, self._node, settings, lambda: self._keeper.lease is not None)
        self._views, self.request_times = Views(self._node, self._executors), RequestTimes()
        self._new_upstream = functools.lru_cache(1024)(_upstream)  # cached, because every request needs an Upstream
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def role(self) -> Literal["active", "standby"]:
        """`active` if this control plane holds the lease and reconciles its node, otherwise `standby`."""
        return "active" if self._keeper.lease else "standby"

    @property
    def requests_in_progress(self) -> Counter[str]:
        """The number of requests in progress, by engine id. The gateway updates the numbers."""
        return self._activity.in_progress

    async def open(self) -> None:
        """Try to acquire the lease, and start the background tasks."""
        await self._keeper.open()
        cursor = await self._routing.load(self._store)
        if self.role == "standby" and not self._is_standby_expected:
            logger.warning(
                "another control plane of this node is active; this gateway is on standby until that control plane exits"
            )
        work = (self._reconcile(), self._prober.run(), self._routing.follow(self._store, cursor), self._bound_logs(),
                self._activity.run(), self.webhooks.run())  # fmt: skip
        self._tasks = [asyncio.create_task(task) for task in work]

    async def close(self) -> None:
        """Stop the background tasks and release the lease."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._balancer:
            await self._balancer.close()
        await self._runner.close()
        await self._prober.close()
        await self.webhooks.close()
        await self._keeper.close()
        self._pool.close()

    async def start_engine(self, request: StartRequest) -> EngineView:
        """Run the fast checks of a request, store a new engine, and return the engine in state `validating`.

        Raises SageError and stores nothing if a check fails.
        """
        await self._lease()
        engine_id, executor = f"engine-{random_suffix()}", self._executors[request.engine_kind]
        served = served_run(request)
        prepared = await executor.prepare(engine_id, request)
        policy = default_policy(self._settings.restart_policy, request.engine_kind)
        on_busy = OnBusy(self._settings.on_busy)
        record = new_engine(engine_id, self._node, request, prepared, policy, served, on_busy)
        if request.engine_kind is EngineKind.LLM:
            servers = await self._pool.run(self._store.servers, self._node)
            record = await asyncio.to_thread(like_its_base, record, servers, request.options)
        return await self._add(record)

    async def _add(self, record: EngineRecord) -> EngineView:
        engine = await self._write(self._store.add, record, ACTOR)
        self._routing.apply(engine, None)
        return await self._view(engine, None)

    async def stop_engine(self, engine_id: str, *, force: bool = False) -> EngineView:
        """Request that an engine stops, and return before the engine has stopped. A settled engine is not changed.

        force: whether to kill the process of the engine. A process that other engines use is not killed.
        """
        for _ in range(ATTEMPTS):
            engine, server = await self._own(engine_id)
            if engine.state in SETTLED:
                return await self._view(engine, server)
            is_forced = force or (engine.force and engine.desired is DesiredState.STOPPED)
            if (engine.desired, engine.force) == (DesiredState.STOPPED, is_forced):
                return await self._view(engine, server)
            with contextlib.suppress(StaleWrite):
                stop = functools.partial(self._store.set_desired, engine, DesiredState.STOPPED, force=is_forced)
                return await self._view(await self._write(stop, actor=ACTOR), server)
        raise busy(engine_id)

    async def resume_engine(self, engine_id: str) -> EngineView:
        """Resume an engine: a stopped or failed engine is validated and queued again; a paused engine is loaded again.

        Raises SageError if the engine is in another state, or if the engine cannot be started again.
        """
        for _ in range(ATTEMPTS):
            engine, server = await self._own(engine_id)
            if engine.desired is DesiredState.PAUSED:
                with contextlib.suppress(StaleWrite):
                    run = functools.partial(self._store.set_desired, engine, DesiredState.RUNNING, force=False)
                    return await self._view(await self._write(run, actor=ACTOR, queue_rank=rank(engine)[1]), server)
                continue
            if engine.state not in (EngineState.STOPPED, EngineState.FAILED):
                raise not_resumable(engine_id, engine.state)
            await self._executors[engine.kind].check_resumable(engine)
            with contextlib.suppress(StaleWrite):
                resume = functools.partial(self._store.transition, engine, EngineState.VALIDATING, actor=ACTOR, restarts=0)
                serve = engine.serve and {**engine.serve, "is_complete": False}
                engine = await self._write(
                    resume,
                    desired=DesiredState.RUNNING,
                    force=False,
                    last_crash=None,
                    serve=serve,
                    merger_id=engine.merger_id and "",
                )
                self._routing.apply(engine, None)
                return await self._view(engine, None)
        raise busy(engine_id)

    async def checkpoint_engine(self, engine_id: str) -> EngineView:
        """Request that a training run saves a checkpoint after its current step.

        If the run was started with `serve`, an llm engine then serves this checkpoint.
        Raises Conflict if the engine is not a training run in state `running`.
        """
        for _ in range(ATTEMPTS):
            engine, server = await self._own(engine_id)
            executor = self._executors[engine.kind]
            if engine.state is not EngineState.RUNNING:
                raise not_training(engine)
            with contextlib.suppress(StaleWrite):
                if serve := ServedRun.of(engine):
                    noted = serve.model_copy(update={"after_step": await executor.checkpoint_step(engine)})
                    engine = await self._write(self._store.revise, engine, actor=ACTOR, serve=noted.model_dump())
                await executor.request_checkpoint(engine)
                return await self._view(engine, server)
        raise busy(engine_id)

    async def remove_engine(self, engine_id: str) -> None:
        """Remove a settled engine, and its run directory or log. The output folder is kept.

        Raises Conflict if the engine is not settled, still has a process, or is still being validated. Also raises Conflict
        if another engine serves a checkpoint of the engine's run.
        """
        for _ in range(ATTEMPTS):
            engine, server = await self._own(engine_id)
            executor = self._executors[engine.kind]
            if engine.state not in SETTLED:
                raise still_running(engine_id, f"is {engine.state}", "Stop the engine first: `sage llm engine stop {}`.")
            if serving := await self._serving_a_checkpoint(engine):
                raise still_running(
                    engine_id, f"has a checkpoint that the engine {serving} serves", f"Stop {serving} first."
                )
            if self._runner.validator.is_running(engine_id):
                raise still_running(engine_id, "is still being validated", "Retry in some seconds.")
            handle = executor.plan_server(engine).handle
            process = (await self._launcher.observe([handle])).get(handle)
            is_hosting_others = server is not None
            if not is_hosting_others and (process is None or process.alive):
                hint = "Retry, or take over the process: `sage llm engine resume {}`."
                raise still_running(engine_id, "still has a process", hint)
            with contextlib.suppress(StaleWrite):
                await self._write(self._store.remove, engine, actor=ACTOR)
                self._routing.forget(engine_id)
                try:
                    if not await self._pool.run(self._store.is_server_needed, server_id_of(engine), engine_id):
                        await executor.remove(engine)
                except (SageError, OSError) as error:
                    logger.warning("engine %s was removed, but its files cannot be removed: %s", engine_id, error)
                return
        raise busy(engine_id)

    def find(self, model: str, kind: EngineKind, client: str | None = None) -> Route:
        """Return the route of the engine to which a request for `model` is sent. This engine need not be running.

        client: identifies the sender of the request. See `RoutingTable.find`.
        Raises NotFound if no engine matches. Raises Overloaded if all matching engines are running but do not respond.
        """
        return self._routing.find(model, kind, self.is_responsive, client)

    def upstream(self, route: Route) -> Upstream:
        """Return the server for requests to a running engine. Raises Overloaded if the engine has no address yet."""
        if route.address is None or route.token is None:
            raise Overloaded(code="engine_starting", message=f"{route.engine_id} has no address yet.", hint="Retry.")
        return self._new_upstream(route.address, route.model_name, route.engine_id, route.name, route.token, route.backend)

    async def running(self, model: str, kind: EngineKind, wait_seconds: float, client: str | None = None) -> Upstream:
        """Return the server to which a request for `model` is sent. If the engine is not ready, wait until it is ready.

        client: identifies the sender of the request. See `RoutingTable.find`.
        Raises NotFound if no engine matches. Raises Overloaded if the engine was paused by a user, is not ready in time, or
        ends before it is ready. If `paused_requests` is `reject`, also raises Overloaded if the engine is paused to make
        room for another engine.
        """
        deadline_seconds = time.monotonic() + wait_seconds
        change, route = self._routing.next_change(), self.find(model, kind, client)
        engine_id = route.engine_id
        while not await self._activity.may_use(route):
            if route.paused_by == "user" or (route.paused_by and self._settings.paused_requests == "reject"):
                raise paused(route.engine_id, route.paused_by)
            left_seconds = deadline_seconds - time.monotonic()
            if left_seconds <= 0:
                raise Overloaded(code="engine_starting",
                                 message=f"The engine {route.engine_id} for '{model}' is still {route.state}.",
                                 hint="Retry in some seconds.")  # fmt: skip
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_seconds):
                    await change.wait()
            change = self._routing.next_change()  # called before `may_use`, to notice changes during `may_use`
            try:
                route = self.find(engine_id, kind)
            except NotFound:
                engine = await self._pool.run(self._store.get, engine_id)
                raise ended(engine_id, model, engine.state, engine.reason) from None
        return self.upstream(route)

    def _wake(self, engine_id: str) -> None:
        self._activity.wake(engine_id)

    def _on_lease(self, lease: Lease | None) -> None:
        logger.info("this control plane is %s", f"active (fence {lease.fence})" if lease else "standby")
        self._woken.set()

    async def _lease(self) -> Lease:
        if lease := self._keeper.lease:
            return lease
        raise standby(await self._pool.run(self._store.leader, self._node))

    async def _write(self, write: Callable[..., T], *args: object, **values: object) -> T:
        try:
            written = await self._pool.run(write, *args, lease=await self._lease(), **values)
        except LeaseLost:
            raise standby(await self._pool.run(self._store.leader, self._node)) from None
        self._woken.set()
        return written

    async def _own(self, engine_id: str) -> tuple[EngineRecord, ServerRecord | None]:
        await self._lease()
        return await self._local(engine_id)

    async def _serving_a_checkpoint(self, run: EngineRecord) -> str | None:
        """Return the id of the active engine that serves a checkpoint in the directory of `run`, or None."""
        serve = ServedRun.of(run)
        engine = serve and serve.engine_id and self._routing.get(serve.engine_id)
        if not engine:
            return None
        view = await self._view(run, None)
        return engine.engine_id if f"/{view.task_id}/served/" in engine.model else None

    async def _reconcile(self) -> None:
        while True:
            self._woken.clear()
            await self._reconciler.tick(is_active=self._keeper.lease is not None)
            with contextlib.suppress(TimeoutError):
                # `asyncio.wait_for` is not used. In Python 3.11, `asyncio.wait_for` ignores a cancellation that arrives
                # while the event is being set.
                async with asyncio.timeout(self._settings.reconcile_seconds):
                    await self._woken.wait()

    async def _bound_logs(self) -> None:
        # `LogFile.cut` moves text from a log file to a second file. Each file may grow to half of `log_limit_mb`.
        limit_bytes = self._settings.log_limit_mb * 500_000
        while True:
            await asyncio.sleep(_LOGS_SECONDS)
            if self._keeper.lease is None:
                continue
            try:
                engines = await self._pool.run(self._store.active, self._node)
                paths = {self._executors[engine.kind].log_path(engine) for engine in engines}
                for path in (*paths, get_user_paths().state_dir / "gateway.log"):
                    await asyncio.to_thread(LogFile(path).cut, limit_bytes)
            except Exception as error:
                logger.warning("the logs cannot be shortened, retrying", exc_info=error)


def _upstream(address: str, model_name: str | None, engine_id: str, name: str, token: str, backend: str) -> Upstream:
    parameters = registry.serving(backend).parameters
    return Upstream(address, model_name, engine_id, name, server_key(token), parameters)
