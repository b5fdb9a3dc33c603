"""Turns of a conversation, from the many ways in which files write them down."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from leyden.datamodules.formats.not_read import FLAGS, name_the_rest
from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.formats.tool_calls import calls_of
from leyden.errors import nearest
from leyden.example import Message

_ROLES = {
    "system": "system developer 시스템",
    "user": "user human prompter question 사용자 유저 질문자",
    "assistant": "assistant gpt chatgpt bot model ai chatbot answer 어시스턴트 비서 봇 챗봇 도우미 답변자 "
    "function_call tool_call",
    "tool": "tool function observation function_response tool_response 도구",
}
ROLES = {word: role for role, words in _ROLES.items() for word in words.split()}
"""Words for roles -> the role that chat templates know."""

_EMPTY = {"assistant": "empty response", "user": "empty prompt"}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of assistant turns whose text is the call of a tool."""
_REASONING_KEYS, _CALL_KEYS = ("reasoning_content", "thinking", "reasoning"), ("tool_calls", "function_call")
_NAMES = ("name", "tool_call_id")
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["']\w+["']\s*:""")
_PYTHON_TURNS = re.compile(
    r"""\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:.*'(?:role|content|from|value)'\s*:""", re.DOTALL
)
_OPEN_END = re.compile(r"\n\nAssistant:\s*\Z")


def text_of(value: Any, name: str, role: str = "") -> str:
    """A text value, checked: a string that is not blank and can be written as UTF-8. `role` is whose text it is."""
    if isinstance(value, list):  # content in parts
        value = _joined(value, name)
    if value is None or value == "":
        raise RowError(f"'{name}' is empty; write a text or drop the row", _EMPTY.get(role, "empty text"))
    if not isinstance(value, str):
        raise RowError(f"'{name}' is {value!r:.40}, not a text; write it as a string", "not a text")
    if not value.strip():
        raise RowError(f"'{name}' holds only blanks; write a text or drop the row", _EMPTY.get(role, "empty text"))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"'{name}' holds half a character (a lone surrogate at {error.start}); mend the text"
        raise RowError(problem, "broken text") from None
    return value


def normalised_turns(turns: Sequence[Message]) -> tuple[tuple[str, ...], ...]:
    """Turns as a reader sees them, for comparison: blanks around a text and at line ends, the kind of line ends and the
    composition of letters make no difference. Other blanks do, since code and lists depend on them."""
    return tuple((turn["role"], _normalised(turn["content"]), *_beside_content(turn)) for turn in turns)


def _beside_content(turn: Message) -> tuple[str, ...]:
    """What else a turn says: its reasoning and its calls."""
    keys = ("reasoning_content", "tool_calls", *_NAMES)
    rest = {key: value for key in keys if (value := turn.get(key))}
    return (json.dumps(rest, sort_keys=True, default=str),) if rest else ()


def messages_of(value: Any, name: str) -> list[Message]:
    """Turns from a list of {role, content} or {from, value} objects, from its JSON, or from one of them."""
    value = written_out(value, name)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"'{name}' is not a list of turns; write [{{'role': 'user', 'content': …}}, …]", "bad turns")
    if not turns:
        raise RowError(f"'{name}' is an empty list; write its turns or drop the row", "bad turns")
    messages = [_message(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]
    spoken = [turn for turn in messages if turn["role"] != "system" or turn["content"]]
    if not spoken:
        raise RowError(f"'{name}' has an empty system turn alone; write its turns or drop the row", "bad turns")
    return spoken


def turns_of(value: Any, name: str, role: str) -> list[Message]:
    """A plain text as one turn of `role`, an HH transcript or a list of turns, or its JSON, as they are."""
    value = written_out(value, name)
    if isinstance(value, list | dict) and not _is_parts(value):
        return messages_of(value, name)
    text = text_of(value, name, role)
    if not is_transcript(text):
        return [Message(role=role, content=text)]
    return transcript(_OPEN_END.sub("", text) if role == "user" else text, name)


def written_out(value: Any, name: str = "") -> Any:
    """The list of turns whose JSON a text is, as the cells of tables hold lists; any other value as it is.

    Raises:
        RowError: the text is such a list as Python or NumPy prints it, which cannot be read back in every case.
    """
    if not isinstance(value, str) or not _TURNS_AS_TEXT.match(value) or not value.rstrip().endswith("]"):
        return value
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        if not _PYTHON_TURNS.match(value):
            return value
        problem = f"'{name}' holds turns as Python prints them, not JSON; write json.dumps(turns, ensure_ascii=False)"
        raise RowError(problem, "bad turns") from None
    return turns if _are_turns(turns) else value


def _are_turns(value: Any) -> bool:
    """Whether a list is a conversation, and no JSON that somebody asked for: it has roles that are known."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return False
    pairs = [(turn.get("role", turn.get("from")), "content" in turn or "value" in turn) for turn in value]
    known = [isinstance(role, str) and role.strip().lower() in ROLES for role, _ in pairs]
    return any(known) and any(content for _, content in pairs)


def is_plain(text: str) -> bool:
    """Whether a text in the column of a response is read as that response, word for word."""
    try:
        return written_out(text) is text and not is_transcript(text)
    except RowError:
        return False


def is_transcript(value: Any) -> bool:
    """Whether a text is an HH-RLHF transcript, `\\n\\nHuman: …\\n\\nAssistant: …`, or the JSON of a conversation."""
    if not isinstance(value, str):
        return False
    if value.lstrip().startswith("Human:"):
        return "\n\nAssistant:" in value
    if not _TURNS_AS_TEXT.match(value) or _PYTHON_TURNS.match(value):
        return False
    turns = written_out(value)
    if not isinstance(turns, list):
        return False
    first, last = (ROLES.get(str(turn.get("role", turn.get("from"))).strip().lower()) for turn in (turns[0], turns[-1]))
    return first != "assistant" and last == "assistant"


def transcript(text: str, name: str) -> list[Message]:
    """The turns of an HH-RLHF transcript, without the blanks around them."""
    pieces = _TRANSCRIPT.split("\n\n" + text.lstrip())[1:]
    roles, contents = pieces[::2], pieces[1::2]
    spoken = [(ROLES[role.lower()], content.strip()) for role, content in zip(roles, contents, strict=True)]
    return [
        Message(role=role, content=text_of(content, f"{name}, turn {number}", role))
        for number, (role, content) in enumerate(spoken, start=1)
    ]


def check_order(turns: Sequence[Message]) -> None:
    """Raise `RowError` unless the turns are an optional system turn, then user and assistant in turn, with tools after
    assistants."""
    allowed = {"start": ("system", "user"), "system": ("user",), "user": ("assistant",)}
    allowed |= {"assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    before = "start"
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in allowed[before]:
            raise RowError(f"turn {number} is {role} {_after(before)}; {_remedy(role, before)}", "turns out of order")
        before = role


def split_at_answer(turns: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """(prompt, response) of a conversation: the response starts at the first assistant turn."""
    first = next((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return list(turns[:first]), list(turns[first:])


def _normalised(text: str) -> str:
    return "\n".join(line.rstrip() for line in unicodedata.normalize("NFC", text).splitlines()).strip()


def _message(turn: dict[str, Any], name: str) -> Message:
    role_key = next((key for key in _ROLE_KEYS if key in turn), None)
    content_key = next((key for key in _CONTENT_KEYS if key in turn), None)
    call_key = next((key for key in _CALL_KEYS if turn.get(key)), None)
    if role_key is None or (content_key is None and call_key is None):
        problem = f"'{name}' has the keys {', '.join(turn)}; each turn needs role and content (or from and value)"
        raise RowError(problem, "bad turns")
    word = turn[role_key]
    role = ROLES.get(word.strip().lower()) if isinstance(word, str) else None
    if role is None:
        problem = f"'{name}' has the role {word!r}{nearest(str(word), ROLES) or '; use user, assistant or system'}"
        raise RowError(problem, "bad turns")
    content, where = turn.get(content_key or ""), f"{name}.{content_key}"
    calls = calls_of(turn[call_key], f"{name}.{call_key}") if call_key else []
    if word.strip().lower() in _CALL_ROLES:
        calls, content = [*calls, *calls_of(text_of(content, where), where)], ""
    may_be_empty = bool(calls) or role in ("system", "tool")
    message = Message(role=role, content="" if may_be_empty and _is_blank(content) else text_of(content, where, role))
    if calls:
        message["tool_calls"] = calls
    reasoning = next((key for key in _REASONING_KEYS if not _is_blank(turn.get(key))), None)
    if reasoning:
        message["reasoning_content"] = text_of(turn[reasoning], f"{name}.{reasoning}")
    for key in _NAMES:
        if not _is_blank(turn.get(key)):
            message[key] = text_of(turn[key], f"{name}.{key}")  # type: ignore[literal-required]
    if _flag(turn, name, role) is False and role == "assistant":
        message["trained"] = False
    read = {role_key, content_key, call_key, reasoning, *_NAMES, *_flags(turn)}
    name_the_rest(turn, {key for key in read if key is not None}, "messages[].")
    return message


def _flag(turn: Mapping[str, Any], name: str, role: str) -> bool | None:
    """Whether a turn says of itself that it is trained on; None where it says nothing."""
    flags = {key: turn[key] for key in _flags(turn) if turn[key] is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            problem = f"'{name}.{key}' is {value!r:.40}; a turn is trained or it is not: write 1 or 0, true or false"
            raise RowError(problem, "bad flag")
        if value and role != "assistant":
            problem = (
                f"'{name}.{key}' asks to train on a {role} turn; only assistant turns are trained: drop it or write 0"
            )
            raise RowError(problem, "bad flag")
    if len(set(map(bool, flags.values()))) > 1:
        raise RowError(f"'{name}' has flags that contradict each other ({', '.join(flags)}); keep one", "bad flag")
    return bool(next(iter(flags.values()))) if flags else None


def _flags(turn: Mapping[str, Any]) -> list[str]:
    """The keys of a turn that are flags, in any case of letters."""
    names = {key: str(key).strip().lower() for key in turn}
    return sorted((key for key in turn if names[key] in FLAGS), key=lambda key: FLAGS.index(names[key]))


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def _joined(parts: list[Any], name: str) -> str:
    """The text of content in parts, `{"type": "text", "text": …}` each."""
    texts = []
    for number, part in enumerate(parts):
        key = next((key for key in ("text", "value", "content") if isinstance(part, dict) and key in part), None)
        said = part.get(key) if key else None
        if said is None or not isinstance(said, str) or part.get("type") not in ("text", "input_text", "output_text"):
            kind = f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else f"{part!r:.40}"
            problem = f"'{name}[{number}]' is {kind}; only text can be trained on: write text parts or drop the row"
            raise RowError(problem, "not a text")
        if flag := next((flag for flag in _flags(part) if part[flag] is not None), None):
            problem = f"'{name}[{number}].{flag}': a turn is trained whole or not at all; put the flag beside its role"
            raise RowError(problem, "bad flag")
        name_the_rest(part, ("type", str(key)), "messages[].content[].")
        texts.append(said)
    return "".join(texts)


def _after(before: str) -> str:
    return "and comes first" if before == "start" else f"after {before}"


def _remedy(role: str, before: str) -> str:
    if role == before:
        return "merge the two turns or drop the row"
    if role == "system":
        return "a system turn can only come first"
    if role == "assistant":
        return "put a user turn before it"
    return "user and assistant must take turns"
