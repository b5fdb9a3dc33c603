"""Where a server of a run's own runs, with which arguments, and which part of the machine it gets."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leyden.errors import UserError
from leyden.models.causal_lm import CausalLM
from leyden.models.engines.published import lora_room
from leyden.models.engines.server import Found

SERVED = "policy"
"""What a server of our own calls the model that it was started from."""
SHARED_GPU = 0.45
"""The share of a GPU's memory that a server takes by default where training is on the same one."""


def machine() -> str:
    """What tells this machine from others: its name, and what loopback addresses reach. Containers may share a name."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/net')} {Path('/etc/machine-id').read_text()}"
    except OSError:
        return socket.gethostname()


def devices_for(asked: Sequence[int] | None, trainers: int, cuda: bool) -> tuple[list[int] | None, float | None]:
    """GPUs of the server, and the share of their memory by default.

    Args:
        asked: what was asked for; else it is the first one that training leaves free.
        trainers: processes that train on this machine, each on one of the first.
        cuda: whether they do so on GPUs.

    Raises:
        UserError: a GPU that is not there.
    """
    there = torch.cuda.device_count()
    if asked is not None:
        if missing := [device for device in asked if device >= there]:
            raise UserError(
                f"--model.engine.devices {list(asked)}: there is no GPU {missing[0]}; {there} are visible, from 0 on"
            )
        return list(asked), SHARED_GPU if cuda and min(asked, default=0) < trainers else None
    if not there:
        return None, None
    return ([trainers], None) if cuda and trainers < there else ([0], SHARED_GPU if cuda else None)


def arguments(
    policy: CausalLM,
    found: Found,
    computes: torch.dtype,
    longest: int,
    devices: Sequence[int] | None,
    memory: float | None,
) -> dict[str, Any]:
    """Arguments of vLLM's server.

    Args:
        policy: what is served.
        found: the vLLM that serves it.
        computes: in this dtype.
        longest: most tokens of a prompt and its response.
        devices: its GPUs.
        memory: the share of their memory that it may take.
    """
    given: dict[str, Any] = {
        "served_model_name": SERVED,
        "dtype": str(computes).removeprefix("torch."),
        "max_model_len": longest,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "generation_config": "vllm",
        "seed": 0,
    }
    if policy.backbone.adapted:
        given |= {"enable_lora": True, "max_lora_rank": lora_room(policy), "max_loras": 2, "max_cpu_loras": 2}
    if found.cpu:
        # a seeded request whose prompt is cut in chunks ends the engine there
        given |= {"enforce_eager": True, "enable_chunked_prefill": False}
        given["max_num_batched_tokens"] = max(4096, 4 * longest)
    else:
        given["gpu_memory_utilization"] = memory
        given["tensor_parallel_size"] = len(devices) if devices else None
    if policy.source["trust_remote_code"]:
        given["trust_remote_code"] = True
    return given


def environment(found: Found, devices: Sequence[int] | None, memory: float | None) -> dict[str, str]:
    """Variables of its environment."""
    own = {
        "VLLM_SERVER_DEV_MODE": "1",  # weights are taken over by a command that it has only then
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if found.cpu:
        return own | {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(memory or 1))),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    if devices is not None:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        own["CUDA_VISIBLE_DEVICES"] = ",".join(str(n) if names == [""] else names[n] for n in devices)
    return own


def check_memory(memory: float | None, cpu: bool) -> None:
    """That an amount of memory can be what it says.

    Raises:
        UserError: GiB for a GPU, or a share for a processor.
    """
    if memory is not None and (memory > 1) is not cpu and memory != 1:
        what = "GiB, at least 1, since this vLLM runs on the processor" if cpu else "the share of a GPU, at most 1"
        raise UserError(f"--model.engine.memory {memory:g}: give {what}")
