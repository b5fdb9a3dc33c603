"""Align a model to preferences: pairs of a better and a worse answer train it directly. Run fine_tune.py first."""

import csv
from functools import partial

from lightning import seed_everything
from torch.optim import AdamW

from leyden.algos import DPO
from leyden.datamodules import Evaluation, PreferenceData
from leyden.datamodules.sample import write_sample
from leyden.models import CausalLM
from leyden.objectives import Sigmoid
from leyden.policy import Sampling
from leyden.rewards import Gold
from leyden.trainer import Trainer

seed_everything(0)

# Rows of prompt, chosen and rejected; one label in ten is wrong, as people's are. Any other form that pairs or rankings
# come in is recognised, and `leyden data check --kind preference FILE` says what it is read as.
data = PreferenceData(write_sample("pairs.jsonl", "preference", rows=500))

# The policy is also its own reference: a frozen copy is made before the first step. β says how far it may move away.
policy = CausalLM("runs/fine-tuned/export")
algorithm = DPO(policy, objective=Sigmoid(beta=0.1), optimizer=partial(AdamW, lr=1e-4))

# The evaluator asks questions before and after training, so the run says what it was good for.
questions = write_sample("heldout.jsonl", "prompts", rows=60, split="heldout")
evaluation = Evaluation(questions, reward=Gold(), sampling=Sampling(max_new_tokens=48, seed=0))
trainer = Trainer("runs/aligned", evaluator=evaluation, gradient_clip_val=1.0, num_sanity_val_steps=-1)
trainer.fit(algorithm, data)

with open("runs/aligned/metrics.csv", encoding="utf-8") as stream:
    rows = list(csv.DictReader(stream))
for name in ("val/accuracy", "eval/reward", "eval/kl"):
    values = [float(row[name]) for row in rows if row[name]]
    print(f"{name:14} {values[0]:.3f} before, {values[-1]:.3f} after")

# The same data trains a reward model: RewardModel in the place of DPO, without an objective and an evaluator.
