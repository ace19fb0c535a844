"""Send requests with LangChain's ChatOpenAI and OpenAIEmbeddings, and print the answers as JSON."""

import functools
import json
import operator
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

base_url, model, embedding = sys.argv[1:]


class Verdict(BaseModel):
    """A verdict."""

    ok: bool
    size: Literal["s", "m"]


@tool
def now(zone: Literal["utc", "cet"]) -> str:
    """Return the time."""
    return f"noon in {zone}"


llm = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=200, max_retries=0)
question = HumanMessage("Hello")
whole = llm.invoke([question])
streamed = functools.reduce(operator.add, llm.stream([question], stream_usage=True))
called = llm.bind_tools([now], tool_choice="any", parallel_tool_calls=False).invoke([question])
call = called.tool_calls[0]
streamed_call = functools.reduce(operator.add, llm.bind_tools([now], tool_choice="now").stream([question]))
answered = llm.bind_tools([now]).invoke([question, called, ToolMessage(now.invoke(call["args"]), tool_call_id=call["id"])])
vectors = OpenAIEmbeddings(base_url=base_url, api_key="none", model=embedding, check_embedding_ctx_length=False)
result = {
    "chat": whole.content,
    "stream": streamed.content,
    "tokens": [whole.usage_metadata["output_tokens"], streamed.usage_metadata["output_tokens"]],
    "call": [call["name"], list(call["args"])],
    "streamed_call": [streamed_call.tool_calls[0]["name"], list(streamed_call.tool_calls[0]["args"])],
    "after_the_call": isinstance(answered.content, str),
    "structured": [
        list(llm.with_structured_output(Verdict, method=method).invoke([question]).model_dump())
        for method in ("json_schema", "function_calling")
    ],
    "dimensions": [len(vector) for vector in vectors.embed_documents(["a cat", "a dog"])],
}
print(json.dumps(result))
