"""What DSPy gets, through LiteLLM; prints it as JSON."""

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


lm = dspy.LM(f"openai/{model}", api_base=base_url, api_key="none", temperature=0, max_tokens=200, cache=False, num_retries=0)
dspy.configure(lm=lm, adapter=dspy.JSONAdapter())


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
