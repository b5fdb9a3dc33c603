"""Checks of shapes and kinds of numbers on entry to pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_KINDS = {"bool": (torch.bool,), "int": (torch.int64, torch.int32)}


def check_shapes(**named: tuple[Tensor | None, str]) -> None:
    """Check tensors against axes named by letters: `check_shapes(reward=(reward, "N L"), mask=(mask, "bool N L"))`.

    A letter stands for the same size wherever it is used. Tensors hold floating-point numbers unless `bool` or `int`
    stands before the axes. No letters stand for a scalar, and None is not checked.

    Raises:
        ValueError: a tensor has another number of axes, another size or another kind of numbers; it names the argument.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (x, axes) in named.items():
        if x is None:
            continue
        kind, _, rest = axes.partition(" ")
        letters = rest.split() if kind in _KINDS else axes.split()
        if kind in _KINDS and x.dtype not in _KINDS[kind] or kind not in _KINDS and not x.is_floating_point():
            wanted = kind if kind in _KINDS else "floating point"
            raise ValueError(f"{name}: {str(x.dtype).removeprefix('torch.')}, not {wanted}")
        if x.ndim != len(letters):
            raise ValueError(f"{name}: shape {list(x.shape)}, not [{', '.join(letters)}]")
        for letter, size in zip(letters, x.shape, strict=True):
            known, where = sizes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(f"{name}: shape {list(x.shape)}, but {letter} is {known} in {where}")
