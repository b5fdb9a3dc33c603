"""Runs a server for another process, again where it ended by itself, and ends it with that process, however that ends:
also killed outright.

Run by file, in the Python of that process: `python guard.py PARENT FOLDER HOST PORT COMMAND…`. It imports the standard
library alone, so that it starts at once and holds hardly any memory.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

PATIENCE = 15.0
"""Seconds that the server has to end by itself."""
EVERY = 0.1
"""Seconds between two looks at the parent."""


def run(parent: int, folder: str, address: tuple[str, int], command: list[str]) -> int:
    """Run a command as the leader of its own group of processes, until the parent ends or it is told to stop; then
    remove a folder. Where the command ends before, it is run again, unless nothing listened at its address in between:
    what cannot start would not the next time either.

    Args:
        parent: id of the process that it is run for; 0 for a guard, which started this one and may be killed outright.
        folder: what is removed at the end; none for an empty name.
        address: host and port where the command listens once it has started.
        command: to run.

    Returns:
        The exit status of the command, or minus the signal that ended it.
    """
    patience = PATIENCE if parent else PATIENCE - 5  # done before the guard of this one has no more
    parent, stopping = parent or os.getppid(), list[int]()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stopping.append(number))

    def wanted() -> bool:
        return not stopping and os.getppid() == parent

    status, listened = 0, True
    try:
        while listened and wanted():
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            listened = False
            try:
                while server.poll() is None and wanted():
                    listened = listened or accepts(address)
                    time.sleep(EVERY)
            finally:
                end(server, patience)
            status = server.returncode
            if listened and wanted():
                print(f"guard: the server ended with status {status}, and is started again", flush=True)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return status


def accepts(address: tuple[str, int]) -> bool:
    """Whether anything takes connections there."""
    try:
        socket.create_connection(address, timeout=1.0).close()
    except OSError:
        return False
    return True


def end(server: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    """End a server with all processes that it has started: asked first, and killed after so many seconds."""
    deadline = time.monotonic() + patience
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
    given = sys.argv[1:]
    code = run(int(given[0]), given[1], (given[2], int(given[3])), given[4:])
    raise SystemExit(code if code >= 0 else 128 - code)  # as a shell says it
