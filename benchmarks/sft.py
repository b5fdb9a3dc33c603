"""Supervised fine-tuning, side by side with TRL: the same token ids, model, dtype, optimizer and examples a step.

    python benchmarks/sft.py --model MODEL_FOLDER --data ROWS

TRL runs with its defaults and at its best: gradient checkpointing off, best-fit packing; weights in bf16 with and
without autocast, the faster one counts.
"""

from __future__ import annotations

import argparse
from typing import Any

import contest
import sides

PACKED = {"gradient_checkpointing": False, "packing": True, "packing_strategy": "bfd"}
CONTESTANTS: dict[str, sides.Settings] = {
    contest.OURS: {},
    "trl, defaults": {},
    "trl, best, bf16 weights": PACKED | {"bf16": False},
    "trl, best, bf16 autocast": PACKED,
}


def leyden(options: argparse.Namespace) -> sides.Result:
    from leyden.algos import SFT
    from leyden.models import CausalLM

    policy = CausalLM(options.model, dtype=options.dtype, **sides.policy_options(options))
    return sides.fit(SFT(policy, optimizer=sides.adamw, lr_scheduler=None), options, passes=3)


def trl(options: argparse.Namespace, own: sides.Settings) -> sides.Result:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    trees = sides.read(options.trees)
    rows: list[dict[str, Any]] = [
        {
            "input_ids": tree.prompt + tree.responses[0],
            "completion_mask": [0] * len(tree.prompt) + [int(w) for w in tree.weights[0]],
        }
        for tree in trees
    ]
    own = {"completion_only_loss": True, "max_length": options.max_length} | own
    if own.get("packing"):  # as many tokens a step as the examples of one step have, in rows as long as allowed
        budget = options.batch_size * sum(map(len, trees)) / len(trees)
        own["max_length"] = max(max(map(len, trees)), min(options.max_length, round(budget)))
        own["per_device_train_batch_size"] = max(1, round(budget / own["max_length"]))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    return sides.trl_run(SFTTrainer, SFTConfig, model, rows, options, own)


def run(options: argparse.Namespace, own: sides.Settings | None) -> sides.Result:
    return leyden(options) if own is None else trl(options, own)


if __name__ == "__main__":
    contest.main(__file__, __doc__, CONTESTANTS, run, "instruction", 1024)
