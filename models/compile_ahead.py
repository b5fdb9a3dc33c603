"""Kernels of FlexAttention, compiled before the first step for every length that rows will have.

What is compiled in beside the length is taken down from a forward on a few tokens. Then only attention runs, on random
queries, keys and values: the model as a whole would take far longer, and its memory.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from leyden.batch.forest import Batch, pack
from leyden.batch.tree import Tree
from leyden.models.attention.flex import Call, Flex, compiled_lengths, give_up_dynamic, recording
from leyden.models.attention.forest import Forest
from leyden.policy.policy import Policy, eval_mode


def uses_flex(policy: Policy, batch: Batch, attention: str) -> bool:
    """Whether attention of any layer will run as compiled FlexAttention, which is for GPUs alone.

    Args:
        policy: run on the batch once, without gradients.
        attention: the policy's.
    """
    if batch.tokens.device.type != "cuda" or attention == "rows":
        return False
    with recording() as calls, eval_mode(policy), torch.no_grad():
        policy(batch, ())
    return bool(calls)


def compile_calls(calls: Collection[Call], sizes: tuple[int, int], device: torch.device) -> None:
    """Run each of these calls once for rows of each length, with its backward pass where gradients are recorded.

    Args:
        sizes: fewest and most tokens of a row.
    """
    lengths = compiled_lengths(*sizes)
    try:
        _compile_all(calls, lengths, device)
    except Exception as error:  # of a backward pass
        if not give_up_dynamic(error):
            raise
    if compiled_lengths(*sizes) != lengths:  # torch could not compile for all lengths at once
        _compile_all(calls, compiled_lengths(*sizes), device)


def _compile_all(calls: Collection[Call], lengths: Collection[int], device: torch.device) -> None:
    for length in lengths if calls else ():
        forest = Forest(pack([Tree([0] * length, [])]).to(device), Flex.name)
        for call in calls:
            _compile(call, forest, length, device)


def _compile(call: Call, forest: Forest, length: int, device: torch.device) -> None:
    with torch.set_grad_enabled(call.gradients), torch.autocast(device.type, enabled=call.autocast):
        query, key, value = (
            torch.randn(1, heads, length, width, dtype=call.dtype, device=device, requires_grad=needed)
            for (heads, width), needed in zip(call.shapes, call.needs_gradient, strict=True)
        )
        out = Flex().attend(query, key, value, forest, call.args)
        if out.requires_grad:
            torch.autograd.grad(out.float().sum(), [x for x in (query, key, value) if x.requires_grad])
