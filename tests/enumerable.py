"""A language model small enough to list everything it can say: 8 words, 4 long, 4,096 sequences; all answers exact."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch, Tree, pack
from leyden.data.datamodule import DataModule
from leyden.data.prompts import Prompt, PromptLoader
from leyden.example import Example, Sample
from leyden.policy.policy import Outputs, Policy, Reference, ReferenceKind, Response, Sampling
from leyden.policy.predictions import KnownPredictions, Predictions

WORDS, LENGTH, START = 8, 4, 0
CONTEXTS = (WORDS**LENGTH - 1) // (WORDS - 1)
"""Everything that can have been said before a word."""


class Vocabulary:
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {str(word): word for word in range(WORDS)}


class Table(Policy):
    """Logits of every context in a table, numbered like a heap: the k-th word after context c gives 8 c + 1 + k."""

    tokenizer: Any = Vocabulary()
    stop: frozenset[int] = frozenset()
    path = "table"

    def __init__(self, seed: int = 0, spread: float = 1.0, stop: int | None = None) -> None:
        super().__init__()
        self.stop = frozenset() if stop is None else frozenset([stop])
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(spread * torch.randn(CONTEXTS, WORDS, generator=generator))
        self.values = nn.Parameter(torch.zeros(CONTEXTS))

    def build(self, wants: Collection[str] = ("logp",), dropout: bool = True) -> None:
        self.values.requires_grad_("value" in wants)

    def context(self, batch: Batch) -> Tensor:
        """[T] the context in which each token is said."""
        after = torch.zeros(len(batch) + 1, dtype=torch.long)
        for depth in range(1, int(batch.position.max()) + 1):
            at = ((batch.position == depth) & (batch.branch >= 0)).nonzero()[:, 0]
            after[at] = WORDS * after[batch.parent[at]] + 1 + batch.tokens[at]
        return after[batch.parent].clamp_max(CONTEXTS - 1)

    def forward(self, batch: Batch, want: Collection[str] = ("logp",), temperature: float = 1.0) -> Outputs:
        context, on = self.context(batch), (batch.branch >= 0) & (batch.weight > 0)
        logp = (self.logits[context] / temperature).log_softmax(-1)
        return Outputs(
            torch.where(on, logp.gather(-1, batch.tokens[:, None])[:, 0], 0.0),
            entropy=torch.where(on, -(logp.exp() * logp).sum(-1), 0.0),
            agreement=torch.where(on, (2 * logp.detach()).logsumexp(-1), 0.0),
            value=torch.where(on, self.values[context], 0.0),
            predictions=KnownPredictions(batch, self.logits[context] / temperature),
        )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        keys: Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        sampling = sampling or Sampling()
        names = [f"{sampling.seed}/{key}/{k}" for key in keys or range(len(prompts)) for k in range(n)]
        noise = torch.tensor([[(r := random.Random(name)).random()] + [r.random() for _ in range(3)] for name in names])
        context, words, logps = torch.zeros(len(names), dtype=torch.long), [], []
        for step in range(LENGTH):
            p = (self.logits[context] / sampling.temperature).double().softmax(-1)
            word = (p.cumsum(-1) < noise[:, step : step + 1]).sum(-1).clamp_max(WORDS - 1)
            logps.append(p.gather(-1, word[:, None])[:, 0].log())
            words.append(word)
            context = WORDS * context + 1 + word
        rows = [self.cut(row) for row in torch.stack(words, 1).tolist()]
        found = [
            Response(row, lp[: len(row)], row[-1] in self.stop, " ".join(map(str, row)))
            for row, lp in zip(rows, torch.stack(logps, 1).tolist(), strict=True)
        ]
        return [found[i * n : (i + 1) * n] for i in range(len(prompts))]

    def cut(self, words: list[int]) -> list[int]:
        """The words up to the first that ends a response."""
        return words[: next((i + 1 for i, word in enumerate(words) if word in self.stop), len(words))]

    def reference(self, kind: ReferenceKind = "auto") -> Reference:
        return TableReference(self)

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError


class TableReference(Reference):
    kind = "copy"

    def __init__(self, policy: Table) -> None:
        super().__init__()
        self.table = Table(stop=min(policy.stop, default=None))
        self.table.load_state_dict(policy.state_dict())
        self.table.requires_grad_(False)

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        return self.table(batch, temperature=temperature).logp  # type: ignore[no-any-return]

    def predictions(self, batch: Batch, temperature: float = 1.0) -> Predictions:
        return self.table(batch, temperature=temperature).predictions  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        return "table"


class Prompts(DataModule):
    """The one prompt there is, `size` times a rollout."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size, 10_000_000, seed)

    def source(self, row: int) -> str:
        return f"prompts:{row}"

    def train_dataloader(self) -> Any:
        prompts = [Prompt(i, Example([{"role": "user", "content": ""}]), [START]) for i in range(self.batch_size)]
        return self._trainer().lightning_module.experience(PromptLoader(prompts, self.batch_size, self.seed))


def everything(policy: Table | None = None) -> Batch:
    """Every sequence there is, in order: branch b says the digits of b to the base of 8. For a policy with a word that
    ends a response fewer: those that go on to the length limit, or to that word."""
    grid = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH).tolist()
    cut = policy.cut if policy is not None else list
    return pack([Tree([START], [list(x) for x in dict.fromkeys(tuple(cut(row)) for row in grid)])])


def number(response: str) -> int:
    """Which of the 4,096 sequences "3 1 4 1" is; of a shorter one that whose other words are 0."""
    return int(response.replace(" ", "").ljust(LENGTH, "0"), WORDS)


def rewards_of(batch: Batch, seed: int = 0) -> Tensor:
    """[N] the reward of each response of a batch."""
    table, tokens = rewards(seed), batch.tokens.tolist()
    said = {n: " ".join(map(str, tokens[i:j])) for span in batch.structure() for n, i, j in span.responses}
    return table[[number(said[n]) for n in range(len(said))]]


def rewards(seed: int = 0) -> Tensor:
    """[4096] a reward of each sequence: words and neighbouring words count."""
    generator = torch.Generator().manual_seed(100 + seed)
    single, pair = torch.randn(LENGTH, WORDS, generator=generator), torch.randn(WORDS, WORDS, generator=generator)
    words = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)
    total = sum(single[i, words[:, i]] for i in range(LENGTH)) + sum(
        pair[words[:, i], words[:, i + 1]] for i in range(3)
    )
    return total / total.std()  # type: ignore[union-attr, operator]


def reward_function(seed: int = 0) -> Callable[[Sequence[Sample]], Tensor]:
    table = rewards(seed)
    return lambda samples: torch.stack([table[number(s.response)] for s in samples])


def log_probs(policy: Policy, batch: Batch) -> Tensor:
    """[4096] log-prob of every sequence."""
    return batch.per_branch(policy(batch).logp).double()


def objective(logp: Tensor, ref: Tensor, reward: Tensor, price: float) -> Tensor:
    """J = E[r] - price KL(policy || reference), exactly: a scalar."""
    p = logp.exp()
    return (p * (reward - price * (logp - ref))).sum()


def optimum(ref: Tensor, reward: Tensor, price: float) -> float:
    """J* = price log sum ref exp(r / price)."""
    return price * float((ref + reward / price).logsumexp(0))
