"""Rows to examples: the list of formats, the detection of a format, and the parsing of a row.

Column names are matched without regard to case, and a few obvious ones stand for each other (question and 질문 for
prompt, answer and 답변 for response); `columns={"prompt": "my column"}` maps any other name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from leyden.class_paths import import_class
from leyden.datamodules.formats.columns import CHOICE, check_columns, could_be, is_label, names_of
from leyden.datamodules.formats.format import KINDS, Format, Parts
from leyden.datamodules.formats.not_read import TakenRow, hint, is_empty, name_the_rest, noting
from leyden.datamodules.formats.open_assistant import OpenAssistant
from leyden.datamodules.formats.preference_readers import (
    MessagesPair,
    Pair,
    Ranked,
    RankedColumns,
    Scored,
    ShareGPTPair,
    Transcripts,
)
from leyden.datamodules.formats.ranking import best_first
from leyden.datamodules.formats.readers import (
    Alpaca,
    InputOutput,
    Messages,
    PromptOnly,
    PromptResponse,
    ShareGPT,
    Squad,
    Text,
)
from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.formats.scored_readers import HelpSteer2Preference, HelpSteer3, ScoredObjects, ScoredRows
from leyden.datamodules.formats.tool_calls import tools_beside, tools_of
from leyden.datamodules.formats.turns import check_order
from leyden.datamodules.formats.unpaired_readers import Unpaired, UnpairedMessages, UnpairedPrompts, UnpairedShareGPT
from leyden.errors import UserError, nearest
from leyden.example import Example

Row = Mapping[str, Any]


def parse(
    row: Row,
    format: str,
    kind: str,
    columns: Mapping[str, str] | None = None,
    rank_order: str | None = None,
) -> Example:
    """One row as an example of `kind`; raises `RowError`, or `LeftOut` for a good row without an answer to train. Pure.

    `columns` maps canonical names to the row's own (`{"prompt": "질문"}`). `rank_order` is `lower_is_better` or
    `higher_is_better` and needed where a row only ranks its completions. Responses to compare stand best first,
    candidates in the order of the row.
    """
    form = format_named(format, kind)
    column_of = names_of(row, columns or {})
    named = TakenRow({name: row[column] for name, column in column_of.items()})
    if rank_order is not None:
        named["rank_order"] = rank_order
    _require(form, kind, named, row, columns or {}, answers=kind != "prompts")
    with noting() as not_read:
        parts = form.read(named, kind)
        tools = parts.tools
        if tools is None and parts.text is None and "tools" not in named.taken:
            tools = _tools(named)
        known = {column_of[name] for name in named.taken if name in column_of}
        if isinstance(row.get("row"), Mapping):  # where `predict` and `label` keep the row that was asked
            known.add("row")
        name_the_rest(row, known)
    example = Example([], text=parts.text, row=row) if parts.text is not None else _finish(parts, kind, row)
    example.tools = tools or []
    example.not_read = _not_read(example, not_read, named, form, kind)
    return example


def detect(rows: Sequence[Row], kind: str, columns: Mapping[str, str] | None = None) -> str:
    """The name of the format that most of the first `rows` are written in; raises `UserError` when none fits.

    Where two fit equally well, the earlier in `FORMATS` wins; for prompts, formats whose answers are there come first.
    """
    if not rows:
        raise UserError("no rows to find the format from; give a file with data")
    check_columns(rows, columns or {}, [name for form in FORMATS[kind].values() for name in form.needs])
    named = [{name: row[column] for name, column in names_of(row, columns or {}).items()} for row in rows]
    best, most = "", 0
    for answers, form in product((True, False) if kind == "prompts" else (True,), FORMATS[kind].values()):
        fitting = [row for row in named if form.fits(row, kind, answers)]
        labelled = kind == "unpaired" and isinstance(form, Unpaired)  # the user has said what the label means
        if not fitting or (answers and not labelled and not form.told(fitting)):
            continue
        votes = form.votes(named, len(fitting), kind, answers)
        if votes > most:
            best, most = form.name, votes
    if most == 0:
        raise UserError(_single(named, kind) or _no_format(rows[0], kind))
    return best


def describe(rows: Sequence[Row], format: str, kind: str, columns: Mapping[str, str] | None = None) -> str:
    """The format and the columns of rows in one line: `prompt-response (prompt: 질문, response: 답변)`."""
    form, column_of = format_named(format, kind), names_of(rows[0], columns or {})
    check_columns(rows, columns or {}, form.needs)
    reads = form.columns(kind, answers=kind != "prompts")
    taken = {column_of[name] for name in reads if name in column_of}
    others = [name for name in form.optional if name in column_of and column_of[name] not in taken]
    if len({"score_chosen", "score_rejected"} & set(others)) == 1:  # one alone is not read
        others = [name for name in others if name not in ("score_chosen", "score_rejected")]
    uses = [
        f"{name}: {column_of[name]}" if column_of[name] != name else name
        for name in (*reads, *others)
        if name in column_of
    ]
    return f"{form.name} ({', '.join(uses)})"


def _tools(named: TakenRow) -> list[dict[str, Any]]:
    """The tools of the column, or of the prompt."""
    column, beside = tools_of(named.get("tools")), tools_beside(named)
    if column and beside and column != beside:
        raise RowError("the column 'tools' and the prompt have different tools; keep one of them", "two lists of tools")
    return column or beside


def _not_read(example: Example, noted: Mapping[str, bool], named: TakenRow, form: Format, kind: str) -> dict[str, bool]:
    """What is not read -> whether it holds text, and hints for `lines`. A second column for the answer, or the choices
    of a question, count as text in a single word too; what stands in the example anyway does not."""
    turns = [*example.messages, *(turn for response in example.responses for turn in response)]
    seen = "\n".join([*(turn["content"] for turn in turns), example.text or ""])
    found: dict[str, bool] = {}
    for name, text in noted.items():
        value = example.row.get(name)
        reading = "" if "." in name else could_be(name, noted, named.taken)
        if is_label(name):
            reading = _unpaired(form, named) if kind == "instruction" and example.text is None else ""
        elif reading and isinstance(value, str):
            text = not is_empty(value)
        said_elsewhere = isinstance(value, str) and value.strip() in seen and reading != CHOICE
        found[name] = text and not said_elsewhere
        if reading:
            found[hint(name, reading)] = False
    return found


def _unpaired(form: Format, names: Mapping[str, Any]) -> str:
    """The format that reads such a row with its label, if there is one."""
    fitting = [other for other in SHIPPED if isinstance(other, Unpaired) and set(other.needs) <= {*names, "label"}]
    same = [other for other in fitting if other.reader.name == form.name]
    return (same or fitting)[0].name if fitting and form not in fitting else ""


def _finish(parts: Parts, kind: str, row: Row) -> Example:
    if kind == "prompts":
        turns = list(parts.prompt)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        check_order(turns)
        if not turns or turns[-1]["role"] not in ("user", "tool"):
            raise RowError("there is no user turn to answer; write a prompt or drop the row", "no prompt")
        return Example(turns, row=row)
    responses, worth = parts.responses, parts.worth
    left_out = 0
    if kind == "instruction":
        left_out = len(responses) - 1
        responses = [responses[worth.index(max(worth)) if worth else 0]]
    for response in responses:
        check_order([*parts.prompt, *response])
        if response[-1]["role"] != "assistant":
            problem = f"the last turn is {response[-1]['role']}, not assistant: nothing to train; drop that turn"
            raise RowError(problem, "no answer")
    if parts.label is not None and kind == "unpaired":
        return Example(parts.prompt, responses, [float(parts.label)], row=row)
    if kind not in ("preference", "unpaired"):
        return Example(parts.prompt, responses, row=row, left_out=left_out)
    numbers = best_first(responses, worth)
    if kind == "unpaired":  # of answers that are compared, the best is good and the worst bad
        best, worst = responses[numbers[0]], responses[numbers[-1]]
        return Example(parts.prompt, [best, worst], [1.0, 0.0], row=row, left_out=len(responses) - 2)
    scores = parts.scores and [parts.scores[number] for number in numbers]
    left_out = len(responses) - len(numbers)
    return Example(parts.prompt, [responses[number] for number in numbers], scores, row=row, left_out=left_out)


SHIPPED: tuple[Format, ...] = (
    Pair(),
    ShareGPTPair(),
    MessagesPair(),
    Transcripts(),
    Ranked(),
    RankedColumns(),
    ScoredObjects(),
    Scored(),
    HelpSteer3(),
    HelpSteer2Preference(),
    ScoredRows(),
    OpenAssistant(),
    UnpairedMessages(),
    UnpairedShareGPT(),
    UnpairedPrompts(),
    Squad(),
    Messages(),
    Alpaca(),
    PromptResponse(),
    InputOutput(),
    ShareGPT(),
    Text(),
    PromptOnly(),
)
"""The formats that are built in, in order of precedence. Every kind also reads rows with more parts than it uses."""
FORMATS: dict[str, dict[str, Format]] = {
    kind: {form.name: form for form in SHIPPED if kind in form.kinds} for kind in KINDS
}
"""kind -> name -> format."""


def format_named(name: str, kind: str) -> Format:
    """A format by its name, or by the path of its class.

    Raises:
        UserError: there is none of this name, or it cannot be read as this kind.
    """
    if kind not in FORMATS:
        raise UserError(f"kind {kind}: unknown{nearest(kind, KINDS) or '; use ' + ', '.join(KINDS)}")
    if "." in name:
        form = _own_format(name)
        if kind not in form.kinds:
            raise UserError(f"format {name}: it is read as {' or '.join(form.kinds)} data, not {kind}")
        return form
    if name not in FORMATS[kind]:
        known = ", ".join(FORMATS[kind])
        raise UserError(f"format {name}: unknown for {kind} data{nearest(name, FORMATS[kind]) or '; use ' + known}")
    return FORMATS[kind][name]


@cache
def _own_format(path: str) -> Format:
    """A format of the user's own."""
    return import_class(path, "format", Format)()  # type: ignore[no-any-return]


def _no_format(row: Row, kind: str) -> str:
    if pointer := next((say for names, say in POINTERS.items() if set(names) <= set(row)), ""):
        return f"no {kind} format fits the columns {', '.join(map(str, row))}; {pointer}"
    columns = ", ".join(map(str, row)) or "none"
    known = " | ".join(",".join(form.columns(kind)) for form in FORMATS[kind].values())
    names = {"preference": ("chosen", "rejected"), "unpaired": ("response", "label")}.get(kind, ("prompt", "response"))
    flags = " ".join(f"--{name} COLUMN" for name in names)
    mapping = ", ".join(f"{name}: COLUMN" for name in names)
    return (
        f"no {kind} format fits the columns {columns}; name them with {flags} (leyden data) or "
        f"--data.columns '{{{mapping}}}' (leyden fit), or use one of {known}"
    )


POINTERS = {
    ("fields", "responses"): "these are records of Argilla: export them flat, dataset.records.to_datasets()",
    ("conversation_a", "conversation_b"): "write the better conversation as chosen and the other as rejected",
    ("response_a", "response_b"): "write the better response as chosen and the other as rejected",
    ("human_ref_A", "human_ref_B"): "write the better answer as chosen and the other as rejected, history as prompt",
    ("better_response_id",): "write the response that better_response_id names as chosen and the other as rejected",
    ("tokens",): "rows of token ids are not read: give their text",
    ("input_ids",): "rows of token ids are not read: give their text",
}
"""Columns of shapes that are known and not read -> what to do."""


def _single(rows: Sequence[Row], kind: str) -> str:
    """What to say where preferences are asked for, of rows that have one answer each with a label or a score."""
    for form in SHIPPED if kind == "preference" else ():
        if isinstance(form, Unpaired | ScoredRows) and all(set(form.needs) <= set(row) for row in rows):
            single = f"the rows hold single answers ({', '.join(form.needs)}), and a preference compares two answers"
            if isinstance(form, Unpaired):
                return (
                    f"{single} to one prompt; train on them with --config kto (leyden data: --kind unpaired), or on "
                    "the good answers as instructions (--config sft; leyden data: --kind instruction)"
                )
            return (
                f"{single} to one prompt; join them as prompt, chosen, rejected, or train on them as instructions "
                "(--data InstructionData; leyden data: --kind instruction)"
            )
    return ""


def _require(
    form: Format, kind: str, named: Mapping[str, Any], row: Row, columns: Mapping[str, str], answers: bool
) -> None:
    for name in form.columns(kind, answers):
        if name not in named:
            column = columns.get(name, name)
            hint = nearest(column, map(str, row)) or f"; the row has {', '.join(map(str, row)) or 'no columns'}"
            raise RowError(f"no column '{column}' ({form.name}){hint}", f"no {name}")
