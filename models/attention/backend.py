"""The interface of an attention back-end: a record of its abilities, and the method `attend`.

Your own back-end is a class in a file of yours: `--model.policy.attention my_file.MyBackend`. It is never given an
option (dropout, soft cap, window) that its record does not claim. tests/test_attention.py shows how to compare a
back-end with `dense`, the reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from leyden.models.attention.forest import AttentionArgs, Forest


class Backend(ABC):
    """One implementation of attention over a packed forest. Sliding windows count in `forest.position`."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...] | None] = None
    """Supported device types; None for all."""
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    """Supported dtypes of the weights; None for all."""
    dropout: ClassVar[bool] = False
    """Whether attention dropout is supported. A layer with dropout is served by a back-end that supports it."""
    softcap: ClassVar[bool] = False
    """Whether soft-capped scores are supported (Gemma 2)."""
    window: ClassVar[bool] = True
    """Whether sliding windows are supported."""

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Reason, beyond the record, why it cannot run on this device with weights of this dtype; None if it can."""
        return None

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
        """Attention of every query to the keys that it sees.

        Args:
            query: [1, H, T, D]
            key, value: [1, H or fewer, T, D]
            forest: the structure: query q sees key k iff `k <= q < end[k]`.
            args: the layer's scale, dropout, window and soft cap.

        Returns:
            [1, T, H, D]
        """

    def lacks(self, device: torch.device, dtype: torch.dtype, softcap: float | None) -> str | None:
        """Reason why it cannot serve a model, or None if it can."""
        if softcap and not self.softcap:
            return "it knows no soft-capped scores"
        if self.devices is not None and device.type not in self.devices:
            return self.obstacle(device, dtype) or f"it runs on {' and '.join(self.devices)} alone"
        if (problem := self.obstacle(device, dtype)) is not None:
            return problem
        if self.dtypes is not None and dtype not in self.dtypes:
            supported = " and ".join(str(kind).removeprefix("torch.") for kind in self.dtypes)
            return f"the kernel knows no {str(dtype).removeprefix('torch.')} weights, only {supported}"
        return None
