"""Engines other than the policy itself: vLLM behind a server, on a Ray cluster, or in this process.

Called by algorithms through `leyden.policy.Engine`, by class path, mostly from `--config vllm`. May import the
framework; needs no vLLM itself. Begin reading at `vllm`, the engine; `server` starts and ends a server of its own,
`client` speaks to one, `published` is what weights travel by; `served_model` is a teacher behind a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.models.engines.colocated import ColocatedVLLM
    from leyden.models.engines.ray_vllm import RayVLLM
    from leyden.models.engines.served_model import ServedModel
    from leyden.models.engines.vllm import VLLM

__all__ = ["VLLM", "ColocatedVLLM", "RayVLLM", "ServedModel"]

__getattr__ = lazy_exports(
    __name__, {"vllm": "VLLM", "colocated": "ColocatedVLLM", "ray_vllm": "RayVLLM", "served_model": "ServedModel"}
)
