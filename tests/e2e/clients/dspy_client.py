"""Send requests with DSPy, which uses LiteLLM, and print the answers as JSON."""

import asyncio
import json
import sys
from typing import Any, Literal

import dspy

base_url, model, embedding = sys.argv[1:]


class Judge(dspy.Signature):
    """Judge a text."""

    text: str = dspy.InputField()
    ok: bool = dspy.OutputField()
    size: Literal["s", "m"] = dspy.OutputField()


#: By itself, DSPy requests structured output only if its model catalogue says that the model supports structured output.
FORM = {"ok": {"type": "boolean"}, "size": {"enum": ["s", "m"]}}
SCHEMA = {"type": "object", "properties": FORM, "required": [*FORM], "additionalProperties": False}
lm = dspy.LM(f"openai/{model}", api_base=base_url, api_key="none", temperature=0, max_tokens=200, cache=False, num_retries=0)
structured = lm.copy(response_format={"type": "json_schema", "json_schema": {"name": "judge", "schema": SCHEMA}})
dspy.configure(lm=structured, adapter=dspy.JSONAdapter())


async def streamed() -> list[Any]:
    judge = dspy.streamify(dspy.Predict(Judge))
    return [part async for part in judge(text="Hello")]


verdict = dspy.Predict(Judge)(text="Hello")
vectors = dspy.Embedder(f"openai/{embedding}", api_base=base_url, api_key="none", caching=False)(["a cat", "a dog"])
result = {
    "chat": lm(messages=[{"role": "user", "content": "Hello"}])[0],
    "structured": [type(verdict.ok).__name__, verdict.size in ("s", "m")],
    "stream": isinstance(asyncio.run(streamed())[-1], dspy.Prediction),
    "dimensions": [len(vector) for vector in vectors],
}
print(json.dumps(result))
