"""Random numbers: one seed for a run, and the states of the global generators as a checkpoint holds them."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

EVALUATION_SEED = 0
"""Of all that is drawn to measure on: the same for every run, or runs could not be compared."""


def resolve_seed(seed: int | None) -> int:
    """The seed itself; for None that of Lightning's `seed_everything`, and 0 where nothing was seeded."""
    return seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED") or 0)


def rng_states() -> dict[str, Any]:
    """States of torch's, Python's and NumPy's global generators as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = numpy_state
    states = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """The inverse of `rng_states`."""
    torch.set_rng_state(states["torch"].cpu())
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
