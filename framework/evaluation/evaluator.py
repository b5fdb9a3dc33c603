"""Asks a policy the same held-out questions before, during and after training, whatever it is trained by."""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from leyden.batch.tree import Tree
from leyden.data.chat_template import Template
from leyden.distributed import gathered, share
from leyden.errors import UserError
from leyden.evaluation import metrics as answers
from leyden.evaluation.evaluation_pass import Row, answered, compare, evaluating, text_loss
from leyden.evaluation.looks import Looks
from leyden.fingerprint import of_text, of_weights
from leyden.lightning_loop import accumulating
from leyden.on_policy.rollout_loader import Prompt
from leyden.policy.policy import Policy, Reference, Sampling
from leyden.policy.reference import Other, frozen
from leyden.rewards.reward import Reward, attach, name_of
from leyden.rng import MEASURED
from leyden.run.progress import Progress
from leyden.run.tracker import Tracker
from leyden.sharding import assembled

log = logging.getLogger("leyden")
SAMPLING = Sampling(max_new_tokens=256, temperature=1.0, seed=MEASURED)


class Evaluator(Callback, ABC):
    """Logs `eval/*`, the same for every algorithm: at the start, with every validation, and at the end.

    Every prompt is answered once, with noise that depends on the prompt alone, so that runs and moments are compared on
    equal terms. The reference is the model that training starts from, or the algorithm's own; its answers are sampled
    once and kept in checkpoints. A subclass says what the prompts are.

    Args:
        reward: scores answers; None is the reward that is trained on, where there is one.
        reference: another model to hold the policy against, with the same tokenizer: needed where a finished model is
            measured.
        sampling: how answers are sampled, with seed 0 unless one is given. KL and entropy are those of the distribution
            at this temperature.
        every_n_steps: optimizer steps between two looks, beside those of validations.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        reference: Policy | None = None,
        sampling: Sampling = SAMPLING,
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"--eval.every_n_steps {every_n_steps}: give 1 or more, or leave it out")
        self.sampling, self.every_n_steps = replace(sampling, seed=sampling.seed or 0), every_n_steps
        self._reward, self._other = reward, reference
        self._reference: Reference | None = None
        self._prompts: list[Prompt] | None = None
        self._text: list[Tree] = []
        self._theirs: dict[int, Row] = {}
        """The reference's answers, by the number of the prompt."""
        self._known: dict[str, Any] = {}
        """What a checkpoint held."""
        self._at = -1
        """The optimizer step of the latest look."""
        self._looks = Looks(None)

    # -- what a subclass says ----------------------------------------------------------------------------------------

    @abstractmethod
    def prompts(self, template: Template) -> list[Prompt]:
        """The prompts, each with a number of its own, in the order in which they are shown."""

    def text(self, template: Template) -> list[Tree]:
        """General text, to see what the model forgets: trees without prompts. None by default."""
        return []

    def facts(self) -> dict[str, Any]:
        """Where what is read comes from, for evaluation.json: `prompts` and `text`."""
        return {}

    # -- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "predict":
            return
        name = type(pl_module).__name__
        if pl_module.predicts == "scores":
            raise UserError(f"--eval: {name} scores answers and gives none; leave the evaluation out")
        if self.reward(pl_module) is None:
            raise UserError(
                f"--eval.reward: missing; {name} has no reward of its own to score answers by: add --eval.reward Gold, "
                "ModelReward or a class of yours"
            )
        pl_module.when_built.append(lambda: self._build(pl_module))

    def _build(self, module: Any) -> None:
        """Make the reference and the reward, before the weights of a checkpoint arrive."""
        attach(self._reward, module.policy)
        if self._other is not None:
            self._reference = Other(self._other, module.policy)
            module.spread(self._other)
        elif module.trainer.state.fn == "fit" and not module.compares:
            self._reference = frozen(module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept = trainer.is_global_zero and not trainer.fast_dev_run
        self._looks = Looks(Path(trainer.default_root_dir) if kept else None)
        if trainer.ckpt_path is not None:
            return self._looks.cut(self._at)
        self._read(trainer, pl_module)
        self._looks.begin(self._facts(pl_module))
        self._say(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due and not accumulating(trainer) and self._at != trainer.global_step:
            self._say(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log_dict(self.look(trainer, pl_module), logger=False)

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._at != trainer.global_step:
            self._say(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        theirs = list(self._theirs.values()) or self._known.get("reference", [])
        return {"at": self._at, "prompts": self._mark() or self._known.get("prompts", ""), "reference": theirs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._known, self._at = state_dict, int(state_dict["at"])

    def _say(self, trainer: Trainer, module: Any) -> None:
        """Look outside of a validation: show the measures, and let nobody take the time for that of steps."""
        began, shown = time.monotonic(), trainer.progress_bar_callback
        found = self.look(trainer, module)
        if isinstance(shown, Progress):
            shown.measures(trainer, found)
        for part in (module, *trainer.callbacks):  # type: ignore[attr-defined]
            if (pause := getattr(part, "pause", None)) is not None:
                pause(time.monotonic() - began)

    # -- the look ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, trainer: Trainer, module: Any) -> dict[str, float]:
        """Answer, score and measure: logged and given back as eval/…, the same on every process."""
        self._read(trainer, module)
        prompts, reference = share(self._prompts or [], trainer), self._compared(module)
        whole = assembled(module), assembled(reference or nn.Module())
        with evaluating(module), whole[0], whole[1], trainer.precision_plugin.forward_context():
            mine = answered(
                trainer, module.policy, prompts, self.sampling, self.reward(module), getattr(module, "engine", None)
            )
            self._meet(trainer, module, prompts, mine)
            compare(module, prompts, mine, reference, self.sampling.temperature or 1.0)
            losses = text_loss(module, share(self._text, trainer))
        for row in mine:
            if (other := self._theirs.get(row["row"])) is not None:
                row |= {"reference": other["response"], "reference_reward": other["reward"]}
        rows, text = gathered(mine, trainer), gathered([losses], trainer)
        found = {f"eval/{name}": value for name, value in answers.measured(rows, text).items()}
        self._at = trainer.global_step
        hidden = ("tokens", "kl", "entropy")
        shown = [{"step": self._at} | {k: v for k, v in row.items() if k not in hidden} for row in rows]
        self._looks.add(shown)
        for logger in trainer.loggers:
            logger.log_metrics(found, step=self._at - 1)
            if isinstance(logger, Tracker):
                logger.samples(shown)
        return found

    def reward(self, module: Any) -> Any:
        """What scores answers; None where nothing does."""
        found = self._reward if self._reward is not None else getattr(module, "reward", None)
        return found.to(module.device) if isinstance(found, nn.Module) else found

    def _meet(self, trainer: Trainer, module: Any, prompts: Sequence[Prompt], mine: list[Row]) -> None:
        """Have the reference's answers: its own, those of the policy before training, or what a checkpoint knows."""
        reference = self._compared(module)
        if self._theirs or reference is None:
            return
        if self._known.get("prompts") == self._mark():
            self._theirs = {row["row"]: row for row in self._known["reference"]}
        elif isinstance(reference, Other) and (self._other or module.has_other):
            theirs = answered(trainer, reference.policy, prompts, self.sampling, self.reward(module))
            self._theirs = {row["row"]: row for row in gathered(theirs, trainer)}
        elif trainer.global_step == 0:
            self._theirs = {row["row"]: dict(row) for row in gathered(mine, trainer)}

    def _compared(self, module: Any) -> Reference | None:
        """What the policy is held against; None where that would be the policy itself."""
        if self._reference is not None:
            return self._reference.to(module.device)
        known = module.compares and (module.trainer.state.fn == "fit" or module.has_other)
        return module.reference if known else None

    # -- what is looked at -------------------------------------------------------------------------------------------

    def _read(self, trainer: Any, module: Any) -> None:
        """Read prompts and text, once."""
        if self._prompts is not None:
            return
        template = getattr(trainer.datamodule, "template", None) or Template(module.policy.tokenizer)
        self._prompts, self._text = self.prompts(template), self.text(template)
        if not self._prompts:
            raise UserError("--eval.path: no prompt in it leaves room to answer; give another file")
        if self._compared(module) is None:
            log.info("evaluation: no KL and no win rate without a model to compare with; give --eval.reference.path")
        elif self._known and self._known["prompts"] != self._mark():
            log.info("evaluation: no win rate, since the prompts are not those that the reference was asked")

    def _mark(self) -> str:
        """Differs where the prompts do, as they are written."""
        return of_text("".join(repr(prompt.example.messages) for prompt in self._prompts)) if self._prompts else ""

    def _facts(self, module: Any) -> dict[str, Any]:
        """What `eval/*` depend on, by the measures that do."""
        paths, reference, reward = self.facts(), self._compared(module), self.reward(module)
        text = "".join(repr((tree.prompt, tree.responses)) for tree in self._text)
        other = getattr(reference, "policy", module.policy)
        return {
            "prompts": {"path": paths.get("prompts"), "rows": len(self._prompts or ()), "fingerprint": self._mark()},
            "reward": {"name": name_of(reward), "fingerprint": _identity(reward)},
            "reference": reference and {"path": other.path, "fingerprint": other.fingerprint()},
            "text": {"path": paths.get("text"), "fingerprint": of_text(text)} if self._text else None,
            "sampling": vars(self.sampling),
        }


def _identity(reward: Any) -> str:
    """What tells one reward from another: a model's weights, else the class and what it was given."""
    if isinstance(reward, nn.Module):
        return of_weights(reward.named_parameters())
    own = sorted((name, repr(value)) for name, value in getattr(reward, "__dict__", {}).items())
    return of_text(re.sub(r" at 0x[0-9a-f]+", "", repr((name_of(reward), own))))  # addresses differ between runs
