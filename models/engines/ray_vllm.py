"""vLLM servers on the machines of a Ray cluster, placed by Ray."""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from leyden.cluster import ray
from leyden.cluster.ray import Spread
from leyden.distributed import all_gather, all_or_none
from leyden.errors import UserError
from leyden.models.causal_lm import CausalLM
from leyden.models.engines.client import Client
from leyden.models.engines.placement import arguments, check_memory, environment
from leyden.models.engines.published import base_of, check_policy, publish_model
from leyden.models.engines.ray_host import ServerHost
from leyden.models.engines.requests import Replica
from leyden.models.engines.server import Found
from leyden.models.engines.vllm import VLLM, computed_in
from leyden.policy.policy import Policy

log = logging.getLogger("leyden")


class RayVLLM(VLLM):
    """Samples with vLLM servers that Ray starts on the machines of a cluster, and that end with the run. They share
    the work of all processes, and get the weights by a folder that all machines see.

    Args:
        folder: where weights are put: on a disk that all machines see under the same path.
        servers: how many, each with the whole model.
        gpus: of each server, which share the model; None is one, or none where the cluster has no GPUs.
        cpus: processors of each server.
        placement: PACK on few machines, SPREAD over many; STRICT_ fails where that cannot be.
        address: of the cluster's head, HOST:PORT; `auto` is $RAY_ADDRESS, or the cluster that this machine belongs to.
        room_timeout: seconds that the cluster may take to have room.
        python: the Python of an environment with vLLM on those machines, or its folder; None is that of Ray there.
        dtype: in which servers compute; `auto` is that of training's forward pass.
        memory: the share of a GPU's memory that a server may take; on a processor GiB for its cache of keys.
        max_length: most tokens of a prompt and its response; None is what the data may ask for.
        requests: most responses that are asked for at the same time, by each process.
        timeout: seconds that the answer to one prompt may take.
        start_timeout: seconds that a server may take to start.
        options: more arguments of vLLM's server; null leaves one out.
    """

    def __init__(
        self,
        folder: str,
        servers: int = 1,
        gpus: int | None = None,
        cpus: float = 1.0,
        placement: Spread = "PACK",
        address: str = "auto",
        room_timeout: float = 60.0,
        python: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        memory: float | None = None,
        max_length: int | None = None,
        requests: int = 256,
        timeout: float = 1800.0,
        start_timeout: float = 900.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if servers < 1 or cpus <= 0 or room_timeout <= 0 or (gpus or 0) < 0:
            raise UserError(
                f"RayVLLM: servers {servers}, gpus {gpus}, cpus {cpus:g}, room_timeout {room_timeout:g}: give more "
                "than 0"
            )
        super().__init__(
            python=python, folder=folder, dtype=dtype, memory=memory, max_length=max_length, requests=requests,
            timeout=timeout, start_timeout=start_timeout, options=options,
        )  # fmt: skip
        self.count, self.gpus, self.cpus, self.placement = servers, gpus, cpus, placement
        self.address, self.room_timeout = address, room_timeout
        self._hosts: list[Any] = []
        self._group: Any = None
        self._connected = False

    def start(self, policy: Policy, folder: Path, longest: int) -> None:
        policy = self._policy = check_policy(policy)
        self._leads = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._run = all_gather(uuid.uuid4().hex[:8])[0]
        computes = self._settle(policy, longest)
        self._exact = computes == computed_in(policy) == torch.float32
        self._scratch = Path(all_or_none(lambda: self._join(policy, folder) if self._leads else "")[0])
        model = base_of(policy)
        if model is None:
            self._publish(publish_model, "v0")
            model = str(self._scratch / "current")
        elif Path(model).exists():
            model = str(Path(model).absolute())  # processes of Ray have another current folder
        urls = all_or_none(lambda: self._place(model, computes, folder) if self._leads else [])[0]
        self._replicas = [Replica(Client(url, self.timeout)) for url in urls]
        self._up_to_date = not policy.backbone.adapted

    def _join(self, policy: CausalLM, folder: Path) -> str:
        """Join the cluster, and make the folder of the weights. On the first process."""
        self._connected = ray.connect(self.address)
        try:
            return str(self._make_scratch(policy, folder))
        except OSError as error:
            problem = f"--model.engine.folder {self.folder}: {error.strerror}; give a folder to write to"
            raise UserError(problem) from None

    def _place(self, model: str, computes: torch.dtype, folder: Path) -> list[str]:
        """Have Ray place the servers, and start them; their urls."""
        gpus = self.gpus
        if gpus is None:
            gpus = 1 if ray.library().cluster_resources().get("GPU") else 0
        bundle = {"CPU": float(self.cpus)} | ({"GPU": float(gpus)} if gpus else {})
        what = f"{self.count} vLLM servers"
        self._group = ray.place(
            [bundle] * self.count, self.placement, self.room_timeout, what, "--model.engine.servers"
        )
        self._hosts = [ray.actor(ServerHost, self._group, place, bundle) for place in range(self.count)]
        python = None if self.python is None else str(Path(self.python).expanduser().absolute())
        looking = [host.find.remote(python, str(self._scratch)) for host in self._hosts]
        found = [Found(*ray.result(one, f"server {number}")) for number, one in enumerate(looking)]
        log.info("Ray starts %d vLLM servers; their logs are %s", self.count, folder / "vllm-N.log")
        scratch = str(self._scratch) if self.count == 1 else None
        starting = []
        for number, (host, one) in enumerate(zip(self._hosts, found, strict=True)):
            files = str((folder / f"vllm-{number}.log").absolute()), scratch
            given, own = self._given(one, computes, gpus)
            starting.append(host.serve.remote(one, model, given, own, files, self.start_timeout))
        return [ray.result(one, f"server {number}") for number, one in enumerate(starting)]

    def _given(self, found: Found, computes: torch.dtype, gpus: int) -> tuple[dict[str, Any], dict[str, str]]:
        """Arguments and variables of a server."""
        assert self._policy is not None and self.room is not None
        check_memory(self.memory, found.cpu)
        devices = list(range(gpus)) if gpus else None
        given = arguments(self._policy, found, computes, self.room, devices, self.memory)
        return given | self.options, environment(found, None, self.memory)  # Ray says which GPUs it sees

    def stop(self) -> None:
        hosts, group, connected = self._hosts, self._group, self._connected
        self._hosts, self._group, self._connected = [], None, False
        if group is not None and ray.library().is_initialized():
            for ending in [host.stop.remote() for host in hosts]:
                with suppress(UserError, ray.library().exceptions.GetTimeoutError):  # it has gone already
                    ray.result(ending, "server", seconds=30.0)
            ray.release(hosts, group)
        super().stop()
        if connected:
            ray.library().shutdown()
