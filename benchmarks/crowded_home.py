"""Create a state folder with many settled and active engines, for benchmarks.

If this file is run as a program, its process stands in for the processes of all active engines: it holds their locks and
answers their health checks.
"""

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import insert

from sage.common.paths import get_user_paths
from sage.common.processes import try_lock, write_identity
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.manager import FinetuneManager
from sage.llm.client.types import DesiredState, EngineKind, EngineState, EventKind, RestartPolicy
from sage.llm.control_plane.node import open_state_folder
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState
from sage.llm.control_plane.store.rows import to_columns
from sage.llm.control_plane.store.tables import engines, events, servers

#: Model of the engines. The benchmarks resolve this name without network access, but do not load the model.
MODEL = "smollm2-135m-instruct"
_DATASET = Path(__file__).parents[1] / "examples/data/sample_eval.jsonl"
_STEPS = 300


@dataclass(frozen=True)
class Crowd:
    """The numbers of engines to create."""

    settled: int = 0
    living: int = 0  #: active engines: one half are inference servers that answer, the other half are training runs
    hung: int = 0  #: inference servers that accept connections but do not answer


@contextmanager
def crowded_home(home: Path, crowd: Crowd) -> Iterator[None]:
    """Create a SAGE_HOME with engines and set it in this process; during the block, the stand-in process runs."""
    os.environ["SAGE_HOME"] = str(home)
    node, database = open_state_folder(), open_database(f"sqlite:///{get_user_paths().state_dir / 'engines.db'}")
    serving = [_id("s", number) for number in range(crowd.living // 2 + crowd.hung)]
    training = [_id("t", number) for number in range(crowd.living - crowd.living // 2)]
    if training:
        _make_runs(training)
    state = get_user_paths().state_dir / "engines"
    job = {
        "servers": {engine_id: str(state / engine_id) for engine_id in serving},
        "hung": serving[crowd.living // 2 :],
        "locks": [str(_run(engine_id) / "worker.lock") for engine_id in training],
    }
    standin = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert standin.stdin
    assert standin.stdout
    try:
        standin.stdin.write(f"{json.dumps(job)}\n")
        standin.stdin.flush()
        addresses = json.loads(standin.stdout.readline())
        records = [engine_record(node, number, _id("e", number), EngineState.STOPPED) for number in range(crowd.settled)]
        records += [
            engine_record(node, crowd.settled + number, engine_id, EngineState.RUNNING)
            for number, engine_id in enumerate([*serving, *training])
        ]
        rows = [to_columns(vars(server_record(record, addresses))) for record in records if record.server_id]
        with database.execution_options(writes=True).begin() as connection:
            _insert(connection, events, [_event(record) for record in records])
            _insert(connection, engines, [to_columns(vars(record)) for record in records])
            _insert(connection, servers, rows)
        database.dispose()
        yield
    finally:
        standin.kill()
        standin.wait()
        shutil.rmtree(home)


def _insert(connection, table, rows) -> None:  # type: ignore[no-untyped-def]
    if rows:
        connection.execute(insert(table), rows)


def _id(sort: str, number: int) -> str:
    return f"engine-{sort}{number:09d}"


def _run(engine_id: str) -> Path:
    return get_user_paths().finetuned_dir / engine_id.replace("engine", "task")


def engine_record(node: str, number: int, engine_id: str, state: EngineState) -> EngineRecord:
    """Return the database record of an engine."""
    is_training = engine_id.startswith("engine-t")
    now = datetime.now(UTC)
    return EngineRecord(
        id=engine_id, kind=EngineKind.FINETUNE if is_training else EngineKind.LLM, model=MODEL, name=f"model-{engine_id}",
        backend="trainer" if is_training else "transformers", options={"output_dir": "/out"}, metadata={},
        desired=DesiredState.RUNNING if state is EngineState.RUNNING else DesiredState.STOPPED, force=False,
        restart_policy=RestartPolicy.NO, restarts=0, state=state, reason=None, figures=None, node=node,
        server_id=engine_id.replace("engine", "server") if state is EngineState.RUNNING else None, requested_port=None,
        devices=None, reserved_bytes=None, version=1, created_at=now, state_at=now, first_event=number + 1,
        last_event=number + 1,
    )  # fmt: skip


def server_record(engine: EngineRecord, addresses: dict[str, str]) -> ServerRecord:
    """Return the database record of a running engine's server."""
    assert engine.server_id
    is_training = engine.kind is EngineKind.FINETUNE
    lock = (
        _run(engine.id) / "worker.lock"
        if is_training
        else get_user_paths().state_dir / "engines" / engine.id / "process.lock"
    )
    return ServerRecord(
        id=engine.server_id, node=engine.node, backend=engine.backend, model=engine.model, state=ServerState.LAUNCHED,
        handle=str(lock), address=addresses.get(engine.id), devices=None, reserved_bytes=None, version=1,
        created_at=engine.created_at,
    )  # fmt: skip


def _event(engine: EngineRecord) -> dict[str, object]:
    return {
        "id": engine.first_event, "engine_id": engine.id, "kind": EventKind.CREATED, "at": engine.created_at, "before": None,
        "after": engine.state, "actor": "user", "reason": "",
    }  # fmt: skip


def _make_runs(engine_ids: list[str]) -> None:
    """Create the run directories of runs that are still training. The first directory is copied to create the others."""
    first, *others = map(_run, engine_ids)
    config = FinetuneConfig(base_model=MODEL, dataset_path=str(_DATASET), output_dir=str(get_user_paths().data_dir / "out"))
    FinetuneManager().create(config, first.name)
    at = datetime.now(UTC).isoformat()
    lines = [{"event": "launched", "at": at}, {"event": "started", "at": at, "step": 0, "total_steps": 9999}]
    lines += [
        {"event": "step", "at": at, "step": step, "total_steps": 9999, "loss": 1.5, "tokens_per_second": 900.0}
        for step in range(1, _STEPS + 1)
    ]
    with (first / "events.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    for other in others:
        shutil.copytree(first, other)
        spec = json.loads((other / "spec.json").read_text())
        (other / "spec.json").write_text(json.dumps(spec | {"task_id": other.name}))


async def _stand_in() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    job = json.loads(sys.stdin.readline())
    locks = [*map(Path, job["locks"]), *(Path(folder) / "process.lock" for folder in job["servers"].values())]
    for lock in locks:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = try_lock(lock)
        assert descriptor is not None
        write_identity(descriptor)
    addresses, hung = {}, set(job["hung"])
    for engine_id, folder in job["servers"].items():
        server = await asyncio.start_server(_health(engine_id, is_hung=engine_id in hung), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        (Path(folder) / "port").write_text(str(port))
        addresses[engine_id] = f"127.0.0.1:{port}"
    print(json.dumps(addresses), flush=True)
    await asyncio.Event().wait()


def _health(engine_id: str, *, is_hung: bool):  # type: ignore[no-untyped-def]
    body = json.dumps({"status": "ok", "engine": engine_id}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    never = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                if is_hung:
                    await never.wait()
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    return serve


if __name__ == "__main__":
    asyncio.run(_stand_in())
