"""Compiled layers: kernels that do a layer's norms, rotations and activations in one pass over memory each.

Layers are compiled one by one, not the body as a whole. All have the same code, so the first compiles for all of them,
and attention stays outside: what it is given changes with every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from leyden.paths import kernel_folder

OPTIONS = {"emulate_precision_casts": True}
"""Round wherever the uncompiled layer rounds. Else kernels of a policy and its reference, of training and sampling,
would each round in places of their own, and in bfloat16 differ by hundredths of a nat a token."""
RECOMPILATIONS = 64
"""Limit on variants of a layer's code: with and without gradients, training, prefill and decode step, kinds of layers.
Torch's own limit is 8, beyond which a layer silently runs uncompiled."""


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each layer in place, for rows of any length. Names of parameters stay as they are."""
    kernel_folder()
    config: Any = torch.compiler.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    for block in blocks:
        block.compile(dynamic=True, options=OPTIONS)
