"""How far people agree: Krippendorff's alpha over all, and shares and kappa for two of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from leyden.votes.ballots import Ballots, gather
from leyden.votes.bootstrap import DRAWS, Array, Estimate, Sums, estimate, resampled, sums
from leyden.votes.vote import Item, Vote


@dataclass(frozen=True)
class Two:
    """Two people who ranked the same answers.

    Args:
        people: their names.
        items: how many both ranked.
        pairs: pairs of answers that both ordered, or called a tie.
        share: of those pairs, how many both said the same of.
        kappa: the share beyond chance, see `kappa`; NaN where chance alone would agree.
    """

    people: tuple[str, str]
    items: int
    pairs: int
    share: float
    kappa: float


@dataclass(frozen=True)
class Divided:
    """An item that two people or more ranked, and the share of what they said of its pairs that was the same."""

    item: Item
    people: int
    share: float


@dataclass(frozen=True)
class Agreement:
    """How far people agree. Numbers are NaN where no two people ranked the same item.

    Args:
        ordinal: Krippendorff's alpha of ranks: a near miss counts less than a far one.
        nominal: the same of pairs of answers: better, worse or a tie.
        share: of all pairs of answers and of people, how often both said the same.
        two: every two people who ranked an item both, those who agree least first.
        items: those that two or more ranked, the most divided first.
    """

    ordinal: Estimate
    nominal: Estimate
    share: Estimate
    two: list[Two] = field(default_factory=list)
    items: list[Divided] = field(default_factory=list)


def agreement(items: Sequence[Item], votes: Sequence[Vote], draws: int = DRAWS) -> Agreement:
    """Agreement of people over their current votes, with intervals over items."""
    ballots = gather(items, votes)
    ranks, pairs, same = _rank_sums(ballots), _pair_sums(ballots), _same_sums(ballots)
    drawn = [
        (_ordinal([one.total(weights) for one in ranks]), _nominal(pairs.total(weights)), _share(same.total(weights)))
        for weights in resampled(len(ballots.items), draws if ballots.items else 0)
    ]
    values = (_ordinal([one.total() for one in ranks]), _nominal(pairs.total()), _share(same.total()))
    ordinal, nominal, share = (estimate(value, [row[at] for row in drawn]) for at, value in enumerate(values))
    return Agreement(ordinal, nominal, share, _two(ballots), _divided(ballots))


# -- Krippendorff's alpha --------------------------------------------------------------------------------------------


def mid_ranks(ranks: Sequence[int]) -> list[float]:
    """Ranks from 1 in which answers that tie share the mean of their places, however ties were numbered."""
    before, equal = Counter[int](), Counter(ranks)
    for rank in equal:
        before[rank] = sum(count for other, count in equal.items() if other < rank)
    return [before[rank] + (equal[rank] + 1) / 2 for rank in ranks]


def coincidences(values: Sequence[int], size: int) -> list[tuple[int, float]]:
    """What one unit adds to the table of coincidences: (cell of a `size` by `size` table, amount).

    Each ordered pair of values of two people adds 1 / (m - 1), for m people who gave a value; one alone adds nothing.
    """
    counts, m = Counter(values), len(values)
    if m < 2:
        return []
    return [
        (c * size + k, counts[c] * (counts[k] - (c == k)) / (m - 1))
        for c in counts
        for k in counts
        if counts[k] - (c == k)
    ]


def ordinal_distances(n: Array) -> Array:
    """Squared distances of ordered values, of which each was given n times.

    δ²(c, k) = (n_c + … + n_k - (n_c + n_k) / 2)², Krippendorff 2004, section 11.3.5, here divided by the greatest: so
    that items with few answers and with many can be added up.
    """
    middle = np.cumsum(n) - n / 2
    squared: Array = (middle[:, None] - middle[None, :]) ** 2
    most = squared.max(initial=0.0)
    return squared / most if most > 0 else squared


def alpha(tables: Sequence[Array], distances: Sequence[Array]) -> float:
    """Krippendorff's alpha, 1 - D_o / D_e, over tables of coincidences.

    With o the table, n_c = Σ_k o_ck and n = Σ_c n_c: D_o = Σ o_ck δ²_ck and D_e = Σ n_c n_k δ²_ck / (n - 1). Of several
    tables, whose values do not compare, both are added up.
    """
    observed = expected = 0.0
    for o, squared in zip(tables, distances, strict=True):
        n = o.sum(1)
        observed += float((o * squared).sum())
        expected += float(n @ squared @ n) / float(n.sum() - 1) if n.sum() > 1 else 0.0
    return 1 - observed / expected if expected > 0 else float("nan")


def _ordinal(tables: Sequence[Array]) -> float:
    return alpha(tables, [ordinal_distances(table.sum(1)) for table in tables])


def _nominal(table: Array) -> float:
    return alpha([table], [1.0 - np.eye(len(table))])


def _rank_sums(ballots: Ballots) -> list[Sums]:
    """Coincidences of mid-ranks, a unit an answer: a table for each number of answers, since a second place of two is
    another value than a second place of eight."""
    said: defaultdict[int, list[list[float]]] = defaultdict(list)
    for number, vote in ballots.ranked:
        said[number].append(mid_ranks(vote.ranks))
    rows: defaultdict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for number, rankings in said.items():
        answers = len(rankings[0])
        size = 2 * answers - 1  # mid-ranks are 1, 1.5, 2 … answers
        for column in zip(*rankings, strict=True):
            values = [int(2 * rank) - 2 for rank in column]
            rows[answers] += [(number, cell, amount) for cell, amount in coincidences(values, size)]
    return [sums(rows[answers], (2 * answers - 1,) * 2) for answers in sorted(rows)]


def _pair_sums(ballots: Ballots) -> Sums:
    """Coincidences of better, tie and worse, a unit a pair of answers. Each pair counts both ways round, so that the
    order in which answers happen to stand changes nothing."""
    rows = []
    for number, unit in _units(ballots):
        for way in (1, -1):
            rows += [(number, cell, amount) for cell, amount in coincidences([1 + way * one for one in unit], 3)]
    return sums(rows, (3, 3))


def _units(ballots: Ballots) -> list[tuple[int, list[int]]]:
    """(item, what each person said of one of its pairs of answers): -1, 0 or 1."""
    said: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
    for number, vote in ballots.ranked:
        for (i, j), way in _ways(vote).items():
            said[number, i, j].append(way)
    return [(number, ways) for (number, _, _), ways in said.items()]


def _ways(vote: Vote) -> dict[tuple[int, int], int]:
    """(i, j) with i < j -> 1 where i is better, -1 where it is worse, 0 where they tie."""
    places = range(len(vote.ranks))
    return {
        (i, j): int(vote.ranks[j] > vote.ranks[i]) - int(vote.ranks[j] < vote.ranks[i])
        for i, j in combinations(places, 2)
    }


# -- shares ----------------------------------------------------------------------------------------------------------


def kappa(same: int, pairs: int, ties: tuple[int, int]) -> float:
    """Cohen's kappa of two people over pairs of answers, each pair both ways round.

    Chance agrees with probability p_e = t u + (1 - t)(1 - u) / 2, where t and u are the shares of pairs that the two
    call a tie: either is as likely the better one, since no answer comes first. κ = (p_o - p_e) / (1 - p_e).
    """
    t, u = (count / pairs for count in ties)
    chance = t * u + (1 - t) * (1 - u) / 2
    return (same / pairs - chance) / (1 - chance) if chance < 1 else float("nan")


def _share(table: Array) -> float:
    return float(table[0] / table[1]) if table[1] > 0 else float("nan")


def _same_sums(ballots: Ballots) -> Sums:
    """Pairs of people who said the same of a pair of answers, and all of them."""
    rows = []
    for number, unit in _units(ballots):
        same, every = _same(unit)
        rows += [(number, 0, float(same)), (number, 1, float(every))]
    return sums(rows, (2,))


def _same(unit: Sequence[int]) -> tuple[int, int]:
    """How many pairs of people said the same, and how many pairs there are."""
    counts = Counter(unit)
    return sum(count * (count - 1) // 2 for count in counts.values()), len(unit) * (len(unit) - 1) // 2


def _two(ballots: Ballots) -> list[Two]:
    by_item: defaultdict[int, dict[str, dict[tuple[int, int], int]]] = defaultdict(dict)
    for number, vote in ballots.ranked:
        by_item[number][vote.person] = _ways(vote)
    found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for ways in by_item.values():
        for one, other in combinations(sorted(ways), 2):
            counts, mine, theirs = found[one, other], ways[one], ways[other]
            counts["items"] += 1
            counts["pairs"] += len(mine)
            counts["same"] += sum(way == theirs[pair] for pair, way in mine.items())
            counts["ties"] += sum(way == 0 for way in mine.values())
            counts["other ties"] += sum(way == 0 for way in theirs.values())
    rows = [
        Two(people, n["items"], n["pairs"], n["same"] / n["pairs"],
            kappa(n["same"], n["pairs"], (n["ties"], n["other ties"])))
        for people, n in found.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row.share, row.people))


def _divided(ballots: Ballots) -> list[Divided]:
    found: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, unit in _units(ballots):
        found[number].append(_same(unit))
    people = Counter(number for number, _ in ballots.ranked)
    rows = [
        Divided(ballots.items[number], people[number], sum(same for same, _ in said) / sum(every for _, every in said))
        for number, said in found.items()
        if people[number] > 1
    ]
    return sorted(rows, key=lambda row: (row.share, -row.people))
