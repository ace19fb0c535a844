"""Convert tools and tool calls of all dataset formats to OpenAI's format. Invalid tools and calls raise RecordError."""

from collections.abc import Mapping
from typing import Any

from sage.libs.finetune.data.values import (
    RecordError,
    check_encodable,
    decoded,
    kind_of,
    list_of,
    unpacked,
    without_nulls,
)

Call = dict[str, Any]
_KNOWN = {"id", "type", "index", "function", "name", "arguments"}


def tools_of(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools in the field `tools`, or in `functions` of OpenAI's older format; None if the record has no tools."""
    field = "tools" if unpacked(record.get("tools")) else "functions"
    tools = unpacked(record.get(field))
    if not tools:
        return None
    tools = [unpacked(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError(f"'{field}' must be a list of objects.")
    check_encodable(tools, field)
    return [_tool(without_nulls(tool), f"{field}[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if "function" not in tool:
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RecordError(f"{where} must have a function with a name.")
    return {"type": "function", **tool}


def tool_calls_of(message: Mapping[str, Any], where: str, ignored: list[str]) -> list[Call]:
    """Return the calls of an assistant message: its field `tool_calls`, or `function_call` of OpenAI's older format.

    Add the names of fields without effect to `ignored`.
    """
    if "function_call" in message:
        if message.get("tool_calls"):
            raise RecordError(f"{where} has both tool_calls and function_call.", "Remove function_call.")
        return called_functions(message["function_call"], f"{where}.function_call", ignored)
    calls = list_of(message.get("tool_calls") or [], f"{where}.tool_calls")
    return [_call(call, f"{where}.tool_calls[{index}]", ignored) for index, call in enumerate(calls)]


def called_functions(value: Any, where: str, ignored: list[str]) -> list[Call]:
    """Return the calls in `value`. `value` is a list of calls or a single call, possibly as JSON text."""
    if isinstance(value, str):
        value = decoded(value, where, 'Write {"name": ..., "arguments": {...}}, or a list of such objects.')
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RecordError(f"{where} has no calls.")
    places = [f"{where}[{index}]" for index in range(len(calls))] if isinstance(value, list) else [where]
    return [_call(call, place, ignored) for call, place in zip(calls, places, strict=True)]


def _call(call: Any, where: str, ignored: list[str]) -> Call:
    if not isinstance(call, Mapping):
        raise RecordError(f"{where} must be an object with name and arguments, found {kind_of(call)}.")
    function, place = (call, where) if call.get("function") is None else (call["function"], f"{where}.function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RecordError(f"{place} must be an object with name and arguments.")
    given = {**call, **function}
    ignored += [f"tool_calls[].{name}" for name, value in given.items() if name not in _KNOWN and value is not None]
    made: Call = {"type": "function"}
    if call.get("id") is not None:
        if not isinstance(call["id"], str):
            raise RecordError(f"{where}.id must be text, found {kind_of(call['id'])}.")
        made = {"id": call["id"], "type": "function"}
    made["function"] = {"name": function["name"], "arguments": _arguments(function.get("arguments"), f"{place}.arguments")}
    check_encodable(made, where)
    return made


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Return a call's arguments as the object that chat templates expect. JSON text is parsed."""
    if isinstance(arguments, str):
        arguments = decoded(arguments, where, "Write the arguments as an object.") if arguments.strip() else {}
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise RecordError(f"{where} must be an object, found {kind_of(arguments)}.")
    return dict(arguments)
