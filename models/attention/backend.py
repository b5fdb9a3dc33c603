"""The interface of an attention back-end: a record of its abilities, and the method `attend`.

Your own back-end is a class in a file of yours: `--model.policy.attention my_file.MyBackend`. It is never given an
option (dropout, soft cap, window) that its record does not claim. tests/test_attention.py shows how to compare a
back-end with `dense`, the reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from leyden.models.attention.forest import AttentionArgs, Forest


class Needs(NamedTuple):
    """What a model, or one layer's call, asks of a back-end."""

    device: torch.device
    dtype: torch.dtype
    """Of queries and keys: under autocast its dtype, else that of the weights"""
    softcap: bool = False
    window: bool = False
    dropout: bool = False
    width: int | None = None
    """Head width of queries and keys, if known"""
    value_width: int | None = None
    """Head width of values, if known"""


class Backend(ABC):
    """One implementation of attention over a packed forest. Sliding windows count in `forest.position`."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...] | None] = None
    """Supported device types; None for all."""
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    """Supported dtypes of queries and keys; None for all."""
    widths: ClassVar[range | None] = None
    """Supported head widths; None for all."""
    one_width: ClassVar[bool] = False
    """Whether values must be as wide as keys."""
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

    def lacks(self, needs: Needs) -> str | None:
        """Reason why it cannot serve a model or a layer, or None if it can."""
        if (problem := self.lacks_option(needs)) is not None:
            return problem
        if self.devices is not None and needs.device.type not in self.devices:
            return self.obstacle(needs.device, needs.dtype) or f"it runs on {' and '.join(self.devices)} alone"
        if (problem := self.obstacle(needs.device, needs.dtype)) is not None:
            return problem
        if self.dtypes is not None and needs.dtype not in self.dtypes:
            supported = " and ".join(str(kind).removeprefix("torch.") for kind in self.dtypes)
            return f"the kernel knows no {str(needs.dtype).removeprefix('torch.')}, only {supported}"
        return self._lacks_width(needs)

    def lacks_option(self, needs: Needs) -> str | None:
        """Reason why it cannot serve a layer on any device: an option that its record does not claim."""
        if needs.softcap and not self.softcap:
            return "it knows no soft-capped scores"
        if needs.window and not self.window:
            return "it knows no sliding windows"
        if needs.dropout and not self.dropout:
            return "it knows no dropout"
        return None

    def _lacks_width(self, needs: Needs) -> str | None:
        for width in (needs.width, needs.value_width):
            if self.widths is not None and width is not None and width not in self.widths:
                step = f" in steps of {self.widths.step}" if self.widths.step > 1 else ""
                return f"the heads are {width} wide, and the kernel takes {self.widths[0]} to {self.widths[-1]}{step}"
        if self.one_width and needs.value_width not in (None, needs.width):
            return f"keys are {needs.width} wide and values {needs.value_width}, and the kernel takes one width"
        return None
