"""Tools and the calls of tools, from the ways in which files write them down to the one that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from leyden.datamodules.formats.not_read import TakenRow, name_the_rest
from leyden.datamodules.formats.row_error import RowError

_EXAMPLE = '{"name": "get_time", "arguments": {"city": "Busan"}}'


def tools_of(value: Any, name: str = "tools") -> list[dict[str, Any]]:
    """The tools of a row: a list, or the JSON of one, of function schemas with or without their wrapper."""
    tools = _json(value, name, "[{'type': 'function', …}]") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list):
        raise RowError(
            f"'{name}' is {tools!r:.40}, not a list of tools; write [{{'type': 'function', …}}]", "bad tools"
        )
    return [_tool(tool, f"{name}[{number}]") for number, tool in enumerate(tools)]


def tools_beside(row: TakenRow) -> list[dict[str, Any]]:
    """The tools that stand in a row beside the messages of its prompt, as OpenAI writes `input`."""
    for name in ("prompt", "input", "instruction"):
        value = row.get(name) if name in row.taken else None
        if isinstance(value, Mapping) and "messages" in value:
            return tools_of(value.get("tools"), f"{name}.tools")
    return []


def calls_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The calls of an assistant turn: one or a list of them, or their JSON, each with or without its wrapper."""
    calls = _json(value, name) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call, name if len(calls) == 1 else f"{name}[{number}]") for number, call in enumerate(calls)]


def _tool(tool: Any, name: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        problem = f"'{name}' is {tool!r:.60}, not the schema of a function with a name; mend it or drop the tool"
        raise RowError(problem, "bad tools")
    if function is not tool:
        return {"type": "function", **tool}
    schema = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": schema}


def _call(call: Any, name: str) -> dict[str, Any]:
    """`{"type": "function", "function": {"name": …, "arguments": {…}}}`, with its id if it has one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    called = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(called, str) or not called:
        raise RowError(f"'{name}' is {call!r:.60}, not the call of a tool; write {_EXAMPLE}", "bad tool call")
    given = function.get("arguments", function.get("parameters"))
    arguments = _json(given, f"{name}.arguments") if isinstance(given, str) and given.strip() else given or {}
    if not isinstance(arguments, Mapping):
        problem = f"'{name}.arguments' is {arguments!r:.40}, not an object; write names and values, as in {_EXAMPLE}"
        raise RowError(problem, "bad tool call")
    name_the_rest(call, ("id", "type", "index", "function", "name", "arguments", "parameters"), "tool_calls[].")
    whole: dict[str, Any] = {"type": "function", "function": {"name": called, "arguments": dict(arguments)}}
    return {**whole, "id": call["id"]} if call.get("id") else whole


def _json(text: str, name: str, example: str = _EXAMPLE) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(f"'{name}' is not JSON ({error}); write {example}", "bad tool call") from None
