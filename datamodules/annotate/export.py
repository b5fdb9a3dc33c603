"""From votes to preference rows that `PreferenceData` reads as they are."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from leyden.datamodules.formats.turns import normalised_turns
from leyden.errors import UserError
from leyden.language import say
from leyden.votes.ballots import check
from leyden.votes.vote import Item, Vote, current

Kind = Literal["ranked", "pairs"]
Used = Literal["majority", "all"]
Ways = Counter[tuple[int, int]]
"""(i, j) -> how many votes prefer answer i to answer j."""


@dataclass
class Export:
    """Rows, and what did not become one.

    Args:
        rows: to be written as JSONL.
        prompts: how many different ones there are.
        counts: what was left out -> how many.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    prompts: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """What was written and what was left out, one line each."""
        texts = {
            "skipped": "{} votes that skip their item",
            "all bad": "{} votes that call all answers bad",
            "all bad items": "{} items that most people call all bad",
            "gone": "{} votes for items that are gone",
            "empty": "{} answers without text",
            "ties": "{} pairs of answers that are as good",
            "cycles": "{} pairs in a circle of majorities (A over B, B over C, C over A)",
            "repeats": "{} rows that say nothing new of their prompt",
            "unordered": "{} answers that the majority does not order with the others",
        }
        left_out = [f"left out: {texts[name].format(f'{n:,}')}" for name in texts if (n := self.counts[name])]
        return [f"{len(self.rows):,} rows of {self.prompts:,} prompts", *left_out]


def export(items: Sequence[Item], votes: Sequence[Vote], kind: Kind, votes_used: Used) -> list[dict[str, Any]]:
    """Preference rows of the current votes, as `exported` makes them; prints what they hold and what was left out.
    There are none where no vote prefers an answer to another one."""
    done = exported(items, votes, kind, votes_used)
    for line in done.notes():
        say(line, file=sys.stderr)
    return done.rows


def exported(items: Sequence[Item], votes: Sequence[Vote], kind: Kind, votes_used: Used) -> Export:
    """Preference rows of the current votes.

    `pairs` are rows of prompt, chosen and rejected. `ranked` are rows of prompt, completion_0 …, the rank of each in
    `ranking` and `rank_order`; equal ranks are ties, of which training takes the first. Answers are turns and not
    texts, so that none is taken for a transcript.

    Votes on one prompt are taken together, whatever item they came from, and answers with the same text are one.

    - `majority`: i is preferred to j where more votes prefer i to j than j to i. Pairs in a circle of such majorities
      are dropped. A ranked row is the largest choice of an item's answers, by pairs, that these preferences put in
      order with ties. A prompt has no row twice, and no ranked row whose pairs are all in another.
    - `all`: each vote makes its own rows.

    A vote that calls all answers bad makes no rows, and under `majority` neither does an item that more than half of
    its votes call so.
    """
    if kind not in ("ranked", "pairs") or votes_used not in ("majority", "all"):
        raise UserError(f"kind {kind}, votes {votes_used}: give ranked or pairs, and majority or all")
    done = Export()
    prompts = set()
    for prompt in _by_prompt(items, votes, done.counts, votes_used == "majority"):
        rows = prompt.majority(kind, done.counts) if votes_used == "majority" else prompt.all(kind, done.counts)
        if rows:
            prompts.add(prompt.key)
        done.rows += rows
    done.prompts = len(prompts)
    return done


# -- the votes on a prompt -------------------------------------------------------------------------------------------


@dataclass
class _Prompt:
    """Votes on one prompt.

    Args:
        key: equal for equal prompts.
        messages: of the first item.
        texts: the different answers.
        ballots: the answers of a vote's item by number, and whom the vote prefers to whom.
    """

    key: object
    messages: list[Mapping[str, Any]]
    texts: list[str] = field(default_factory=list)
    ballots: list[tuple[tuple[int, ...], Ways]] = field(default_factory=list)

    def majority(self, kind: Kind, counts: Counter[str]) -> list[dict[str, Any]]:
        """One set of rows of all votes."""
        ways = sum((ways for _, ways in self.ballots), Ways())
        return self._rows(kind, ways, dict.fromkeys(answers for answers, _ in self.ballots), counts)

    def all(self, kind: Kind, counts: Counter[str]) -> list[dict[str, Any]]:
        """The rows of each vote."""
        return [row for answers, ways in self.ballots for row in self._rows(kind, ways, {answers: None}, counts)]

    def _rows(
        self, kind: Kind, ways: Ways, sets: Mapping[tuple[int, ...], None], counts: Counter[str]
    ) -> list[dict[str, Any]]:
        beats = {(i, j) for (i, j), votes in ways.items() if votes > ways[j, i]}
        circles = {(i, j) for i, j in beats if _leads_to(j, i, beats)}
        asked = {tuple(sorted(pair)) for answers in sets for pair in combinations(answers, 2)}
        counts["cycles"] += len(circles)
        counts["ties"] += sum((i, j) not in beats and (j, i) not in beats for i, j in asked)
        beats -= circles
        if kind == "pairs":
            return [self._pair(i, j) for i, j in sorted(beats)]
        rows, said = list[dict[str, Any]](), set[tuple[int, int]]()
        for answers in sorted(sets, key=lambda one: -len(one)):
            ranks = ordered(answers, beats)
            states = {(i, j) for i in ranks for j in ranks if ranks[i] < ranks[j]}
            counts["unordered"] += len(answers) - len(ranks) if ranks else 0
            if states and states <= said:
                counts["repeats"] += 1
            elif states:
                rows.append(self._ranked(ranks))
                said |= states
        return rows

    def _pair(self, better: int, worse: int) -> dict[str, Any]:
        prompt = [dict(message) for message in self.messages]
        return {"prompt": prompt, "chosen": self._answer(better), "rejected": self._answer(worse)}

    def _ranked(self, ranks: Mapping[int, int]) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": [dict(message) for message in self.messages]}
        row |= {f"completion_{place}": self._answer(number) for place, number in enumerate(ranks)}
        return row | {"ranking": list(ranks.values()), "rank_order": "lower_is_better"}

    def _answer(self, number: int) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": self.texts[number]}]


def _by_prompt(items: Sequence[Item], votes: Sequence[Vote], counts: Counter[str], majority: bool) -> Iterator[_Prompt]:
    """The prompts in the order of items, each with the votes that rank its answers."""
    by_item: defaultdict[str, list[Vote]] = defaultdict(list)
    for vote in current(votes):
        by_item[vote.item].append(vote)
    prompts: dict[object, _Prompt] = {}
    for item in {item.id: item for item in items}.values():
        cast = by_item.pop(item.id, [])
        for vote in cast:
            check(vote, item)
        given = [vote for vote in cast if vote.ranks or vote.all_bad]
        counts["skipped"] += len(cast) - len(given)
        bad = sum(vote.all_bad for vote in given)
        counts["all bad"] += bad
        if majority and 2 * bad > len(given):
            counts["all bad items"] += 1
            continue
        key = _key(item.messages)
        prompt = prompts.setdefault(key, _Prompt(key, list(item.messages)))
        _add(prompt, item, [vote for vote in given if not vote.all_bad], counts)
    counts["gone"] += sum(map(len, by_item.values()))
    yield from (prompt for prompt in prompts.values() if prompt.ballots)


def _add(prompt: _Prompt, item: Item, votes: Sequence[Vote], counts: Counter[str]) -> None:
    """Add votes on an item to those on its prompt."""
    known = {_plain(text): number for number, text in enumerate(prompt.texts)}
    numbers: list[int | None] = []
    for answer in item.answers if votes else ():
        if not answer.text.strip():
            counts["empty"] += 1
            numbers.append(None)
            continue
        number = known.setdefault(_plain(answer.text), len(prompt.texts))
        if number == len(prompt.texts):
            prompt.texts.append(answer.text)
        numbers.append(number)
    answers = tuple(sorted({number for number in numbers if number is not None}))
    for vote in votes:
        ways = Ways()
        for i, j, tie in vote.pairs():
            better, worse = numbers[i], numbers[j]
            if better is not None and worse is not None and better != worse and not tie:
                ways[better, worse] += 1
        one = {(i, j): 1 for (i, j), n in ways.items() if n > ways[j, i]}  # a person is one vote, copies or not
        prompt.ballots.append((answers, Ways(one)))


def _key(messages: Sequence[Mapping[str, Any]]) -> object:
    """Equal for conversations that training would read as the same."""
    plain = [
        {**message, "role": str(message.get("role")), "content": str(message.get("content") or "")}
        for message in messages
    ]
    return normalised_turns(plain)  # type: ignore[arg-type]


def _plain(text: str) -> object:
    return normalised_turns([{"role": "assistant", "content": text}])


# -- orders ----------------------------------------------------------------------------------------------------------


def _leads_to(start: int, end: int, beats: set[tuple[int, int]]) -> bool:
    """Whether preferences lead from one answer to another."""
    reached, open_ = {start}, [start]
    while open_:
        at = open_.pop()
        found = {j for i, j in beats if i == at} - reached
        reached |= found
        open_ += found
    return end in reached


def ordered(answers: Sequence[int], beats: set[tuple[int, int]]) -> dict[int, int]:
    """Ranks from 1 of the largest choice of answers that preferences put in order, in the order of answers; empty where
    they prefer nothing.

    A choice is in order where one answer is preferred to another exactly if it is preferred to more of them: then
    preferences and ties together never contradict themselves. The largest has the most preferences, then the most
    answers.
    """
    best: dict[int, int] = {}
    most = (0, len(answers))
    for size in range(len(answers), 1, -1):
        if (size * (size - 1) // 2, size) <= most:
            break
        for choice in combinations(answers, size):
            wins = {i: sum((i, j) in beats for j in choice) for i in choice}
            total = (sum(wins.values()), size)
            if total > most and all(((i, j) in beats) == (wins[i] > wins[j]) for i in choice for j in choice):
                best, most = wins, total
    return {i: 1 + sum(other > wins for other in best.values()) for i, wins in best.items()}
