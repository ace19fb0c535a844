"""Send random valid and invalid requests, generated from an OpenAPI document with a fixed seed, and check the answers."""

import contextlib
import copy
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

#: Numbers of requests: a small number by default, and a large number for `make test-long`.
CASES = (
    240,
    pytest.param(int(os.environ.get("SAGE_FUZZ_CASES", "7000")), marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
)
_CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
#: A test fails if an answer takes longer than this number of seconds.
_ANSWER_SECONDS = 30
_ASK_EVERY = 100
_FEW = {"type": "integer", "minimum": 1, "maximum": 3}
_SOME_TEXT = {"type": "string", "minLength": 1}
_MESSAGE = {
    "type": "object", "required": ["role", "content"], "additionalProperties": False,
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _SOME_TEXT},
}  # fmt: skip
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 4}
#: Fields that are valid only together with another field, or only for some models.
_DEPENDENT = {"stream_options", "top_logprobs", "best_of", "tools", "tool_choice", "logit_bias", "dimensions"}


def fuzz(document: dict[str, Any], base_url: str, cases: int, ask: Callable[[], None]) -> None:
    """Send at least `cases` requests and check the answers. After every 100 requests, call `ask`, which must not raise."""
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    sent, rounds = 0, 0
    bounded = settings(
        max_examples=max(8, cases // (8 * len(operations))), deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with requests.Session() as session:

        def send(case: Case) -> None:
            nonlocal sent
            _cheapen(case.body)
            answer = case.call(base_url=base_url, session=session, timeout=_ANSWER_SECONDS)
            case.validate_response(answer, checks=_CHECKS)
            sent += 1
            if sent % _ASK_EVERY == 0:
                ask()

        while sent < cases:
            rounds += 1
            for operation, mode in itertools.product(operations, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)):
                with contextlib.suppress(Unsatisfiable):  # a request without parameters and body cannot be invalid
                    seed(rounds)(bounded(given(case=operation.as_strategy(generation_mode=mode))(send)))()
    ask()


def _cheapen(body: Any) -> None:
    """Limit `n` to 3, because a request for up to 128 long answers is valid and takes minutes."""
    count = body.get("n") if isinstance(body, dict) else None
    if isinstance(count, int | float) and 3 < count <= 128:
        body["n"] = 3


def inference(document: dict[str, Any], models: dict[str, str]) -> list[dict[str, Any]]:
    """Return two OpenAPI documents of the inference routes: the second omits fields that engines often reject.

    In both documents, `model` is a served model, and `max_tokens` is small.  models: maps a route's path to its model.
    """
    whole = {**document, "paths": {path: document["paths"][path] for path in models}}
    for path, model in models.items():
        _narrow(whole, path, model={"const": model}, max_tokens=_FEW, max_completion_tokens=_FEW)
    narrowed = copy.deepcopy(whole)
    for path in models:
        schema = _narrow(narrowed, path, messages=_MESSAGES, prompt=_SOME_TEXT, input=_SOME_TEXT)
        for name in _DEPENDENT & set(schema["properties"]):
            del schema["properties"][name]
    return [whole, narrowed]


def _narrow(document: dict[str, Any], path: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """Replace properties in the schema of a route's body, and return the schema."""
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = content["schema"]
    if "$ref" in schema:
        schema = content["schema"] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    schema["properties"].update({name: value for name, value in properties.items() if name in schema["properties"]})
    if "max_tokens" in schema["properties"] and "max_tokens" not in schema["required"]:
        schema["required"] = [*schema["required"], "max_tokens"]
    return schema
