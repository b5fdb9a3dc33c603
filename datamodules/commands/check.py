"""`leyden data check`: what a data file holds, how long its rows are, and every row that training could not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from leyden.datamodules.commands.convert import counted
from leyden.datamodules.commands.preference_stats import PreferenceStats
from leyden.datamodules.files.hangul import is_decomposed
from leyden.datamodules.formats.ranking import compared
from leyden.datamodules.formats.row_error import LeftOut, RowError, by_count
from leyden.datamodules.source import Source
from leyden.errors import UserError
from leyden.example import Example

if TYPE_CHECKING:
    from leyden.data.chat_template import ChatTemplate

SHOWN = 3
"""How many places a warning names."""


@dataclass(frozen=True)
class Limits:
    """What training will be asked for, so that its counts are these.

    Args:
        max_length: most tokens of a prompt with any one response.
        max_new_tokens: of prompts: the tokens of that which an answer may take.
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
        """Raise `UserError` where rows of this kind have no use for what is asked."""
        if self.max_new_tokens is not None and kind != "prompts":
            raise UserError(f"--max-new-tokens: prompts need room for an answer, these are {kind} data; --kind prompts")
        if (self.min_gap or self.max_responses) and kind != "preference":
            raise UserError(f"--min-gap, --max-responses: of preferences, these are {kind} data; --kind preference")


@dataclass
class Findings:
    """What the rows of a file gave."""

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
    comparisons: PreferenceStats | None = None
    """Of preference data"""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What is odd but usable -> the places"""
    seen: dict[int, str] = field(default_factory=dict)
    """Hash of an example -> where it stood first"""

    def warn(self, what: str, place: str) -> None:
        """Note a place for a warning."""
        self.warnings.setdefault(what, []).append(place)


def check(source: Source, limits: Limits | None = None, say: Callable[[str], None] = print) -> int:
    """Report on a file and return 0 where every row is usable, 1 where some are not, 2 where none is."""
    files = source.files(say)
    template = source.template(say)
    return max([_check_file(file, template, limits or Limits(), say) for file in files])


def _check_file(source: Source, template: ChatTemplate | None, limits: Limits, say: Callable[[str], None]) -> int:
    source, examples = source.examples(say)
    limits.fit(source.kind)
    specials = _specials(template)
    found = Findings(comparisons=PreferenceStats() if source.kind == "preference" else None)
    for place, example in counted(examples, Path(source.path).name):
        found.rows += 1
        try:
            if isinstance(example, RowError):
                raise example
            ranked = found.comparisons is not None
            used = compared(example, limits.min_gap, limits.max_responses) if ranked else example
            _measure(used, place, template, found)
            _inspect(example, place, specials, found)
        except LeftOut as reason:
            found.left_out[str(reason)] += 1
        except RowError as error:
            found.bad[error.reason] += 1
            say(f"{place}: {error}")
    _report(source, template, limits, found, say)
    return 2 if not _usable(found) else 1 if found.bad else 0


def _usable(found: Findings) -> int:
    return found.rows - found.bad.total() - found.left_out.total()


def _measure(example: Example, place: str, template: ChatTemplate | None, found: Findings) -> None:
    """Add the lengths of an example; raises `RowError` where the template cannot take it."""
    from leyden.datamodules.storage.truncation import distinct

    if template is None:
        prompt = sum(len(turn["content"]) for turn in example.messages)
        responses = [sum(len(turn["content"]) for turn in response) for response in example.responses]
        responses = responses if example.text is None else [len(example.text)]
    elif example.responses or example.text is not None:
        tree = template.encode(example)
        if found.comparisons is not None:
            tree = distinct(tree)
        prompt, responses = len(tree.prompt), [len(response) for response in tree.responses]
    else:
        prompt, responses = len(template.prompt(example.messages)), []
    found.prompt.append(prompt)
    found.response.extend(responses)
    found.longest.append(prompt + max(responses, default=0))
    opposite = found.comparisons and found.comparisons.add(example, responses, place)
    if opposite:
        what = "two answers compared the other way round than in an earlier row; keep the one that is right"
        found.warn(what, f"{place} against {opposite.rpartition(':')[2]}")


def _inspect(example: Example, place: str, specials: Sequence[str], found: Findings) -> None:
    """Warn of what can be trained on but should be known."""
    turns = [*example.messages, *(turn for response in example.responses for turn in response)]
    texts = [turn["content"] for turn in turns] if example.text is None else [example.text]
    key = hash((tuple(turn["role"] for turn in turns), tuple(texts)))
    if key in found.seen:
        earlier = found.seen[key].rpartition(":")[2]
        asked = not example.responses and example.text is None
        what = "training keeps a prompt once" if asked else "drop them if they are not meant to repeat"
        found.warn(f"the same as an earlier row; {what}", f"{place} = {earlier}")
    found.seen.setdefault(key, place)
    if any(is_decomposed(text) for text in texts):
        found.warn("decomposed Hangul (NFD), which tokenizers see as other letters; run leyden data convert", place)
    for special in specials:
        if any(special in text for text in texts):
            found.warn(f"the text holds the special token {special}, which the model takes as such; remove it", place)


def _report(
    source: Source, template: ChatTemplate | None, limits: Limits, found: Findings, say: Callable[[str], None]
) -> None:
    for what, places in found.warnings.items():
        more = f" and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
        say(f"warning: {len(places):,} rows: {what} ({', '.join(places[:SHOWN])}{more})")
    why = f" ({by_count(found.bad)})" if found.bad else ""
    more = f" · left out {found.left_out.total():,} ({by_count(found.left_out)})" if found.left_out else ""
    say(f"rows {found.rows:,} · usable {_usable(found):,} · bad {found.bad.total():,}{why}{more}")
    if not _usable(found):
        return
    unit = "characters" if template is None else "tokens"
    say(f"{unit:<12}{'median':>9}{'95%':>9}{'max':>9}{'sum':>13}")
    both = found.longest if found.response else []
    for name, lengths in (("prompt", found.prompt), ("response", found.response), ("both", both)):
        if any(lengths):
            ordered = sorted(lengths)
            numbers = (_quantile(ordered, 0.5), _quantile(ordered, 0.95), ordered[-1])
            say(f"{name:<12}" + "".join(f"{number:>9,}" for number in numbers) + f"{sum(lengths):>13,}")
    if limits.max_length is not None:
        room = limits.max_length - (limits.max_new_tokens or 0)
        over = sum(length > room for length in found.longest)
        cut = "truncate_prompt, truncate_response" if found.response else "truncate_prompt"
        what = f"; they follow --data.overlength (drop, {cut} or error)" if over else ""
        say(f"longer than {room:,} {unit}: {over:,} rows{what}")
    for line in found.comparisons.lines() if found.comparisons is not None else ():
        say(line)
    if template is not None and template.tokenizer.pad_token_id == template.tokenizer.eos_token_id:
        say("note: pad and EOS are one token here; nothing is masked by its id, so EOS is trained")


def _quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed."""
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


def _specials(template: ChatTemplate | None) -> list[str]:
    if template is None:
        return []
    added = template.tokenizer.added_tokens_decoder.values()
    return sorted({str(token) for token in added if token.special})
