"""Where the host waits for a GPU, as torch tells it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def waits() -> Iterator[list[str]]:
    """A list that holds, after the block, each `file:line` at which the host has waited in it."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            places += [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
