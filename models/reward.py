"""A trained reward model as the reward of sampled responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leyden.batch.forest import pack
from leyden.batch.tree import Tree, chunk_by_tokens
from leyden.data.chat_template import ChatTemplate
from leyden.errors import RowError, UserError
from leyden.example import Example, Message, Sample
from leyden.models.causal_lm import CausalLM
from leyden.models.load import adapter_on
from leyden.models.restore import config_of, restored, weights_of
from leyden.models.shared_base import check_frozen, without_adapter
from leyden.paths import resolve
from leyden.policy.policy import Policy
from leyden.rewards.reward import Reward, at


class ModelReward(nn.Module, Reward):
    """What a reward model that `leyden fit --config reward_model` trained says of responses: the scores that
    `leyden predict` writes for the same rows.

    It reads text with its own tokenizer and chat template, so it need not be of the policy's family. Responses to one
    prompt share it. A response that was cut at its length limit is scored at its last token, without an end of turn.

    Args:
        path: the folder that was exported (a whole model or an adapter), or a checkpoint file in its run's folder,
            whose config.yaml says what the model was made from.
        base: where the weights below an adapter come from: its `own` copy of the model, or the `policy` that is being
            trained, if it trains an adapter on the same model; then that model is held once, in four bits if it is.
        dtype: of the weights and of the arithmetic, whatever the precision of the run; of its own copy only.
        batch_tokens: most tokens in one forward.
        chat_template: `plain`, or a Jinja file, if the reward model was trained with such a one and is no export.
        system_prompt: put before conversations that have none, as the reward model's training did (its
            `--data.system_prompt`); from the config.yaml of a checkpoint if it stands there.
        attention: how a packed batch is attended to, as `CausalLM` takes it.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Only for sources you trust.

    Raises:
        UserError: there is no reward head at `path`.
    """

    def __init__(
        self,
        path: str,
        base: Literal["own", "policy"] = "own",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_tokens: int = 16384,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        attention: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if batch_tokens < 1:
            raise UserError(f"ModelReward: batch_tokens {batch_tokens}; give the most tokens that one forward may have")
        self.path, self.batch_tokens, self.texts = path, batch_tokens, (chat_template, system_prompt)
        self.policy: Policy | None = None
        if base == "policy":
            if not (Path(path) / "adapter_config.json").is_file():
                raise UserError(f"{path}: no adapter, so it has no base to share; leave out --model.reward.base policy")
            return
        with torch.random.fork_rng(devices=[]):  # new weights are drawn before saved ones take their place
            if Path(path).is_file():
                built, data = _from_checkpoint(Path(path), {"dtype": dtype, "attention": attention})
                self.texts = chat_template or data.get("chat_template"), system_prompt or data.get("system_prompt")
            else:
                built = CausalLM(
                    path, dtype, attention=attention, revision=revision, trust_remote_code=trust_remote_code
                )
            self._finish(built)

    def attach(self, policy: Policy) -> None:
        """Take the policy's frozen weights as this reward model's base, if that was asked for.

        Raises:
            UserError: the policy has no frozen base, or another one than this reward model's adapter was trained on.
        """
        if self.policy is not None:
            return
        if not isinstance(policy, CausalLM):
            raise UserError("--model.reward.base policy: only a CausalLM has weights to share; leave it out")
        check_frozen(policy.backbone, "--model.reward.base policy", "leave it out")
        mine, theirs = (
            json.loads((Path(self.path) / "adapter_config.json").read_text(encoding="utf-8"))[
                "base_model_name_or_path"
            ],
            policy.backbone.base.config.name_or_path,
        )
        if Path(resolve(mine)).absolute() != Path(resolve(theirs)).absolute():
            raise UserError(
                f"{self.path}: an adapter on {mine}, but the policy stands on {theirs}; leave out --model.reward.base "
                "policy, or train a reward model on the policy's base"
            )
        adapted = adapter_on(without_adapter(policy.backbone), self.path, trained=False)
        self._finish(policy.on_same_base(adapted, self.path))

    def _finish(self, policy: Policy) -> None:
        """Build the policy that scores, and see that it can."""
        try:
            policy.build(("score",), dropout=False)
        except UserError as problem:  # it names the flag of the model that is trained
            raise UserError(str(problem).replace("--model.policy.path", "--model.reward.path")) from None
        if "score" in policy.fresh:
            raise UserError(
                f"{self.path}: it has no reward head, so its scores would be random; give ModelReward the folder that "
                "`leyden fit --config reward_model` exported"
            )
        self.policy = policy
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        self.eval()
        self.template = ChatTemplate(policy.tokenizer, *self.texts)

    def train(self, mode: bool = True) -> ModelReward:
        return super().train(False)

    @torch.no_grad()
    def forward(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], float32, on the CPU.

        Raises:
            UserError: a conversation that the chat template refuses, or that is longer than the model has positions.
        """
        if self.policy is None:
            raise UserError(f"{self.path}: --model.reward.base policy needs a policy that is being trained")
        trees, places = self._trees(samples)
        device, scores = self.policy.device, torch.zeros(len(samples))
        parts = []
        for few in chunk_by_tokens(trees, self.batch_tokens):
            with torch.autocast(device.type, enabled=False):
                found = self.policy(pack(few).to(device), {"score"}).score
            assert isinstance(found, Tensor)
            parts.append(found)
        if parts:
            scores[torch.tensor(places)] = torch.cat(parts).float().cpu()
        return scores

    def _trees(self, samples: Sequence[Sample]) -> tuple[list[Tree], list[int]]:
        """Prompts with their responses, the longest first, and which sample each response is, in the order of trees."""
        encoded = [self._encode(sample) for sample in samples]
        groups: dict[tuple[int, ...], list[list[int]]] = {}
        for place, (prompt, response) in enumerate(encoded):
            parts = groups.setdefault(tuple(prompt), [[]])
            size = len(prompt) + sum(len(encoded[other][1]) for other in parts[-1])
            if parts[-1] and size + len(response) > self.batch_tokens:
                parts.append([])
            parts[-1].append(place)
        found = [
            (Tree(list(prompt), [encoded[place][1] for place in part], row=part[0]), part)
            for prompt, parts in groups.items()
            for part in parts
        ]
        found.sort(key=lambda tree: -len(tree[0]))  # what does not fit the memory shows at once
        return [tree for tree, _ in found], [place for _, part in found for place in part]

    def _encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Prompt and response as the reward model was trained on them."""
        example = Example(sample.messages, [[Message(role="assistant", content=sample.response)]])
        try:
            tree = self.template.encode(example, finished=sample.finished)
            if not tree.responses[0]:  # a response without a token has no last token; its end of turn has to do
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


def _from_checkpoint(file: Path, changed: dict[str, Any]) -> tuple[Policy, dict[str, Any]]:
    """The policy of a reward model's checkpoint, and the settings of the data that it was trained on.

    Args:
        file: the checkpoint.
        changed: arguments of the policy that are not to be those of the training.
    """
    config = config_of(file)
    if "heads.score.weight" not in weights_of(file):
        kind = str(config.get("model", {}).get("class_path", "model")).rpartition(".")[2]
        raise UserError(f"{file}: a checkpoint of {kind}, which has no reward head; give one of a RewardModel")
    return restored(file, changed), config.get("data", {}).get("init_args", {})
