"""One pass over the held-out questions: answers, their scores, how they compare with a reference, what was forgotten,
and the files that this leaves in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from leyden.atomic import truncate_jsonl, write_whole, writing
from leyden.batch.forest import Batch, pack
from leyden.batch.tree import Tree, chunk_by_tokens
from leyden.data.prompts import Prompt
from leyden.on_policy.rollout import AnsweredPrompt
from leyden.policy.policy import Reference, Sampling

Row = dict[str, Any]
"""See `leyden.evaluation.metrics.Row`."""


def answer_row(answered: AnsweredPrompt) -> Row:
    """The first answer to a prompt as the row that measures are taken from."""
    response, scores = answered.responses[0], answered.scores
    assert scores is not None
    return {
        "row": answered.prompt.row,
        "prompt": answered.prompt.example.messages,
        "response": response.text,
        "tokens": response.tokens,
        "finished": response.finished,
        "reward": scores[0],
    }


def add_divergence(
    module: Any, prompts: Sequence[Prompt], rows: list[Row], reference: Reference | None, sampling: Sampling
) -> None:
    """Add to each answer its `entropy` and, where there is a reference, its `kl`: log policy / reference. Answers of
    which tokens were left out (top-k, top-p, temperature 0) have no `kl`: their mean would be no KL divergence."""
    temperature, compared = sampling.temperature or 1.0, reference is not None and sampling.is_full

    def measure(batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(module.device)
        out = module.policy(batch, {"logp", "entropy"}, temperature)
        ratio = out.logp - reference(batch, temperature) if reference is not None and compared else 0 * out.logp
        return batch.per_branch(ratio), batch.per_branch(out.entropy)

    trees = [Tree(p.tokens, [row["tokens"]], row=p.row) for p, row in zip(prompts, rows, strict=True)]
    chunks = chunk_by_tokens(trees, module.budget)
    parts = module.run_in_step(measure, [pack(few) for few in chunks])
    kl = [value for part, _ in parts for value in part.tolist()]
    entropy = [value for _, part in parts for value in part.tolist()]
    for row, nats, spread in zip(rows, kl, entropy, strict=True):
        row |= {"entropy": spread} | ({"kl": nats} if compared else {})


def sum_text_loss(module: Any, trees: Sequence[Tree]) -> tuple[float, float]:
    """Summed loss of text in nats, and how many tokens it has."""

    def loss(batch: Batch) -> float:
        batch = batch.to(module.device)
        return -float((module.policy(batch, {"logp"}).logp * batch.weight).sum())

    chunks = chunk_by_tokens(trees, module.budget)
    parts = module.run_in_step(loss, [pack(few) for few in chunks])
    return sum(parts), sum(tree.totals().tokens for tree in trees)


class EvaluationFiles:
    """evaluation.json and samples.jsonl in a folder.

    Args:
        folder: of the run; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Start anew, with what the measures depend on: runs that differ in it cannot be compared."""
        self._write("evaluation.json", json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
        self._write("samples.jsonl", "")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the answers of one pass."""
        if self.folder is not None:
            file = self.folder / "samples.jsonl"
            with writing(file), file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def truncate(self, step: int) -> None:
        """Forget what came after a step, to go on from a checkpoint that knows no more."""
        if self.folder is not None:
            truncate_jsonl(self.folder / "samples.jsonl", step)

    def _write(self, name: str, text: str) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with writing(self.folder / name):
                write_whole(self.folder / name, text)
