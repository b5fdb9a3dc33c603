"""What templates in the manner of well-known ones do to a conversation: exact spans, or an error, or a note."""

from __future__ import annotations

import copy
import re
from typing import Any

import chat_brothers
import pytest
from chat import byte_level
from test_template import example, trained

from leyden.data.chat_template import ChatTemplate
from leyden.errors import RowError, UserError
from leyden.example import Example, Message


def turns(*said: str) -> list[Message]:
    pairs = [text.partition(": ") for text in said]
    return [Message(role=role, content=content) for role, _, content in pairs]


HARD = turns(
    "system: Be <b>brief</b>.",
    "user: assistant",
    "assistant: A",
    "user:  Does <|im_start|>user stay?\n",
    "assistant: say </s> twice: </s></s> user",
)
"""Texts that are part of others, or of the template's own words; tags, special tokens and blanks."""
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "arguments": {"city": '부산 "a"'}}}
WITH_TOOLS = [
    *turns("user: Time?"),
    Message(role="assistant", content="", tool_calls=[CALL]),
    *turns("tool: 14:05", "assistant: Five past two."),
]


def made(name: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(byte_level(), getattr(chat_brothers, name.upper()), **options)


@pytest.mark.parametrize("name", chat_brothers.EXACT)
def test_exactly_the_answers_are_trained(name: str) -> None:
    template, (before, end) = made(name), chat_brothers.EXACT[name]
    runs = trained(template, template.encode(example(HARD, 2)))
    blank = " " if name == "llama2" else ""
    earlier = "<|im_end|>" if name == "harmony" else end
    assert runs == [f"{blank}A{earlier}", f"{blank}{before}{HARD[-1]['content']}{end}"]
    assert template.take_notes() == []


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("llama2", ["user: a", "user: b", "assistant: c"], "roles must alternate"),
        ("mistral", ["user: a", "tool: b", "assistant: c"], "Only user and assistant roles"),
        (
            "last_only",
            ["user: a", "assistant: b", "user: c", "assistant: d"],
            r"leaves out or rewrites turn 1 \(user\)",
        ),
        ("vicuna", ["user: a", "assistant: b", "tool: z", "assistant: c"], r"rewrites turn 3 \(tool\)"),
        ("r1", ["user: a", "assistant: b"], "not a prefix of the conversation: .*'<think>"),
        ("v3", ["user: a", "assistant: <think>why</think>b"], r"rewrites the reasoning of turn 2 \(assistant\): 'why'"),
        ("phi3", ["user: a", "assistant: b"], None),
    ],
)
def test_what_a_template_refuses_or_drops_is_a_row_error(name: str, said: list[str], message: str | None) -> None:
    template = made(name)
    row = turns(*said)
    if message is None:
        assert trained(template, template.encode(example(row))) == ["b<|im_end|>"]
        return
    with pytest.raises(RowError, match=message):
        template.encode(example(row))


@pytest.mark.parametrize(
    ("change", "dropped"),
    [
        ("m.content | upper", "turn 1 (system): 'Be kind.'"),
        ("m.content[:5]", "turn 1 (system): 'Be kind.'"),
        ("m.content.replace('kind', 'wild')", "turn 1 (system): 'Be kind.'"),
        ("m.content | striptags", "turn 2 (user): '<b>'"),
        ("m.content if m.role != 'system' else ''", "turn 1 (system): 'Be kind.'"),
        ("m.content | trim", None),
        ("m.content | tojson", None),
    ],
)
def test_a_rewritten_text_is_a_row_error_and_trimmed_blanks_are_none(change: str, dropped: str | None) -> None:
    source = chat_brothers.CHATML.replace("m.content", change)
    row = turns("system: Be kind.", "user: <b>Hi</b>", 'assistant: Say "x" ')
    template = ChatTemplate(byte_level(), source)
    if dropped is None:
        assert len(trained(template, template.encode(example(row, 2)))) == 1
        return
    with pytest.raises(RowError, match=re.escape(f"leaves out or rewrites {dropped}")):
        template.encode(example(row, 2))
    with pytest.raises(RowError, match="leaves out or rewrites"):
        template.prompt(row[:2])


@pytest.mark.parametrize("inline", [True, False])
def test_reasoning_of_earlier_answers_is_said_to_be_left_out(inline: bool) -> None:
    template, row = made("qwen3"), turns("user: a", "assistant: b", "user: c", "assistant: d")
    for turn in row[1::2]:
        if inline:
            turn["content"] = f"<think>\nwhy {turn['content']}\n</think>\n\n{turn['content']}"
        else:
            turn["reasoning_content"] = f"why {turn['content']}"
    runs = trained(template, template.encode(example(row)))
    assert runs == ["b<|im_end|>", "<think>\nwhy d\n</think>\n\nd<|im_end|>"]
    (note,) = template.take_notes()
    assert "the reasoning of earlier answers" in note and not template.take_notes()
    template.encode(example(row[:2]))
    assert template.take_notes() == []
    with pytest.raises(RowError, match="the reasoning of turn 2"):  # a template that knows no reasoning
        made("chatml").encode(example([row[0], Message(role="assistant", content="b", reasoning_content="why")]))


def test_answers_that_are_context_alone() -> None:
    row = turns("user: a", "assistant: b", "user: c", "assistant: d", "user: e", "assistant: f")
    row[1]["trained"] = False
    template = made("chatml")
    tree = template.encode(example(row))
    assert trained(template, tree) == ["d<|im_end|>", "f<|im_end|>"] and tree.prompt == template.prompt(row[:3])
    row[3]["trained"], row[1]["trained"] = False, True
    assert trained(template, template.encode(example(row))) == ["b<|im_end|>", "f<|im_end|>"]
    with pytest.raises(RowError, match="train_on all"):
        template.encode(example(row), "all")
    row[1]["trained"] = row[5]["trained"] = False
    with pytest.raises(RowError, match="every one is flagged"):
        template.encode(example(row))


def test_tools_and_calls_reach_the_template() -> None:
    template = made("qwen25")
    tree = template.encode(Example(WITH_TOOLS[:1], [WITH_TOOLS[1:]], tools=[TOOL]))
    assert '"name": "get_time"' in template.tokenizer.decode(tree.prompt)
    call = '<tool_call>\n{"name": "get_time", "arguments": {"city": "부산 \\"a\\""}}\n</tool_call><|im_end|>'
    assert trained(template, tree) == [call, "Five past two.<|im_end|>"]
    assert tree.prompt == template.prompt(WITH_TOOLS[:1], [TOOL]) != template.prompt(WITH_TOOLS[:1])
    chatml = made("chatml")
    with pytest.raises(RowError, match="rewrites the tools: 'get_time'"):
        chatml.encode(Example(WITH_TOOLS[:1], [WITH_TOOLS[3:]], tools=[TOOL]))
    with pytest.raises(RowError, match=r"rewrites the tool call of turn 2 \(assistant\): 'get_time'"):
        chatml.encode(Example(WITH_TOOLS[:1], [WITH_TOOLS[1:]]))


def test_arguments_of_templates_are_part_of_the_source() -> None:
    row = turns("user: a", "assistant: b", "user: c", "assistant: d")
    off, plain = made("qwen3", args={"enable_thinking": False}), made("qwen3")
    asked = off.tokenizer.decode(off.prompt(row[:1]))
    assert asked == plain.tokenizer.decode(plain.prompt(row[:1])) + "<think>\n\n</think>\n\n"
    again = ChatTemplate(byte_level(), off.source)  # as an export has it
    assert again.prompt(row[:1]) == off.prompt(row[:1])
    assert trained(off, off.encode(example(row))) == ["d<|im_end|>"]  # earlier answers are not asked for like that
    assert "are context" in off.take_notes()[0]
    dated = made("llama3", args={"date_string": "1 \"Jan\"\n'2025' 가"})
    assert "Today Date: 1 \"Jan\"\n'2025' 가\n" in dated.tokenizer.decode(dated.prompt(row[:1]))
    for name, args, known in (
        ("qwen3", {"thinking": True}, "it has enable_thinking"),
        ("chatml", {"x": 1}, "it has none"),
    ):
        with pytest.raises(UserError, match=f"has no such argument; {known}"):
            made(name, args=args)


def test_the_named_templates_of_a_tokenizer_can_be_chosen() -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = {"default": chat_brothers.CHATML, "tool_use": chat_brothers.QWEN25}
    assert ChatTemplate(tokenizer).source == chat_brothers.CHATML
    assert ChatTemplate(tokenizer, "tool_use").source == chat_brothers.QWEN25
    assert ChatTemplate(tokenizer).terminator == "<|im_end|>"


@pytest.mark.parametrize(
    "said",
    [
        ["system: Be nice", "user: Say this: Be nice to me", "assistant: ok"],
        ["system: no", "user: I do not know", "assistant: ok"],
        ["system: ok", "user: What is it?", "assistant: It is ok."],
    ],
)
def test_a_turn_that_stands_in_another_alone_is_left_out(said: list[str]) -> None:
    """The template depends on the length of a text, so that private characters cannot show where each stands."""
    long = "(' long' if m.role == 'user' and m.content|length > 3 else '')"
    body = "{{ '<|im_start|>' + m.role + " + long + " + '\n' + m.content + '<|im_end|>\n' }}"
    start = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    all_turns = "{% for m in messages %}" + body + "{% endfor %}" + start
    no_system = all_turns.replace(body, "{% if m.role != 'system' %}" + body + "{% endif %}")
    template = ChatTemplate(byte_level(), all_turns)
    assert trained(template, template.encode(example(turns(*said), 1))) == [f"{said[-1][11:]}<|im_end|>"]
    with pytest.raises(RowError, match=r"leaves out or rewrites turn 1 \(system\)"):
        ChatTemplate(byte_level(), no_system).encode(example(turns(*said), 1))
