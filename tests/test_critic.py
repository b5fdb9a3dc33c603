"""The value function beside a policy: values and gradients where they belong, and nothing that is shared moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import LLAMA, small, some_trees

from leyden.batch.forest import Batch, pack
from leyden.errors import UserError
from leyden.models import CausalLM

Gradients = dict[str, torch.Tensor]


def adapted(config: Any = None, **kwargs: Any) -> CausalLM:
    """A small policy with an adapter that has already learned something."""
    policy = small(**kwargs)
    config = config or LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.2)
    policy.model = get_peft_model(policy.model, config)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.build()
    return policy


def trained(critic: Any) -> Any:
    """The critic, with weights as after some training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return critic


@pytest.fixture
def batch() -> Batch:
    """Prompts with responses of which some tokens have weight 0, a text without a prompt, and padding."""
    trees = some_trees(4, responses=2)
    trees[2].prompt, trees[2].responses = [], trees[2].responses[:1]
    trees[2].weights = [[1.0] * len(trees[2].responses[0])]
    return pack(trees, length=sum(map(len, trees)) + 3)


def gradients(module: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_values_stand_where_tokens_are_predicted(batch: Batch) -> None:
    critic = trained(adapted().critic())
    value = critic(batch)
    counts = (batch.branch >= 0) & (batch.parent >= 0) & (batch.weight > 0)
    assert value.dtype == torch.float32 and value.shape == (len(batch),)
    assert bool((value[counts] != 0).all()) and bool((value[~counts] == 0).all())
    assert 0 < int(counts.sum()) < len(batch) and value.requires_grad


def test_a_value_is_read_before_its_token(batch: Batch) -> None:
    """Changing the last token of a response changes none of its values."""
    critic = trained(adapted().critic())
    other = pack(some_trees(4, responses=2))
    value = critic(other)
    other.tokens[other.last] = (other.tokens[other.last] + 1) % 97
    assert torch.equal(critic(other), value)


def test_a_new_critic_says_nothing_and_starts_without_change(batch: Batch) -> None:
    policy = adapted()
    critic = policy.critic()
    assert bool((critic(batch) == 0).all()) and critic.policy.fresh == {"value"}
    with torch.no_grad(), critic.policy.backbone.native_attention(), policy.backbone.native_attention():
        tokens = torch.tensor([[5, 9, 2]])
        with policy.model.disable_adapter():
            assert torch.equal(critic.policy.model(tokens).logits, policy.model(tokens).logits)


def test_the_policy_is_what_it_was(batch: Batch) -> None:
    policy = adapted().eval()
    policy.adapter = LoraConfig(r=4)
    reference = policy.reference("adapter_off")
    before, base = policy(batch).logp, reference(batch)
    critic = trained(policy.critic()).eval()
    state = {name: p.requires_grad for name, p in policy.named_parameters()}
    critic(batch).sum().backward()
    assert torch.equal(policy(batch).logp, before) and torch.equal(reference(batch), base)
    assert gradients(policy) == {} and state == {name: p.requires_grad for name, p in policy.named_parameters()}
    assert not torch.equal(before, base)


@pytest.mark.parametrize("config", [None, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")])
def test_only_the_base_is_shared_and_it_is_not_touched(config: Any) -> None:
    policy = adapted(config)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    critic = policy.critic()
    frozen = {id(p) for p in policy.parameters() if not p.requires_grad}
    own = [p for p in critic.parameters() if p.requires_grad]
    assert {id(p) for p in critic.parameters() if not p.requires_grad} == frozen
    assert own and not {id(p) for p in own} & {id(p) for p in policy.parameters()}
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())


def interleaved(checkpointing: bool, order: str, batch: Batch) -> tuple[Gradients, Gradients]:
    """Gradients of policy and critic when both run forward, in this order, before both run backward."""
    policy = adapted(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), gradient_checkpointing=checkpointing)
    critic = trained(policy.critic())
    if checkpointing:
        policy.train()
        critic.train()
    losses = [policy(batch).logp.sum() if who == "p" else critic(batch).square().sum() for who in order]
    sum(losses[1:], losses[0]).backward()
    return gradients(policy), gradients(critic)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_each_ones_own_weights_in_any_order(checkpointing: bool, batch: Batch) -> None:
    expected = interleaved(False, "p", batch)[0], interleaved(False, "c", batch)[1]
    for order in ("pc", "cp"):
        found = interleaved(checkpointing, order, batch)
        for mine, alone in zip(found, expected, strict=True):
            assert mine.keys() == alone.keys() and len(mine) >= 8
            for name in mine:
                torch.testing.assert_close(mine[name], alone[name], rtol=1e-5, atol=1e-6)
    assert "policy.heads.value.weight" in expected[1] and all("lora" in name for name in expected[0])


def test_checkpoints_hold_what_is_the_critics_own() -> None:
    policy = adapted()
    both = torch.nn.ModuleDict({"policy": policy, "critic": policy.critic()})
    names = [name for name, p in both.named_parameters() if p.requires_grad and name.startswith("critic")]
    assert names and all("lora_" in name or name.endswith("heads.value.weight") for name in names)
    assert len({id(p) for p in both.parameters()}) == len([*both.parameters()])


def test_the_export_is_the_policys_alone(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    policy = CausalLM(adapter=LoraConfig(r=2, target_modules=["q_proj"]))
    policy.build()
    policy.save(tmp_path / "before")
    trained(policy.critic())
    policy.save(tmp_path / "after")
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {f.name for f in (tmp_path / "before").iterdir()} == {f.name for f in (tmp_path / "after").iterdir()}


def test_a_model_that_runs_by_rows(batch: Batch) -> None:
    policy = adapted(attention="rows")
    torch.testing.assert_close(
        trained(policy.critic())(batch), trained(adapted().critic())(batch), rtol=1e-4, atol=1e-5
    )


def test_what_has_no_fixed_base_is_refused() -> None:
    with pytest.raises(UserError, match=r"all weights of .* are trained.*--model.value head"):
        small().critic()
    biased = LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    with pytest.raises(UserError, match=r"more than the adapter is trained \(.*bias"):
        adapted(biased, options=LLAMA | {"attention_bias": True}).critic()
