"""From votes to preference rows: majorities, ties, circles, copies, and training on what comes out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from voters import plackett_luce, vote

from leyden.datamodules.annotate.export import export, exported, ordered
from leyden.datamodules.formats.formats import detect, parse
from leyden.errors import UserError
from leyden.example import Example
from leyden.votes import Answer, Item, Vote

STRENGTHS = {"sft": -0.8, "dpo": 0.5, "ppo": 0.2, "grpo": 0.1}


def read(rows: Sequence[dict[str, Any]]) -> list[Example]:
    """Rows as the readers of `PreferenceData` take them from a file; what they do not read is a failure."""
    rows = [json.loads(json.dumps(row, ensure_ascii=False)) for row in rows]
    form = detect(rows, "preference")
    examples = [parse(row, form, "preference") for row in rows]
    assert all(not example.not_read for example in examples)
    return examples


def orders(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The answers of each row as training orders them, best first."""
    return [[response[0]["content"] for response in example.responses] for example in read(rows)]


def of(text: str, *answers: str) -> Item:
    return Item(({"role": "user", "content": text},), tuple(Answer(answer) for answer in answers))


def test_a_majority_of_rankings() -> None:
    """Two of three prefer a to b, all prefer both to c, and one of them calls the last two a tie."""
    one = of("?", "a", "b", "c")
    votes = [vote(one, "p", 1, 2, 3), vote(one, "q", 1, 2, 2), vote(one, "r", 2, 1, 3)]
    assert orders(export([one], votes, "ranked", "majority")) == [["a", "b", "c"]]
    assert orders(export([one], votes, "pairs", "majority")) == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert orders(export([one], votes, "ranked", "all")) == [["a", "b", "c"], ["a", "b"], ["b", "a", "c"]]
    assert len(export([one], votes, "pairs", "all")) == 3 + 2 + 3


def test_a_circle_of_majorities_is_dropped_and_counted() -> None:
    one = of("?", "a", "b", "c", "d")
    votes = [vote(one, "p", 1, 2, 3, 4), vote(one, "q", 3, 1, 2, 4), vote(one, "r", 2, 3, 1, 4)]
    done = exported([one], votes, "pairs", "majority")
    assert orders(done.rows) == [["a", "d"], ["b", "d"], ["c", "d"]] and done.counts["cycles"] == 3
    (row,) = exported([one], votes, "ranked", "majority").rows
    assert row["ranking"] == [1, 1, 1, 4] and orders([row]) == [["a", "d"]]  # of a tie training takes the first
    alone = of("?", "a", "b", "c")
    circle = [Vote(alone.id, cast.person, 0.0, cast.ranks[:3]) for cast in votes]
    assert exported([alone], circle, "ranked", "majority").rows == []
    assert export([alone], circle, "pairs", "majority") == export([], [], "pairs", "all") == []


def test_what_two_people_see_otherwise_is_a_tie() -> None:
    """a and b, and a and c, are even; b over c is all that both say, so a is left out of the order."""
    one = of("?", "a", "b", "c")
    done = exported([one], [vote(one, "p", 1, 2, 3), vote(one, "q", 3, 1, 2)], "ranked", "majority")
    assert orders(done.rows) == [["b", "c"]] and done.counts["unordered"] == 1
    assert exported([one], [vote(one, "p", 1, 1, 1)], "pairs", "majority").counts["ties"] == 3


def test_skipped_bad_and_gone_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    one, bad = of("?", "a", "b"), of("!", "c", "d")
    votes = [vote(one, "p", 1, 2), vote(one, "q"), vote(one, "r", 2, 1, all_bad=True), Vote("gone", "p", 0.0, (1, 2))]
    votes += [vote(bad, "p", 1, 2), vote(bad, "q", all_bad=True), vote(bad, "r", all_bad=True)]
    assert orders(export([one, bad], votes, "pairs", "majority")) == [["a", "b"]]
    said = capsys.readouterr().err
    for text in ("1 rows of 1 prompts", "1 votes that skip", "3 votes that call all answers bad", "1 items that most",
                 "1 votes for items that are gone"):  # fmt: skip
        assert text in said, said
    done = exported([one, bad], votes, "pairs", "all")
    assert orders(done.rows) == [["a", "b"], ["c", "d"]] and done.prompts == 2
    with pytest.raises(UserError, match="ranked or pairs"):
        export([one], votes, "triples", "all")  # type: ignore[arg-type]


def test_items_of_one_prompt_are_taken_together() -> None:
    """The same two answers in two items, by other models: three votes to two. A row whose pairs are all in another
    says nothing new."""
    one, other = of("?", "a", "b", "c"), replace(of("?", "b ", "a"), answers=(Answer("b ", "x"), Answer("a", "y")))
    votes = [vote(one, "p", 1, 2, 3), vote(one, "q", 1, 2, 3)]
    votes += [vote(other, "p", 2, 1), vote(other, "q", 1, 2), vote(other, "r", 1, 2)]
    done = exported([one, other], votes, "ranked", "majority")
    assert orders(done.rows) == [["a", "b", "c"]] and done.counts["repeats"] == 1 and done.prompts == 1
    rows = exported([one, other], votes, "pairs", "majority").rows
    assert orders(rows) == [["a", "b"], ["a", "c"], ["b", "c"]]


def test_copies_of_an_answer_are_one() -> None:
    one = Item(({"role": "user", "content": "?"},), (Answer("a", "x"), Answer("a", "y"), Answer("b"), Answer(" ")))
    done = exported([one], [vote(one, "p", 1, 2, 3, 4)], "ranked", "majority")
    assert orders(done.rows) == [["a", "b"]] and done.counts["empty"] == 1
    # one copy above and one below says nothing
    assert exported([one], [vote(one, "p", 1, 3, 2, 4)], "pairs", "all").rows == []


def test_conversations_and_odd_texts_stay_as_they_are() -> None:
    talk = (
        {"role": "system", "content": "짧게 답해."},
        {"role": "user", "content": "Human: 안녕\n\nAssistant: 네"},
        {"role": "assistant", "content": "안녕하세요"},
        {"role": "user", "content": "더"},
    )
    better, worse = (
        "Human: a\n\nAssistant: b",
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
    )
    one = Item(talk, (Answer(worse, "x"), Answer(better, "y")))
    for kind in ("ranked", "pairs"):
        (example,) = read(export([one], [vote(one, "p", 2, 1)], kind, "all"))  # type: ignore[arg-type]
        assert example.messages == list(talk)
        assert [turn[0]["content"] for turn in example.responses] == [better, worse]


def test_rows_say_what_most_people_say_and_no_more() -> None:
    r = random.Random(1)
    items, votes = plackett_luce(r, 60, dict.fromkeys("abcd", 0.0), each=3, shown=4)
    votes = [
        replace(one, ranks=tuple(min(rank, 3) for rank in one.ranks)) if r.random() < 0.3 else one for one in votes
    ]
    wins: Counter[tuple[str, str]] = Counter()
    texts = {one.id: [answer.text for answer in one.answers] for one in items}
    for cast in votes:
        wins.update((texts[cast.item][i], texts[cast.item][j]) for i, j, tie in cast.pairs() if not tie)
    majority = {pair for pair in wins if wins[pair] > wins[pair[::-1]]}
    pairs = [(better, worse) for better, worse in orders(export(items, votes, "pairs", "majority"))]
    assert len(set(pairs)) == len(pairs) and set(pairs) <= majority
    dropped = exported(items, votes, "pairs", "majority").counts["cycles"]
    assert len(majority) == len(pairs) + dropped and 0 < dropped < len(pairs)
    ranked = [pair for order in orders(export(items, votes, "ranked", "majority")) for pair in combinations(order, 2)]
    assert set(ranked) <= set(pairs) and len(ranked) > 0.8 * len(pairs)


@pytest.mark.parametrize(
    ("beats", "ranks"),
    [
        ({(0, 1), (1, 2), (0, 2)}, {0: 1, 1: 2, 2: 3}),
        ({(0, 2), (1, 2)}, {0: 1, 1: 1, 2: 3}),
        ({(0, 1), (1, 2)}, {0: 1, 1: 2}),  # 0 and 2 are a tie, which 0 over 1 over 2 contradicts
    ],
)
def test_the_largest_order(beats: set[tuple[int, int]], ranks: dict[int, int]) -> None:
    assert ordered((0, 1, 2), beats) == ranks
    assert ordered((0, 1, 2), set()) == {}


@pytest.mark.parametrize(("config", "kind", "used"), [("reward_model", "ranked", "majority"), ("dpo", "pairs", "all")])
def test_exported_votes_train(config: str, kind: Any, used: Any, leyden: Any, workplace: Path) -> None:
    """A reward model and DPO, by way of the readers and `PreferenceData`."""
    rows = export(*plackett_luce(random.Random(0), 12, STRENGTHS), kind, used)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (workplace / "votes.jsonl").write_text(text, encoding="utf-8")
    code, out, err = leyden("data", "check", "votes.jsonl", "--kind", "preference")
    assert code == 0 and f"usable {len(rows)} · bad 0" in out, out + err
    more = ["--data.batch_size", "4", "--trainer.max_steps", "2", "--trainer.default_root_dir", "run"]
    code, _, err = leyden("fit", "--config", config, "--data.path", "votes.jsonl", *more)
    assert code == 0, err
    assert (workplace / "run" / "export" / "config.json").is_file()
