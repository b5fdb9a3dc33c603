"""Preference data: responses to one prompt, best first."""

from __future__ import annotations

from typing import Any

from leyden.batch.forest import Tree
from leyden.data.step_plan import StepPlan
from leyden.datamodules.file_data import StoredRows
from leyden.datamodules.formats.ranking import compared
from leyden.datamodules.storage.truncation import distinct_responses
from leyden.errors import UserError
from leyden.example import Example


class PreferenceData(StoredRows):
    """Rows of any preference format: two or more responses to each prompt, the better before the worse.

    Of responses that tie, or repeat each other, only the first is compared with the others. Rows with the same prompt
    are held out together. The scores of a row become the batch's `score`; margins are their differences.

    Args:
        min_gap: least difference of the scores of two responses. From the best down, a response closer than this to the
            last one kept is left out, so that no pair is closer. It applies to pairs with scores or a margin.
        max_responses: most responses of a row that are compared: 2 keeps the best and the worst, more keeps some
            evenly between them.
    """

    kind = "preference"

    def __init__(self, *args: Any, min_gap: float = 0.0, max_responses: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not min_gap >= 0:
            raise UserError(f"--data.min_gap {min_gap}: a gap between scores is 0 or more")
        if max_responses is not None and max_responses < 2:
            raise UserError(f"--data.max_responses {max_responses}: a comparison takes two; give 2 or more")
        self.min_gap, self.max_responses = min_gap, max_responses

    def encode(self, example: Example) -> list[Tree]:
        chosen = compared(example, self.min_gap, self.max_responses)
        tree = self.template.encode(chosen)
        tree.scores = chosen.scores
        return [distinct_responses(tree)]

    def places(self, rows: list[tuple[int, int]]) -> list[Any]:
        prompts = [store.prompts() for store in self._stores]
        return [prompts[store][row] for store, row in rows]

    def train_plan(self) -> StepPlan:
        """The optimizer steps of one epoch. Raises `UserError` where a row with all its responses does not fit."""
        if self._planned is None and self.train_trees is not None:
            lengths = self.train_trees.lengths
            row = max(self.train_rows(), key=lambda index: lengths[index], default=None)
            if row is not None and lengths[row] > self.max_tokens:
                tree = self.train_trees[row]
                fewer = "--data.max_responses 2" if len(tree.responses) > 2 else "a lower --data.max_length"
                raise UserError(
                    f"{self.source(tree.row)}: a prompt of {len(tree.prompt)} tokens with its {len(tree.responses)} "
                    f"responses has {lengths[row]} tokens but a micro-batch holds {self.max_tokens}; set "
                    f"--data.max_tokens {lengths[row]} or more, or {fewer}"
                )
        return super().train_plan()
