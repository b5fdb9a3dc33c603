"""What a run is made from: kept in its checkpoints, so that none is gone on from with something else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from leyden import __version__
from leyden.checkpoint.find import ENTRY, FORMAT, check_format
from leyden.errors import UserError
from leyden.fingerprint import of_text, of_vocabulary
from leyden.policy.policy import Policy

if TYPE_CHECKING:
    from leyden.algorithm.algorithm import Algorithm

_FLAGS = {"policy": "--model.policy.path", "reference.policy": "--model.reference_policy.path"}


class Origin:
    """Writes the entry of a checkpoint and holds it against the run that is to go on from there."""

    def __init__(self) -> None:
        self._saved = 0.0

    def entry(self, algorithm: Algorithm) -> dict[str, Any]:
        """What a checkpoint that is saved now says of itself: plain values."""
        self._saved = max(time.time(), self._saved + 1e-3)  # later than the one before, whatever the clock says
        return self.facts(algorithm) | {"format": FORMAT, "saved": self._saved}

    def facts(self, algorithm: Algorithm) -> dict[str, Any]:
        """What a run is made from; to be asked on every process, since weights may be sharded."""
        return {
            "version": __version__,
            "algorithm": type(algorithm).__name__,
            "base": {name: policy.fingerprint() for name, policy in _policies(algorithm)},
            "paths": {name: policy.path for name, policy in _policies(algorithm)},
            "tokenizer": of_vocabulary(algorithm.policy.tokenizer),
            "template": _template(algorithm),
            "data": str(getattr(algorithm.data, "fingerprint", "")),
        }

    def check(self, algorithm: Algorithm, checkpoint: dict[str, Any]) -> None:
        """Before anything is restored.

        Raises:
            UserError: the checkpoint was made from something else; it names that, and what to type.
        """
        check_format("the checkpoint", checkpoint)
        entry = checkpoint[ENTRY]
        self._saved, fits = float(entry["saved"]), algorithm.trainer.state.fn == "fit"
        if fits and entry["algorithm"] != type(algorithm).__name__:
            raise UserError(
                f"the checkpoint is of {entry['algorithm']} and this run is {type(algorithm).__name__}; go on with "
                f"--model {entry['algorithm']}, or start a new run from its export: --model.policy.path RUN/export"
            )
        taken = algorithm.device_mesh is not None  # the strategy has put weights and optimizer in their places already
        if fits and not taken and "optimizer_states" not in checkpoint:
            raise UserError(
                "the checkpoint holds weights alone (--checkpoint.save_weights_only), so training cannot go on from "
                "it; take another, or start a new run from the export: --model.policy.path RUN/export"
            )
        for name, policy in _policies(algorithm):
            if entry["base"].get(name, policy.fingerprint()) != policy.fingerprint():
                raise UserError(_other_base(name, policy.path, entry["paths"][name]))
        if entry["tokenizer"] != of_vocabulary(algorithm.policy.tokenizer):
            raise UserError(
                f"the checkpoint was trained with another tokenizer than that of {algorithm.policy.path}; put the one "
                "back that it was trained with, or start a new run"
            )
        if fits and entry["template"] != _template(algorithm):
            raise UserError(
                "the checkpoint was trained with another chat template; set --data.chat_template to the one that it "
                "was trained with, or start a new run"
            )
        if not taken:
            _check_shapes(checkpoint["state_dict"], algorithm.state_dict())


def _policies(algorithm: Algorithm) -> list[tuple[str, Policy]]:
    """The policy and whatever other models stand beside it, by name."""
    return [(name, module) for name, module in algorithm.named_modules() if isinstance(module, Policy)]


def _template(algorithm: Algorithm) -> str:
    template = getattr(algorithm.policy.tokenizer, "chat_template", None)
    return of_text(template if template is None or isinstance(template, str) else repr(template))


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


def _check_shapes(saved: dict[str, Any], here: dict[str, Any]) -> None:
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
