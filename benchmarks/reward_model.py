"""Reward models, side by side with TRL: the same pairs, model, head, dtype, optimizer and pairs a step.

    python benchmarks/reward_model.py --model MODEL_FOLDER --data PAIRS

TRL runs with its defaults and at its best: gradient checkpointing off, pairs of similar length together; weights in
bf16 with and without autocast, the faster one counts. Tokens are those that are read where no prompt is shared:
prompt + chosen + prompt + rejected, for both sides.
"""

from __future__ import annotations

import argparse
from typing import Any

import contest
import sides

CONTESTANTS = contest.FOR_PAIRS


def set_head(head: Any) -> None:
    """The same first weights on both sides."""
    import torch

    with torch.no_grad():
        values = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
        head.weight.copy_(values * (head.weight.shape[1] + 1) ** -0.5)


def leyden(options: argparse.Namespace) -> sides.Result:
    from leyden.algos import RewardModel
    from leyden.models import CausalLM

    policy = CausalLM(options.model, dtype=options.dtype, **sides.policy_options(options))
    algorithm = RewardModel(policy, optimizer=sides.adamw, lr_scheduler=None)
    return sides.fit(algorithm, options, passes=3, head=False, start=lambda a: set_head(a.policy.heads["score"]))


def trl(options: argparse.Namespace, own: sides.Settings) -> sides.Result:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    trees = sides.read(options.trees)
    rows = [
        {
            "chosen_ids": tree.prompt + tree.responses[0],
            "rejected_ids": tree.prompt + tree.responses[1],
            "length": len(tree.prompt) + max(map(len, tree.responses)),
        }
        for tree in trees
    ]
    dtype = getattr(torch, options.dtype)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=dtype)
    set_head(model.score)
    used = {token for tree in trees for response in tree.responses for token in response[-1:]}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # a row's score is read before its padding, so a pad token that ends responses would be taken for padding
    free = next(i for i in (tokenizer.pad_token_id, *tokenizer.all_special_ids) if i is not None and i not in used)
    own = {"max_length": options.max_length, "pad_token": tokenizer.convert_ids_to_tokens(free)} | own
    return sides.trl_run(RewardTrainer, RewardConfig, model, rows, options, own)


def run(options: argparse.Namespace, own: sides.Settings | None) -> sides.Result:
    return leyden(options) if own is None else trl(options, own)


if __name__ == "__main__":
    contest.main(__file__, __doc__, CONTESTANTS, run, "preference", 512)
