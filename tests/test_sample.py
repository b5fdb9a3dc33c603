"""The generator: grammar, determinism, the split by content, and that what it says is right by the gold reward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from random import Random

import pytest

from leyden.datamodules.sample import items, phrases, preference, rewriting, sample_rows
from leyden.datamodules.sample.korean import fill, particle
from leyden.errors import UserError
from leyden.example import Sample
from leyden.rewards.gold import Gold, _word


@pytest.mark.parametrize(
    ("word", "kind", "expected"),
    [
        ("서울", "은", "서울은"),
        ("파리", "은", "파리는"),
        ("톱", "이", "톱이"),
        ("개", "을", "개를"),
        ("서울", "으로", "서울로"),
        ("산", "으로", "산으로"),
        ("바다", "으로", "바다로"),
        ("7", "이에요", "7이에요"),  # 칠
        ("12", "은", "12는"),  # 십이
        ("10", "이야", "10이야"),  # 십
        ("'강'", "이에요", "'강'이에요"),
        ("'book'", "이에요", "'book'이에요"),  # 북
        ("'river'", "이에요", "'river'예요"),  # 리버
    ],
)
def test_particles_follow_the_last_sound(word: str, kind: str, expected: str) -> None:
    assert particle(word, kind) == expected


def test_fill_puts_words_and_particles() -> None:
    assert fill("{n:은} {a:입니다}. {n}!", n="프랑스의 수도", a="파리") == "프랑스의 수도는 파리입니다. 프랑스의 수도!"


def everything(language: str) -> list[items.Item]:
    """All facts and sums, and some of the endless rewriting jobs."""
    draw = Random(5)
    jobs = [make(draw, language) for make in rewriting.REWRITING for _ in range(100)]
    return [*items.facts(language), *items.sums(language), *jobs]


@pytest.mark.parametrize("language", ["ko", "en"])
def test_every_answer_is_right_and_in_the_style_it_should_have(language: str) -> None:
    gold, draw = Gold(), Random(1)
    counted = brief_by_gold = 0
    for item in everything(language):
        row = {"language": language, "answer": item.answer, "rivals": "|".join(item.rivals)}
        for polite in (False, True):
            for brief in (False, True):
                messages = [{"role": "user", "content": phrases.question(draw, item)}]
                response = phrases.answer(draw, item, polite, brief)
                parts = gold.parts(Sample(messages, response, row))  # type: ignore[arg-type]
                assert parts.correct == 1, (messages, response)
                assert parts.polite == polite, (messages, response)
                assert parts.brief == 1 or not brief, (messages, response)
                counted += not brief
                brief_by_gold += parts.brief == 1 and not brief
    # A long question leaves room for a few short wrappings.
    assert brief_by_gold < counted / 500


@pytest.mark.parametrize("language", ["ko", "en"])
def test_no_question_holds_its_answer(language: str) -> None:
    for item in everything(language):
        for question in phrases.asks(item):
            assert not _word(item.answer).search(question), (question, item.answer)


def test_rows_are_the_same_in_every_process() -> None:
    code = "import json; from leyden.datamodules.sample import sample_rows as s\n"
    code += "print(json.dumps([list(s(k, 'both', 20, 3)) for k in ('instruction', 'preference', 'prompts', 'text')]))"
    made = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1]
    assert json.loads(made[0])[0] == list(sample_rows("instruction", "both", 20, 3))


@pytest.mark.parametrize("kind", ["instruction", "preference", "prompts", "text"])
def test_fewer_rows_are_a_prefix_and_other_seeds_differ(kind: str) -> None:
    rows = list(sample_rows(kind, "ko", 30, 0))
    assert list(sample_rows(kind, "ko", 10, 0)) == rows[:10]
    assert list(sample_rows(kind, "ko", 30, 1)) != rows


def test_held_out_contents_are_never_trained_on() -> None:
    train = {row["prompt"] for row in sample_rows("instruction", "both", 3000, 0, "train")}
    train |= {row["prompt"] for row in sample_rows("preference", "both", 500, 0, "train")}
    held_out = {row["prompt"] for row in sample_rows("prompts", "both", 1000, 0, "heldout")}
    assert len(held_out) > 800
    assert not train & held_out
    # The split is by content: both languages put a fact on the same side, whatever the wording.
    sides = {(item.topic, item.key): item.split for item in items.facts("ko")}
    shared = [item for item in items.facts("en") if (item.topic, item.key) in sides]
    assert len(shared) > 250
    assert all(item.split == sides[item.topic, item.key] for item in shared)
    share = sum(side == "heldout" for side in sides.values()) / len(sides)
    assert 0.15 < share < 0.25
    # 3 + 4 and 4 + 3 are one content.
    by_key = {(item.key, item.names[1]): item.split for item in items.sums("en")}
    assert by_key["3 + 4", "3 + 4"] == by_key["3 + 4", "4 + 3"]


def test_text_states_held_out_facts_but_asks_no_question_of_the_rows() -> None:
    text = "\n".join(row["text"] for row in sample_rows("text", "both", 3000, 0))
    held_out = [item for language in ("ko", "en") for item in items.facts(language) if item.split == "heldout"]
    told = [item for item in held_out if any(name in text for name in item.names)]
    assert len(told) == len(held_out) > 100
    for item in [*held_out, *items.sums("ko"), *items.sums("en")]:
        for question in phrases.asks(item):
            assert question not in text, question


def test_styles_are_mixed_evenly() -> None:
    rows = list(sample_rows("instruction", "both", 600, 2))
    gold = Gold()
    parts = [gold.parts(Sample([{"role": "user", "content": row["prompt"]}], row["response"], row)) for row in rows]
    # Standard error 0.02; polite and brief are drawn apart, so a quarter of the rows are both.
    assert abs(sum(part.polite for part in parts) / 600 - 0.5) < 0.08
    assert abs(sum(part.brief == 1 for part in parts) / 600 - 0.5) < 0.08
    assert abs(sum(part.polite and part.brief == 1 for part in parts) / 600 - 0.25) < 0.08
    assert abs(sum(row["language"] == "ko" for row in rows) / 600 - 0.5) < 0.08


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("instructions", "ko", 5, 0), "did you mean 'instruction'"),
        (("instruction", "kr", 5, 0), "no language 'kr'; use ko, en, both"),
        (("instruction", "ko", 0, 0), "--rows 1 or more"),
        (("instruction", "ko", 5, 0, "test"), "no split 'test'"),
        (("preference", "ko", 5, 0, "train", 1.5), "--noise 1.5 is not a share"),
        (("preference", "ko", 5, 0, "train", float("nan")), "--noise nan is not a share"),
        (("preference", "ko", 5, 0, "train", None, 1), "cannot compare 1 answers; use --responses 2 to 8"),
        (("preference", "ko", 5, 0, "train", None, 9), "--responses 2 to 8"),
        (("instruction", "ko", 5, 0, "train", 0.0), "instruction rows have no labels; .* --kind preference"),
        (("text", "ko", 5, 0, "train", None, 2), "text rows have no labels"),
    ],
)
def test_wrong_arguments_are_explained(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_rows(*arguments)  # type: ignore[arg-type]


def test_counts_and_kinds_are_asked_for_as_koreans_do() -> None:
    asked = [item for item in items.facts("ko") if item.topic in ("count", "kind")]
    found = {question for item in asked for question in phrases.asks(item)}
    assert {
        "바이올린의 줄 수는 몇 개야?",
        "일주일의 날수는 며칠이야?",
        "축구 한 팀의 선수 수가 몇 명인지 알아?",
    } <= found
    assert "바이올린이 어떤 종류인지 알려 주세요." in found
    assert not any("속하는 종류를" in question for question in found)


def gold_of(row: dict[str, object], *responses: object) -> list[float]:
    messages = [{"role": "user", "content": str(row["prompt"])}]
    rewards = Gold()([Sample(messages, str(response), row) for response in responses])  # type: ignore[arg-type]
    return [float(reward) for reward in rewards]


@pytest.mark.parametrize("language", ["ko", "en"])
def test_wrong_answers_are_wrong_in_every_style(language: str) -> None:
    gold, draw = Gold(), Random(1)
    for item in everything(language):
        row = {"language": language, "answer": item.answer, "rivals": "|".join(item.rivals)}
        messages = [{"role": "user", "content": phrases.question(draw, item)}]
        for polite, brief in ((False, False), (False, True), (True, False), (True, True)):
            wrong = preference.wrong(draw, item)
            assert wrong.answer != item.answer and wrong.shown != item.shown
            response = phrases.answer(draw, wrong, polite, brief)
            parts = gold.parts(Sample(messages, response, row))  # type: ignore[arg-type]
            assert parts.correct == 0 and parts.polite == polite, (messages, response)
    assert {preference.wrong(draw, item).shown for item in items.facts("en") if item.topic == "kind"} >= {"furniture"}


def test_pairs_without_noise_are_ordered_by_the_gold_reward() -> None:
    rows = list(sample_rows("preference", "both", 400, 3, noise=0.0))
    for row in rows:
        chosen, rejected = gold_of(row, row["chosen"], row["rejected"])
        assert chosen - rejected > preference.GAP - 1e-4, row
        assert [row["gold_chosen"], row["gold_rejected"]] == pytest.approx([chosen, rejected], abs=1e-4)
    # Right against wrong in about half of the rows; manners decide the others. The standard error is 0.025.
    assert abs(sum(row["gold_rejected"] == 0 for row in rows) / 400 - 0.5) < 0.1
    assert min(row["gold_chosen"] for row in rows) > 0


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 1.0])
def test_noise_flips_that_share_of_the_labels_and_nothing_else(noise: float) -> None:
    count = 1000
    clean = list(sample_rows("preference", "ko", count, 5, noise=0.0))
    noisy = list(sample_rows("preference", "ko", count, 5, noise=noise))
    flipped = 0
    for before, after in zip(clean, noisy, strict=True):
        if before["chosen"] != after["chosen"]:
            flipped += 1
            swapped = {"chosen": "rejected", "gold_chosen": "gold_rejected"}
            swapped |= {there: here for here, there in swapped.items()}
            after = {name: after[swapped.get(name, name)] for name in after}
        assert before == after
    assert flipped == sum(row["gold_chosen"] < row["gold_rejected"] for row in noisy)
    assert abs(flipped - noise * count) <= 3 * (noise * (1 - noise) * count) ** 0.5
    assert list(sample_rows("preference", "ko", 50, 5, noise=0.1)) == list(sample_rows("preference", "ko", 50, 5))


def test_pairs_hold_every_style_that_instruction_rows_have() -> None:
    """A policy trained on instruction rows says nothing that its reward model never saw the like of."""
    gold = Gold()

    def styles(kind: str, *columns: str) -> set[tuple[bool, bool, bool]]:
        found = set()
        for row in sample_rows(kind, "both", 300, 1):
            for column in columns:
                parts = gold.parts(Sample([{"role": "user", "content": row["prompt"]}], row[column], row))
                found.add((parts.correct == 1, parts.polite == 1, parts.brief == 1))
        return found

    assert styles("instruction", "response") < styles("preference", "chosen")
    assert len(styles("preference", "rejected")) == 8


def test_more_than_two_answers_are_scored() -> None:
    rows = list(sample_rows("preference", "both", 300, 2, noise=0.0, responses=4))
    for row in rows:
        assert len(set(row["responses"])) == 4
        assert row["scores"] == row["gold"] == pytest.approx(gold_of(row, *row["responses"]), abs=1e-4)
        assert max(row["gold"]) - min(row["gold"]) >= preference.GAP
    noisy = list(sample_rows("preference", "both", 300, 2, noise=0.5, responses=4))
    assert [row["responses"] for row in noisy] == [row["responses"] for row in rows]
    flipped = [row for row in noisy if row["scores"] != row["gold"]]
    assert abs(len(flipped) - 150) <= 3 * 75**0.5
    for row in flipped:
        traded = [i for i in range(4) if row["scores"][i] != row["gold"][i]]
        assert len(traded) == 2 and sorted(row["scores"]) == sorted(row["gold"])
    assert len(next(iter(sample_rows("preference", "en", 1, 0, responses=8)))["responses"]) == 8
