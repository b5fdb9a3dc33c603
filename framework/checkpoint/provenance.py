"""The provenance of a run: what it is made from, kept in its checkpoints, so that none is resumed with others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from leyden import __version__
from leyden.checkpoint.find import ENTRY, FORMAT, check_format
from leyden.errors import UserError
from leyden.fingerprint import fingerprint_text, fingerprint_vocabulary
from leyden.policy.policy import Policy

_FLAGS = {
    "policy": "--model.policy.path",
    "reference.policy": "--model.reference_policy.path",
    "teacher.policy": "--model.teacher.path",
}


def made_from(algorithm: str, policies: Mapping[str, Policy], tokenizer: Any, data: str) -> dict[str, Any]:
    """What a run is made from, as plain values.

    Args:
        algorithm: name of its class.
        policies: the policy and whatever other models stand beside it, by name.
        tokenizer: of the policy.
        data: fingerprint of the rows.
    """
    template = getattr(tokenizer, "chat_template", None)
    return {
        "version": __version__,
        "algorithm": algorithm,
        "base": {name: policy.fingerprint() for name, policy in policies.items()},
        "paths": {name: policy.path for name, policy in policies.items()},
        "tokenizer": fingerprint_vocabulary(tokenizer),
        "template": fingerprint_text(template if template is None or isinstance(template, str) else repr(template)),
        "data": data,
    }


class Provenance:
    """Writes the entry of a checkpoint and holds it against the run that is to go on from there."""

    def __init__(self) -> None:
        self._saved = 0.0

    def entry(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint that is saved now says of itself: the facts of `made_from`, format and time."""
        self._saved = max(time.time(), self._saved + 1e-3)  # later than the one before, whatever the clock says
        return {**facts, "format": FORMAT, "saved": self._saved}

    def check(
        self,
        checkpoint: Mapping[str, Any],
        facts: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None,
        training: bool,
    ) -> None:
        """Before anything is restored.

        Args:
            checkpoint: as it was read.
            facts: of this run, from `made_from`.
            weights: that this run trains, by name; None where the strategy has restored them already.
            training: whether training goes on from here, and not only a measurement.

        Raises:
            UserError: the checkpoint was made from something else; it names that, and what to type.
        """
        check_format("the checkpoint", checkpoint)
        entry = checkpoint[ENTRY]
        self._saved = float(entry["saved"])
        if training and entry["algorithm"] != facts["algorithm"]:
            raise UserError(
                f"the checkpoint is of {entry['algorithm']} and this run is {facts['algorithm']}; go on with "
                f"--model {entry['algorithm']}, or start a new run from its export: --model.policy.path RUN/export"
            )
        if training and weights is not None and "optimizer_states" not in checkpoint:
            raise UserError(
                "the checkpoint holds weights alone (--checkpoint.save_weights_only), so training cannot go on from "
                "it; take another, or start a new run from the export: --model.policy.path RUN/export"
            )
        for name, base in facts["base"].items():
            if entry["base"].get(name, base) != base:
                raise UserError(_other_base(name, facts["paths"][name], entry["paths"][name]))
        if entry["tokenizer"] != facts["tokenizer"]:
            raise UserError(
                f"the checkpoint was trained with another tokenizer than that of {facts['paths']['policy']}; put the "
                "one back that it was trained with, or start a new run"
            )
        if training and entry["template"] != facts["template"]:
            raise UserError(
                "the checkpoint was trained with another chat template; set --data.chat_template and "
                "--data.chat_template_args to what it was trained with, or start a new run"
            )
        if weights is not None:
            _check_shapes(checkpoint["state_dict"], weights)


def _other_base(name: str, here: str, there: str) -> str:
    flag = _FLAGS.get(name, f"--model.{name}.path")
    if here == there:
        return (
            f"the weights of {here} are not those that the checkpoint was trained from: they have changed, or are "
            "loaded in another dtype or precision; put back what it was trained from, or start a new run"
        )
    return (
        f"the checkpoint was trained from the weights of {there}, and those of {here} are others; set {flag} {there}, "
        f"or start a new run from the export: {flag} RUN/export"
    )


def _check_shapes(saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """That the checkpoint has the very weights that this run trains."""
    if odd := sorted(saved.keys() ^ here.keys()):
        raise UserError(
            f"the checkpoint does not fit this model: {len(saved.keys() - here.keys())} weights are only in the "
            f"checkpoint and {len(here.keys() - saved.keys())} only in the model ({odd[0]}); use the configuration it "
            "was trained with"
        )
    for name, weight in here.items():
        if weight.shape != saved[name].shape:
            raise UserError(
                f"the checkpoint does not fit this model: {name} is {tuple(saved[name].shape)} in the checkpoint and "
                f"{tuple(weight.shape)} in the model; use the configuration it was trained with"
            )
