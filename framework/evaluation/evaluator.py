"""The evaluation of a policy: the same held-out questions before, during and after training by any algorithm."""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from leyden.batch.tree import Tree
from leyden.checkpoint.averaging import averaged
from leyden.data.chat_template import ChatTemplate
from leyden.data.prompts import Prompt
from leyden.distributed import all_gather_list, local_share
from leyden.errors import UserError
from leyden.evaluation.evaluation_pass import EvaluationFiles, Row, add_divergence, answer_row, sum_text_loss
from leyden.evaluation.metrics import MEASURES, Measure, measure_answers
from leyden.fingerprint import fingerprint_text, fingerprint_weights
from leyden.lightning_loop import is_accumulating
from leyden.on_policy.sampler import answer_prompts
from leyden.policy.policy import Policy, Reference, Sampling, eval_mode
from leyden.policy.reference import OtherPolicy
from leyden.rewards.reward import Reward, attach, name_of
from leyden.rng import EVALUATION_SEED
from leyden.run.progress import progress_of
from leyden.run.trackers import log_samples
from leyden.sharding import assembled, is_sharded

log = logging.getLogger("leyden")
SAMPLING = Sampling(max_new_tokens=256, temperature=1.0, seed=EVALUATION_SEED)


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
            at this temperature; there is no KL where tokens are left out (temperature 0, top-k, top-p).
        every_n_steps: optimizer steps between two passes, beside those of validations.
        measures: what is measured beside what every evaluation measures: a `Measure` of yours, or several.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        reference: Policy | None = None,
        sampling: Sampling = SAMPLING,
        every_n_steps: int | None = None,
        measures: Measure | list[Measure] | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"--eval.every_n_steps {every_n_steps}: give 1 or more, or leave it out")
        self.sampling, self.every_n_steps = replace(sampling, seed=sampling.seed or 0), every_n_steps
        self._reward, self._other = reward, reference
        self.measures = measures if isinstance(measures, list) else [] if measures is None else [measures]
        self._check_measures()
        self._reference: Reference | None = None
        self._prompts: list[Prompt] | None = None
        self._text: list[Tree] = []
        self._reference_answers: dict[int, Row] = {}
        """The reference's answers, by the number of the prompt."""
        self._known: dict[str, Any] = {}
        """What a checkpoint held."""
        self._at = -1
        """The optimizer step of the latest pass."""
        self._files = EvaluationFiles(None)

    def _check_measures(self) -> None:
        """That no measure of the user's takes the column of another one."""
        taken = {column.column for measure in MEASURES for column in measure.columns}
        for measure in self.measures:
            for column in measure.columns:
                if not column.column.startswith("eval/") or column.column in taken:
                    raise UserError(
                        f"--eval.measures {type(measure).__name__}: its column {column.column} is taken, or does not "
                        "begin with eval/; name it otherwise"
                    )
                taken.add(column.column)

    # -- what a subclass says ----------------------------------------------------------------------------------------

    @abstractmethod
    def prompts(self, template: ChatTemplate) -> list[Prompt]:
        """The prompts, each with a number of its own, in the order in which they are shown."""

    def text(self, template: ChatTemplate) -> list[Tree]:
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
        pl_module.samples_answers |= pl_module.engine.runs_policy
        pl_module.longest_sampled = max(pl_module.longest_sampled, getattr(self, "max_length", 0))
        pl_module.when_built.append(lambda: self._build(pl_module))

    def _build(self, module: Any) -> None:
        """Make the reference and the reward, before the weights of a checkpoint arrive."""
        try:
            attach(self._reward, module.policy)
        except UserError as error:  # a reward knows the flag of training
            raise UserError(str(error).replace("--model.reward", "--eval.reward")) from error
        if self._other is not None:
            self._reference = OtherPolicy(self._other, module.policy)
            module.shard_policy(self._other)
        elif module.trainer.state.fn == "fit" and not module.has_reference:
            self._reference = module.frozen_reference()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept = trainer.is_global_zero and not trainer.fast_dev_run
        self._files = EvaluationFiles(Path(trainer.default_root_dir) if kept else None)
        if trainer.ckpt_path is not None:
            return self._files.truncate(self._at)
        self._read(trainer, pl_module)
        self._files.begin(self._facts(pl_module))
        self._evaluate_now(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due and not is_accumulating(trainer) and self._at != trainer.global_step:
            self._evaluate_now(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log_dict(self.evaluate(trainer, pl_module), logger=False)

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._at != trainer.global_step:
            self._evaluate_now(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        theirs = list(self._reference_answers.values()) or self._known.get("reference", [])
        return {
            "at": self._at,
            "prompts": self._prompts_fingerprint() or self._known.get("prompts", ""),
            "reference": theirs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._known, self._at = state_dict, int(state_dict["at"])

    def _evaluate_now(self, trainer: Trainer, module: Any) -> None:
        """Evaluate outside of a validation: show the measures, and let nobody take the time for that of steps."""
        began = time.monotonic()
        metrics = self.evaluate(trainer, module)
        if (shown := progress_of(trainer)) is not None:
            shown.show_metrics(trainer, metrics)
        for part in (module, *trainer.callbacks):  # type: ignore[attr-defined]
            if (pause := getattr(part, "pause", None)) is not None:
                pause(time.monotonic() - began)

    # -- the pass ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, trainer: Trainer, module: Any) -> dict[str, float]:
        """Answer, score and measure: logged and given back as eval/…, the same on every process."""
        self._read(trainer, module)
        prompts, reference = local_share(self._prompts or [], trainer), self._reference_of(module)
        reward, context = self.reward(module), trainer.precision_plugin.forward_context()
        with eval_mode(module), averaged(trainer, module), context:
            with module.sampling_engine() as engine, self._whole(module, reward):  # also where there are no prompts
                answered = answer_prompts(trainer, module.policy, prompts, self.sampling, reward, engine)
            mine = list(map(answer_row, answered))
            self._ensure_reference_answers(trainer, module, prompts, mine)
            add_divergence(module, prompts, mine, reference, self.sampling)
            losses = sum_text_loss(module, local_share(self._text, trainer))
        module.agree_on_memory()
        for row in mine:
            if (other := self._reference_answers.get(row["row"])) is not None:
                row |= {"reference": other["response"], "reference_reward": other["reward"]}
        rows, text = all_gather_list(mine), all_gather_list([losses])
        measured = measure_answers(rows, text, self.measures)
        metrics = {f"eval/{name}": value for name, value in measured.items()}
        self._at = trainer.global_step
        hidden = ("tokens", "kl", "entropy")
        shown = [{"step": self._at} | {k: v for k, v in row.items() if k not in hidden} for row in rows]
        self._files.add(shown)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._at - 1)
            log_samples(logger, shown)
        return metrics

    def _whole(self, module: Any, reward: Any) -> Any:
        """Sharded weights put together, where a reward of the evaluation's own runs on them."""
        shared = isinstance(reward, nn.Module) and any(map(is_sharded, reward.modules()))
        return assembled(module) if shared and not module.needs_whole else nullcontext()

    def reward(self, module: Any) -> Any:
        """What scores answers; None where nothing does."""
        reward = self._reward if self._reward is not None else getattr(module, "reward", None)
        return reward.to(module.device) if isinstance(reward, nn.Module) else reward

    def _ensure_reference_answers(
        self, trainer: Trainer, module: Any, prompts: Sequence[Prompt], mine: list[Row]
    ) -> None:
        """Have the reference's answers: its own, those of the policy before training, or what a checkpoint knows."""
        reference = self._reference_of(module)
        if self._reference_answers or reference is None:
            return
        if self._known.get("prompts") == self._prompts_fingerprint():
            self._reference_answers = {row["row"]: row for row in self._known["reference"]}
        elif isinstance(reference, OtherPolicy) and (self._other or module.has_reference_policy):
            with assembled(reference):
                theirs = answer_prompts(trainer, reference.policy, prompts, self.sampling, self.reward(module))
            self._reference_answers = {row["row"]: row for row in all_gather_list(list(map(answer_row, theirs)))}
        elif trainer.global_step == 0:
            self._reference_answers = {row["row"]: dict(row) for row in all_gather_list(mine)}

    def _reference_of(self, module: Any) -> Reference | None:
        """What the policy is held against; None where that would be the policy itself."""
        if self._reference is not None:
            return self._reference.to(module.device)
        known = module.has_reference and (module.trainer.state.fn == "fit" or module.has_reference_policy)
        return module.reference if known else None

    # -- what is asked ----------------------------------------------------------------------------------------------

    def _read(self, trainer: Any, module: Any) -> None:
        """Read prompts and text, once."""
        if self._prompts is not None:
            return
        template = getattr(trainer.datamodule, "template", None) or ChatTemplate(module.policy.tokenizer)
        self._prompts, self._text = self.prompts(template), self.text(template)
        if not self._prompts:
            raise UserError("--eval.path: no prompt in it leaves room to answer; give another file")
        if self._reference_of(module) is None:
            log.info("evaluation: no KL and no win rate without a model to compare with; give --eval.reference.path")
        elif self._known and self._known["prompts"] != self._prompts_fingerprint():
            log.info("evaluation: no win rate, since the prompts are not those that the reference was asked")

    def _prompts_fingerprint(self) -> str:
        """Differs where the prompts do, as they are written."""
        return (
            fingerprint_text("".join(repr(prompt.example.messages) for prompt in self._prompts))
            if self._prompts
            else ""
        )

    def _facts(self, module: Any) -> dict[str, Any]:
        """What `eval/*` depend on, by the measures that do."""
        paths, reference, reward = self.facts(), self._reference_of(module), self.reward(module)
        text = "".join(repr((tree.prompt, tree.responses)) for tree in self._text)
        other = getattr(reference, "policy", module.policy)
        own = [column.as_dict() for measure in self.measures for column in measure.columns]
        return {
            "prompts": {
                "path": paths.get("prompts"),
                "rows": len(self._prompts or ()),
                "fingerprint": self._prompts_fingerprint(),
            },
            "reward": {"name": name_of(reward), "fingerprint": _identity(reward)},
            "reference": reference and {"path": other.path, "fingerprint": other.fingerprint()},
            "text": {"path": paths.get("text"), "fingerprint": fingerprint_text(text)} if self._text else None,
            "sampling": vars(self.sampling),
        } | ({"columns": own} if own else {})


def _identity(reward: Any) -> str:
    """What tells one reward from another: a model's weights, else the class and what it was given."""
    if isinstance(reward, nn.Module):
        return fingerprint_weights(reward.named_parameters())
    own = sorted((name, repr(value)) for name, value in getattr(reward, "__dict__", {}).items())
    return fingerprint_text(
        re.sub(r" at 0x[0-9a-f]+", "", repr((name_of(reward), own)))
    )  # addresses differ between runs
