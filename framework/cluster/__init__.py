"""Processes of a run on the machines of a Ray cluster.

Called by the Trainer through the strategies `RayDDP` and `RayFSDP2`, by class path, mostly from `--config ray`, and by
engines whose servers Ray places. May import the single files of `framework`; needs no Ray until it is used. Begin
reading at `launcher`, which starts the ranks; `ray` is what is said to Ray, `hosts` what runs in its processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.cluster.strategies import RayDDP, RayFSDP2

__all__ = ["RayDDP", "RayFSDP2"]

__getattr__ = lazy_exports(__name__, {"strategies": "RayDDP RayFSDP2"})
