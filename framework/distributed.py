"""Work that processes share: each holds a part, and sums, lists and whole tensors are put together from the parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from leyden.errors import UserError

T = TypeVar("T")
Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes; the tensor itself where there is one."""


def one_process(x: Tensor) -> Tensor:
    """The `Reduce` of a process on its own: the tensor itself."""
    return x


def local_share(items: Sequence[T], trainer: Any) -> Sequence[T]:
    """This process's part: in order, and of equal size or one apart."""
    rank, world = trainer.global_rank, trainer.world_size
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def all_gather(item: T) -> list[T]:
    """The items of all processes, in the order of their ranks: small Python objects only."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def all_gather_list(items: Sequence[T]) -> list[T]:
    """The lists of all processes, one after the other."""
    return [item for part in all_gather(list(items)) for item in part]


def all_or_none(action: Callable[[], T]) -> list[T]:
    """The results of an action of every process, in the order of their ranks: small Python objects only.

    Raises:
        UserError: the first that any of them raised, on every process, so that none waits for another in vain.
    """
    result: T | None = None
    try:
        result, problem = action(), None
    except UserError as error:
        problem = error
    found = all_gather((result, str(problem) if problem is not None else None))
    if problem is not None:
        raise problem
    for _, said in found:
        if said is not None:
            raise UserError(said)
    return [one for one, _ in found]  # type: ignore[misc]


def reduce_sums(sums: Mapping[str, Any], trainer: Any, device: torch.device) -> dict[str, float]:
    """Sums of scalars over all processes, which must have the same names; counts of tokens need double precision."""
    names = sorted(sums)
    if not names:
        return {}
    dtype = torch.float64 if device.type != "mps" else torch.float32
    ahead = device.type == "cuda"  # other devices may read what is not there yet
    # numbers are sent together and without waiting: one by one, each would hold the host up until the device is through
    numbers = [name for name in names if not isinstance(sums[name], Tensor)]
    sent = torch.tensor([float(sums[name]) for name in numbers], dtype=dtype).to(device, non_blocking=ahead)
    parts = dict(zip(numbers, sent.unbind(), strict=True))
    parts |= {name: sums[name].to(device, dtype, non_blocking=ahead) for name in names if name not in parts}
    mine = torch.stack([parts[name] for name in names])
    total = trainer.strategy.reduce(mine, reduce_op="sum")
    return dict(zip(names, total.tolist(), strict=True))


def reducer(trainer: Any) -> Reduce:
    """Sums a tensor over the processes of a trainer, on the device that they talk by."""

    def reduce(x: Tensor) -> Tensor:
        if trainer.world_size == 1:
            return x
        total: Tensor = trainer.strategy.reduce(x.to(trainer.strategy.root_device, copy=True), reduce_op="sum")
        return total.to(x.device)

    return reduce


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor put together from its parts, on every process; any other tensor as it is."""
    full = getattr(x, "full_tensor", None)
    return x if full is None else full()  # type: ignore[no-any-return]


def gather_tensor(x: Tensor, trainer: Any) -> list[Tensor] | None:
    """Tensors whose first axes may differ, of all processes in their order, on the CPU of the first one; None on the
    others."""
    if trainer.world_size == 1:
        return [x]
    device = trainer.strategy.root_device
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(sizes, torch.tensor([len(x)], device=device))
    padded = torch.zeros(int(max(sizes)), *x.shape[1:], dtype=x.dtype, device=device)
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes] if trainer.global_rank == 0 else None
    torch.distributed.gather(padded, parts)
    return parts and [part[: int(size)].cpu() for part, size in zip(parts, sizes, strict=True)]
