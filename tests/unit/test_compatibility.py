"""The HTTP interface stays compatible as docs/compatibility.md promises.

`python tests/unit/test_compatibility.py` writes a new snapshot. Run it after an intended change of the interface.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from sage.common.settings import load_settings
from sage.common.training import TrainingStep
from sage.llm.client.types import EngineEvent, EnginePage, EngineView, RouteView
from sage.llm.gateway.app import create_app

SNAPSHOT = Path(__file__).parents[1] / "data" / "http_interface.json"
_PROSE = {"title", "description", "summary", "operationId", "tags"}


def interface() -> dict[str, Any]:
    """Return the stable part of the OpenAPI document, and the schemas of the responses."""
    document = create_app(load_settings()).openapi()
    answers = (EngineView, EnginePage, EngineEvent, TrainingStep, RouteView)
    paths = {path: item for path, item in document["paths"].items() if path.startswith("/v1/management/")}
    errors = [_split_errors(operation) for item in paths.values() for operation in item.values()]
    content = {
        "paths": paths,
        "error": errors[0]["400"],
        "requests": {name: document["components"]["schemas"][name] for name in ("StartRequest", "RouteRequest")},
        "answers": {answer.__name__: answer.model_json_schema(mode="serialization") for answer in answers},
    }
    found: dict[str, Any] = _without_prose(content)
    return found


def _split_errors(operation: dict[str, Any]) -> dict[str, Any]:
    """Remove the error responses of a route, and return them: they are the same for all routes."""
    answers = operation["responses"]
    return {status: answers.pop(status) for status in list(answers) if status[0] in "45"}


def _without_prose(value: Any) -> Any:
    """Remove descriptions of schemas and routes, but keep properties that are named `title`."""
    if isinstance(value, list):
        return [_without_prose(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_prose(item) for key, item in value.items() if key not in _PROSE or not isinstance(item, str | list)
    }


def breaks(old: Any, new: Any, path: str = "", is_request: bool = False) -> list[str]:
    """Return the parts of `old` that `new` breaks; additions are allowed, except new required fields of a request."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing = [f"{path}/{key} was removed" for key in old if key not in new]
        needed = [f"{path}/{key} was added" for key in new if key in ("enum", "const", "pattern") and key not in old]
        return missing + needed + [
            problem for key in old if key in new
            for problem in breaks(old[key], new[key], f"{path}/{key}", is_request or key in ("requests", "requestBody"))
        ]  # fmt: skip
    if isinstance(old, list) and isinstance(new, list):
        return _list_breaks(old, new, path, is_request)
    return [] if old == new else [f"{path} was {old!r} and is {new!r}"]


def _list_breaks(old: list[Any], new: list[Any], path: str, is_request: bool) -> list[str]:
    if path.endswith("/parameters"):
        by_name = {parameter["name"]: parameter for parameter in new}
        names = {parameter["name"] for parameter in old}
        added = [f"{path}/{name} is required" for name in by_name if name not in names and by_name[name].get("required")]
        return added + breaks({parameter["name"]: parameter for parameter in old}, by_name, path + "/by-name", is_request)
    if path.endswith("/required") and is_request:
        return [f"{path}: {name} is required now" for name in new if name not in old]
    return [f"{path}: {item!r} was removed" for item in old if item not in new]


def test_the_http_interface_still_has_everything_that_it_had() -> None:
    assert breaks(json.loads(SNAPSHOT.read_text()), interface()) == []


VIEW = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}, "port": {"type": "integer"}}}
REQUEST = {"requests": {"R": {**VIEW, "required": ["id"]}}}


@pytest.mark.parametrize(
    "new",
    [
        {**VIEW, "properties": {**VIEW["properties"], "name": {"type": "string"}}},  # type: ignore[dict-item]
        {**VIEW, "required": ["id", "port"]},
    ],
)
def test_additions_to_an_answer_are_allowed(new: dict[str, Any]) -> None:
    assert breaks(VIEW, new) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (VIEW, {**VIEW, "properties": {"id": {"type": "string"}}}),
        (VIEW, {**VIEW, "properties": {**VIEW["properties"], "port": {"type": "string"}}}),  # type: ignore[dict-item]
        (VIEW, {**VIEW, "required": []}),
        ({"enum": ["a", "b"]}, {"enum": ["a"]}),
        (REQUEST, {"requests": {"R": {**VIEW, "required": ["id", "port"]}}}),
        ({"/parameters": []}, {"/parameters": [{"name": "node", "required": True}]}),
        ({"/parameters": [{"name": "limit"}]}, {"/parameters": []}),
    ],
)
def test_breaking_changes_are_found(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert breaks(old, new)


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(interface(), indent=1, sort_keys=True) + "\n")
