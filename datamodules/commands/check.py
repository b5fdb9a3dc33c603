"""`leyden data check`: a report on a data file, with row lengths, warnings and every row that training cannot use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from leyden import language
from leyden.datamodules.commands.convert import counted
from leyden.datamodules.commands.preference_stats import LabelStats, PreferenceStats
from leyden.datamodules.files.hangul import is_decomposed
from leyden.datamodules.formats import not_read
from leyden.datamodules.formats.ranking import compared
from leyden.datamodules.formats.row_error import LeftOut, RowError, by_count
from leyden.datamodules.source import Source
from leyden.errors import UserError
from leyden.example import Example

if TYPE_CHECKING:
    from leyden.data.chat_template import ChatTemplate

TRAINING = 1024
"""The `--data.max_length` of training where none is given."""
SHOWN = 3
"""Places that a warning names."""


@dataclass(frozen=True)
class Limits:
    """The limits that training will have, so that the check counts as training does.

    Args:
        max_length: most tokens of a prompt with any one response.
        max_new_tokens: of prompts: the part of `max_length` that an answer may take.
        min_gap: of preferences, as in `PreferenceData`.
        max_responses: of preferences, as in `PreferenceData`.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_gap: float = 0.0
    max_responses: int | None = None

    def __post_init__(self) -> None:
        new, whole = self.max_new_tokens, self.max_length
        if not self.min_gap >= 0:
            raise UserError(f"--min-gap {self.min_gap}: a gap between scores is 0 or more")
        if self.max_responses is not None and self.max_responses < 2:
            raise UserError(f"--max-responses {self.max_responses}: a comparison takes two; give 2 or more")
        if new is not None and (whole is None or not 0 < new < whole):
            raise UserError(f"--max-new-tokens {new}: the answer's part of --max-length; give both, and less of this")

    def fit(self, kind: str | None) -> None:
        """Raise `UserError` for a limit that has no meaning for rows of this kind."""
        if self.max_new_tokens is not None and kind != "prompts":
            raise UserError(f"--max-new-tokens: prompts need room for an answer, these are {kind} data; --kind prompts")
        if (self.min_gap or self.max_responses) and kind != "preference":
            raise UserError(f"--min-gap, --max-responses: of preferences, these are {kind} data; --kind preference")


@dataclass
class Findings:
    """Counts, lengths and warnings from the rows of a file."""

    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Reason -> rows that cannot be used"""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> good rows that an option leaves out"""
    prompt: list[int] = field(default_factory=list)
    """Length of each prompt, in tokens or characters"""
    response: list[int] = field(default_factory=list)
    """Length of each response"""
    longest: list[int] = field(default_factory=list)
    """Length of prompt and longest response, each row"""
    comparisons: PreferenceStats | LabelStats | None = None
    """Statistics of preference and of unpaired data; None for other kinds"""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """Warning about usable rows -> their places"""
    worse: int = 0
    """Answers that are not trained, since the row has a better one"""
    not_read: dict[str, list[int]] = field(default_factory=dict)
    """What is not read of the usable rows, as `not_read.count` has it"""
    seen: dict[int, str] = field(default_factory=dict)
    """Hash of an example -> the place of the first row with it"""

    def warn(self, what: str, place: str) -> None:
        """Note a place for a warning."""
        self.warnings.setdefault(what, []).append(place)


def check(source: Source, limits: Limits | None = None, say: Callable[[str], None] = language.say) -> int:
    """Report on a file and return 0 where every row is usable, 1 where some are not, 2 where none is."""
    files = source.files(say)
    template = source.template(say)
    return max([_check_file(file, template, limits or Limits(), say) for file in files])


def _check_file(source: Source, template: ChatTemplate | None, limits: Limits, say: Callable[[str], None]) -> int:
    source, examples = source.examples(say)
    limits.fit(source.kind)
    specials = _special_tokens(template)
    ranked = source.kind == "preference"
    labelled = LabelStats() if source.kind == "unpaired" else None
    findings = Findings(comparisons=PreferenceStats() if ranked else labelled)
    for place, example in counted(examples, Path(source.path).name):
        findings.rows += 1
        try:
            if isinstance(example, Exception):
                raise example
            not_read.count(example.not_read, findings.not_read)
            findings.worse += example.left_out if source.kind == "instruction" else 0
            used = compared(example, limits.min_gap, limits.max_responses) if ranked else example
            _measure(used, place, template, findings)
            for note in template.take_notes() if template else ():
                findings.warn(note, place)
            _add_warnings(example, place, specials, findings)
        except LeftOut as reason:
            findings.left_out[str(reason)] += 1
        except RowError as error:
            findings.bad[error.reason] += 1
            say(f"{place}: {error}")
    _report(source, template, limits, findings, say)
    unusable = not _usable_count(findings) or (labelled is not None and labelled.alike)
    return 2 if unusable else 1 if findings.bad else 0


def _usable_count(findings: Findings) -> int:
    return findings.rows - findings.bad.total() - findings.left_out.total()


def _measure(example: Example, place: str, template: ChatTemplate | None, findings: Findings) -> None:
    """Add the lengths of an example. Raises `RowError` where the chat template cannot encode it."""
    from leyden.datamodules.storage.truncation import distinct_responses

    if template is None:
        prompt = sum(len(turn["content"]) for turn in example.messages)
        responses = [sum(len(turn["content"]) for turn in response) for response in example.responses]
        responses = responses if example.text is None else [len(example.text)]
    elif example.responses or example.text is not None:
        tree = template.encode(example)
        if isinstance(findings.comparisons, PreferenceStats):
            tree = distinct_responses(tree)
        prompt, responses = len(tree.prompt), [len(response) for response in tree.responses]
    else:
        prompt, responses = len(template.prompt(example.messages, example.tools)), []
    findings.prompt.append(prompt)
    findings.response.extend(responses)
    findings.longest.append(prompt + max(responses, default=0))
    opposite = findings.comparisons and findings.comparisons.add(example, responses, place)
    if opposite:
        warning = "two answers compared the other way round than in an earlier row; keep the one that is right"
        if isinstance(findings.comparisons, LabelStats):
            warning = "an answer labelled otherwise than in an earlier row; keep the one that is right"
        findings.warn(warning, f"{place} against {opposite.rpartition(':')[2]}")


def _add_warnings(example: Example, place: str, specials: Sequence[str], findings: Findings) -> None:
    """Add warnings about a usable row: duplicates, decomposed Hangul and special tokens in the text."""
    turns = [*example.messages, *(turn for response in example.responses for turn in response)]
    texts = [turn["content"] for turn in turns] if example.text is None else [example.text]
    labels = example.scores if isinstance(findings.comparisons, LabelStats) else None
    key = hash((repr(turns), repr(example.tools), example.text, repr(labels)))
    if key in findings.seen:
        earlier = findings.seen[key].rpartition(":")[2]
        is_prompt = not example.responses and example.text is None
        advice = "training keeps a prompt once" if is_prompt else "drop them if they are not meant to repeat"
        findings.warn(f"the same as an earlier row; {advice}", f"{place} = {earlier}")
    findings.seen.setdefault(key, place)
    if any(is_decomposed(text) for text in texts):
        findings.warn("decomposed Hangul (NFD), which tokenizers see as other letters; run leyden data convert", place)
    for special in specials:
        if any(special in text for text in texts):
            findings.warn(
                f"the text holds the special token {special}, which the model takes as such; remove it", place
            )


def _report(
    source: Source, template: ChatTemplate | None, limits: Limits, findings: Findings, say: Callable[[str], None]
) -> None:
    for what, places in findings.warnings.items():
        more = f" and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
        say(f"warning: {len(places):,} rows: {what} ({', '.join(places[:SHOWN])}{more})")
    for line in not_read.lines(findings.not_read, str(source.kind)):
        say(line)
    if findings.worse:
        say(f"worse answers, not trained: {findings.worse:,}")
    why = f" ({by_count(findings.bad)})" if findings.bad else ""
    more = f" · left out {findings.left_out.total():,} ({by_count(findings.left_out)})" if findings.left_out else ""
    say(f"rows {findings.rows:,} · usable {_usable_count(findings):,} · bad {findings.bad.total():,}{why}{more}")
    if not _usable_count(findings):
        return
    unit = "characters" if template is None else "tokens"
    say(f"{unit:<12}{'median':>9}{'95%':>9}{'max':>9}{'sum':>13}")
    both = findings.longest if findings.response else []
    for name, lengths in (("prompt", findings.prompt), ("response", findings.response), ("both", both)):
        if any(lengths):
            ordered = sorted(lengths)
            numbers = (_quantile(ordered, 0.5), _quantile(ordered, 0.95), ordered[-1])
            say(f"{name:<12}" + "".join(f"{number:>9,}" for number in numbers) + f"{sum(lengths):>13,}")
    if limits.max_length is not None:
        room = limits.max_length - (limits.max_new_tokens or 0)
        over = sum(length > room for length in findings.longest)
        cut = "truncate_prompt, truncate_response" if findings.response else "truncate_prompt"
        what = f"; they follow --data.overlength (drop, {cut} or error)" if over else ""
        say(f"longer than {room:,} {unit}: {over:,} rows{what}")
    else:
        over = sum(length > TRAINING for length in findings.longest)
        say(f"longer than {TRAINING:,} {unit} (training's own limit): {over:,} rows; --max-length names another")
    for line in findings.comparisons.lines() if findings.comparisons is not None else ():
        say(line)
    if template is not None and template.tokenizer.pad_token_id == template.tokenizer.eos_token_id:
        say("note: pad and EOS are one token here; nothing is masked by its id, so EOS is trained")


def _quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed."""
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


def _special_tokens(template: ChatTemplate | None) -> list[str]:
    if template is None:
        return []
    added = template.tokenizer.added_tokens_decoder.values()
    return sorted({str(token) for token in added if token.special})
