"""Compare rendered samples with their records, and add findings about missing content."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sage.libs.finetune.data.findings import Code, Findings
from sage.libs.finetune.data.samples import Sample
from sage.libs.models.chat import ChatFormat, Message
from sage.libs.models.resolve import json_object

#: Matches names of ignored fields that look like a weight or a flag.
_FLAG = re.compile(r"weight|mask|train|loss|learn|skip|ignore", re.IGNORECASE)
_THINK_TAG = re.compile(r"</?think>")


def inspect_fields(sample: Sample, findings: Findings) -> None:
    """Add a finding for each field that has no effect."""
    for name in sample.ignored:
        code = Code.TOOLS_LOST if name == "tools" else Code.FIELD_IGNORED
        if "." in name and _FLAG.search(name.rpartition(".")[2]):
            code = Code.FLAG_IGNORED
        findings.add(code, sample.origin, name)


def inspect_answer(sample: Sample, message: Message, trained: str, findings: Findings) -> None:
    """Add findings if content, reasoning or tool calls of an answer are missing from the trained text."""
    if any(part.strip() not in trained for part in _THINK_TAG.split(message["content"])):
        findings.add(Code.ANSWER_LOST, sample.origin)
    if message.get("reasoning_content", "").strip() not in trained:
        findings.add(Code.REASONING_LOST, sample.origin)
    if any(call["function"]["name"] not in trained for call in message.get("tool_calls", ())):
        findings.add(Code.CALLS_LOST, sample.origin)


def inspect_prompt(
    sample: Sample, asked: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, prompt: str, findings: Findings
) -> None:
    """Add findings for messages and tools that are missing from the rendered prompt."""
    for message in asked:
        content = message["content"].strip()
        # Some templates write tool results as JSON.
        if message["role"] != "assistant" and content not in prompt and json.dumps(content)[1:-1] not in prompt:
            findings.add(Code.MESSAGE_LOST, sample.origin)
    if any(tool.get("function", tool).get("name", "") not in prompt for tool in tools or ()):
        findings.add(Code.TOOLS_LOST, sample.origin)


def inspect_end(folder: Path, chat_format: ChatFormat, findings: Findings) -> None:
    """Add a finding if the model's configuration files do not list the token that ends answers."""
    end = chat_format.answer_end()
    listed: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            configured = json_object(folder / name).get("eos_token_id")
            listed += configured if isinstance(configured, list) else [configured]
    if end is not None and end not in listed:
        findings.add_of_model(Code.END_NOT_CONFIGURED, chat_format.tokenizer.convert_ids_to_tokens(end))


def inspect_tokens(
    sample: Sample, ids: Sequence[int], labels: Sequence[int], bos: int | None, ends: Sequence[int], findings: Findings
) -> None:
    """Add findings for a second BOS token and a missing end token.  ends: ids of the tokens that end an answer."""
    if bos is not None and list(ids[:2]) == [bos, bos]:
        findings.add(Code.DOUBLE_BOS, sample.origin)
    if labels[-1] not in ends:
        findings.add(Code.NO_END_TOKEN, sample.origin)
