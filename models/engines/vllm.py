"""vLLM as the engine of a run: a server of its own on this machine, or servers that run already."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from leyden.distributed import all_gather, all_or_none
from leyden.errors import UserError
from leyden.models.causal_lm import CausalLM
from leyden.models.engines.client import Client, Refused, Unreachable, not_taken_over
from leyden.models.engines.placement import SERVED, arguments, check_memory, devices_for, environment, machine
from leyden.models.engines.published import base_of, check_policy, publish_adapter, publish_model, room_for
from leyden.models.engines.requests import Replica, Requests, persist
from leyden.models.engines.server import Found, Server, check_server, find, free_port
from leyden.policy.engine import Engine, OnProgress
from leyden.policy.policy import Policy, Response, Sampling

log = logging.getLogger("leyden")

MEMORY = Path("/dev/shm")
"""A disk in memory, on Linux"""


class VLLM(Engine):
    """Samples with vLLM, which gets the weights anew whenever they have changed (Kwon et al. 2023).

    Without `url` a server is started on this machine (on each, where training runs on several), in the environment of
    `python`, and ended with the run. Full weights travel by a folder that both sides see; an adapter travels alone,
    under a name of its own each time. After each sync a few samples are scored on both sides; see `SyncProof`.

    Args:
        python: the Python of an environment with vLLM, or that environment's folder; None is this one.
        url: of a server that runs already, or of several with the same weights, which share the work.
        folder: where weights are put for it: a disk that it sees too. Beside a server of its own that is the memory,
            if there is room, or else the run's folder.
        dtype: in which the server computes; `auto` is that of training's forward pass.
        devices: GPUs of the server that is started, which share the model; None is the first that training leaves free.
        memory: the share of a GPU's memory that the server may take, by default 0.45 where training is on the same one,
            or else what vLLM takes; on a processor GiB for its cache of keys.
        max_length: most tokens of a prompt and its response; None is what the data may ask for.
        requests: most responses that are asked for at the same time, by each process.
        timeout: seconds that the answer to one prompt may take.
        start_timeout: seconds that a server may take to start.
        host: address that the server that is started listens at; by default this machine alone can reach it.
        port: its port; None takes a free one.
        options: more arguments of vLLM's server, such as `tensor_parallel_size: 2`; null leaves one out.
    """

    runs_policy: ClassVar[bool] = False
    concurrent: ClassVar[bool] = True

    def __init__(
        self,
        python: str | None = None,
        url: str | list[str] | None = None,
        folder: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        devices: list[int] | None = None,
        memory: float | None = None,
        max_length: int | None = None,
        requests: int = 256,
        timeout: float = 1800.0,
        start_timeout: float = 900.0,
        host: str = "127.0.0.1",
        port: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if requests < 1 or timeout <= 0 or start_timeout <= 0 or (memory is not None and memory <= 0):
            raise UserError(
                f"VLLM: requests {requests}, timeout {timeout:g}, start_timeout {start_timeout:g}, memory {memory}: "
                "give more than 0"
            )
        self.urls = [url] if isinstance(url, str) else list(url or ())
        if self.urls and python is not None:
            raise UserError("VLLM: python is of a server to start, and url of one that runs; give one of the two")
        if self.urls and folder is None:
            raise UserError(
                "--model.engine.url: its server reads the weights from a folder that both sides see; give it by "
                "--model.engine.folder"
            )
        ignored = {"dtype": dtype != "auto", "devices": devices, "memory": memory, "port": port, "options": options}
        if self.urls and (wrong := next((name for name, given in ignored.items() if given), None)):
            raise UserError(f"--model.engine.{wrong}: of a server to start, and url names one that runs; set it there")
        self.python, self.folder, self.dtype, self.devices = python, folder, dtype, devices
        self.memory, self.max_length, self.requests = memory, max_length, requests
        self.timeout, self.start_timeout = timeout, start_timeout
        self.host, self.port, self.options = host, port, dict(options or {})
        self._clients = [Client(one, timeout) for one in self.urls]
        self._replicas: list[Replica] = []
        self._server: Server | None = None
        self._policy: CausalLM | None = None
        self._scratch = Path()
        self._version, self._run, self._model = 0, "", SERVED
        self._leads = self._up_to_date = self._exact = False

    def is_exact(self, policy: Policy) -> bool:
        return self._exact

    # -- start and stop ----------------------------------------------------------------------------------------------

    def start(self, policy: Policy, folder: Path, longest: int) -> None:
        policy = self._policy = check_policy(policy)
        hosts = all_gather(machine())
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        here, self._run = hosts.index(hosts[rank]), all_gather(uuid.uuid4().hex[:8])[0]
        computes = self._settle(policy, longest)
        if self.urls:
            self._leads, self._replicas = rank == 0, [Replica(client) for client in self._clients]
            self._model = all_or_none(self._prepare_shared)[0]
            return
        self._leads = here == rank
        self._exact = computes == computed_in(policy) == torch.float32
        found = all_or_none(lambda: find(self.python) if self._leads else None)[here]
        assert found is not None
        self._scratch = Path(all_or_none(lambda: str(self._make_scratch(policy, folder)) if self._leads else "")[here])
        model = base_of(policy)
        if model is None:
            self._publish(publish_model, "v0")
            model = str(self._scratch / "current")
        log_file = folder / ("vllm.log" if len(set(hosts)) == 1 else f"vllm-{socket.gethostname()}.log")
        trainers = hosts.count(hosts[rank])
        urls = all_or_none(lambda: self._serve(found, model, computes, trainers, log_file) if self._leads else "")
        self._replicas = [Replica(Client(urls[here], self.timeout))]
        self._up_to_date = not policy.backbone.adapted

    def _settle(self, policy: CausalLM, longest: int) -> torch.dtype:
        """Settle how long a row may be, and the dtype that a server of our own computes in."""
        self.room = min(self.max_length or longest, policy.positions or self.max_length or longest)
        return getattr(torch, self.dtype, None) or computed_in(policy)

    def _prepare_shared(self) -> str:
        """Look at the servers, and make a folder that they see; what they call their model. On the first process."""
        if not self._leads:
            return ""
        names = sorted({check_server(client) for client in self._clients})
        if len(names) > 1:
            raise UserError(f"--model.engine.url: the servers call their models {', '.join(names)}; give all one name")
        self._scratch = (Path(str(self.folder)).expanduser() / f"leyden-{self._run}").absolute()
        try:
            self._scratch.mkdir(parents=True)
        except OSError as error:
            problem = f"--model.engine.folder {self.folder}: {error.strerror}; give a folder to write to"
            raise UserError(problem) from None
        return names[0]

    def _make_scratch(self, policy: CausalLM, folder: Path) -> Path:
        """A new folder: in memory where there is room, or else in the run's."""
        if self.folder is not None:
            Path(self.folder).expanduser().mkdir(parents=True, exist_ok=True)
            place = Path(self.folder).expanduser()
        else:
            place = MEMORY if MEMORY.is_dir() and room_for(policy, MEMORY) else folder
            place.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="leyden-", dir=place)).resolve()

    def _serve(self, found: Found, model: str, computes: torch.dtype, trainers: int, log_file: Path) -> str:
        assert self._policy is not None and self.room is not None
        check_memory(self.memory, found.cpu)
        devices, share = None, None
        if not found.cpu:
            devices, share = devices_for(self.devices, trainers, self._policy.device.type == "cuda")
        memory = self.memory or share
        given = arguments(self._policy, found, computes, self.room, devices, memory) | self.options
        own, port = environment(found, devices, memory), self.port or free_port(self.host)
        self._server = Server(found, model, given, own, self.host, port, log_file, self._scratch)
        log.info("vLLM %s starts, which takes a minute or more; its log is %s", found.version, log_file)
        self._server.wait(self.start_timeout)
        return self._server.client.url

    def stop(self) -> None:
        for replica in self._replicas:
            if self.urls and self._leads and self._model.startswith(f"{SERVED}-{self._run}-"):
                with suppress(Unreachable, Refused):  # it goes on without us, and without our adapter
                    replica.client.post("/v1/unload_lora_adapter", {"lora_name": self._model}, timeout=10.0)
            replica.client.close()
        if self._server is not None:
            self._server.stop()
        if self._leads and self._scratch.name.startswith("leyden-"):
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._server, self._replicas, self._up_to_date = None, [], False
        self._version, self._model = 0, SERVED

    # -- weights -----------------------------------------------------------------------------------------------------

    def sync(self, policy: Policy) -> None:
        policy = self._policy = check_policy(policy)
        if self._up_to_date:  # it was started from these very weights
            self._up_to_date = False
            return
        self._version += 1
        if policy.backbone.adapted:
            if self.urls and base_of(policy) is None and self._version == 1:
                raise UserError(
                    "--model.engine.url: the frozen weights of this run are quantised in its own memory, and no server "
                    "elsewhere has them; leave url out, so that one is started from them"
                )
            self._model = f"{SERVED}-{self._run}-{self._version}"
            self._publish(publish_adapter, f"a{self._version}")
            self._tell(self._load_adapter)
            self._remove(f"a{self._version - 1}")
        else:
            self._publish(publish_model, f"v{self._version}")
            self._tell(self._reload)
            self._remove(f"v{self._version - 1}")

    def _publish(self, how: Callable[[CausalLM, Path, bool], None], name: str) -> None:
        """Write weights to a folder of this name, on the first process of each machine, and wait for it."""
        policy = self._policy
        assert policy is not None

        def publish() -> None:
            how(policy, self._scratch / name, self._leads)
            if self._leads and not name.startswith("a"):
                link = self._scratch / "next"
                link.symlink_to(name)
                os.replace(link, self._scratch / "current")  # what a server that has to be started again reads

        all_or_none(publish)

    def _tell(self, what: Callable[[Client], None]) -> None:
        """Have every server take over what was published; a problem of one process is raised on all."""

        def tell() -> list[bool]:
            if not self._leads:
                return []
            for replica in self._replicas:
                persist(replica, what, self._lives, self.start_timeout, alone=len(self._replicas) == 1)
            if not any(replica.is_up for replica in self._replicas):
                raise UserError(f"none of the {len(self._replicas)} servers answers any more; start them again")
            return [replica.is_up for replica in self._replicas]

        told = all_or_none(tell)  # of several servers, the first process's; of our own there is one, which has them now
        for replica, is_up in zip(self._replicas, told[0], strict=True):
            replica.is_up = is_up

    def _lives(self) -> bool:
        """Whether a server that does not answer may come back: one of our own, until its guard has given up."""
        return bool(self.urls) or self._scratch.is_dir()

    def _reload(self, client: Client) -> None:
        folder = self._scratch / f"v{self._version}"
        try:
            client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            if not client.post("/reset_prefix_cache").get("success"):
                raise UserError(f"{client.url}: its cache of keys could not be emptied, since requests are running")
        except Refused as refusal:
            raise not_taken_over(client, folder, refusal) from None

    def _load_adapter(self, client: Client) -> None:
        folder = self._scratch / f"a{self._version}"
        try:
            client.post("/v1/load_lora_adapter", {"lora_name": self._model, "lora_path": str(folder)})
        except Refused as refusal:
            if "already been loaded" not in refusal.reason:
                raise not_taken_over(client, folder, refusal) from None
        if self._version > 1:
            with suppress(Refused):  # it was started again since, and does not know that one
                client.post("/v1/unload_lora_adapter", {"lora_name": f"{SERVED}-{self._run}-{self._version - 1}"})

    def _remove(self, name: str) -> None:
        if self._leads:
            shutil.rmtree(self._scratch / name, ignore_errors=True)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: OnProgress | None = None,
    ) -> list[list[Response]]:
        groups = dict(one for few in self.stream(prompts, n, sampling, keys, on_progress) for one in few)
        return [groups[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: OnProgress | None = None,
    ) -> Iterator[list[tuple[int, list[Response]]]]:
        assert self._policy is not None
        asking = Requests(
            self._policy, self._replicas, self._model, self.requests, self._lives, self.start_timeout, self._again(),
            self.stop_strings,
        )  # fmt: skip
        return asking.stream(prompts, n, sampling, keys, on_progress or (lambda count: None))

    def servers(self) -> Sequence[Engine]:
        if len(self._replicas) < 2:
            return [self]
        single = [copy.copy(self) for _ in self._replicas]
        for one, replica in zip(single, self._replicas, strict=True):
            one._replicas = [replica]
        return [one for one in single if one._replicas[0].is_up]

    def _again(self) -> Callable[[Client], None] | None:
        """What makes a server that was started again ready; None where it is so from the start, since our own starts
        from the last weights."""
        if self._policy is not None and self._policy.backbone.adapted:
            return self._load_adapter
        return self._reload_again if self.urls else None

    def _reload_again(self, client: Client) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError(  # another process may be sampling there, from whichever weights it has
                f"{client.url} went away, and may have come back with other weights; --ckpt_path auto goes on"
            )
        self._reload(client)


def computed_in(policy: Policy) -> torch.dtype:
    """The dtype of training's forward pass: that of the weights, or of the autocast that is on."""
    kind = policy.device.type
    own: torch.dtype = getattr(policy, "dtype", torch.float32)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
