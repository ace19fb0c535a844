"""Tests of the sync and async clients with a small server, of the error classes, and of the command line's dependencies."""

import ast
import asyncio
import inspect
import json
import re
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from small_gateway import small_gateway, sse
from support import ROOT

from sage.common import errors
from sage.common.error_codes import codes_of, error_class
from sage.llm.client import AsyncSageClient, SageClient, answers, calls, streams
from sage.llm.client.types import EngineEvent, EngineKind, EngineState


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    for module in ("client", "async_client"):
        monkeypatch.setattr(f"sage.llm.client.{module}.RECONNECT_SECONDS", 0.0)
    with small_gateway() as server:
        yield server


def first(count: int, items: Any) -> Any:
    """Return the first items of an iterator, sync or async."""
    if isinstance(items, AsyncIterator):

        async def collect() -> list[Any]:
            return [await anext(items) for _ in range(count)]

        return collect()
    return [next(items) for _ in range(count)]


#: For each case: its name, the call, and a check of the value or error that results.
CALLS: list[tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    ("start_engine", lambda c: c.start_engine(model="m"), lambda r: r.id == "engine-a"),
    ("page_engines", lambda c: c.page_engines(limit=5, kinds=[EngineKind.LLM]), lambda r: r.has_more),
    ("iter_engines", lambda c: c.iter_engines(order="desc"), lambda r: len(r) == 2),
    ("list_engines", lambda c: c.list_engines(states=[EngineState.RUNNING]), lambda r: len(r) == 2),
    ("get_engine", lambda c: c.get_engine("engine-a"), lambda r: r.id == "engine-a"),
    ("stop_engine", lambda c: c.stop_engine("engine-a", force=True), lambda r: r.id == "engine-a"),
    ("pause_engine", lambda c: c.pause_engine("engine-a"), lambda r: r.id == "engine-a"),
    ("queue", lambda c: c.queue(), lambda r: [engine.id for engine in r] == ["engine-a"]),
    ("move_engine", lambda c: c.move_engine("engine-a", 1), lambda r: r.id == "engine-a"),
    ("resume_engine", lambda c: c.resume_engine("engine-a"), lambda r: r.id == "engine-a"),
    ("checkpoint_engine", lambda c: c.checkpoint_engine("engine-a"), lambda r: r.id == "engine-a"),
    ("change_training", lambda c: c.change_training("engine-a", max_steps=9), lambda r: r.revision == 1),
    ("fork_engine", lambda c: c.fork_engine("engine-a", output_dir="/out"), lambda r: r.id == "engine-a"),
    ("remove_engine", lambda c: c.remove_engine("engine-a"), lambda r: r is None),
    ("get_logs", lambda c: c.get_logs("engine-a"), lambda r: r == ["one", "two"]),
    ("follow_logs", lambda c: c.follow_logs("engine-a"), lambda r: r == ["one", "älpha", "end"]),
    ("get_events", lambda c: c.get_events("engine-a"), lambda r: [e.id for e in r] == [1, 2, 3, 4, 5]),
    ("follow_events", lambda c: c.follow_events("engine-a"), lambda r: [e.id for e in r] == [1, 2, 3, 4, 5]),
    ("changes", lambda c: c.changes(0, 5), lambda r: r.last_id == 1),
    ("follow_changes", lambda c: first(5, c.follow_changes(0)), lambda r: [e.id for e in r] == [1, 2, 3, 4, 5]),
    ("follow from now on", lambda c: first(4, c.follow_changes("latest")), lambda r: [e.id for e in r] == [2, 3, 4, 5]),
    ("training_steps", lambda c: c.training_steps("engine-a", 1, 5), lambda r: r[0].loss == 2),
    ("list_routes", lambda c: c.list_routes(), lambda r: r[0].engines[0].weight == 9),
    ("get_route", lambda c: c.get_route("org/a"), lambda r: r.name == "org/a"),
    ("set_route", lambda c: c.set_route("org/a", {"b": 9}), lambda r: r.name == "org/a"),
    ("remove_route", lambda c: c.remove_route("org/a"), lambda r: r is None),
    ("devices", lambda c: c.devices(), lambda r: r[0].kind == "cpu"),
    ("estimate", lambda c: c.estimate("m", engine_kind="llm"), lambda r: (r.model, r.parts) == ("m", {"weights": 3})),
    ("test_webhooks", lambda c: c.test_webhooks(), lambda r: r[0].host == "a.example"),
    ("backends", lambda c: c.backends(), lambda r: r[0].name == "x"),
    ("health", lambda c: c.health(), lambda r: r["service"] == "sage-gateway"),
    ("models", lambda c: c.models(), lambda r: r == ["m"]),
    ("chat", lambda c: c.chat("m", []), lambda r: r == "Hello"),
    ("chat_stream", lambda c: c.chat_stream("m", []), lambda r: r == ["Hel", "lo"]),
    ("error", lambda c: c.get_engine("engine-unknown"), lambda r: r[1:] == ("engine_not_found", "List them.", "engine_id")),
    ("html", lambda c: c.get_engine("engine-html"), lambda r: r[:2] == ("GatewayUnreachable", "not_a_gateway")),
    ("odd", lambda c: c.get_engine("engine-odd"), lambda r: r[:2] == ("GatewayUnreachable", "not_a_gateway")),
    ("cut", lambda c: c.chat_stream("cut", []), lambda r: r[:2] == ("EngineError", "stream_cut")),
    ("dies", lambda c: c.chat_stream("dies", []), lambda r: r == ("EngineError", "engine_died", "See its log.", None)),
]  # fmt: skip


async def outcome(client: Any, call: Callable[[Any], Any]) -> Any:
    """Return a call's result as plain values, or its error as class, code, hint and param."""
    try:
        result = call(client)
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, AsyncIterator):
            return [item async for item in result]
        return list(result) if isinstance(result, Iterator) else result
    except errors.SageError as error:
        return type(error).__name__, error.code, error.hint, error.param


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("call", "is_right"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS])
def test_every_method_of_both_clients_returns_what_the_gateway_answers(
    call: Callable[[Any], Any], is_right: Callable[[Any], Any], is_async: bool, gateway: tuple[str, list[str]]
) -> None:
    async def run() -> Any:
        if is_async:
            async with AsyncSageClient(gateway[0]) as client:
                return await outcome(client, call)
        with SageClient(gateway[0]) as client:
            return await outcome(client, call)

    result = asyncio.run(run())
    assert is_right(result), result


def test_both_clients_have_the_same_methods_with_the_same_signatures() -> None:
    def methods(client: type) -> dict[str, str]:
        public = {name: member for name, member in vars(client).items() if not name.startswith("_") or name == "__init__"}
        return {
            name: re.sub(r"AsyncIterator", "Iterator", str(inspect.signature(member))) for name, member in public.items()
        }

    assert methods(AsyncSageClient) == methods(SageClient)
    assert methods(SageClient).keys() - {"__init__"} <= {case[0] for case in CALLS}


def test_filters_and_cursors_are_sent_as_the_gateway_reads_them(gateway: tuple[str, list[str]]) -> None:
    with SageClient(gateway[0]) as client:
        client.page_engines(limit=5, after="engine-b", states=[EngineState.QUEUED, EngineState.RUNNING], order="desc")
        client.training_steps("engine-a", 7)
    prefix = "/v1/management/engines"
    query = "limit=5&order=desc&after=engine-b&state=queued%2Crunning"
    assert gateway[1] == [f"{prefix}?{query}", f"{prefix}/engine-a/training?after=7"]


@pytest.mark.parametrize("engine_id", ["", "..", "../models", "engine-a/remove", "engine-a?force=true", "engine-a#"])
def test_a_text_that_is_not_an_id_does_not_reach_another_route(engine_id: str) -> None:
    for call in (calls.get, calls.resume, calls.remove):
        with pytest.raises(errors.NotFound, match="No engine"):
            call(engine_id)
    assert calls.get("engine-a").path == "/v1/management/engines/engine-a"


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.DatasetError(code="dataset_invalid", message="Bad.", hint="Fix it."), 1),
        (errors.ConfigError(code="config_invalid", message="Bad.", hint="Fix it.", param="lora_rank"), 2),
        (errors.Unauthorized(code="invalid_api_key", message="Bad."), 1),
        (errors.Conflict(code="dataset_changed", message="Bad."), 1),
        (errors.DatasetError(code="dataset_changed", message="Bad."), 1),
        (errors.Overloaded(code="out_of_memory", message="Bad.", hint="Retry."), 1),
        (errors.Overloaded(code="code_of_a_later_version", message="Bad.", hint="Retry."), 1),
        (errors.SageError(code="internal_error", message="Bad."), 1),
    ],
)
def test_an_error_over_http_is_raised_as_the_same_error(error: errors.SageError, exit_code: int) -> None:
    with pytest.raises(errors.SageError) as caught:
        answers.raise_for_error(httpx.Response(error.http_status, content=json.dumps(error.body())))
    same = caught.value
    assert (type(same), vars(same), same.exit_code) == (type(error), vars(error), exit_code)


def test_an_error_response_of_another_program_raises_an_error() -> None:
    for content in ("<html>", "[]", '{"error": "no"}', '{"error": {}}'):
        with pytest.raises(errors.SageError, match="HTTP status 500"):
            answers.raise_for_error(httpx.Response(500, content=content))


def test_every_code_is_registered_with_the_class_that_raises_it() -> None:
    missing = set()
    for path in (ROOT / "packages").glob("*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            kind = (
                getattr(errors, node.func.id, None)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                else None
            )
            if kind in (None, errors.SageError, errors.GatewayUnreachable) or not isinstance(kind, type):
                continue  # no gateway sends a code of GatewayUnreachable
            assert isinstance(node, ast.Call)
            codes = [k.value.value for k in node.keywords if k.arg == "code" and isinstance(k.value, ast.Constant)]
            missing |= {(kind.__name__, code) for code in codes if code not in codes_of(kind)}
    assert missing == set()


def test_the_class_of_an_unknown_code_follows_from_the_status() -> None:
    assert error_class("new", 409) is errors.Conflict
    assert error_class("new") is errors.SageError


def test_a_continued_log_has_no_missing_or_repeated_bytes() -> None:
    reader = streams.LogReader()
    reader.begin({"X-Log-Offset": "100"})
    assert reader.feed(b"one\ntw") == ["one"]
    assert reader.offset == 104
    reader.begin({"X-Log-Offset": "104"})
    assert reader.feed(b"two\nthr") == ["two"]
    assert (reader.finish(), reader.offset) == (["thr"], 108)


def test_keep_alive_comments_of_a_stream_are_skipped() -> None:
    assert [event.id for event in streams.EventReader().feed(f": keep-alive\n\n{sse(1)}: keep-alive\n\n".encode())] == [1]


def test_an_event_that_is_sent_twice_is_returned_once() -> None:
    reader = streams.EventReader()
    read: list[EngineEvent] = []
    for ids in ((1, 2), (1, 2, 3)):
        reader.begin({})
        read += reader.feed(sse(*ids).encode())
    assert [event.id for event in read] == [1, 2, 3]


def test_the_wheels_of_the_command_line_require_neither_a_database_nor_training_libraries() -> None:
    def required(name: str) -> set[str]:
        project = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]
        direct = {re.split(r"[\s\[=<>~!;]", line)[0] for line in project["dependencies"]}
        return direct.union(*(required(each) for each in direct if each.startswith("sage-")))

    assert required("sage-cli") == {
        "sage-common", "sage-llm-client", "httpx", "packaging", "platformdirs", "psutil", "pydantic", "pydantic-settings",
        "rich", "typer",
    }  # fmt: skip
