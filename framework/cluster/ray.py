"""What is said to Ray: connecting to a cluster, and room on its machines by placement groups."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

from leyden.errors import UserError, first_line

Spread = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""Whether Ray places bundles on few machines or on many; a strict one fails where it cannot."""


def library() -> ModuleType:
    """Ray.

    Raises:
        UserError: it is not installed.
    """
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call after the end would start a cluster
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed: pip install 'leyden[ray]', here and on every machine of it") from None
    return ray  # type: ignore[no-any-return]


def connect(address: str) -> bool:
    """Join a cluster, unless this process is in one already; whether it was not.

    Args:
        address: HOST:PORT of its head; `auto` is $RAY_ADDRESS, or the one that runs on this machine.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    ray = library()
    if ray.is_initialized():
        return False
    before, head = signal.getsignal(signal.SIGTERM), os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = head.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10.0).close()
        ray.init(address=address, logging_level=logging.ERROR, configure_logging=True)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"no Ray cluster at '{address}' that this machine belongs to ({first_line(error)[:160]}); start one by "
            "ray start --head, join it by ray start --address HOST:6379, or give its address"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray takes it, and the run has its own
    return True


def place(bundles: Sequence[Mapping[str, float]], spread: Spread, seconds: float, what: str, where: str) -> Any:
    """A placement group of Ray: room for processes, each in a bundle of resources on one machine.

    Args:
        bundles: what each needs, such as `{"CPU": 1, "GPU": 1}`.
        spread: on few machines or many.
        seconds: that it may take until there is room.
        what: is placed, in words.
        where: the option that asks for less.

    Raises:
        UserError: the cluster has no room for it in that time.
    """
    ray = library()
    from ray.util import placement_group, remove_placement_group

    group = placement_group([dict(bundle) for bundle in bundles], strategy=spread)
    if group.wait(seconds):
        return group
    there, free = ray.cluster_resources(), ray.available_resources()
    remove_placement_group(group)
    names = [name for name in ("CPU", "GPU") if any(name in bundle for bundle in bundles)]
    asked, there, free = (
        ", ".join(f"{counts.get(name, 0):g} {name}" for name in names)
        for counts in ({name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}, there, free)
    )
    raise UserError(
        f"Ray found no room for {what} within {seconds:g} s: asked for {asked} ({spread}), the cluster has {there}, "
        f"free are {free}; give it more, or less {where}"
    )


def actor(kind: type, group: Any, index: int, bundle: Mapping[str, float], *arguments: Any) -> Any:
    """An object of a class in a process of its own, in a bundle of a placement group; it ends with this process."""
    ray = library()
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    remote = ray.remote(kind).options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        max_concurrency=4,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    )
    return remote.remote(*arguments)


def release(actors: Sequence[Any], group: Any) -> None:
    """End objects, and give their room back."""
    ray = library()
    if not ray.is_initialized():
        return
    from ray.util import remove_placement_group

    for one in actors:
        ray.kill(one)
    if group is not None:
        remove_placement_group(group)


def result(reference: Any, what: str, seconds: float | None = None) -> Any:
    """What a call of such an object returns.

    Raises:
        UserError: what it raised, or its process has gone.
    """
    ray = library()
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except ray.exceptions.RayActorError as error:
        raise UserError(f"{what}: Ray lost its process or its machine ({first_line(error)[:160]})") from None
