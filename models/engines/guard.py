"""Runs a server for another process and ends it with that process, however that ends: also killed outright.

Run by file, in the Python of the server, which may have no Leyden: `python guard.py PARENT FOLDER COMMAND…`.
It imports the standard library alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

PATIENCE = 15.0
"""Seconds that the server has to end by itself."""
EVERY = 0.3
"""Seconds between two looks at the parent."""


def run(parent: int, folder: str, command: list[str]) -> int:
    """Run a command as the leader of its own group of processes, until it or the parent ends; then remove a folder.

    Args:
        parent: id of the process that it is run for.
        folder: what is removed at the end; none for an empty name.
        command: to run.

    Returns:
        The exit status of the command.
    """
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stopping.append(number))
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while server.poll() is None and not stopping and os.getppid() == parent:
            time.sleep(EVERY)
    finally:
        end(server)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return server.returncode or 0


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server with all processes that it has started: asked first, and killed after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        while time.monotonic() < deadline and group_lives(server):
            time.sleep(0.05)
    server.wait()


def group_lives(server: subprocess.Popen[bytes]) -> bool:
    """Whether any process of its group is left."""
    server.poll()  # or it would stay as a zombie, which counts
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(run(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
