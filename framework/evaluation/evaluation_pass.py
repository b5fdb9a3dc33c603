"""One look at a policy: its answers to prompts, their scores, how they compare with a reference, and what it forgot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from leyden.batch.forest import Batch, pack
from leyden.batch.tree import Tree, packs
from leyden.on_policy.engine import Engine, Native
from leyden.on_policy.rollout_file import row_of, samples_of
from leyden.on_policy.rollout_loader import Prompt
from leyden.policy.policy import Policy, Reference, Sampling
from leyden.rewards.reward import score
from leyden.run.progress import Progress

Row = dict[str, Any]
"""See `leyden.evaluation.metrics.Row`."""


def answered(
    trainer: Trainer,
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    reward: Callable[..., Any],
    engine: Engine | None = None,
) -> list[Row]:
    """One scored answer to each prompt, with noise that depends on the number of the prompt alone."""
    engine = engine or Native()
    engine.sync(policy)
    tokens, keys = [prompt.tokens for prompt in prompts], [prompt.row for prompt in prompts]
    groups = engine.generate(tokens, 1, sampling, keys, _counter(trainer, len(prompts)))
    rows = [row_of(prompt, group, {}) for prompt, group in zip(prompts, groups, strict=True)]
    samples = [s for prompt, row in zip(prompts, rows, strict=True) for s in samples_of(prompt, row)]
    return [
        {
            "row": prompt.row,
            "prompt": row["prompt"],
            "response": row["responses"][0],
            "tokens": row["tokens"][0],
            "finished": row["finished"][0],
            "reward": value,
        }
        for prompt, row, value in zip(prompts, rows, score(reward, samples).tolist(), strict=True)
    ]


def compare(
    module: Any, prompts: Sequence[Prompt], rows: list[Row], reference: Reference | None, temperature: float
) -> None:
    """Add to each answer its `entropy` and, where there is a reference, its `kl`: log policy / reference."""

    def seen(batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(module.device)
        out = module.policy(batch, {"logp", "entropy"}, temperature)
        ratio = 0 * out.logp if reference is None else out.logp - reference(batch, temperature)
        return batch.per_branch(ratio), batch.per_branch(out.entropy)

    trees = [Tree(p.tokens, [row["tokens"]], row=p.row) for p, row in zip(prompts, rows, strict=True)]
    parts = [part for few in packs(trees, module.budget) for part in module.pieces.run(seen, pack(few))]
    kl = [value for part, _ in parts for value in part.tolist()]
    entropy = [value for _, part in parts for value in part.tolist()]
    for row, nats, spread in zip(rows, kl, entropy, strict=True):
        row |= {"entropy": spread} | ({} if reference is None else {"kl": nats})


def text_loss(module: Any, trees: Sequence[Tree]) -> tuple[float, float]:
    """Summed loss of text in nats, and how many tokens it has."""

    def loss(batch: Batch) -> float:
        batch = batch.to(module.device)
        return -float((module.policy(batch, {"logp"}).logp * batch.weight).sum())

    parts = [part for few in packs(trees, module.budget) for part in module.pieces.run(loss, pack(few))]
    return sum(parts), sum(tree.totals().tokens for tree in trees)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside, and every part in the mode that it was in afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _counter(trainer: Trainer, total: int) -> Callable[[int], None]:
    """Tells how many of this process's prompts are answered, where progress is shown."""
    shown, done = trainer.progress_bar_callback, [0]

    def add(count: int) -> None:
        done[0] += count
        if isinstance(shown, Progress) and trainer.is_global_zero:
            shown.say(f"evaluation · {done[0]:,}/{total:,} answers")

    return add
