"""Messages in Korean: complete, of messages that there are, and whole whatever stands in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import messages
import pytest

from leyden.language import language, localised

HANGUL = re.compile(r"[가-힣]")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko"}, "ko"),
        ({"LANG": "kok_IN.UTF-8"}, "en"),  # Konkani
        ({"LANG": "C.UTF-8", "LC_MESSAGES": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "ko_KR.UTF-8", "LEYDEN_LANG": "en"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LEYDEN_LANG": "ko"}, "ko"),
        ({"LEYDEN_LANG": "fr"}, "en"),
    ],
)
def test_the_language_is_that_of_the_locale_or_of_leyden_lang(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LEYDEN_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_every_message_is_translated() -> None:
    assert messages.missing() == {}, "add them to framework/messages.ko.json"


def pairs(text: str) -> set[tuple[str, str]]:
    words = re.findall(r"[\w.-]*[A-Za-z]{2}[\w.-]*|\{\}|[;:]", text)
    return {pair for pair in zip(words, words[1:], strict=False) if "{}" not in pair}


def test_every_translation_is_of_a_message() -> None:
    """Most of its words stand beside each other in the code. A message may be put together of several texts."""
    said = {pair for text in messages.constants() for pair in pairs(text)}
    stale = {english for english in messages.catalogue() if 2 * len(pairs(english) - said) > len(pairs(english))}
    assert stale == set()


def test_a_translation_holds_what_its_message_holds() -> None:
    for english, korean in messages.catalogue().items():
        fields = re.findall(r"\{(\d)\}", korean)
        assert sorted(map(int, fields)) == list(range(english.count("{}"))), english
        assert HANGUL.search(korean), english
        for flag in re.findall(r"--[a-z][\w.]*\w", english):
            assert flag in korean, (english, flag)


def test_what_stands_in_a_message_stands_in_its_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEYDEN_LANG", "ko")
    for english in messages.catalogue():
        names = [f"x{number}.y" for number in range(english.count("{}"))]
        filled = english
        for name in names:
            filled = filled.replace("{}", name, 1)
        shown = localised(f"  {filled}")
        assert shown.startswith("  ") and HANGUL.search(shown), english
        assert [name for name in names if name not in shown] == [] and not re.search(r"\{\d\}", shown), (english, shown)


def test_a_message_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEYDEN_LANG", "ko")
    shown = localised("error: no command is called 'ft'; did you mean 'fit'? (see leyden --help)")
    assert HANGUL.search(shown) and "'ft'" in shown and "'fit'" in shown and "leyden --help" in shown
    assert re.search("did|command", shown) is None, shown
    assert localised("질문 하나") == "질문 하나" and localised("qwerty uiop asdf") == "qwerty uiop asdf"
    monkeypatch.setenv("LEYDEN_LANG", "en")
    assert localised("error: no rows") == "error: no rows"


def test_commands_speak_korean(leyden, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEYDEN_LANG", "ko")
    rows = [{"prompt": "안녕?", "response": "네.", "note": "x y"}, {"prompt": "", "response": "네."}]
    (workplace / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, _ = leyden("data", "check", "bad.jsonl")
    assert code == 1 and "bad.jsonl:2: " in out
    for line in out.splitlines():
        assert HANGUL.search(line) or re.match(r"[\w ]+\d", line) or "median" in line, line
    for words in (["--help"], ["fit", "--help"], ["data", "--help"], ["data", "check", "--help"], ["plan", "--help"]):
        code, out, _ = leyden(*words)
        assert code == 0 and len(HANGUL.findall(out)) > 60, out
    code, _, error = leyden("fit", "--config", "sft", "--data.path", "bad.jsonl", "--data.pth", "x")
    assert code == 2 and HANGUL.search(error) and error.count("\n") == 1, error
