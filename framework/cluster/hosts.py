"""What runs in a process of Ray for one rank: it starts the rank's command, hands on what it says, and ends with it.

It imports the standard library alone, so that it holds hardly any memory beside the rank.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PARENT = "LEYDEN_RAY_PARENT"
"""Variable with the id of the process that a rank ends with."""
OF_A_MACHINE = "CUDA_VISIBLE_DEVICES|RAY_.*|HOSTNAME|TMPDIR|XDG_RUNTIME_DIR|_"
"""Names of variables that a rank does not get from the first one."""


class Ended(NamedTuple):
    """How a rank ended."""

    status: int
    said: str
    """The last line of its errors"""


class Host:
    """The process of Ray beside a rank."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def gpus(self) -> str:
        """Names of the GPUs that Ray gave to this process, as CUDA_VISIBLE_DEVICES has them."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def run(self, command: Sequence[str], folder: str, environment: Mapping[str, str]) -> Ended:
        """Run a command to its end.

        Args:
            command: of the rank.
            folder: the current one of the rank.
            environment: the variables of the first rank, but for those of its machine, and those of this rank.
        """
        given = {name: value for name, value in environment.items() if not re.fullmatch(OF_A_MACHINE, name)}
        last = deque[str](maxlen=1)
        try:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | given | {PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            return Ended(127, f"{error.filename}: {error.strerror}")
        assert self.process.stderr is not None
        for line in self.process.stderr:
            sys.stderr.write(line)
            last.extend([line.strip()] if line.strip() else [])
        return Ended(self.process.wait(), last[0].removeprefix("error: ") if last else "it says nothing")

    def signal(self, number: int) -> None:
        """Send the rank a signal."""
        if self.process is not None:
            self.process.send_signal(number)
