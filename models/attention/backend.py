"""What an attention back-end is: a record of what it can do, and the function that does it.

One of yours is a class in a file of yours: `--model.policy.attention my_file.MyBackend`. It is asked for nothing that
its record does not claim; tests/test_attention.py shows how one is compared with `dense`, the reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from leyden.models.attention.forest import AttentionArgs, Forest


class Backend(ABC):
    """One way to attend over a packed forest. Sliding windows count in `forest.position`."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...] | None] = None
    """Kinds of devices that it runs on; None is all."""
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    """Weights that it runs with; None is all."""
    dropout: ClassVar[bool] = False
    """Whether it can drop attention weights. A layer that asks for it is served by one that can."""
    softcap: ClassVar[bool] = False
    """Whether it can squeeze scores (Gemma 2)."""
    window: ClassVar[bool] = True
    """Whether it can hide keys by their distance."""

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on this device with weights of this kind, beyond what its record says; None if it can."""
        return None

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
        """Attention of every query to the keys that it sees.

        Args:
            query: [1, H, T, D]
            key, value: [1, H or fewer, T, D]
            forest: which keys are seen: k by q iff `k <= q < end[k]`.
            args: scale, window and what else the layer asks for.

        Returns:
            [1, T, H, D]
        """

    def lacks(self, device: torch.device, dtype: torch.dtype, softcap: float | None) -> str | None:
        """Why it cannot serve a model, or None if it can."""
        if softcap and not self.softcap:
            return "it knows no soft-capped scores"
        if self.devices is not None and device.type not in self.devices:
            return self.obstacle(device, dtype) or f"it runs on {' and '.join(self.devices)} alone"
        if (problem := self.obstacle(device, dtype)) is not None:
            return problem
        if self.dtypes is not None and dtype not in self.dtypes:
            known = " and ".join(str(one).removeprefix("torch.") for one in self.dtypes)
            return f"the kernel knows no {str(dtype).removeprefix('torch.')} weights, only {known}"
        return None
