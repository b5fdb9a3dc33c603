"""The peer's side of ppo.py: TRL's PPOTrainer, which its releases had until 1.12.0. Imports nothing of Leyden."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rule import rule
from sides import RATE, Result, Settings, now


class Clocks:
    """Seconds of every rollout, by what they went into."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.parts = options, {"generation": 0.0, "reward": 0.0, "scoring": 0.0}
        self.rollouts: list[dict[str, float]] = []
        self.began = now(options)

    def timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = now(self.options)
            out = function(*args, **kwargs)
            self.parts[name] += now(self.options) - began
            return out

        return call

    def end(self) -> None:
        """A rollout is trained on."""
        at = now(self.options)
        took = at - self.began
        self.rollouts.append(self.parts | {"seconds": took, "update": took - sum(self.parts.values())})
        self.parts, self.began = dict.fromkeys(self.parts, 0.0), at


def trl(options: argparse.Namespace, own: Settings) -> Result:
    """PPO with a copy of the model as reference and another as value function, all of both trained.

    Its reward must be a model. Here `get_reward` gives the rule's score of the text where it is asked for the reward,
    so that no forward is spent on it. Its optimizer steps once an epoch, however many minibatches there are, because
    accumulation is counted over the whole rollout; counting it anew lets every minibatch step, as in the other side.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    others = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # or sampled ends of text would be taken for padding
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    dtype = getattr(torch, options.dtype)
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    value = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=dtype)
    clocks = Clocks(options)

    class Rule(torch.nn.Module):
        """Stands where the reward model does."""

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clocks.began = now(options)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clocks.end()

    def score(model: Any, ids: Any, pad: int, context: int) -> Any:
        texts = tokenizer.batch_decode(ids[:, context:], skip_special_tokens=True)
        return None, torch.tensor([rule(text) for text in texts], device=ids.device), None

    values = ppo_trainer.get_reward
    timed_score, timed_values = clocks.timed("reward", score), clocks.timed("scoring", values)
    ppo_trainer.get_reward = lambda model, *rest: (timed_score if isinstance(model, Rule) else timed_values)(
        model, *rest
    )
    ppo_trainer.batch_generation = clocks.timed("generation", ppo_trainer.batch_generation)
    plain, looked = ppo_trainer.forward, clocks.timed("scoring", ppo_trainer.forward)
    ppo_trainer.forward = lambda *rest: (plain if torch.is_grad_enabled() else looked)(*rest)
    prompts = json.loads(Path(options.trees).read_text(encoding="utf-8"))
    rows = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])
    settings = {
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "per_device_train_batch_size": options.batch_size // options.minibatches,
        "gradient_accumulation_steps": options.minibatches,
        "num_mini_batches": options.minibatches,
        "num_ppo_epochs": options.epochs,
        "total_episodes": options.batch_size * (options.warmup + options.steps),
        "response_length": options.tokens,
        "temperature": 1.0,
        "kl_coef": 0.05,
        "num_sample_generations": 0,
        "missing_eos_penalty": None,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": options.device == "cpu",
        "dataloader_pin_memory": options.device != "cpu",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, **(settings | own)),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=Rule(),
            value_model=value,
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[Watch()],
        )
        trainer.accelerator.gradient_accumulation_steps = 1
        steps: list[int] = []
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
        trainer.train()
    return {"rollouts": clocks.rollouts, "optimizer_steps": len(steps)}
