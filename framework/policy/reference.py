"""References beside the policy's own: another model, and log-probs of all rows worked out before training."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leyden.batch.forest import Batch
from leyden.distributed import all_gather
from leyden.errors import UserError
from leyden.policy.policy import Policy, Reference, eval_mode, predictions_of
from leyden.policy.predictions import Predictions

log = logging.getLogger("leyden")


class OtherPolicy(Reference):
    """Another model as the reference.

    Args:
        policy: the other model; it is built here and never trained.
        learner: the policy that is trained.
        name: what it is, for messages.
        flag: where it is given.

    Raises:
        UserError: the other model has another tokenizer, so its log-probs would be of other text.
    """

    kind = "other"

    def __init__(
        self, policy: Policy, learner: Policy, name: str = "the reference", flag: str = "--model.reference_policy"
    ) -> None:
        super().__init__()
        if policy.tokenizer.get_vocab() != learner.tokenizer.get_vocab():
            raise UserError(
                f"{name} {policy.path} has another tokenizer than {learner.path}, so the same tokens are other "
                f"text to it; give {flag}.path a model of the same family"
            )
        policy.build(dropout=False)
        self.policy = policy.requires_grad_(False)

    def train(self, mode: bool = True) -> OtherPolicy:
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        return self.policy(batch, {"logp"}, temperature).logp  # type: ignore[no-any-return]

    @torch.no_grad()
    def predictions(self, batch: Batch, temperature: float = 1.0) -> Predictions:
        return predictions_of(self.policy, self.policy(batch, {"predictions"}, temperature))

    def fingerprint(self) -> str:
        return self.policy.fingerprint()[:8]


class CurrentPolicy(Reference):
    """The policy as it is at the moment: only of use before training."""

    kind = "itself"

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = (policy,)  # not registered: its weights are not the reference's

    @torch.no_grad()
    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        with eval_mode(self._policy[0]) as policy:
            return policy(batch, {"logp"}, temperature).logp  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        return "changing"


class Precomputed(Reference):
    """Log-probs worked out once, kept in memory: no second model, and no second forward in later epochs.

    Args:
        rows: stable id of a row -> log-probs of the tokens of all its responses, fp32.
    """

    kind = "precomputed"

    def __init__(self, rows: dict[int, Tensor]) -> None:
        super().__init__()
        self.rows = rows

    @classmethod
    def of(cls, reference: Reference, loaders: Iterable[Iterable[Batch]], device: torch.device) -> Precomputed:
        """What a reference says of every row of the loaders; each rank runs its share and all learn of all."""
        rows: dict[int, Tensor] = {}
        said = time.monotonic()
        for batch in (batch for loader in loaders for batch in loader):
            if time.monotonic() - said > 10:
                log.info("reference: %s rows so far", f"{len(rows):,}")
                said = time.monotonic()
            logp = reference(batch.to(device)).cpu()
            spans = [span for span in batch.structure() if span.responses]
            rows |= {row: logp[s.cut : s.stop].clone() for row, s in zip(batch.row.tolist(), spans, strict=True)}
        return cls({row: logp for share in all_gather(rows) for row, logp in share.items()})

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        if temperature != 1.0:
            raise ValueError("log-probs were worked out at temperature 1")
        out = torch.zeros(len(batch))
        spans = [span for span in batch.structure() if span.responses]
        for row, span in zip(batch.row.tolist(), spans, strict=True):
            if row not in self.rows or len(self.rows[row]) != span.stop - span.cut:
                raise UserError("reference precomputed: the rows are not those it was worked out for; start a new run")
            out[span.cut : span.stop] = self.rows[row]
        return out.to(batch.tokens.device)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for row, logp in sorted(self.rows.items()):
            digest.update(str(row).encode() + logp.numpy().tobytes())
        return digest.hexdigest()[:8]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The log-probs as three tensors: ids of rows, lengths, and all log-probs one after the other."""
        ids = sorted(self.rows)
        return {
            "row": torch.tensor(ids, dtype=torch.long),
            "length": torch.tensor([len(self.rows[i]) for i in ids], dtype=torch.long),
            "logp": torch.cat([self.rows[i] for i in ids]) if ids else torch.zeros(0),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Precomputed:
        """The inverse of `state_dict`."""
        parts = torch.split(state["logp"], state["length"].tolist())
        return cls(dict(zip(state["row"].tolist(), (part.clone() for part in parts), strict=True)))
