"""A policy, an algorithm and data small enough to train in milliseconds, as a user would write them in a file."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from leyden.algorithm.algorithm import Algorithm
from leyden.batch.forest import Batch, Totals, Tree
from leyden.data.datamodule import PlannedData
from leyden.errors import UserError
from leyden.example import Example
from leyden.policy.policy import Outputs, Policy, Response, Sampling


class Bigrams(Policy):
    """Predicts a token from the one before, with dropout, so that a resumed run needs the right random numbers."""

    tokenizer: Any = None
    stop: frozenset[int] = frozenset({0})

    def __init__(
        self, path: str = "toy", dtype: Literal["float32", "bfloat16"] = "float32", dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.path, self.dropout = path, dropout
        self.table: torch.nn.Embedding | None = None

    def build(self, wants: Collection[str] = ("logp",), dropout: bool = True) -> None:
        if self.path == "missing":
            raise UserError("missing: no such model folder; check the path")
        if self.table is None:
            self.table = torch.nn.Embedding(16, 16)

    def forward(self, batch: Batch, want: Collection[str] = ("logp",), temperature: float = 1.0) -> Outputs:
        assert self.table is not None
        logits = torch.nn.functional.dropout(
            self.table(batch.tokens[batch.parent.clamp(0)]), self.dropout, self.training
        )
        logp = logits.log_softmax(-1).gather(-1, batch.tokens[:, None]).squeeze(-1)
        return Outputs(logp * (batch.branch >= 0) * (batch.parent >= 0))

    def generate(
        self, prompts: Sequence[list[int]], n: int = 1, sampling: Sampling | None = None, *args: Any, **kwargs: Any
    ) -> list[list[Response]]:
        return [[Response([1, 0], [0.0, 0.0], True, f"답 {sum(prompt)}")] * n for prompt in prompts]

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True)
        torch.save(self.state_dict(), Path(folder) / "table.pt")


class Toy(Algorithm):
    """Plain maximum likelihood.

    Args:
        scale: multiplies the loss.
        sleep: seconds each step takes.
    """

    def __init__(self, *args: Any, scale: float = 1.0, fail_at: int = -1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale, self.fail_at = scale, fail_at

    def loss(self, batch: Batch) -> torch.Tensor:
        if self.training and self.global_step == self.fail_at:
            raise UserError("toy.csv:7: a broken row; mend it")
        return self.scale * batch.token_mean(-self.policy(batch).logp)


class Rows(list[Tree]):
    @property
    def lengths(self) -> list[int]:
        return [len(tree) for tree in self]

    @property
    def totals(self) -> list[Totals]:
        return [tree.totals() for tree in self]


class ToyData(PlannedData):
    """Rows `{"prompt": [ids], "response": [ids]}`.

    Args:
        path: a JSONL file.
        tokenizer: follows the policy.
    """

    def __init__(self, path: str, tokenizer: str = "toy", batch_size: int = 4, seed: int = 0) -> None:
        super().__init__(batch_size, 1000, seed)
        self.path, self.tokenizer = path, tokenizer

    def setup(self, stage: str) -> None:
        if not Path(self.path).is_file():
            raise UserError(f"{self.path}: no such file; check --data.path")
        rows = [json.loads(line) for line in Path(self.path).read_text(encoding="utf-8").splitlines()]
        trees = Rows(Tree(r["prompt"], [r["response"]], row=i) for i, r in enumerate(rows))
        self.train_trees, self.val_trees = Rows(trees[2:]), Rows(trees[:2])

    def source(self, row: int) -> str:
        return f"{self.path}:{row + 1}"

    def predict_dataloader(self) -> Any:
        assert self.train_trees is not None
        rows = [(Example([{"role": "user", "content": str(tree.prompt)}]), tree.prompt) for tree in self.train_trees]
        return torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=list)
