"""What is inside a message: flags, tools, reasoning, parts, and keys that nothing reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from leyden.datamodules.formats.formats import detect, parse
from leyden.datamodules.formats.not_read import FLAGS
from leyden.datamodules.formats.row_error import RowError
from leyden.example import Example

ASKED = {"role": "user", "content": "Time in Busan?"}
SAID = {"role": "assistant", "content": "Five past two."}
CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Busan"}}}
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}


def read(row: dict[str, Any], kind: str = "instruction") -> Example:
    return parse(row, detect([row], kind), kind)


def messages(*turns: dict[str, Any], **columns: Any) -> Example:
    return read({"messages": list(turns), **columns})


@pytest.mark.parametrize("flag", [*FLAGS, "Weight", "is_trained"])
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0)])
def test_flags_of_loss(flag: str, off: Any, on: Any) -> None:
    answer, empty = {**SAID, flag: off}, {**ASKED, flag: None}
    example = messages(empty, answer, {**ASKED, flag: off}, {**SAID, flag: on})
    assert [turn.get("trained") for turn in example.responses[0]] == [False, None, None]
    assert example.not_read == {}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({**SAID, "weight": 0.5}, "'messages[1].weight' is 0.5; a turn is trained or it is not: write 1 or 0"),
        ({**SAID, "train": "no"}, "'messages[1].train' is 'no'; a turn is trained or it is not"),
        ({**SAID, "train": True, "weight": 0}, "flags that contradict each other (weight, train); keep one"),
        ({**SAID, "content": [{"type": "text", "text": "a", "weight": 0}]}, "put the flag beside its role"),
        ({**SAID, "content": [{"type": "image_url", "image_url": "a"}]}, "a part of type 'image_url'; only text"),
        ({**SAID, "content": [{"type": "text", "url": "a"}]}, "a part of type 'text'; only text can"),
        ({**SAID, "tool_calls": [{"function": {"arguments": {}}}]}, "not the call of a tool; write"),
        ({**SAID, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments' is not JSON"),
        ({**SAID, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "[1], not an object; write"),
        ({"from": "function_call", "value": "get_time(Busan)"}, "is not JSON"),
        ({"role": "assistant", "content": None}, "'messages[1].content' is empty"),
    ],
)
def test_what_cannot_be_used_is_refused(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        messages(ASKED, turn)
    assert message in str(caught.value)


def test_flags_on_turns_that_are_never_trained_are_refused() -> None:
    with pytest.raises(RowError, match="asks to train on a user turn"):
        messages({**ASKED, "weight": 1}, SAID)


def test_an_empty_system_turn_is_none() -> None:
    for system in ("", " ", None):
        example = messages({"role": "system", "content": system}, ASKED, SAID)
        assert example.messages == [{"role": "user", "content": "Time in Busan?"}]
    with pytest.raises(RowError, match="an empty system turn alone"):
        messages({"role": "system", "content": ""})


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_texts_in_parts(key: str) -> None:
    parts = [{"type": "text", key: "Five "}, {"type": "text", key: "past"}, {"type": "text", key: " two.", "cached": 1}]
    example = messages(ASKED, {"role": "assistant", "content": parts})
    assert example.responses == [[SAID]] and example.not_read == {"messages[].content[].cached": False}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "get_time", "arguments": '{"city": "Busan"}'}]},
        {"role": "assistant", "content": "", "function_call": {"name": "get_time", "arguments": '{"city": "Busan"}'}},
        {"from": "function_call", "value": '{"name": "get_time", "arguments": {"city": "Busan"}}'},
        {"role": "tool_call", "content": '[{"name": "get_time", "arguments": {"city": "Busan"}}]'},
    ],
)
@pytest.mark.parametrize("answers", ["tool", "function", "observation"])
def test_calls_of_tools_become_those_that_templates_take(turn: dict[str, Any], answers: str) -> None:
    example = messages(ASKED, turn, {"role": answers, "content": "14:05", "name": "get_time"}, SAID)
    assert example.responses[0] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "14:05", "name": "get_time"},
        SAID,
    ]
    assert example.not_read == {}


def test_the_column_of_tools() -> None:
    for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
        for name in ("tools", "functions"):
            example = messages(ASKED, SAID, **{name: tools})
            assert example.tools == [TOOL] and example.not_read == {}
    for nothing in ([], "[]", "", None):
        assert messages(ASKED, SAID, tools=nothing).tools == []
    preference = {"prompt": "Time?", "chosen": "Two.", "rejected": "?", "tools": [TOOL]}
    assert read(preference, "preference").tools == [TOOL]
    assert read({"text": "It is two.", "tools": [TOOL]}).not_read == {"tools": False}
    for bad in ("{", [1], [{"type": "web_search"}], 3):
        with pytest.raises(RowError, match="tools"):
            messages(ASKED, SAID, tools=bad)


def test_the_tools_beside_the_messages_of_an_input() -> None:
    asked = {"messages": [ASKED], "tools": [TOOL], "parallel_tool_calls": True}
    row = {"input": asked, "preferred_output": [SAID], "non_preferred_output": [{**SAID, "content": "?"}]}
    for kind in ("preference", "instruction", "prompts"):
        example = read(row, kind)
        assert example.tools == [TOOL] and "input.tools" not in example.not_read
    assert read(row, "preference").not_read == {"prompt.parallel_tool_calls": False}
    assert read({**row, "tools": [TOOL]}, "preference").tools == [TOOL]
    assert read({"input": asked, "output": "Two."}).tools == [TOOL]
    other = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(RowError, match="have different tools; keep one"):
        read({**row, "tools": [other]}, "preference")
    with pytest.raises(RowError, match="not a list of tools"):
        read({**row, "input": {**asked, "tools": 3}}, "preference")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_beside_the_content(key: str) -> None:
    example = messages(ASKED, {**SAID, key: "Look at the clock."})
    assert example.responses == [[{**SAID, "reasoning_content": "Look at the clock."}]] and example.not_read == {}


def test_keys_of_messages_that_are_not_read_are_named() -> None:
    example = messages({**ASKED, "id": 7, "comment": "a hard one"}, {**SAID, "refusal": None, "annotations": []})
    assert example.not_read == {"messages[].id": False, "messages[].comment": True}
