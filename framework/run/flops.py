"""How much arithmetic training takes, and how much the device could do."""

from __future__ import annotations

import torch
from torch import nn

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
"""10^12 operations a second of dense bf16 matrix products, as the makers of the cards give them; longer names first."""


def peak(device: torch.device) -> float | None:
    """Operations a second of a device at most, in bf16; None where nobody says."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for known, tera in PEAKS.items() if known in name), None)


def per_token(module: nn.Module, compares: bool = False) -> float:
    """Operations that training on one token takes, attention itself and recomputed activations left out.

    A weight costs 2 forward, 2 for the gradient of its input and, where it is trained, 2 for its own (Kaplan et al.
    2020, table 1): 6 a weight for full weights, 4 for what an adapter stands on. Four-bit weights count unpacked, since
    they are unpacked before they are used; embeddings that are only looked up cost nothing.

    Args:
        module: the policy.
        compares: whether a reference of the same size reads every token too.
    """
    looked_up = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    used = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    total = 0.0
    trains = any(parameter.requires_grad for parameter in module.parameters())
    for parameter in module.parameters():
        if id(parameter) in looked_up - used:  # tied embeddings are a head as well
            continue
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count * (2 + 2 * trains + 2 * parameter.requires_grad + 2 * compares)
    return total
