"""Algorithms that give every response a reward: how rewards are measured, and what `leyden predict` makes of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from leyden.algorithm.algorithm import GREEDY, Algorithm
from leyden.algorithm.calibration import agreement, length_sums, pair_sums
from leyden.batch.forest import Batch, pack
from leyden.batch.pairs import pairs
from leyden.batch.tree import packs
from leyden.errors import UserError
from leyden.example import Example, Message
from leyden.losses import bradley_terry


class Scored(Algorithm):
    """A policy with a scalar head, read at each response's last token. Dropout is off: a reward has no noise.

    A subclass writes `loss` on `rewards(batch)`. Validation sees preferences, best response first.
    """

    wants: ClassVar[tuple[str, ...]] = ("score",)
    dropout: ClassVar[bool] = False
    predicts: ClassVar[str] = "scores"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sampling != GREEDY.seeded():
            raise UserError(f"--model.sampling: {type(self).__name__} scores answers and samples none; leave it out")

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch, as for every algorithm, from `rewards(batch)`."""

    def rewards(self, batch: Batch) -> Tensor:
        """The reward of each response: [N] fp32."""
        found = self.policy(batch, {"score"}).score
        assert isinstance(found, Tensor)
        return found

    # -- validation --------------------------------------------------------------------------------------------------

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        """The plain log loss of pairs, whatever is trained on, so that runs compare; and what `agreement` needs."""
        r, found = self.rewards(batch), pairs(batch)
        better, worse = r[found.better], r[found.worse]
        length = batch.branch[batch.branch >= 0].bincount(minlength=len(r))
        sums = pair_sums(better, worse, found.share / (batch.totals.prompts or 1)) | length_sums(r, length)
        return {"loss": found.mean(batch, bradley_terry(better - worse))} | sums

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"]} | agreement(sums) if sums else {}

    # -- prediction --------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Sequence[tuple[Example, Any]], index: int) -> list[dict[str, Any]]:
        """The rewards of the responses that rows have, which keep their order, as rows for a JSONL file.

        Args:
            batch: rows and their trees.
            index: of the batch.

        Returns:
            `{"prompt", "responses", "scores", "row"}`, which is preference data itself, or `{"prompt", "response",
            "score", "row"}` where a row has one response.
        """
        scores: list[float] = []
        for trees in packs([tree for _, tree in batch], getattr(self.data, "max_tokens", 16384)):
            scores += self.rewards(pack(trees).to(self.device)).tolist()
        rest = iter(scores)
        return [_row(example, [round(next(rest), 6) for _ in tree.responses]) for example, tree in batch]

    def _needs_head(self) -> None:
        """Rewards of a head that was never trained mean nothing."""
        if "score" in self.policy.fresh and not self.progress["samples"] and self.trainer.state.fn != "fit":
            raise UserError(
                f"{self.policy.path}: it has no reward head, so its scores would be random; give --model.policy.path "
                "the folder that `leyden fit` exported, or --ckpt_path FILE a checkpoint of the reward model"
            )

    on_validation_start = on_test_start = on_predict_start = _needs_head


def _row(example: Example, scores: list[float]) -> dict[str, Any]:
    said = [_text(turns) for turns in example.responses]
    answers = {"responses": said, "scores": scores} if len(said) > 1 else {"response": said[0], "score": scores[0]}
    return {"prompt": example.messages, **answers, "row": dict(example.row)}


def _text(turns: list[Message]) -> str | list[Message]:
    """One answer as its text; a conversation that goes on as its turns."""
    return turns[0]["content"] if len(turns) == 1 else turns
