"""A trained reward model as the reward of sampled responses."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from leyden.batch.forest import pack
from leyden.batch.tree import Tree, chunk_by_tokens
from leyden.data.chat_template import ChatTemplate
from leyden.errors import RowError, UserError
from leyden.example import Example, Message, Sample
from leyden.models.causal_lm import CausalLM
from leyden.models.heads import ONE
from leyden.models.labels import chosen
from leyden.models.load import adapter_on, brings_embeddings
from leyden.models.restore import config_of, restored, weights_of
from leyden.models.shared_base import check_frozen, without_adapter
from leyden.paths import resolve
from leyden.policy.policy import Policy
from leyden.precision import asked
from leyden.rewards.reward import Reward, at

_HELD: dict[Hashable, WeakSet[CausalLM]] = {}
"""The reward models that hold each base, while there are some, so that another adapter on it need not hold it again.
Nothing here is ever trained, so a base stays as it was read."""


class ModelReward(nn.Module, Reward):
    """Scores of responses from a reward model that `leyden fit --config reward_model` trained, equal to the scores that
    `leyden predict` writes for the same rows.

    It reads text with its own tokenizer and chat template, so it need not be of the policy's family. Responses to one
    prompt share the prompt's tokens. A response that was cut at its length limit is scored at its last token, without
    an end of turn.

    Args:
        path: the exported folder (a whole model or an adapter), or a checkpoint file in its run's folder, whose
            config.yaml names the base model.
        base: source of the weights below an adapter: its `own` copy of the base model that it names, which several
            reward models with adapters on the same base hold once (an `Ensemble`); that of the `policy` in training, if
            it trains an adapter on the same base, so that the base is held only once, in four bits if it is; or folder
            or hub name of a base that is not where the adapter says.
        dtype: dtype of the weights and of the arithmetic, whatever the precision of the run; only for its own copy.
        batch_tokens: largest number of tokens in one forward pass.
        chat_template: `plain`, or a Jinja file, if the reward model was trained with one and is not an export.
        system_prompt: put before conversations that have none, as in the reward model's training (its
            `--data.system_prompt`); by default that in the config.yaml of a checkpoint.
        attention: attention over packed batches, as `CausalLM` takes it.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Only for sources you trust.
        label: what is the reward where the head gives several numbers (an `AttributeModel`), by name or number.
        weights: label -> weight, instead of `label`: the reward is their weighted sum, and each is logged by itself.

    Raises:
        UserError: there is no reward head at `path`, or no such label.
    """

    def __init__(
        self,
        path: str,
        base: str = "own",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_tokens: int = 16384,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        attention: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        label: int | str | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.asked = label, weights
        if batch_tokens < 1:
            raise UserError(f"ModelReward: batch_tokens {batch_tokens}; give the most tokens that one forward may have")
        self.path, self.batch_tokens, self.texts = path, batch_tokens, (chat_template, system_prompt)
        self.template_args: dict[str, Any] | None = None
        self.policy: Policy | None = None
        if base == "policy":
            if not (Path(resolve(path)) / "adapter_config.json").is_file():
                raise UserError(f"{path}: no adapter, so it has no base to share; leave out --model.reward.base policy")
            return
        with torch.random.fork_rng(devices=[]):  # new weights are drawn before saved ones replace them
            origin = None if base == "own" else base
            if Path(path).is_file():
                changed = {"dtype": dtype, "attention": attention} | ({} if origin is None else {"base": origin})
                built, data = _from_checkpoint(Path(path), changed)
                self.texts = chat_template or data.get("chat_template"), system_prompt or data.get("system_prompt")
                self.template_args = data.get("chat_template_args")
                self._finish(built)
            else:
                source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
                policy = CausalLM(path, dtype, attention=attention, base=origin, **source)
                self._finish_on_held_base(policy)

    def attach(self, policy: Policy) -> None:
        """Use the policy's frozen weights as the base of this reward model, if `base` is `policy`.

        Raises:
            UserError: the policy has no frozen base, or not the base that this reward model's adapter was trained on.
        """
        if self.policy is not None:
            return
        if not isinstance(policy, CausalLM):
            raise UserError("--model.reward.base policy: only a CausalLM has weights to share; leave it out")
        check_frozen(policy.backbone, "--model.reward.base policy", "leave it out")
        config = json.loads((Path(resolve(self.path)) / "adapter_config.json").read_text(encoding="utf-8"))
        mine, theirs = config["base_model_name_or_path"], policy.backbone.base.config.name_or_path
        if Path(resolve(mine)).absolute() != Path(resolve(theirs)).absolute():
            raise UserError(
                f"{self.path}: an adapter on {mine}, but the policy stands on {theirs}; leave out --model.reward.base "
                "policy, or train a reward model on the policy's base"
            )
        self._finish(_adapted(policy, self.path))

    def _finish_on_held_base(self, policy: CausalLM) -> None:
        """Build the policy on the base of a reward model that was built before, where it is the same."""
        base = _base_read(policy)
        others = _HELD.setdefault(base, WeakSet()) if base is not None else WeakSet[CausalLM]()
        if (other := next(iter(others), None)) is not None:
            policy = _adapted(other, policy.path)
        self._finish(policy)
        others.add(policy)

    def _finish(self, policy: Policy) -> None:
        """Build and freeze the reward model's policy, and check that it has a reward head."""
        try:
            policy.build(("score",), dropout=False)
        except UserError as error:  # it names the flag of the trained policy
            raise UserError(str(error).replace("--model.policy.", "--model.reward.")) from None
        if "score" in policy.fresh:
            raise UserError(
                f"{self.path}: it has no reward head, so its scores would be random; give ModelReward the folder that "
                "`leyden fit --config reward_model` exported"
            )
        self.chosen = chosen(self.path, (policy.labels or ONE).names, *self.asked)
        self.policy = policy
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        self.eval()
        self.template = ChatTemplate(policy.tokenizer, *self.texts, args=self.template_args)

    def train(self, mode: bool = True) -> ModelReward:
        return super().train(False)

    @torch.no_grad()
    def forward(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], float32, on the CPU.

        Raises:
            UserError: the chat template rejects a conversation, or the model has too few positions for one.
        """
        if self.policy is None:
            raise UserError(f"{self.path}: base policy needs a policy that is being trained; leave it out")
        trees, indices = self._trees(samples)
        device, outputs = self.policy.device, torch.zeros(len(samples), len((self.policy.labels or ONE).names))
        parts = []
        for chunk in chunk_by_tokens(trees, self.batch_tokens):
            with torch.autocast(device.type, enabled=False):
                chunk_scores = self.policy(pack(chunk).to(device), {"score"}).score
            assert isinstance(chunk_scores, Tensor)
            parts.append(chunk_scores)
        if parts:
            outputs[torch.tensor(indices)] = torch.cat(parts).float().cpu().reshape(len(samples), -1)
        total, self.terms = self.chosen(outputs)
        return total

    def _trees(self, samples: Sequence[Sample]) -> tuple[list[Tree], list[int]]:
        """Prompts with their responses, the longest first, and the sample index of each response in that order."""
        encoded = [self._encode(sample) for sample in samples]
        groups: dict[tuple[int, ...], list[list[int]]] = {}
        for index, (prompt, response) in enumerate(encoded):
            parts = groups.setdefault(tuple(prompt), [[]])
            size = len(prompt) + sum(len(encoded[i][1]) for i in parts[-1])
            if parts[-1] and size + len(response) > self.batch_tokens:
                parts.append([])
            parts[-1].append(index)
        pairs = [
            (Tree(list(prompt), [encoded[index][1] for index in part], row=part[0]), part)
            for prompt, parts in groups.items()
            for part in parts
        ]
        pairs.sort(key=lambda tree: -len(tree[0]))  # so that too little memory shows at once
        return [tree for tree, _ in pairs], [index for _, part in pairs for index in part]

    def _encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response, as in the reward model's training."""
        example = Example(sample.messages, [[Message(role="assistant", content=sample.response)]], tools=sample.tools)
        try:
            tree = self.template.encode(example, finished=sample.finished)
            if not tree.responses[0]:  # an empty response has no last token, so its end of turn is scored
                tree = self.template.encode(example)
        except RowError as error:
            raise UserError(f"{at(sample)}: {error}") from None
        assert self.policy is not None
        room, length = self.policy.positions, len(tree)
        if room is not None and length > room:
            raise UserError(
                f"{at(sample)}: {length} tokens of prompt and response, but the reward model {self.path} has positions "
                f"for {room}; lower --model.sampling.max_new_tokens, or leave out long prompts"
            )
        return tree.prompt, tree.responses[0]


def _adapted(policy: CausalLM, path: str) -> CausalLM:
    """The adapter in the folder `path` on the base of a policy, which both then hold."""
    return policy.on_same_base(adapter_on(without_adapter(policy.backbone), resolve(path), trained=False), path)


def _base_read(policy: CausalLM) -> Hashable | None:
    """The base of an adapter's policy, as it is read: equal where the weights are. None where there is no adapter, or
    one that changes the base itself: its biases, its embeddings' size, or all that a start such as PiSSA's takes off.
    """
    file = Path(resolve(policy.path)) / "adapter_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    plain = config.get("bias", "none") == "none" and config.get("init_lora_weights", True) in (True, False, "gaussian")
    if not plain or brings_embeddings(resolve(policy.path)):
        return None
    base = resolve(policy.base or config.get("base_model_name_or_path") or "")
    name = str(Path(base).absolute()) if Path(base).is_dir() else base
    return name, policy.dtype, policy.attention, *policy.source.values(), asked()


def _from_checkpoint(file: Path, changed: dict[str, Any]) -> tuple[Policy, dict[str, Any]]:
    """The policy of a reward model's checkpoint, and the settings of its training data.

    Args:
        file: the checkpoint.
        changed: arguments of the policy that replace those of the training.
    """
    config = config_of(file)
    if "heads.score.weight" not in weights_of(file):
        kind = str(config.get("model", {}).get("class_path", "model")).rpartition(".")[2]
        raise UserError(f"{file}: a checkpoint of {kind}, which has no reward head; give one of a RewardModel")
    return restored(file, changed), config.get("data", {}).get("init_args", {})
