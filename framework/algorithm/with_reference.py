"""Algorithms with a reference: the fixed model that the policy is compared with, and the check that both agree."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor

from leyden.algorithm.algorithm import Algorithm
from leyden.batch.forest import Batch
from leyden.errors import UserError
from leyden.policy.policy import Policy, Reference
from leyden.policy.reference import CurrentPolicy, OtherPolicy, Precomputed

log = logging.getLogger("leyden")

TOLERANCE = {"precomputed": 2e-2}
"""Mean difference in nats a token that a reference may have at the start. Precomputed log-probs of held-out rows may
come from other batches, whose sums are rounded differently in half precision; all else is the very same computation."""


class WithReference(Algorithm):
    """A policy and a reference: the policy as it is when training starts, unless another model is given.

    Dropout is off in both, or noise would look like a difference. Before the first step both must agree, else training
    stops with the reason.

    Args:
        reference: `adapter_off`, `snapshot` (of the adapter), `copy` (of all that is trained), `precomputed` (log-probs
            of all rows are worked out before training and kept), or `auto`: the cheapest that is exact.
        reference_policy: another model to compare with, with the same tokenizer.
    """

    dropout: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        reference: Literal["auto", "adapter_off", "snapshot", "copy", "precomputed"] = "auto",
        reference_policy: Policy | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if reference_policy is not None and reference not in ("auto", "precomputed"):
            raise UserError(
                f"--model.reference {reference} is a form of the policy itself and --model.reference_policy another "
                "model; give one of the two"
            )
        self.reference_kind = reference
        self._other = (reference_policy,)  # not registered: it is no part of what is trained
        self.reference: Reference | None = None
        self._agreed = False

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch, as for every algorithm, from `log_ratio(batch, logp)`."""

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with the reference. Where it does not, none is loaded, and options of one are
        refused."""
        return True

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.uses_reference or (self.reference_kind == "auto" and self._other[0] is None):
            return
        flag = "reference_policy" if self._other[0] is not None else f"reference {self.reference_kind}"
        raise UserError(f"--model.{flag}: ignored, since what is trained compares with no reference; leave it out")

    def configure_model(self) -> None:
        super().configure_model()
        if self.reference is not None or self.trainer.predicting or not self.uses_reference:
            return
        other, kind = self._other[0], self.reference_kind
        if other is not None:
            self.reference = OtherPolicy(other, self.policy)
            self.shard_policy(other)
        elif kind == "precomputed" and self.device_mesh is not None:
            raise UserError("--model.reference precomputed: not under FSDP2; leave it out")
        elif kind == "precomputed" and self.trainer.state.fn == "fit":
            self.reference = CurrentPolicy(self.policy)
        else:  # validate and test have no pass before them to work log-probs out in
            self.reference = self.frozen_reference("auto" if kind == "precomputed" else kind)

    @property
    def has_reference(self) -> bool:
        return self.uses_reference and self.reference_kind != "precomputed"

    @property
    def has_reference_policy(self) -> bool:
        return self._other[0] is not None

    def rehearse(self, batch: Batch) -> list[Tensor]:
        if self.reference is not None and not isinstance(self.reference, Precomputed):
            self.reference(batch)
        return super().rehearse(batch)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.uses_reference:
            return
        assert self.reference is not None
        if self.reference_kind == "precomputed" and not isinstance(self.reference, Precomputed):
            if not hasattr(self.data, "all_rows"):
                raise UserError(
                    "--model.reference precomputed: it needs a DataModule with all_rows, to see them before training; "
                    "set --model.reference auto"
                )
            log.info("working out the reference's log-probs of all rows")
            with self.trainer.precision_plugin.forward_context():
                self.reference = Precomputed.of(self.reference, self.data.all_rows(), self.device)
        # a resumed policy differs from its reference already, so only a new run is checked
        self._agreed = self.trainer.ckpt_path is not None or self._other[0] is not None
        log.info("reference: %s %s", self.reference.kind, self.reference.fingerprint())

    def log_ratio(self, batch: Batch, logp: Tensor, temperature: float = 1.0) -> Tensor:
        """log pi / ref of each response token: [T] nats. `logp` [T] is the policy's, at the same temperature."""
        assert self.reference is not None
        ratio: Tensor = logp - self.reference(batch, temperature)
        if not self._agreed and self.trainer.state.fn == "fit":
            self._agreed = self._check(batch, ratio.detach())
        return ratio

    def _check(self, batch: Batch, ratio: Tensor) -> bool:
        """That policy and reference are the same model before the first step; True once there was a token to see."""
        assert self.reference is not None
        counted = (batch.weight > 0) & (batch.branch >= 0) & (batch.parent >= 0)
        if not counted.any():
            return False
        distance, limit = float(ratio[counted].abs().mean()), TOLERANCE.get(self.reference.kind, 1e-3)
        if not distance <= limit:
            kind = self.reference.kind
            raise UserError(
                f"before the first step the policy is {distance:.3g} nats a token from its {kind} reference, "
                "but both should be the same model; an adapter that does not start as zero, or a layer with noise of "
                "its own, does this: set --model.reference copy, or give the adapter its usual start"
            )
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.reference, Precomputed):
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.reference_kind == "precomputed" and self.trainer.state.fn == "fit":
            if "reference" not in checkpoint:
                raise UserError("reference precomputed: the checkpoint has no log-probs; it was trained with another")
            self.reference = Precomputed.from_state_dict(checkpoint["reference"])
