"""Evaluate a finished model on questions that nothing was trained on. Run fine_tune.py first."""

from lightning import seed_everything

from leyden.algos import SFT
from leyden.datamodules import Evaluation, InstructionData
from leyden.datamodules.sample import write_sample
from leyden.models import CausalLM
from leyden.policy import Sampling
from leyden.rewards import Gold
from leyden.trainer import Trainer

seed_everything(0)

# What is asked, how answers are sampled, who scores them, and which model this one is held against. `Gold` knows the
# answers to generated questions: 0 for a wrong one, 1 for a right one, up to 2 for a polite and brief one.
evaluation = Evaluation(
    write_sample("heldout.jsonl", "prompts", rows=60, split="heldout"),
    reward=Gold(),
    reference=CausalLM("tiny"),
    sampling=Sampling(max_new_tokens=48, seed=0),
)

# The loss is that of held-out answers. Without a folder, a Trainer writes nothing.
rows = write_sample("answers.jsonl", "instruction", rows=100, split="heldout")
data = InstructionData("chat.jsonl", val_path=rows)
trainer = Trainer(evaluator=evaluation, enable_progress_bar=False)
trainer.validate(SFT(CausalLM("runs/fine-tuned/export")), data, verbose=False)

for name in ("val/loss", "eval/reward", "eval/win_rate", "eval/kl", "eval/length"):
    print(f"{name:14} {float(trainer.callback_metrics[name]):.3f}")

# Runs that evaluated while they trained are compared by the command `leyden compare runs`.
