"""The reference that a policy is compared with: the model as it was before training, exactly.

Three kinds, of which `auto` takes the cheapest that is exact:

- `adapter_off`: a new adapter starts as no change at all, so the model without it is the reference. Costs nothing.
- `snapshot`: an adapter that was trained before is part of the starting point, so its weights are copied.
- `copy`: with full weights, or where more than an adapter is trained, everything trainable is copied.

Adapters are switched here and not by PEFT, whose switches leave `requires_grad` changed behind them.
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
from leyden.policy.policy import Policy, Reference, ReferenceKind, eval_mode


def frozen_reference(policy: Policy, backbone: Backbone, new: bool, kind: ReferenceKind = "auto") -> Reference:
    """The policy's present weights as a reference of the given kind; see the module.

    Args:
        policy: what is asked, in another state.
        backbone: its model.
        new: whether its adapter was made by this run.
        kind: of the reference.

    Raises:
        UserError: the kind would not be exact for what this policy trains.
    """
    trained = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
    new = new and backbone.adapted
    only_adapter = backbone.adapted and set(trained) <= adapter_weights(backbone.model)
    if kind == "auto":
        kind = "adapter_off" if new and only_adapter else "snapshot" if only_adapter else "copy"
    if kind != "copy" and not backbone.adapted:
        raise UserError(f"reference {kind}: all weights are trained, there is no adapter; use reference copy")
    if kind != "copy" and not only_adapter:
        other = sorted(set(trained) - adapter_weights(backbone.model))[0]
        raise UserError(f"reference {kind}: more than the adapter is trained ({other}); use reference copy")
    if kind == "adapter_off" and not new:
        raise UserError(
            f"reference adapter_off: {policy.path} continues an adapter, and without it the model is not the one that "
            "training starts from; use reference snapshot"
        )
    return AdapterOff(policy, backbone.model) if kind == "adapter_off" else Copy(policy, backbone.model, kind, trained)


class _Frozen(Reference):
    """What the kinds share. The policy is held without being registered: its weights are not the reference's."""

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

    @abstractmethod
    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """What makes this reference differ from another, by name."""


class AdapterOff(_Frozen):
    """The model without its adapter."""

    def __init__(self, policy: Policy, model: nn.Module) -> None:
        super().__init__(policy, model, "adapter_off")

    @torch.no_grad()
    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        with eval_mode(self.policy), without_adapter(self.model):
            logp: Tensor = self.policy(batch, {"logp"}, temperature).logp
        return logp

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((n, p.detach()) for n, p in self.model.named_parameters() if not p.requires_grad)


class Copy(_Frozen):
    """The model with copies of what was trainable when the reference was made, in place of what is being trained."""

    def __init__(self, policy: Policy, model: nn.Module, kind: str, trained: list[str]) -> None:
        super().__init__(policy, model, kind)
        own = dict(model.named_parameters())
        self.names = trained
        self.copies = nn.ParameterList(
            nn.Parameter(own[name].detach().clone(), requires_grad=False) for name in trained
        )

    @torch.no_grad()
    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        copies = {f"model.{name}": tensor for name, tensor in self._weights()}
        with eval_mode(self.policy):
            out: Any = torch.func.functional_call(self.policy, copies, (batch, {"logp"}, temperature))
        return out.logp  # type: ignore[no-any-return]

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.names, self.copies, strict=True)


def _layers(model: nn.Module) -> list[Any]:
    """Modules of PEFT that change the model: adapter layers, and modules that are trained beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_weights(model: nn.Module) -> set[str]:
    """Names of parameters that no longer act when the adapter is off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = set()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
            kept = {id(p) for p in inner.parameters()} if inner is not None else set()
            found |= {f"{path}.{name}" for name, p in module.named_parameters() if id(p) not in kept}
    return found


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model as if it had no adapter. What is trained does not change."""
    layers = _layers(model)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def base_fingerprint(policy: Policy, backbone: Backbone, new: bool) -> str:
    """A hash of the weights as a folder gave them: the base, an adapter that is trained on, heads that were there. New
    adapters and heads start at random and are left out, and names are those without one: the same model is the same
    with an adapter over it.

    Args:
        policy: whose weights they are.
        backbone: its model.
        new: whether its adapter was made by this run.
    """
    adapter = adapter_weights(backbone.model) if new and backbone.adapted else set()
    heads = {f"heads.{name}." for name in policy.fresh}
    return fingerprint_weights(
        (name.replace("base_model.model.", "").replace(".base_layer.", "."), weight)
        for name, weight in policy.named_parameters()
        if name.removeprefix("model.") not in adapter and not any(name.startswith(head) for head in heads)
    )


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout of a model and its adapter to 0, also those that layers keep as a plain number."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
