"""Sharding policies over devices (FSDP2), and having one whole for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from leyden.errors import UserError


class FSDP2(ModelParallelStrategy):
    """Every device holds a part of weights, gradients and optimizer state, and layers are put together when they are
    used (Zhao et al. 2023, as torch's `fully_shard`). Lightning's strategy with all devices in one group.

    Args:
        save_distributed_checkpoint: whether each process writes its own part of a checkpoint, into a folder, or the
            first one the whole, into a file.
        process_group_backend: nccl or gloo; by default what suits the device.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def is_sharded(module: nn.Module) -> bool:
    """Whether `module` is the root of sharded weights."""
    return isinstance(module, FSDPModule)


def shard(policy: nn.Module, blocks: Sequence[nn.Module], mesh: Any) -> None:
    """Shard a built policy, unless it is: each of its blocks by itself, and then the policy with what is left.

    Args:
        policy: the root, which owns its heads.
        blocks: its modules that are sharded one by one, in the order in which they run.
        mesh: the devices that share it, a mesh of one dimension.

    Raises:
        UserError: there are weights of integers, which older versions of torch cannot shard.
    """
    if is_sharded(policy):
        return
    try:
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(policy, mesh=mesh)
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise UserError(
            f"torch {torch.__version__} shards no four-bit weights: use --config ddp in place of --config fsdp2, or "
            "torch 2.13"
        ) from error


@contextmanager
def assembled(module: nn.Module) -> Iterator[None]:
    """Have all sharded weights in `module` on every device, so that forwards inside need not keep step: processes may
    run different numbers of them. To be entered and left on every process. Does nothing where nothing is sharded."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    roots = _outermost(parts)
    for root in roots:  # or the first block that runs, which sampling calls directly, would be taken for the root
        root._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part not in roots, recurse=False)


def _outermost(parts: Sequence[FSDPModule]) -> list[Any]:
    """Those that are in no other of them."""
    modules: list[Any] = list(parts)
    inside = {id(child) for part in modules for child in part.modules() if child is not part}
    return [part for part in modules if id(part) not in inside]
