"""Column names: canonical names, their aliases in English and Korean, and mappings by the user."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from leyden.errors import UserError, nearest

_ALIASES = {
    "instruction": "instruction instructions 지시 지시문 지시사항 명령 명령어",
    "input": "input 입력 맥락",
    "context": "context passage 지문 문맥",
    "output": "output 출력",
    "prompt": "prompt question query 질문 질의 물음 문제 프롬프트 q",
    "response": "response completion answer reply 답변 대답 응답 답 정답 a",
    "text": "text document 본문 텍스트 문장",
    "messages": "messages",
    "conversations": "conversations conversation",
    "chosen": "chosen preferred chosen_response preferred_output 선호 선택",
    "rejected": "rejected dispreferred rejected_response non_preferred_output rejected_messages 비선호 거절 거부",
    "responses": "responses completions candidates answers generations",
    "scores": "scores ratings rewards",
    "ranking": "ranking ranks 순위",
    "system": "system system_prompt",
    "tools": "tools functions",
    "history": "history",
    "margin": "margin",
    "score_chosen": "score_chosen chosen_score chosen-rating chosen_rating chosen_avg_rating",
    "score_rejected": "score_rejected rejected_score rejected-rating rejected_rating rejected_avg_rating",
    "score": "score rating reward helpfulness 점수",
    "label": "label labels kto_label kto_tag desirable is_desirable is_good liked",
}
"""Canonical name -> words for it, the plainest first: that is the one taken where a row has several."""
_STAND_INS = {"prompt": ("instruction", "input"), "response": ("output",), "chosen": ("response", "output")}
"""Names that stand for another one where no column has that. `chosen` needs a `rejected` beside it."""
_ALIAS_OF = {word: name for name, words in _ALIASES.items() for word in words.split()}
_CHOICES = "abcdefgh"
CHOICE = "choice"
"""What `could_be` says of one of the columns A, B, C, D."""


def names_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Canonical name -> the row's own column. A mapped column comes before an exact name, that before an alias, and
    that before a name that stands in: an instruction for the prompt where there is none. Of several aliases the
    plainest is taken, wherever it stands in the row."""
    named: dict[str, str] = {}
    for column in row:
        plain = _plain(column)
        if plain not in named or plain == column:
            named[plain] = column
    for name, words in _ALIASES.items():
        word = next((word for word in words.split() if word in named and not _is_no_answer(word, named)), None)
        if word is not None and name not in named:
            named[name] = named[word]
    for name, column in columns.items():
        named.pop(name, None)
        if column in row:
            named[name] = column
    if "response" in columns and "response" in named and "output" in named and "output" not in columns:
        named["output"] = named["response"]  # which column is the answer was said, whatever the format calls it
    for name, others in _STAND_INS.items():
        other = next((other for other in others if other in named), None)
        if other and name not in named and name not in columns and (name != "chosen" or "rejected" in named):
            named[name] = named[other]
    return named


def could_be(column: str, not_read: Collection[str], taken: Iterable[str]) -> str:
    """What a column that is not read is by its name, though another one was taken for that: a canonical name, or
    `CHOICE` for A, B, C, D of a question; nothing where it is neither.

    Args:
        column: its name.
        not_read: the columns of the row that are not read.
        taken: the canonical names under which columns were read.
    """
    plain = _plain(column)
    if plain in _CHOICES and {"a", "b"} <= set(map(_plain, not_read)):
        return CHOICE
    name, taken = _ALIAS_OF.get(plain, ""), set(taken)
    if is_answer(column):
        return "response" if taken & {"response", "output"} else ""
    return name if name in taken else ""


def is_answer(column: str) -> bool:
    """Whether a column is an answer by its name."""
    return _ALIAS_OF.get(_plain(column)) in ("response", "output")


def is_label(column: str) -> bool:
    """Whether a column may say which answers are good, by its name."""
    return _ALIAS_OF.get(_plain(column)) == "label"


def _plain(column: Any) -> str:
    return unicodedata.normalize("NFC", str(column)).strip().lower()


def _is_no_answer(word: str, named: Mapping[str, str]) -> bool:
    """Whether the column A is not the answer to Q: it is the first of the choices A, B, or there is an output."""
    return word == "a" and ("b" in named or "output" in named)


def check_columns(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], own: Sequence[str] = ()) -> None:
    """Raise `UserError` where a mapping has an unknown canonical name, or a column that no row has.

    Args:
        rows: the first rows of a file.
        columns: canonical name -> column.
        own: names that the format adds to the canonical ones.
    """
    known = dict.fromkeys([*own, *_ALIASES])
    for name, column in columns.items():
        if name not in known and not name.startswith(("completion_", "ranking_")):
            hint = nearest(name, known) or f"; use one of {', '.join(known)}"
            raise UserError(f"columns {name}: {column}: nothing is called '{name}'{hint}")
        if not any(column in row for row in rows):
            names = [str(other) for other in rows[0]]
            raise UserError(
                f"no column '{column}' ({name}){nearest(column, names) or '; there are ' + ', '.join(names)}"
            )
