"""Edges of the algorithms' numbers: steps that teach nothing, truncated samples, how far selection goes, terms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import enumerable
import pytest
import torch
from enumerable import LENGTH, START, WORDS, Table
from peft import LoraConfig
from small import Numbers, TreeData, fit, saved, small, some_trees, weights_of
from test_on_policy import Questions, algorithm, evens
from test_qlora import WIDE

from leyden.algos import DPO, GRPO, SFT, RejectionSampling
from leyden.algos.rejection_sampling import kl_bound
from leyden.batch.tree import Tree
from leyden.data import Prompt
from leyden.errors import UserError
from leyden.evaluation.evaluation_pass import add_divergence
from leyden.example import Example, Sample
from leyden.models import CausalLM
from leyden.on_policy import AnsweredPrompt, Rollout
from leyden.policy import Response, Sampling
from leyden.precision import QLoRAPrecision
from leyden.rewards import Function, WeightedSum, score
from leyden.rewards.reward import score_with_terms

# -- steps that teach nothing ----------------------------------------------------------------------------------------


def adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class Recorded:
    """Keeps the weights before every step, and after the last."""

    weights: list[torch.Tensor]

    def on_step_metrics(self, metrics: Any) -> None:
        self.weights = [*getattr(self, "weights", []), weights_of(self.policy)]  # type: ignore[attr-defined]

    def on_train_end(self) -> None:
        self.weights.append(weights_of(self.policy))  # type: ignore[attr-defined]


def silent(trees: list[Tree]) -> list[Tree]:
    """Every second step of four trees has no trained token."""
    for number, tree in enumerate(trees):
        if number % 2:
            tree.weights = [[0.0] * len(response) for response in tree.responses]
    return trees


def alone(trees: list[Tree]) -> list[Tree]:
    """Every second tree has one response, and so no pair."""
    return [Tree(t.prompt, t.responses[: 1 + (n % 2 == 0)], row=t.row) for n, t in enumerate(trees)]


@pytest.mark.parametrize("kind", [SFT, DPO])
def test_a_step_without_anything_to_learn_leaves_the_weights(kind: Any) -> None:
    """Between steps that teach: without momentum and weight decay, and as if it had not been there."""

    def train(trees: list[Tree], options: dict[str, Any]) -> Any:
        class Found(Recorded, kind):  # type: ignore[misc]
            pass

        found = Found(small(), optimizer=adam, lr_scheduler=None)
        fit(found, TreeData(trees, batch_size=1, seed=4), **options)
        return found

    rows = silent(some_trees(8)) if kind is SFT else alone(some_trees(8, responses=2))
    found = train(rows, {"max_epochs": 2})
    moved = [not torch.equal(a, b) for a, b in zip(found.weights, found.weights[1:], strict=False)]
    assert sum(moved) == 8 and len(moved) == 16
    assert found.global_step == 16, "it counts as a step"
    state = found.trainer.optimizers[0].state
    assert {float(one["step"]) for one in state.values()} == {8.0}, "the optimizer has not seen it"


def train_twice(options: dict[str, Any]) -> list[bool]:
    """A rollout with scores that differ, and then one whose scores are all the same: which moved the weights."""
    calls: list[int] = []

    def at_first(samples: Sequence[Sample]) -> list[float]:
        calls.append(len(samples))
        return evens(samples) if len(calls) == 1 else [0.1] * len(samples)

    class Found(Recorded, GRPO):
        pass

    found = algorithm(
        Found, {"samples": 3, "kl_coef": 0.0, "minibatches": 2} | options, reward=at_first, optimizer=adam
    )
    fit(found, Questions(), max_epochs=2)
    return [not torch.equal(a, b) for a, b in zip(found.weights, found.weights[1:], strict=False)]


@pytest.mark.parametrize("scale", [False, True])
def test_equal_scores_do_not_move_the_weights(scale: bool) -> None:
    assert train_twice({"scale": scale}) == [True, True, False, False]


def test_the_price_of_kl_is_not_scaled() -> None:
    """Where all scores are the same, the gradient is that of the KL's price with and without `scale`."""
    slopes = []
    for scale in (False, True):
        found = algorithm(GRPO, {"samples": 4, "kl_coef": 0.3, "scale": scale}, reward=lambda s: [7.0] * len(s))
        found.policy = Table(1)
        found.reference, found._agreed = enumerable.TableReference(Table(2)), True
        groups = found.policy.generate([[START]] * 8, 4, Sampling(max_new_tokens=LENGTH, seed=0))
        answered = [AnsweredPrompt(Prompt(n, Example([]), [START]), n, group) for n, group in enumerate(groups)]
        for one in answered:
            one.scores = [7.0] * 4
        rollout = Rollout(0, answered)
        with torch.no_grad():
            rollout.trajectory = found.compute_log_probs(Rollout.pack(answered))
        batch = found.credit(rollout)
        slopes.append(torch.autograd.grad(found.policy_loss(batch, found.policy(batch)), found.policy.logits)[0])
    assert slopes[0].abs().max() > 1e-3
    torch.testing.assert_close(*slopes)


def test_a_threshold_that_nothing_reaches_teaches_nothing() -> None:
    """After a rollout that taught something, so that there is momentum."""
    calls: list[int] = []

    def lower(samples: Sequence[Sample]) -> list[float]:
        calls.append(0)
        return evens(samples) if len(calls) == 1 else [-1.0] * len(samples)

    class Found(Recorded, RejectionSampling):
        pass

    found = algorithm(Found, {"samples": 3, "threshold": 0.0, "minibatches": 2}, reward=lower, optimizer=adam)
    fit(found, Questions(), max_epochs=2, precision="bf16-mixed")
    assert [not torch.equal(a, b) for a, b in zip(found.weights, found.weights[1:], strict=False)] == [
        True, True, False, False,
    ]  # fmt: skip


# -- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "given"),
    [
        (Sampling(6, 1.0), True),
        (Sampling(6, 0.7), True),
        (Sampling(6, 1.0, top_k=4), False),
        (Sampling(6, 1.0, top_p=0.5), False),
        (Sampling(6, 0.0), False),
    ],
)
def test_there_is_no_kl_of_samples_that_leave_tokens_out(sampling: Sampling, given: bool) -> None:
    rows: list[dict[str, Any]] = [{"tokens": [1, 2]}]
    found = algorithm(RejectionSampling, {"samples": 2})
    found.trainer = SimpleNamespace()
    add_divergence(found, [Prompt(0, Example([]), [3])], rows, found.policy.reference("copy"), sampling)
    assert ("kl" in rows[0]) is given and "entropy" in rows[0]
    if sampling.temperature == 0:
        return
    found = algorithm(RejectionSampling, {"samples": 2}, sampling=sampling)
    metrics = fit(found, Questions(held=3), max_epochs=1).callback_metrics
    for name in ("rollout/kl", "rollout/entropy", "rollout/mismatch", "val/kl"):
        assert (name in metrics) is given, name
    assert {"rollout/reward", "rollout/length", "val/reward"} <= set(metrics)


def test_the_mean_over_full_samples_is_the_kl_and_over_truncated_ones_is_not() -> None:
    """By enumeration, at temperature 0.7: all samples against those of the four likeliest words of each context."""
    everything = enumerable.everything()
    with torch.no_grad():
        logp, ref = (everything.per_branch(Table(s)(everything, temperature=0.7).logp).double() for s in (1, 2))
    exact = float((logp.exp() * (logp - ref)).sum())
    found = Table(1).generate([[START]] * 4000, 1, Sampling(LENGTH, 0.7, seed=0))
    numbers = torch.tensor([int("".join(map(str, group[0].tokens)), WORDS) for group in found])
    sampled = (logp - ref)[numbers]
    assert float(sampled.mean()) == pytest.approx(exact, abs=4 * float(sampled.std()) / 4000**0.5)
    kept = torch.zeros_like(logp)
    table = (Table(1).logits.detach() / 0.7).log_softmax(-1)
    allowed = table >= table.topk(4, -1).values[:, -1:]
    context = torch.zeros(len(logp), dtype=torch.long)
    digits = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)
    for place in range(LENGTH):
        cut = table.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        kept += cut[context, digits[:, place]].double()
        context = WORDS * context + 1 + digits[:, place]
    inside = kept.isfinite()
    truncated = float((kept.exp() * (logp - ref))[inside].sum())
    assert abs(truncated - exact) > 0.2


# -- how far selection goes ------------------------------------------------------------------------------------------


def selected(n: int, threshold: float, seed: int = 0) -> tuple[float, float]:
    """Exactly, over all sequences: KL of the best of n that reaches a threshold from the policy, and the share kept."""
    logp = enumerable.log_probs(Table(seed), enumerable.everything()).detach()
    reward = enumerable.rewards(seed).double()
    order = reward.argsort()
    below = torch.cat([torch.zeros(1, dtype=torch.float64), logp.exp()[order].cumsum(0)])
    mass = torch.zeros_like(logp)
    mass[order] = below[1:] ** n - below[:-1] ** n
    mass = mass * (reward >= threshold)
    best = mass / mass.sum()
    return float(torch.xlogy(best, best).sum() - (best * logp).sum()), float(mass.sum()) / n


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("percentile", [0.0, 0.5, 0.9, 0.98, 0.999])
def test_the_bound_of_selection_holds_and_is_tight(n: int, percentile: float) -> None:
    logp, reward = enumerable.log_probs(Table(0), enumerable.everything()).detach(), enumerable.rewards(0).double()
    order = reward.argsort()
    threshold = float(reward[order][int((logp.exp()[order].cumsum(0) < percentile).sum())])
    exact, kept = selected(n, threshold if percentile else -math.inf)
    assert exact <= kl_bound(n, 1, kept) + 1e-4
    assert kl_bound(n, 1, kept) - exact < 0.35  # what 4,096 sequences are away from a continuum
    if not percentile:
        assert kl_bound(n, 1, kept) == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-4)


def test_the_bound_where_prompts_differ_and_where_several_are_kept() -> None:
    """Of two prompts one keeps its best answers, the other a hundredth of them: no more than the bound of both."""
    logs = [(kl_bound(4, 1, share / 4), share) for share in (1.0, 0.01)]
    mean = sum(nats * share for nats, share in logs) / sum(share for _, share in logs)
    assert mean < kl_bound(4, 1, (1.0 + 0.01) / 8)
    # the two best of three: density 3/2 (1 - (1 - u)^2) of the share u that is worse; worked out by parts
    assert kl_bound(3, 2, 2 / 3) == pytest.approx(math.log(3 / 2) + 3 / 2 * (4 / 3 * math.log(2) - 10 / 9), abs=1e-5)
    assert math.isnan(kl_bound(4, 1, 0.0))


def test_a_rollout_says_its_bound() -> None:
    """Two answers to each of a hundred prompts, of which one in a hundred reaches the threshold."""
    found = algorithm(RejectionSampling, {"samples": 2, "threshold": 1.0})
    found._trainer = None
    prompt = Prompt(0, Example([]), [1])
    answered = [
        AnsweredPrompt(prompt, n, [Response([2], [0.0], True, "")] * 2, [float(n < 2), 0.0]) for n in range(100)
    ]
    found.credit(Rollout(0, answered))
    assert found.rollout_metrics["rollout/kept"] == 0.01
    assert found.rollout_metrics["rollout/kl_bound"] == pytest.approx(
        math.log(2 / 0.02) - (1 + 0.98 / 0.02 * math.log(0.98)) / 2, abs=1e-4
    )
    assert found.rollout_metrics["rollout/kl_bound"] > 3.9


def test_greedy_answers_have_no_best() -> None:
    with pytest.raises(UserError, match="temperature 0: all answers to a prompt would be the same"):
        algorithm(RejectionSampling, {"samples": 2}, sampling=Sampling(6, 0.0))


# -- the precomputed reference ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), WIDE, noise=0.1)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("float32", {"precision": "bf16-mixed"}),
        ("bfloat16", {}),
        ("float32", {"plugins": ["float32"]}),
        ("float32", {"plugins": ["bfloat16"]}),
    ],
)
def test_a_precomputed_reference_is_the_policy_in_every_precision(
    folder: str, dtype: Any, options: dict[str, Any], adapter: bool
) -> None:
    """Before the first step the loss of every pair is log 2, of training and of held-out rows."""
    if "plugins" in options:
        if not adapter:
            pytest.skip("four-bit weights are trained by an adapter")
        options = {"plugins": [QLoRAPrecision(compute_dtype=options["plugins"][0])]}
    policy = CausalLM(folder, adapter=LoraConfig(r=4, target_modules="all-linear") if adapter else None, dtype=dtype)
    policy._tokenizer = Numbers()  # type: ignore[assignment]
    found = DPO(policy, optimizer=adam, lr_scheduler=None, reference="precomputed")
    losses: list[float] = []
    found.on_step_metrics = lambda metrics: losses.append(metrics["loss"])  # type: ignore[method-assign, assignment]
    held = some_trees(10, seed=3, responses=2)
    for number, tree in enumerate(held):
        tree.row = 100 + number
    fit(found, TreeData(some_trees(12, responses=2), held, batch_size=4), num_sanity_val_steps=-1, **options)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[1] - math.log(2)) > 1e-4


# -- terms of rewards ------------------------------------------------------------------------------------------------


def with_terms(samples: Sequence[Sample]) -> tuple[list[float], dict[str, list[float]]]:
    words = [len(s.response.split()) for s in samples]
    return [float(n) / 10 for n in words], {"words": [float(n) for n in words], "twice": [2.0 * n for n in words]}


class Terms:
    def __call__(self, samples: Sequence[Sample]) -> Any:
        return with_terms(samples)


def test_named_terms_are_logged_filed_and_validated(tmp_path: Path) -> None:
    found = algorithm(GRPO, {"samples": 2, "keep_rollouts": True}, reward=with_terms)
    metrics = fit(found, Questions(held=3), max_epochs=1, default_root_dir=tmp_path).callback_metrics
    for stage in ("rollout", "val"):
        words = float(metrics[f"{stage}/reward_words"])
        assert words == pytest.approx(10 * float(metrics[f"{stage}/reward"]), rel=1e-5) and words > 0
        assert float(metrics[f"{stage}/reward_twice"]) == pytest.approx(2 * words)
    row = json.loads((tmp_path / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["terms"]["words"] == pytest.approx([10 * value for value in row["scores"]], rel=1e-5)


def test_terms_of_functions_classes_and_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample([], "a b"), Sample([], "c")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_terms.py").write_text("def f(samples):\n    return [1.0, 2.0], {'n': [3, 4]}\n", encoding="utf-8")
    for reward in (with_terms, Terms()):
        scores, terms = score_with_terms(reward, samples)
        assert scores.tolist() == pytest.approx([0.2, 0.1]) and terms["words"].tolist() == [2.0, 1.0]
    whole = WeightedSum([Function("own_terms.f"), Terms()], [1.0, 10.0])
    scores, terms = score_with_terms(whole, samples)
    assert scores.tolist() == pytest.approx([3.0, 3.0])
    assert sorted(terms) == ["Terms", "Terms.twice", "Terms.words", "own_terms.f", "own_terms.f.n"]
    assert terms["own_terms.f.n"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (([1.0, 2.0], {"words": [1.0]}), "its term words gave 1 scores for 2 samples"),
        (([1.0, 2.0], {"words": [1.0, math.nan]}), "its term words gave nan; give every response a number"),
        (([1.0, 2.0], {"words": [1.0, "x"]}), "its term words gave 'x', not a number"),
        (([1.0, math.inf], {"words": [1.0, 2.0]}), "gave inf; give every response a number"),
        ({"words": [1.0, 2.0]}, r"return one number for each, in their order, or \(scores, \{NAME: numbers\}\)"),
    ],
)
def test_terms_that_cannot_be(returned: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        score(lambda samples: returned, [Sample([], "a"), Sample([], "b")])
