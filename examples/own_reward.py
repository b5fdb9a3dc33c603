"""Learn from a reward of your own: the model answers, a function says how good that was. Run fine_tune.py first."""

import csv
from functools import partial

from lightning import seed_everything
from torch.optim import AdamW

from leyden.algos import GRPO
from leyden.datamodules import PromptData
from leyden.datamodules.sample import write_sample
from leyden.models import CausalLM
from leyden.policy import Sampling
from leyden.trainer import Trainer


def formal(samples):
    """1 for an answer that ends formally, in 니다, less 1 for every 30 characters beyond the first 30.

    A sample has the conversation (`messages`), the answer (`response`), whether it came to its end (`finished`) and the
    row of the file that the prompt is from (`row`), for rewards that look something up there.
    """
    answers = [sample.response.rstrip(" .!?") for sample in samples]
    return [answer.endswith("니다") - max(0, len(answer) - 30) / 30 for answer in answers]


seed_everything(0)
policy = CausalLM("runs/fine-tuned/export")
data = PromptData(write_sample("prompts.jsonl", "prompts", rows=300), batch_size=16, val_size=16)

# Four answers to each of 16 prompts are a rollout, which two optimizer steps learn from. An answer is judged against
# the other three to its prompt, so no value function is needed.
algorithm = GRPO(
    policy,
    reward=formal,
    samples=4,
    minibatches=2,
    kl_coef=0.02,
    sampling=Sampling(max_new_tokens=48),
    optimizer=partial(AdamW, lr=1e-4),
)

# An epoch is a rollout.
Trainer("runs/formal", max_epochs=8, gradient_clip_val=1.0, check_val_every_n_epoch=4).fit(algorithm, data)

with open("runs/formal/metrics.csv", encoding="utf-8") as stream:
    rewards = [float(row["rollout/reward"]) for row in csv.DictReader(stream) if row["rollout/reward"]]
print(f"reward of the first rollout {rewards[0]:.2f}, of the last {rewards[-1]:.2f}")
