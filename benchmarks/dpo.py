"""Direct preference optimisation, side by side with TRL: the same pairs, model, dtype, optimizer and pairs a step.

    python benchmarks/dpo.py --model MODEL_FOLDER --data PAIRS

Both compute the reference's log-probs in every step. TRL runs with its defaults and at its best: gradient
checkpointing off, pairs of similar length together; weights in bf16 with and without autocast, the faster one counts.
Tokens are those that are read where no prompt is shared: prompt + chosen + prompt + rejected, for both sides.
"""

from __future__ import annotations

import argparse

import contest
import sides

CONTESTANTS = contest.FOR_PAIRS
BETA = 0.1


def leyden(options: argparse.Namespace) -> sides.Result:
    from leyden.algos import DPO
    from leyden.models import CausalLM
    from leyden.objectives import Sigmoid

    policy = CausalLM(options.model, dtype=options.dtype, **sides.policy_options(options))
    algorithm = DPO(policy, objective=Sigmoid(beta=BETA), optimizer=sides.adamw, lr_scheduler=None)
    return sides.fit(algorithm, options, passes=4)


def trl(options: argparse.Namespace, own: sides.Settings) -> sides.Result:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt_ids": tree.prompt,
            "chosen_ids": tree.responses[0],
            "rejected_ids": tree.responses[1],
            "length": len(tree.prompt) + max(map(len, tree.responses)),
        }
        for tree in sides.read(options.trees)
    ]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    own = {"beta": BETA, "max_length": options.max_length} | own
    return sides.trl_run(DPOTrainer, DPOConfig, model, rows, options, own)


def run(options: argparse.Namespace, own: sides.Settings | None) -> sides.Result:
    return leyden(options) if own is None else trl(options, own)


if __name__ == "__main__":
    contest.main(__file__, __doc__, CONTESTANTS, run, "preference", 512)
