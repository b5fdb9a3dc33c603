"""Starts the ranks of a run in processes that Ray places. The process that the user started is the first rank."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from leyden.cluster import ray
from leyden.cluster.hosts import PARENT, Ended, Host
from leyden.errors import UserError
from leyden.language import say

log = logging.getLogger("leyden")

GRACE = 20.0
"""Seconds in which ranks end by themselves once one of them has."""
END = 120.0
"""Seconds that the others may take after the first one has done its work."""


class RayEnvironment(LightningEnvironment):
    """Which rank this process is. Every rank is a node with one device to Lightning, wherever Ray has placed it."""

    @property
    def creates_processes_externally(self) -> bool:
        return PARENT in os.environ

    @staticmethod
    def detect() -> bool:
        return False

    def node_rank(self) -> int:
        return int(os.environ["RANK"]) if PARENT in os.environ else 0

    def local_rank(self) -> int:
        return 0


class RayLauncher(_SubprocessScriptLauncher):
    """Runs the same command once more for every further rank.

    Args:
        strategy: the strategy of the Trainer, with the options of the placement.
    """

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy.cluster_environment, 1, strategy.workers)
        self.strategy = strategy
        self._hosts: list[Any] = []
        self._ends: dict[Any, int] = {}
        """What `Host.run` will return, and the rank of each"""
        self._group: Any = None
        self._done = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        if PARENT in os.environ:
            threading.Thread(target=_follow, args=(int(os.environ[PARENT]),), daemon=True).start()
            return function(*args, **kwargs)
        if self._hosts or self.num_nodes == 1:
            return function(*args, **kwargs)
        connected = ray.connect(self.strategy.address)
        self._start()
        watch = threading.Thread(target=self._watch, name="leyden-ray", daemon=True)
        watch.start()
        try:
            found = function(*args, **kwargs)
        except (RuntimeError, SystemExit) as error:
            self._done.set()
            if (problem := self._first_failure(GRACE)) is not None and isinstance(error, RuntimeError):
                raise UserError(problem) from error
            raise
        finally:
            self._done.set()
            watch.join()
        if (problem := self._first_failure(END, to_the_end=True)) is not None:
            raise UserError(problem)
        ray.release(self._hosts, self._group)
        if connected:
            ray.library().shutdown()
        return found

    def kill(self, signum: Any) -> None:
        for host in self._hosts[1:]:
            host.signal.remote(int(signum))

    # -- start and end -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        library, strategy = ray.library(), self.strategy
        here, gpus = library.util.get_node_ip_address(), strategy.root_device.type == "cuda"
        bundle = {"CPU": float(strategy.cpus)} | ({"GPU": 1.0} if gpus else {})
        bundles = [bundle | {f"node:{here}": 0.001}] + [bundle] * (self.num_nodes - 1)
        what = f"{self.num_nodes} processes that train, the first of them on this machine"
        option = "--trainer.strategy.workers"
        self._group = ray.place(bundles, strategy.placement, strategy.start_timeout, what, option)
        self._hosts = [ray.actor(Host, self._group, rank, bundle) for rank in range(self.num_nodes)]
        if gpus:
            name = ray.result(self._hosts[0].gpus.remote(), "rank 0")
            strategy.parallel_devices = [torch.device("cuda", _index(name))]
        os.environ["MASTER_ADDR"] = here
        os.environ["MASTER_PORT"] = str(self.cluster_environment.main_port)
        os.environ["WORLD_SIZE"] = str(self.num_nodes)
        for rank, host in enumerate(self._hosts[1:], 1):
            own = {"RANK": str(rank), "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
            running = host.run.remote(list(_basic_subprocess_cmd()), os.getcwd(), dict(os.environ) | own)
            self._ends[running] = rank
        log.info("Ray has placed %d processes that train", self.num_nodes)

    def _first_failure(self, seconds: float, to_the_end: bool = False) -> str | None:
        """Wait for ranks to end, and say of the first that failed how; None where none did in that time.

        Args:
            seconds: to wait at most.
            to_the_end: whether one that goes on for longer has failed too.
        """
        waiting, deadline = list(self._ends), time.monotonic() + seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            ended, waiting = ray.library().wait(waiting, num_returns=1, timeout=left)
            for one in ended:
                if (problem := self._problem(one)) is not None:
                    return problem
        if waiting and to_the_end:
            return f"rank {self._ends[waiting[0]]} goes on {seconds:g} s after the first one has ended"
        return None

    def _problem(self, ended: Any) -> str | None:
        """How a rank failed."""
        rank = self._ends[ended]
        try:
            end = Ended(*ray.result(ended, f"rank {rank}"))
        except UserError as error:
            return str(error)
        if end.status == 0:
            return None
        how = f"status {end.status}" if end.status > 0 else signal.Signals(-end.status).name
        return f"rank {rank} ended with {how}: {end.said}"

    def _watch(self) -> None:
        """End this process where another rank failed and this one waits for it, in a collective that does not notice.
        In a thread of its own."""
        waiting = list(self._ends)
        while waiting:
            ended, waiting = ray.library().wait(waiting, num_returns=1, timeout=0.5)
            if self._done.is_set():
                return
            problems = [problem for one in ended if (problem := self._problem(one)) is not None]
            if problems and not self._done.wait(GRACE):  # it would end by itself if it noticed
                say(f"error: {problems[0]}", file=sys.stderr)
                os._exit(1)


def _index(name: str) -> int:
    """The number that this process gives to a GPU that Ray calls by a name.

    Raises:
        UserError: this process does not see it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if name not in names:
        raise UserError(
            f"Ray gave GPU {name} to the first process, which sees {', '.join(names)}; unset CUDA_VISIBLE_DEVICES here"
        )
    return names.index(name)


def _follow(parent: int) -> None:
    """End this rank, at once, with the process of Ray that started it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
