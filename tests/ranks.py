"""Two processes that stay alive for the whole test session and run functions as the ranks of one gloo group."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def _serve(connection: Connection, environment: dict[str, str], folder: str) -> None:
    import sys

    os.environ.update(environment)
    sys.path.insert(0, folder)
    import torch

    torch.set_num_threads(1)
    while (task := connection.recv()) is not None:
        module, name, arguments, own = task
        os.environ.update(own)
        try:
            connection.send((True, getattr(import_module(module), name)(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    """`ranks(function, *arguments)` runs a top-level function on every rank and returns what each returned.

    The processes are started with the first call, which takes some seconds, and anew after one that failed.

    Args:
        world: how many there are.
        method: of starting them, as `multiprocessing` calls it.
    """

    def __init__(self, world: int = 2, method: str = "spawn") -> None:
        self.world, self.method = world, method
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context(self.method)
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world),
                "LOCAL_WORLD_SIZE": str(self.world),
                "NODE_RANK": "0",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            process: Any = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(theirs, environment, str(Path(__file__).parent)), daemon=True
            )
            process.start()
            self.connections.append(mine)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
        if not self.processes:
            self._start()
        own = {"LEYDEN_CACHE": os.environ["LEYDEN_CACHE"]}  # every test has one of its own
        for connection in self.connections:
            connection.send((function.__module__, function.__name__, arguments, own))
        answers, failures = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(timeout):
                self._kill()
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            ok, value = connection.recv()
            answers.append(value)
            failures += [] if ok else [f"rank {rank} failed:\n{value}"]
        if failures:  # what they were in the middle of would meet the next function
            self._kill()
            raise AssertionError("\n".join(failures))
        return answers

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.connections, self.processes = [], []

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.send(None)
            process.join(10)
        self._kill()
