"""Arithmetic of training: operations a token, and the peak of a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""Names in configurations of transformers: experts of a layer, and those that a token goes through."""

PEAKS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Name in a GPU's name -> 10^12 operations a second of dense bf16 matrix products, by its maker; longer names first."""


def peak_flops(device: torch.device) -> float | None:
    """Peak operations a second of a device in bf16; None where not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for known, tera in PEAKS.items() if known in name), None)


def flops_per_token(module: nn.Module, has_reference: bool = False) -> float:
    """Operations of training on one token, without attention itself and recomputed activations.

    A weight costs 2 forward, 2 for the gradient of its input and, where it is trained, 2 for its own (Kaplan et al.
    2020, table 1): 6 a weight for full weights, 4 for what an adapter stands on. Four-bit weights count unpacked, since
    they are unpacked before they are used; embeddings that are only looked up cost nothing, and of a mixture of experts
    those count that a token goes through.

    Args:
        module: the policy.
        has_reference: whether a reference of the same size reads every token too.
    """
    looked_up = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    used = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    share = _routed_share(module)
    total = 0.0
    trains = any(parameter.requires_grad for parameter in module.parameters())
    for parameter in module.parameters():
        if id(parameter) in looked_up - used:  # tied embeddings are a head as well
            continue
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        cost = 2 + 2 * trains + 2 * parameter.requires_grad + 2 * has_reference
        total += count * cost * share.get(id(parameter), 1.0)
    return total


def experts(config: Any) -> tuple[int, int] | None:
    """Number of routed experts in a layer, and how many of them a token goes through; None without experts."""
    for part in (config, getattr(config, "ffn_config", None)):  # DBRX has them in a part
        found = [next((n for name in names if (n := getattr(part, name, None))), 0) for names in (EXPERTS, ACTIVE)]
        total, active = (max(n) if isinstance(n, list) else n for n in found)  # HunYuan has a number for each layer
        if total > 1 and active:
            return total, min(active, total)
    return None


def _routed_share(module: nn.Module) -> dict[int, float]:
    """Share of tokens that go through each weight of a routed expert, by the weight's id."""
    found = (experts(part.config) for part in module.modules() if hasattr(part, "config"))
    sizes = next((pair for pair in found if pair is not None), None)
    if sizes is None:
        return {}
    routed = set()
    for part in module.modules():
        inner = getattr(part, "experts", None)
        if isinstance(inner, nn.Module):
            routed |= {id(parameter) for parameter in inner.parameters()}
        # the weights of all experts in one tensor, whatever its module is called
        own = part.parameters(recurse=False)
        routed |= {id(p) for p in own if p.dim() == 3 and len(p) == sizes[0] and "Conv" not in type(part).__name__}
    return dict.fromkeys(routed, sizes[1] / sizes[0])
