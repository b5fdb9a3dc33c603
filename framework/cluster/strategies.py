"""The strategies whose ranks Ray places: DDP and FSDP2, each with a launcher of its own."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from leyden.cluster.launcher import RayEnvironment, RayLauncher
from leyden.cluster.ray import Spread
from leyden.errors import UserError
from leyden.sharding import FSDP2


class _OnRay:
    """What both have in common. Every rank is a node with one device to Lightning."""

    workers: int = 1
    parallel_devices: Any
    _launcher: Any

    def _set_up(self, workers: int, address: str, cpus: float, placement: Spread, start_timeout: float) -> None:
        if workers < 1 or cpus <= 0 or start_timeout <= 0:
            raise UserError(
                f"--trainer.strategy: workers {workers}, cpus {cpus:g}, start_timeout {start_timeout:g}: give more "
                "than 0"
            )
        self.workers, self.address, self.cpus = workers, address, cpus
        self.placement, self.start_timeout = placement, start_timeout
        self.cluster_environment = RayEnvironment()

    @property
    def num_nodes(self) -> int:
        return self.workers

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count not in (1, self.workers):
            raise UserError(f"--trainer.num_nodes {count}: Ray places processes; give --trainer.strategy.workers")

    def _configure_launcher(self) -> None:
        if (count := len(self.parallel_devices or ())) != 1:
            raise UserError(
                f"--trainer.devices {count}: Ray gives each process one device; leave it 1, and give "
                "--trainer.strategy.workers"
            )
        self._launcher = RayLauncher(self)


class RayDDP(_OnRay, DDPStrategy):  # type: ignore[misc]
    """Every process has the whole model, and Ray places the processes (see `--config ddp`). The one that you start is
    the first of them, so it is started on a machine of the cluster.

    Args:
        workers: processes that train, this one among them.
        address: of the cluster's head, HOST:PORT; `auto` is $RAY_ADDRESS, or the cluster that this machine belongs to.
        cpus: processors that each takes, and threads that it has.
        placement: PACK on few machines, SPREAD over many; STRICT_ fails where that cannot be.
        start_timeout: seconds that the cluster may take to have room.
        process_group_backend: nccl or gloo; by default what suits the device.
        gradient_as_bucket_view: whether gradients live in the buffers that are sent, which takes less memory.
    """

    def __init__(
        self,
        workers: int = 2,
        address: str = "auto",
        cpus: float = 1.0,
        placement: Spread = "PACK",
        start_timeout: float = 60.0,
        process_group_backend: str | None = None,
        gradient_as_bucket_view: bool = True,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, gradient_as_bucket_view=gradient_as_bucket_view)
        self._set_up(workers, address, cpus, placement, start_timeout)


class RayFSDP2(_OnRay, FSDP2):  # type: ignore[misc]
    """Every process has a part of the model, and Ray places the processes (see `--config fsdp2`). The one that you
    start is the first of them, so it is started on a machine of the cluster.

    Args:
        workers: processes that train, this one among them.
        address: of the cluster's head, HOST:PORT; `auto` is $RAY_ADDRESS, or the cluster that this machine belongs to.
        cpus: processors that each takes, and threads that it has.
        placement: PACK on few machines, SPREAD over many; STRICT_ fails where that cannot be.
        start_timeout: seconds that the cluster may take to have room.
        save_distributed_checkpoint: whether each process writes its own part of a checkpoint, into a folder, or the
            first one the whole, into a file.
        process_group_backend: nccl or gloo; by default what suits the device.
    """

    def __init__(
        self,
        workers: int = 2,
        address: str = "auto",
        cpus: float = 1.0,
        placement: Spread = "PACK",
        start_timeout: float = 60.0,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(save_distributed_checkpoint, process_group_backend)
        self._set_up(workers, address, cpus, placement, start_timeout)
