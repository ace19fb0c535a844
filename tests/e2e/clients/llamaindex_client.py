"""Send requests with LlamaIndex's OpenAI-like client, and print the results as JSON."""

import json
import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

base_url, model, embedding = sys.argv[1:]


class Verdict(BaseModel):
    """A verdict."""

    ok: bool
    size: Literal["s", "m"]


def now(zone: Literal["utc", "cet"]) -> str:
    """Return the time."""
    return f"noon in {zone}"


llm = OpenAILike(
    model=model, api_base=base_url, api_key="none", is_chat_model=True, is_function_calling_model=True, temperature=0,
    max_tokens=200, max_retries=0, context_window=512,
)  # fmt: skip
hello = [ChatMessage(role="user", content="Hello")]
*_, last = llm.stream_chat(hello)
called = llm.chat_with_tools([FunctionTool.from_defaults(now)], user_msg="Hello", tool_required=True)
call = llm.get_tool_calls_from_response(called)[0]
vectors = OpenAILikeEmbedding(model_name=embedding, api_base=base_url, api_key="none")
result = {
    "chat": llm.chat(hello).message.content,
    "stream": last.message.content,
    "completion": bool(llm.complete("Hello").text),
    "call": [call.tool_name, list(call.tool_kwargs)],
    "structured": list(llm.as_structured_llm(Verdict).chat(hello).raw.model_dump()),
    "dimensions": [len(vector) for vector in vectors.get_text_embedding_batch(["a cat", "a dog"])],
}
print(json.dumps(result))
