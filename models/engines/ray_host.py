"""A vLLM server in a process that Ray has placed: it starts there, listens at that machine's address, and ends with it.

It imports neither models nor transformers, so that it holds little memory beside the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leyden.errors import UserError
from leyden.models.engines.server import Found, Server, find, free_port


class ServerHost:
    """The process of Ray beside a server."""

    def __init__(self, address: str | None = None) -> None:
        from leyden.cluster import ray

        self.address = address or str(ray.library().util.get_node_ip_address())
        self.server: Server | None = None

    def find(self, python: str | None, folder: str) -> Found:
        """The vLLM of this machine.

        Args:
            python: its Python, or the folder of its environment.
            folder: where weights are put, which this machine has to see.

        Raises:
            UserError: there is none, or the folder is not there.
        """
        if not Path(folder).is_dir():
            raise UserError(
                f"--model.engine.folder: {self.address}, where Ray placed a server, does not see {folder}; give a "
                "folder on a disk of all machines"
            )
        return find(python)

    def serve(
        self,
        found: Found,
        model: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        files: tuple[str, str | None],
        seconds: float,
    ) -> str:
        """Start the server; its url.

        Args:
            found: what it runs in.
            model: folder or hub name that it is started from.
            arguments: of vLLM's server.
            environment: variables beside this process's own.
            files: its log, and a folder that is removed with it.
            seconds: that it may take to start.

        Raises:
            UserError: it does not start.
        """
        log_file, scratch = Path(files[0]), Path(files[1]) if files[1] else None
        port = free_port(self.address)
        self.server = Server(
            found, model, arguments, environment, self.address, port, log_file, scratch, killed_with_us=True
        )
        self.server.wait(seconds)
        return self.server.client.url

    def stop(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.stop()
