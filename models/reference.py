"""The reference model π_ref, with which a policy is compared: exactly the model before training.

There are three kinds, of which `auto` takes the cheapest that is exact:

- `adapter_off`: a new adapter starts as the identity, so the model without it is the reference. It costs nothing.
- `snapshot`: an adapter that was trained before is part of the starting point, so its weights are copied.
- `copy`: in full training, or where more than an adapter is trained, all trainable weights are copied.

Adapters are switched off here and not by PEFT, whose switches leave `requires_grad` changed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.errors import UserError
from leyden.fingerprint import fingerprint_weights
from leyden.models.backbone import Backbone
from leyden.models.divergence import HeadPredictions
from leyden.policy.policy import Outputs, Policy, Reference, ReferenceKind, eval_mode, predictions_of
from leyden.policy.predictions import Predictions


def frozen_reference(policy: Policy, backbone: Backbone, new: bool, kind: ReferenceKind = "auto") -> Reference:
    """The policy with its present weights as a reference model; see the module's docstring.

    Args:
        policy: the policy that computes the log-probabilities, with the reference's weights.
        backbone: the policy's model.
        new: whether this run created the adapter.
        kind: kind of the reference.

    Raises:
        UserError: the kind would not be exact, given the weights that this policy trains.
    """
    trained = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
    new = new and backbone.adapted
    only_adapter = backbone.adapted and set(trained) <= adapter_weights(backbone.model)
    if kind == "auto":
        kind = "adapter_off" if new and only_adapter else "snapshot" if only_adapter else "copy"
    if kind != "copy" and not backbone.adapted:
        raise UserError(f"reference {kind}: all weights are trained, there is no adapter; use reference copy")
    if kind != "copy" and not only_adapter:
        extra = sorted(set(trained) - adapter_weights(backbone.model))[0]
        raise UserError(f"reference {kind}: more than the adapter is trained ({extra}); use reference copy")
    if kind == "adapter_off" and not new:
        raise UserError(
            f"reference adapter_off: {policy.path} continues an adapter, and without it the model is not the one that "
            "training starts from; use reference snapshot"
        )
    return AdapterOff(policy, backbone.model) if kind == "adapter_off" else Copy(policy, backbone.model, kind, trained)


class _Frozen(Reference):
    """Base class of all kinds. The policy is not registered as a submodule: its weights are not the reference's."""

    def __init__(self, policy: Policy, model: nn.Module, kind: str) -> None:
        super().__init__()
        self._held, self.kind = (policy, model), kind

    @property
    def policy(self) -> Policy:
        return self._held[0]

    @property
    def model(self) -> nn.Module:
        return self._held[1]

    def fingerprint(self) -> str:
        return fingerprint_weights(self._weights())[:8]

    @torch.no_grad()
    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        return self._run(batch, "logp", temperature).logp

    @torch.no_grad()
    def predictions(self, batch: Batch, temperature: float = 1.0) -> Predictions:
        return predictions_of(self.policy, self._run(batch, "predictions", temperature))

    @abstractmethod
    def _run(self, batch: Batch, want: str, temperature: float) -> Outputs:
        """What the policy says of the batch with the weights of this reference."""

    @abstractmethod
    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that distinguish this reference from others, by name."""


class AdapterOff(_Frozen):
    """Reference of the kind `adapter_off`: the model without its adapter."""

    def __init__(self, policy: Policy, model: nn.Module) -> None:
        super().__init__(policy, model, "adapter_off")

    def _run(self, batch: Batch, want: str, temperature: float) -> Outputs:
        with eval_mode(self.policy), without_adapter(self.model):
            out: Outputs = self.policy(batch, {want}, temperature)
        return out

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((n, p.detach()) for n, p in self.model.named_parameters() if not p.requires_grad)


class Copy(_Frozen):
    """Reference of the kinds `snapshot` and `copy`: the model with copies of its trainable weights at creation."""

    def __init__(self, policy: Policy, model: nn.Module, kind: str, trained: list[str]) -> None:
        super().__init__(policy, model, kind)
        parameters = dict(model.named_parameters())
        self.names = trained
        self.copies = nn.ParameterList(
            nn.Parameter(parameters[name].detach().clone(), requires_grad=False) for name in trained
        )

    def _run(self, batch: Batch, want: str, temperature: float) -> Outputs:
        copies = {f"model.{name}": tensor for name, tensor in self._weights()}
        with eval_mode(self.policy):
            out: Any = torch.func.functional_call(self.policy, copies, (batch, {want}, temperature))
        return out  # type: ignore[no-any-return]

    def predictions(self, batch: Batch, temperature: float = 1.0) -> Predictions:
        found = super().predictions(batch, temperature)
        if isinstance(found, HeadPredictions) and not found.plain:  # by then it would run with the trained weights
            raise UserError(
                f"reference {self.kind}: the adapter changes the head of {self.policy.path}, so the policy cannot be "
                f"its own teacher; give --model.teacher.path {self.policy.path}"
            )
        return found

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.names, self.copies, strict=True)


def _layers(model: nn.Module) -> list[Any]:
    """PEFT's modules in the model: adapter layers, and modules that are trained along with them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that have no effect when the adapter is off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = set()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            base = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
            base_ids = {id(p) for p in base.parameters()} if base is not None else set()
            names |= {f"{path}.{name}" for name, p in module.named_parameters() if id(p) not in base_ids}
    return names


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model as if it had no adapter. The trainable parameters stay the same."""
    layers = _layers(model)
    states = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, states, strict=True):
            layer._disable_adapters = value


def base_fingerprint(policy: Policy, backbone: Backbone, new: bool) -> str:
    """Fingerprint of the weights as loaded: the base model, and an adapter and heads that came with it.

    New adapters and heads start at random and are left out. Names are those without an adapter, so that a model has the
    same fingerprint with and without a new adapter.

    Args:
        policy: the policy with the weights.
        backbone: the policy's model.
        new: whether this run created the adapter.
    """
    left_out = adapter_weights(backbone.model) if new and backbone.adapted else set()
    heads = {f"heads.{name}." for name in policy.fresh}
    return fingerprint_weights(
        (name.replace("base_model.model.", "").replace(".base_layer.", "."), weight)
        for name, weight in policy.named_parameters()
        if name.removeprefix("model.") not in left_out and not any(name.startswith(head) for head in heads)
    )


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout of a model and its adapter to 0, including those that layers store as a plain number."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
