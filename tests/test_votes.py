"""Agreement, scores of models, votes.jsonl and the report: hand-derived values, and simulated people whose truth is
known."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare import make_run
from voters import PEOPLE, davidson, erring, item, plackett_luce, vote

from leyden.compare.groups import grouped
from leyden.compare.run import RunFiles
from leyden.compare.votes import _shown
from leyden.errors import UserError
from leyden.votes import Answer, Item, Vote
from leyden.votes.agreement import agreement, kappa, mid_ranks
from leyden.votes.ballots import gather
from leyden.votes.bradley_terry import _is_bounded, _likelihood, bradley_terry, fit
from leyden.votes.report import report
from leyden.votes.reward_agreement import reward_agreement
from leyden.votes.vote import current
from leyden.votes.vote_file import read_votes, write_votes

STRENGTHS = {"sft": -0.8, "dpo": 0.5, "ppo": 0.2, "grpo": 0.1}


# -- agreement -------------------------------------------------------------------------------------------------------


def test_alpha_by_hand() -> None:
    """Two people, two items of two answers: they agree on one and contradict each other on the other.

    Each pair counts both ways round: o(+,+) = o(-,-) = 2 and o(+,-) = o(-,+) = 2, so n = 8, the observed disagreement
    is 4 and the expected one 2 · 4 · 4 / 7: alpha is 1 - 4 · 7 / 32 = 1 / 8. Ranks 1 and 2 give the same table.
    """
    items = [item(number, ("a", "b")) for number in range(2)]
    votes = [vote(items[0], "p", 1, 2), vote(items[0], "q", 1, 2), vote(items[1], "p", 1, 2), vote(items[1], "q", 2, 1)]
    found = agreement(items, votes, draws=0)
    assert found.nominal.value == pytest.approx(1 / 8) and found.ordinal.value == pytest.approx(1 / 8)
    assert found.share.value == 0.5
    (two,) = found.two
    assert (two.people, two.items, two.pairs, two.share, two.kappa) == (("p", "q"), 2, 2, 0.5, 0.0)
    assert [(one.item, one.share) for one in found.items] == [(items[1], 0.0), (items[0], 1.0)]


def test_a_near_miss_costs_ranks_less_than_a_far_one() -> None:
    items = [item(number, "abcd") for number in range(12)]
    near = [vote(one, "p", 1, 2, 3, 4) for one in items] + [vote(one, "q", 2, 1, 3, 4) for one in items]
    far = [vote(one, "p", 1, 2, 3, 4) for one in items] + [vote(one, "q", 4, 2, 3, 1) for one in items]
    assert agreement(items, near, 0).ordinal.value > 0.8 > 0 > agreement(items, far, 0).ordinal.value
    assert agreement(items, near, 0).nominal.value == pytest.approx(1 - 2 * (1 / 6) * (1 - 1 / (24 * 12)), abs=1e-9)


def test_the_order_of_answers_and_the_numbers_of_ties_change_nothing() -> None:
    r = random.Random(0)
    items, votes = plackett_luce(r, 40, STRENGTHS)
    votes = [
        replace(one, ranks=tuple(min(rank, 2) for rank in one.ranks)) if r.random() < 0.3 else one for one in votes
    ]
    turned, turned_votes = [], []
    for one in items:
        order = r.sample(range(3), 3)
        other = replace(one, answers=tuple(one.answers[at] for at in order))
        turned.append(other)
        for cast in votes:
            if cast.item == one.id:
                ranks = tuple(cast.ranks[at] for at in order)
                turned_votes.append(replace(cast, ranks=tuple(3 if rank == max(ranks) else rank for rank in ranks)))
    one, other = agreement(items, votes, 0), agreement(turned, turned_votes, 0)
    for name in ("ordinal", "nominal", "share"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, abs=1e-12)
    assert one.two == other.two
    assert mid_ranks([1, 1, 3, 2]) == [1.5, 1.5, 4.0, 3.0] == mid_ranks([1, 1, 7, 5])


def test_kappa_by_hand() -> None:
    """One tie of four pairs each: chance is 1/16 + 9/32 = 11/32. Three of four alike: (24/32 - 11/32) / (21/32)."""
    assert kappa(3, 4, (1, 1)) == pytest.approx(13 / 21)
    assert math.isnan(kappa(4, 4, (4, 4)))


def test_what_nobody_shares_has_no_agreement() -> None:
    items = [item(number, "ab") for number in range(2)]
    found = agreement(items, [vote(items[0], "p", 1, 2), vote(items[1], "q", 1, 2)])
    assert math.isnan(found.ordinal.value) and math.isnan(found.share.value) and found.two == found.items == []
    assert math.isnan(agreement([], []).nominal.value)


def test_only_the_last_vote_of_a_person_counts() -> None:
    one = item(0, "ab")
    votes = [vote(one, "p", 1, 2), vote(one, "q", 2, 1, time=1.0), vote(one, "q", 1, 2, time=2.0)]
    assert agreement([one], votes, 0).share.value == 1.0
    ballots = gather([one], [*votes, Vote("gone", "p", 0.0, (1, 2)), vote(one, "r"), vote(one, "s", all_bad=True)])
    assert (len(ballots.ranked), ballots.skipped, ballots.all_bad, ballots.gone) == (2, 1, 1, 1)
    with pytest.raises(UserError, match="vote of p for item .*: 3 ranks for 2 answers"):
        gather([one], [vote(one, "p", 1, 2, 3)])


# -- scores of models ------------------------------------------------------------------------------------------------


def test_two_models_by_hand() -> None:
    """The model is saturated: the odds of a win are 8 : 2, and ν is the ties over the root of wins times losses."""
    wins, ties = np.array([[0.0, 8.0], [2.0, 0.0]]), np.array([[0.0, 4.0], [4.0, 0.0]])
    found = fit(wins, ties)
    assert found.theta == pytest.approx([math.log(4) / 2, -math.log(4) / 2], abs=1e-9) and not found.prior
    assert found.nu == pytest.approx(4 / math.sqrt(16), abs=1e-9)
    assert fit(wins, 0 * ties).theta == pytest.approx(found.theta, abs=1e-9)


def test_the_slope_and_the_bend_of_the_likelihood() -> None:
    r = np.random.default_rng(0)
    wins, ties = np.triu(r.integers(0, 9, (4, 4)), 1) + np.tril(r.integers(0, 9, (4, 4)), -1), r.integers(0, 4, (4, 4))
    ties = np.triu(ties, 1) + np.triu(ties, 1).T
    table, x, small = (wins[None].astype(float), ties[None].astype(float)), r.normal(size=(1, 5)), 1e-6
    _, slope, bend = _likelihood(x, *table)
    for at in range(5):
        step = small * np.eye(5)[at]
        up, down = (_likelihood(x + way * step, *table) for way in (1, -1))
        assert (up[0] - down[0]) / (2 * small) == pytest.approx(slope[:, at], abs=1e-6)
        assert -(up[1] - down[1]) / (2 * small) == pytest.approx(bend[:, at], abs=1e-5)


@pytest.mark.parametrize(
    ("wins", "ties", "bounded"),
    [
        ([[0, 3], [1, 0]], [[0, 0], [0, 0]], True),
        ([[0, 3], [0, 0]], [[0, 0], [0, 0]], False),  # always wins
        ([[0, 3], [0, 0]], [[0, 2], [2, 0]], False),  # never loses, and ties: scores and ties grow together
        ([[0, 0], [0, 0]], [[0, 2], [2, 0]], False),  # all ties
        ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], [[0, 0, 1], [0, 0, 0], [1, 0, 0]], True),  # round in a circle
    ],
)
def test_scores_stay_finite(wins: Any, ties: Any, bounded: bool) -> None:
    wins, ties = np.array(wins, float), np.array(ties, float)
    found = fit(wins, ties)
    assert found.prior is not bounded and _is_bounded(wins, ties) is bounded
    assert np.isfinite(found.theta).all() and math.isfinite(found.nu) and abs(found.theta).max() < 5
    assert found.theta.sum() == pytest.approx(0, abs=1e-9)


def test_a_model_that_always_wins_is_said() -> None:
    items = [item(number, "ab") for number in range(5)]
    found = bradley_terry(items, [vote(one, "p", 1, 2) for one in items])
    assert found.models == ["a", "b"] and found.prior and "half a win more each way" in found.notes()[0]
    # half a win each way beside five: the odds are 5.5 : 0.5
    assert found.scores[0].value == pytest.approx(math.log(11) / 2, abs=1e-9)
    assert found.win_rates[0].value == 1.0 and found.wins.tolist() == [[0, 5], [0, 0]]


def test_models_that_were_never_compared_have_no_common_scale() -> None:
    items = [item(0, "ab"), item(1, "ab"), item(2, "cd")]
    votes = [vote(items[0], "p", 1, 2), vote(items[1], "p", 2, 1), vote(items[2], "p", 1, 2)]
    found = bradley_terry(items, votes)
    assert found.models == ["a", "b"] and found.apart == ("c", "d")
    assert found.notes()[0].startswith("No vote compares c, d with a, b")
    alone = Item(items[0].messages, tuple(replace(answer, model="") for answer in items[0].answers))
    assert bradley_terry([alone], [vote(alone, "p", 1, 2)]).models == []
    assert bradley_terry([], []).models == []


# -- simulated people ------------------------------------------------------------------------------------------------


def covered(found: Any, truth: float) -> bool:
    return found.low <= truth <= found.high


def test_intervals_of_scores_cover_the_truth() -> None:
    mean = sum(STRENGTHS.values()) / len(STRENGTHS)
    hits = differences = 0
    for seed in range(60):
        found = bradley_terry(*plackett_luce(random.Random(seed), 60, STRENGTHS), draws=200)
        hits += sum(covered(found.scores[at], STRENGTHS[name] - mean) for at, name in enumerate(found.models))
        one, other = found.models.index("dpo"), found.models.index("sft")
        differences += covered(found.difference(one, other), STRENGTHS["dpo"] - STRENGTHS["sft"])
    assert hits / 240 >= 0.85 and differences / 60 >= 0.85


def test_intervals_of_scores_cover_the_truth_with_ties() -> None:
    mean = sum(STRENGTHS.values()) / len(STRENGTHS)
    hits, nus = 0, []
    for seed in range(60):
        found = bradley_terry(*davidson(random.Random(seed), 120, STRENGTHS, 0.6), draws=200)
        hits += sum(covered(found.scores[at], STRENGTHS[name] - mean) for at, name in enumerate(found.models))
        nus.append(found.nu)
    assert hits / 240 >= 0.85 and sum(nus) / 60 == pytest.approx(0.6, abs=0.05)


def test_intervals_of_agreement_cover_the_truth() -> None:
    """Two people with error rates e and f say the same with probability (1 - e)(1 - f) + e f; alpha of pairs, both ways
    round, is 1 - 2 P(not the same)."""
    errors = {name: 0.05 + 0.3 * number / 19 for number, name in enumerate(PEOPLE)}
    apart = [e * (1 - f) + f * (1 - e) for e, f in combinations(errors.values(), 2)]
    truth = 1 - sum(apart) / len(apart)
    hits = shares = 0
    for seed in range(60):
        found = agreement(*erring(random.Random(seed), 60, errors), draws=200)
        hits += covered(found.nominal, 2 * truth - 1)
        shares += covered(found.share, truth)
    assert hits / 60 >= 0.85 and shares / 60 >= 0.85


def test_intervals_of_alpha_of_ranks_cover_the_truth() -> None:
    truth = agreement(*plackett_luce(random.Random(1000), 3000, STRENGTHS, each=2), draws=0).ordinal.value
    hits = sum(
        covered(agreement(*plackett_luce(random.Random(seed), 60, STRENGTHS), draws=200).ordinal, truth)
        for seed in range(60)
    )
    assert hits / 60 >= 0.85


# -- people and the reward -------------------------------------------------------------------------------------------


def test_the_reward_beside_people_by_hand() -> None:
    """Scores 3, 2, 2 of answers ranked 1, 2, 3: two pairs alike and one that the reward ties, so 2.5 of 3; τ_b is
    (2 - 0) / √(3 · 2). A tie of the person is left out of the share."""
    one = item(0, "abc", (3.0, 2.0, 2.0))
    found = reward_agreement([one], [vote(one, "p", 1, 2, 3)], draws=0)
    assert found is not None and found.share.value == pytest.approx(2.5 / 3)
    assert found.tau_b.value == pytest.approx(2 / math.sqrt(6)) and (found.pairs, found.ties) == (3, 0)
    tied = reward_agreement([one], [vote(one, "p", 1, 1, 3)], draws=0)
    assert tied is not None and (tied.pairs, tied.ties) == (2, 1)
    # alike: a over c; the reward ties b and c; the person ties a and b. τ_b = 1 / √(2 · 2)
    assert tied.share.value == 0.75 and tied.tau_b.value == pytest.approx(1 / 2)
    only = reward_agreement([one], [vote(one, "p", 1, 2, 3)], "a", draws=0)
    assert only is not None and only.pairs == 2 and only.share.value == 1.0
    assert reward_agreement([item(0, "ab")], [vote(item(0, "ab"), "p", 1, 2)]) is None


# -- votes.jsonl -----------------------------------------------------------------------------------------------------


def test_votes_travel_exactly(tmp_path: Path) -> None:
    r = random.Random(0)
    items, votes = plackett_luce(r, 10, STRENGTHS)
    messages = ({"role": "system", "content": "짧게"}, {"role": "user", "content": "a\u2028b\ud800"})
    odd = Item(messages, (Answer("답 \x00", "모델", 0.1 + 0.2, 1e-300), Answer("</script>", "")))
    items.append(odd)
    votes += [vote(odd, "김", 1, 1, time=1e9 + 0.1, all_bad=True, reason="줄\n바꿈"), vote(odd, "이"), vote(odd, "김")]
    file = tmp_path / "votes.jsonl"
    assert write_votes(items, votes, file) == len(current(votes))
    again, said = read_votes(file)
    assert said == current(votes)
    assert {one.id: one for one in again} == {one.id: one for one in items}
    first = file.read_bytes()
    write_votes(again, said, file)
    assert file.read_bytes() == first


def test_ranks_follow_the_answers_of_the_first_copy_of_an_item(tmp_path: Path) -> None:
    one = item(0, "abc")
    other = replace(one, answers=one.answers[::-1])
    file, more = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_votes([one], [vote(one, "p", 1, 2, 3)], file)
    write_votes([other], [vote(other, "q", 1, 2, 2)], more)
    file.write_text(file.read_text(encoding="utf-8") + more.read_text(encoding="utf-8"), encoding="utf-8")
    items, votes = read_votes(file)
    assert items == [one] and [cast.ranks for cast in votes] == [(1, 2, 3), (2, 2, 1)]


GOOD: dict[str, Any] = {
    "item": {"messages": [{"role": "user", "content": "?"}], "answers": [{"text": "a"}, {"text": "b"}]},
    "person": "p", "time": 1.0, "ranks": [1, 2],
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"votes.jsonl:2: not whole JSON"),
        ("[]", r"votes.jsonl:2: not a vote with its item"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "person"}), "no 'person'"),
        (json.dumps(GOOD | {"ranks": [1, 2, 3]}), "votes.jsonl:2: vote of p .* 3 ranks for 2 answers"),
        (json.dumps(GOOD | {"ranks": [0, 2]}), "votes.jsonl:2: ranks .*whole numbers"),
        (json.dumps(GOOD | {"ranks": 3}), "votes.jsonl:2: not a vote"),
        (json.dumps(GOOD | {"ranks": ["1", "2"]}), "votes.jsonl:2: "),
        (json.dumps(GOOD | {"time": "now"}), "votes.jsonl:2: not a vote"),
        (json.dumps(GOOD | {"item": {"messages": "?", "answers": []}}), "'messages' is no list"),
    ],
)
def test_a_broken_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_votes(file)


def test_a_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "votes.db").write_bytes(b"SQLite format 3\x00" + bytes(100))
    with pytest.raises(UserError, match=r"leyden annotate export .*votes.db votes.jsonl --kind votes"):
        read_votes(tmp_path / "votes.db")
    with pytest.raises(UserError, match="no such file"):
        read_votes(tmp_path / "nothing.jsonl")


# -- the report ------------------------------------------------------------------------------------------------------

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quotes" \''


def hostile() -> tuple[list[Item], list[Vote]]:
    items, votes = plackett_luce(random.Random(0), 30, STRENGTHS)
    one = Item(
        ({"role": "user", "content": HOSTILE},),
        (Answer(HOSTILE, HOSTILE, 1.0), Answer("가" * 900, "dpo", 2.0), Answer("", "ppo", 0.5)),
    )
    votes += [vote(one, HOSTILE, 1, 2, 3, reason=HOSTILE), vote(one, "person 3", 3, 2, 1), vote(one, "p", all_bad=True)]
    return [*items, one], votes


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_report_escapes_what_people_and_models_wrote(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEYDEN_LANG", language)
    file = tmp_path / "new" / "votes.html"
    report(*hostile(), file)
    text, shown = file.read_text(encoding="utf-8"), capsys.readouterr().out
    assert "<script" not in text and "<img" not in text and "http" not in text.replace("http-equiv", "")
    assert text.count("&lt;script&gt;") >= 6 and "default-src 'none'" in text and f'<html lang="{language}">' in text
    words = {"en": ("Krippendorff", "Which model is better"), "ko": ("크리펜도르프", "어느 모델이 나은가")}[language]
    assert words[0] in text and words[1] in text and words[0] in shown
    if language == "ko":
        for part in (" votes of ", "Whether", "the person", "People find", "people, who"):
            assert part not in text and part not in shown, part
    report(*hostile(), file)  # an older report is replaced
    other = tmp_path / "other.html"
    other.write_text("<p>mine</p>", encoding="utf-8")
    monkeypatch.setenv("LEYDEN_LANG", "en")
    for path, said in ((other, "is not a report"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=said):
            report(*hostile(), path)
    assert other.read_text(encoding="utf-8") == "<p>mine</p>"
    with pytest.raises(UserError, match="no votes yet"):
        report(hostile()[0], [], file)


def test_a_report_on_little_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = item(0, "ab")
    for votes in ([vote(one, "p")], [vote(one, "p", 1, 2)], [vote(one, "p", 1, 1), vote(one, "q", 1, 1)]):
        report([one], votes, tmp_path / "votes.html")
        assert "nan" not in (tmp_path / "votes.html").read_text(encoding="utf-8") + capsys.readouterr().out


# -- leyden compare --------------------------------------------------------------------------------------------------


def test_votes_are_columns_of_the_runs_that_people_ranked(leyden: Any, workplace: Path) -> None:
    for name, algorithm in (("sft", "SFT"), ("dpo", "DPO"), ("other", "PPO")):
        make_run(workplace / "runs" / name, algorithm)
    items, votes = plackett_luce(random.Random(0), 60, STRENGTHS)
    items = [replace(one, answers=tuple(replace(a, score=STRENGTHS[a.model]) for a in one.answers)) for one in items]
    write_votes(items, votes, Path("votes.jsonl"))
    code, out, err = leyden("compare", "runs", "--votes", "votes.jsonl", "--csv", "runs.csv")
    assert code == 0, err
    assert "people's wins" in out and "reward as people" in out and out.index("DPO") < out.index("SFT")
    said = " ".join(out.split())
    assert re.search(r"People find \w+ better than [^.]*SFT", said) and "no votes on PPO" in said
    assert "models in the votes that are none of the runs: grpo, ppo" in said
    with Path("runs.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    scores = bradley_terry(items, votes)
    assert float(rows["dpo"]["people/score"]) == scores.scores[scores.models.index("dpo")].value
    assert float(rows["sft"]["people/score_low"]) == scores.scores[scores.models.index("sft")].low
    assert rows["other"]["people/score"] == "" and 0.5 < float(rows["dpo"]["people/agreement"]) < 1
    assert ">people</abbr>" in Path("report.html").read_text(encoding="utf-8")
    code, _, err = leyden("compare", "runs/other", "--votes", "votes.jsonl")
    assert code == 2 and "none of the runs is in it" in err and "dpo, grpo, ppo, sft" in err
    code, _, err = leyden("compare", "runs", "--votes", "nothing.jsonl")
    assert code == 2 and "no such file" in err


def test_models_of_the_votes_are_called_as_in_the_table() -> None:
    def run(name: str, lr: float, seed: int) -> RunFiles:
        model = {"class_path": "leyden.algos.DPO", "init_args": {"lr": lr}}
        return RunFiles(Path("runs") / name, name, config={"model": model, "seed_everything": seed})

    runs = [run("a", 0.1, 1), run("b", 0.1, 2), run("c", 0.2, 1)]
    rows = [group.name for group in grouped(runs)]
    assert len(rows) == 2 and "lr" in rows[0]
    assert list(_shown(runs, ()).values()) == [f"{rows[0]} (a)", f"{rows[0]} (b)", rows[1]]
