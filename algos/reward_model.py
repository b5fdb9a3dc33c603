"""Reward models from preferences."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from leyden.algorithm import WithScalarHead
from leyden.batch import Batch, Pairs, pairwise_wins, preference_pairs, rank_table
from leyden.errors import UserError
from leyden.losses import bradley_terry, plackett_luce


class RewardModel(WithScalarHead):
    """A scalar reward r of each response, higher for better ones.

    The better of two wins with probability σ(r_better - r_worse), σ the logistic function. K ranked responses are K (K
    - 1) / 2 pairs, averaged before prompts are (Ouyang et al. 2022, eq. 1), or one order of K with a probability of its
    own (Plackett-Luce).

    Args:
        ranking: how more than two responses are compared.
        margin: by how much two rewards should differ for each unit that their labelled scores do (Touvron et al.
            2023, eq. 2, with the scores of the data).
        centre: weight of (r_better + r_worse)^2, which keeps rewards near 0: the same number added to all of them
            leaves the rest of the loss as it is (Eisenstein et al. 2023, section 2).
    """

    def __init__(
        self,
        *args: Any,
        ranking: Literal["pairs", "plackett_luce"] = "pairs",
        margin: float = 0.0,
        centre: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if margin and ranking == "plackett_luce":
            raise UserError("--model.margin is between two responses; leave it out, or set --model.ranking pairs")
        if margin < 0 or centre < 0:
            raise UserError(f"--model.margin {margin} --model.centre {centre}: give 0 or more")
        self.ranking, self.margin, self.centre = ranking, margin, centre

    def loss(self, batch: Batch) -> Tensor:
        reward, pairs = self.rewards(batch), preference_pairs(batch)
        better, worse = reward[pairs.better], reward[pairs.worse]
        if self.ranking == "plackett_luce":
            loss = batch.prompt_mean(plackett_luce(*rank_table(batch, reward)))
        else:
            margin = self.margin * self.score_gaps(batch, pairs) if self.margin else None
            loss = pairs.mean(batch, bradley_terry(better - worse, margin))
        self.note("accuracy", pairs.mean(batch, pairwise_wins(better, worse)))
        self.note("margin", pairs.mean(batch, better - worse))
        return loss + self.centre * pairs.mean(batch, (better + worse) ** 2)

    def score_gaps(self, batch: Batch, pairs: Pairs) -> Tensor:
        """[M] labelled score of the better response minus that of the worse one."""
        gaps = batch.score[pairs.better] - batch.score[pairs.worse]
        for pair in (gaps <= 0).nonzero()[:1, 0]:
            row = int(batch.row[batch.group[pairs.better[pair]]])
            name = self.data.source(row) if self.data is not None else f"row {row}"
            raise UserError(f"{name}: --model.margin needs rows with scores, higher for better responses; leave it out")
        return gaps
