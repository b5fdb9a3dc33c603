"""The gradient that each setting of policy gradients estimates, against the exact one of E[r] - β KL.

On a model whose responses, of different lengths, can all be listed: unbiased settings are within the sampling error of
it, and of the others the size of the bias is printed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import enumerable
import pytest
import torch
from enumerable import LENGTH, START, Table, TableReference
from torch import Tensor

from leyden.advantages import GAE, GroupRelative, LeaveOneOut, Whitened, gae
from leyden.algos import GRPO, PPO
from leyden.batch import Trajectory
from leyden.data import Prompt
from leyden.example import Example
from leyden.on_policy import AnsweredPrompt, PolicyGradient, Rollout
from leyden.policy.policy import Sampling
from leyden.surrogates import CISPO, Clip, Reinforce, SequenceRatio

PRICE, SEED, STOP, SAMPLES = 0.3, 1, 0, 4
WHOLE = Sampling(max_new_tokens=LENGTH)
ON: dict[str, Any] = {"average": "constant", "kl_coef": PRICE}
SETTINGS: dict[str, tuple[type[PolicyGradient], dict[str, Any]]] = {
    "rloo": (PolicyGradient, {"estimator": LeaveOneOut(), "surrogate": Reinforce(), **ON}),
    "leave one out, clip": (PolicyGradient, {"estimator": LeaveOneOut(), "surrogate": Clip(), **ON}),
    "leave one out, CISPO": (PolicyGradient, {"estimator": LeaveOneOut(), "surrogate": CISPO(), **ON}),
    "PPO without whitening": (PPO, {"trace": 1.0, **ON}),
    "dr_grpo": (GRPO, ON),  # (n - 1) / n of it, which is a matter of the learning rate
    "leave one out, GSPO": (PolicyGradient, {"estimator": LeaveOneOut(), "surrogate": SequenceRatio(), **ON}),
    "mean over tokens": (PolicyGradient, {"estimator": LeaveOneOut(), **ON, "average": "tokens"}),
    "mean over responses": (PolicyGradient, {"estimator": LeaveOneOut(), **ON, "average": "responses"}),
    "divided by the deviation": (GRPO, {"estimator": GroupRelative(scale=True), **ON}),
    "REINFORCE++": (PolicyGradient, {"estimator": Whitened(), **ON}),
    "PPO": (PPO, {"trace": 1.0, **ON, "average": "tokens"}),
    "PPO, λ 0.95": (PPO, {"trace": 0.95, **ON, "average": "tokens"}),
    "KL as k2": (PolicyGradient, {"estimator": LeaveOneOut(), **ON, "kl": "k2"}),
    "KL as k3": (PolicyGradient, {"estimator": LeaveOneOut(), **ON, "kl": "k3"}),
    "grpo": (GRPO, {"estimator": GroupRelative(scale=True), "average": "responses", "kl": "k3", "kl_coef": PRICE}),
    "dapo": (GRPO, {"estimator": GroupRelative(scale=True), "average": "tokens", "kl_coef": PRICE}),
    "gspo": (
        GRPO,
        {
            "estimator": GroupRelative(scale=True),
            "surrogate": SequenceRatio(),
            "average": "responses",
            "kl_coef": PRICE,
        },
    ),
}
UNBIASED = ("rloo", "leave one out, clip", "leave one out, CISPO", "PPO without whitening", "dr_grpo")


class Raw(GAE):
    """Generalised advantages as they are, not whitened."""

    def __call__(self, batch: Trajectory, reward: Tensor, reduce: Any = None) -> tuple[Tensor, Tensor]:
        at, mask = batch.grid()
        advantage, returns = torch.zeros_like(reward), torch.zeros_like(reward)
        rows = gae(reward[at], batch.value[at], mask, self.discount, self.trace)
        advantage[at[mask]], returns[at[mask]] = rows[0][mask], rows[1][mask]
        return advantage, returns


def algorithm(name: str) -> Any:
    kind, options = SETTINGS[name]
    policy = Table(SEED, stop=STOP)
    torch.nn.init.normal_(policy.values, std=0.3, generator=torch.Generator().manual_seed(3))
    found = kind(
        policy,
        reward=enumerable.reward_function(SEED),
        sampling=WHOLE,
        keep_rollouts=False,
        **{"samples": SAMPLES} | options,
    )
    found.reference, found._agreed = TableReference(Table(2, stop=STOP)), True
    if name == "PPO without whitening":
        found.estimator = Raw(trace=1.0)
    return found


def estimate(found: Any, seed: int, prompts: int) -> Tensor:
    """The gradient of the loss on one rollout."""
    policy, reward = found.policy, enumerable.reward_function(SEED)
    groups = policy.generate([[START]] * prompts, SAMPLES, replace(WHOLE, seed=seed))
    rollout = Rollout(0, [AnsweredPrompt(Prompt(0, Example([]), [START]), n, g) for n, g in enumerate(groups)])
    for one in rollout.answered:
        one.scores = reward(one.samples()).tolist()
    with torch.no_grad():
        rollout.trajectory = found.compute_log_probs(Rollout.pack(rollout.answered))
    batch = found.credit(rollout)
    slope: Tensor = torch.autograd.grad(found.policy_loss(batch, policy(batch)), policy.logits)[0]
    return slope


class Found(NamedTuple):
    scale: float
    """What the exact gradient is multiplied by to be nearest to the mean estimate"""
    scale_error: float
    """Its standard error"""
    bias: float
    """How far the mean estimate is from that, as a share of it"""
    error: float
    """How far sampling alone would take it"""


def measured(name: str, prompts: int, rollouts: int) -> Found:
    """The mean of many estimates against the exact gradient."""
    found = algorithm(name)
    batch = enumerable.everything(found.policy)
    logp, ref = (enumerable.log_probs(m, batch) for m in (found.policy, Table(2, stop=STOP)))
    exact = enumerable.objective(logp, ref.detach(), enumerable.rewards_of(batch, SEED).double(), PRICE)
    (expected,) = torch.autograd.grad(-exact, found.policy.logits)
    expected = expected / LENGTH  # means divide by the length limit
    slopes = torch.stack([estimate(found, seed, prompts) for seed in range(rollouts)]).double()
    mean = slopes.mean(0)
    error = float(((slopes - mean) ** 2).sum() / (rollouts * (rollouts - 1))) ** 0.5
    scales = (slopes * expected).sum((1, 2)) / (expected**2).sum()
    scale, scale_error = float(scales.mean()), float(scales.std()) / rollouts**0.5
    near = (scale * expected).norm()
    return Found(scale, scale_error, float((mean - scale * expected).norm() / near), error / float(near))


def test_the_listed_responses_are_all_there_are() -> None:
    policy = Table(SEED, stop=STOP)
    batch = enumerable.everything(policy)
    lengths = torch.bincount(batch.per_branch(torch.ones(len(batch))).long()).tolist()
    assert lengths == [0, 1, 7, 49, 343 * 8]
    assert enumerable.log_probs(policy, batch).exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_gradients_are_exact_within_the_sampling_error(name: str) -> None:
    found = measured(name, 400, 8)
    assert found.error < 0.3 and found.bias < 1.3 * found.error
    factor = (SAMPLES - 1) / SAMPLES if name == "dr_grpo" else 1.0
    assert found.scale == pytest.approx(factor, abs=4 * found.scale_error)


@pytest.mark.parametrize("name", ["mean over responses", "KL as k3"])
def test_biased_gradients_are_seen_to_be(name: str) -> None:
    found = measured(name, 400, 12)
    assert found.bias > 1.5 * found.error


@pytest.mark.slow
def test_table_of_gradients() -> None:
    """Prints the size of each bias; unbiased settings stay within the error of many more samples."""
    for name in SETTINGS:
        found = measured(name, 2000, 16)
        scale = f"{found.scale:.3f} ({found.scale_error:.3f})"
        print(f"| {name} | {scale} | {100 * found.bias:.1f} % | {100 * found.error:.1f} % |")
        if name in UNBIASED:
            assert found.bias < 1.2 * found.error
