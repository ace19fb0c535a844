"""Random requests after an OpenAPI document, right ones and wrong ones, bounded and with a fixed seed."""

import contextlib
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

#: Few for every day, many for `make test-long`.
CASES = (
    240,
    pytest.param(int(os.environ.get("SAGE_FUZZ_CASES", "5000")), marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
)
_CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
#: An answer that takes longer than this is taken for a hang.
_ANSWER_SECONDS = 30
_ASK_EVERY = 100
_BOUNDED = settings(
    max_examples=8, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


def fuzz(document: dict[str, Any], base_url: str, cases: int, ask: Callable[[], None]) -> None:
    """Send at least `cases` requests and check their answers; `ask` must succeed after every hundredth."""
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    sent, rounds = 0, 0
    with requests.Session() as session:

        def send(case: Case) -> None:
            nonlocal sent
            answer = case.call(base_url=base_url, session=session, timeout=_ANSWER_SECONDS)
            case.validate_response(answer, checks=_CHECKS)
            sent += 1
            if sent % _ASK_EVERY == 0:
                ask()

        while sent < cases:
            rounds += 1
            for operation, mode in itertools.product(operations, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)):
                with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a request that has no parts
                    seed(rounds)(_BOUNDED(given(case=operation.as_strategy(generation_mode=mode))(send)))()
    ask()


def answering_quickly(document: dict[str, Any], models: dict[str, str]) -> dict[str, Any]:
    """Return a document whose inference requests name a model that is served (by path), and ask for few tokens."""
    for path, model in models.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = content["schema"]
        if "$ref" in schema:
            schema = content["schema"] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        schema["properties"]["model"] = {"const": model}
        for name in {"max_tokens", "max_completion_tokens"} & set(schema["properties"]):
            schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 3}
        if "max_tokens" in schema["properties"]:
            schema["required"] = [*schema["required"], "max_tokens"]
    return document
