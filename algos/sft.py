"""Supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leyden.algorithm import Algorithm
from leyden.batch import Batch
from leyden.losses import negative_log_likelihood, perplexity


class SFT(Algorithm):
    """Maximise the likelihood of the responses: the mean cross-entropy over all trained tokens of a step.

    Which tokens are trained is in the data: assistant turns of every conversation, or all tokens with
    `--data.train_on all` and for rows of plain text.

    Args:
        label_smoothing: share of the target spread evenly over the vocabulary.
    """

    def __init__(self, *args: Any, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing

    def loss(self, batch: Batch) -> Tensor:
        out = self.policy(batch, {"logp", "mean_logp"} if self.label_smoothing else {"logp"})
        return batch.token_mean(negative_log_likelihood(out.logp, out.mean_logp, self.label_smoothing))

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy without smoothing, and the characters that the trained tokens spell."""
        loss = batch.token_mean(-self.policy(batch).logp)
        tokens = batch.tokens[batch.weight > 0].tolist()
        text = str(self.policy.tokenizer.decode(tokens, skip_special_tokens=True))
        share = torch.tensor(float(len(text)), device=loss.device)
        return {"loss": loss, "characters": share, "tokens": batch.weight.sum()}

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        bits = sums["loss"] * sums["tokens"] / math.log(2) / max(sums["characters"], 1.0) if sums else 0.0
        loss = sums.get("loss", math.nan)
        return {"loss": loss, "perplexity": perplexity(loss), "bits_per_character": bits}
