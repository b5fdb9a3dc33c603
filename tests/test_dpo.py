"""DPO: where it starts, what its gradient is however a step is cut, and that its reference never moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from ranks import Ranks
from small import TreeData, fit, small, some_trees, weights_of
from torch import Tensor

from leyden.algos import DPO
from leyden.batch.forest import Batch, Tree, pack
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.objectives import CPO, EXO, IPO, NCA, ORPO, APODown, APOZero, Hinge, Objective, Robust, Sigmoid, SimPO
from leyden.policy.policy import Reference

RATE = 0.5
WITHOUT_REFERENCE: list[Objective] = [SimPO(), CPO(), ORPO()]
OBJECTIVES: list[Objective] = [Robust(), Hinge(), IPO(), APOZero(), APODown(), NCA(), EXO(), *WITHOUT_REFERENCE]
Start = Literal["full", "fresh", "continued"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, weight_decay=0.0)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trees(count: int = 8, responses: int = 2) -> list[Tree]:
    return some_trees(count, seed=3, responses=responses)


def policy(start: Start = "full", **kwargs: Any) -> CausalLM:
    """A small model with all weights, a new adapter, or an adapter that was trained before."""
    made = small(**kwargs)
    if start == "full":
        return made
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    made.model = get_peft_model(made.model, config)
    if start == "fresh":
        made.adapter = config
    else:
        with torch.no_grad():
            for name, parameter in made.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
    return made


def gradient(accumulate: int, devices: int = 1, **options: Any) -> tuple[Tensor, float]:
    """What one optimizer step over 8 pairs adds to the weights, and the loss that was logged."""
    algorithm = DPO(small(), optimizer=sgd, lr_scheduler=None, **options)
    before = weights_of(algorithm.policy)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = fit(
        algorithm,
        TreeData(trees(), batch_size=8),
        accumulate_grad_batches=accumulate,
        devices=devices,
        strategy=strategy,
    )
    return (before - weights_of(algorithm.policy)) / RATE, float(trainer.callback_metrics["train/loss"])


def on_one_rank(accumulate: int, reference: str) -> tuple[Tensor, float]:
    return gradient(accumulate, 2, reference=reference)


def of_objective_on_one_rank(accumulate: int, objective: Objective) -> tuple[Tensor, float]:
    return gradient(accumulate, 2, objective=objective)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- the loss ---------------------------------------------------------------------------------------------------------


class Fixed(Reference):
    """Log-probs that were decided beforehand."""

    kind = "fixed"

    def __init__(self, logp: Tensor) -> None:
        super().__init__()
        self.logp = logp

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        return self.logp

    def fingerprint(self) -> str:
        return "fixed"


def by_hand(batch: Batch, logp: Tensor, ref: Tensor, beta: float) -> Tensor:
    """DPO in loops over single tokens of separate responses."""
    losses = []
    for span in batch.structure():
        ratios = [
            sum(((logp[t] - ref[t]) * batch.weight[t] for t in range(start, stop)), torch.zeros(()))
            for _, start, stop in span.responses
        ]
        found = [-F.logsigmoid(beta * (a - b)) for i, a in enumerate(ratios) for b in ratios[i + 1 :]]
        losses.append(torch.stack(found).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("responses", [2, 4])
def test_the_loss_and_its_gradient_by_hand(responses: int) -> None:
    batch = pack(trees(5, responses))
    algorithm = DPO(small(), objective=Sigmoid(0.3))
    algorithm.reference, algorithm._agreed = Fixed(torch.randn(len(batch)) * (batch.branch >= 0)), True
    ours = torch.autograd.grad(algorithm.loss(batch), list(algorithm.policy.parameters()))
    logp = algorithm.policy(batch).logp
    expected = by_hand(batch, logp, algorithm.reference(batch), 0.3)
    assert float(algorithm.loss(batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    theirs = torch.autograd.grad(expected, list(algorithm.policy.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert off(a, b) < 1e-5


@pytest.mark.parametrize("attention", ["segments", "dense", "rows"])
def test_packed_is_unshared_is_rows(attention: str) -> None:
    batch = pack(trees(5, 3))
    algorithm = DPO(small(attention=attention))
    other = small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    algorithm.reference, algorithm._agreed = other.reference("copy"), True
    losses, gradients = [], []
    for layout in (batch, batch.unshare() if attention != "rows" else batch.select([4, 0, 2, 1, 3])):
        algorithm.zero_grad()
        loss = algorithm.loss(layout)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in algorithm.policy.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert off(gradients[0], gradients[1]) < 1e-5


def test_starts_at_ln_2_and_any_cut_of_a_step_has_one_gradient(ranks: Ranks) -> None:
    whole, loss = gradient(1)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    runs = [gradient(8), gradient(3), gradient(1, reference="precomputed"), *ranks(on_one_rank, 1, "copy")]
    runs += ranks(on_one_rank, 4, "precomputed")
    for found, start in runs:
        assert start == pytest.approx(math.log(2), abs=1e-6)
        assert off(found, whole) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_any_cut_of_a_step_has_one_gradient_whatever_the_objective(objective: Objective, ranks: Ranks) -> None:
    whole, loss = gradient(1, objective=objective)
    assert float(whole.norm()) > 1e-3
    for found, same in (gradient(8, objective=objective), *ranks(of_objective_on_one_rank, 2, objective)):
        assert same == pytest.approx(loss, rel=1e-5)
        assert off(found, whole) < 1e-5


def test_any_cut_of_a_step_has_one_gradient_with_wpo() -> None:
    whole, loss = gradient(1, wpo=True)
    for accumulate in (8, 3):
        found, same = gradient(accumulate, wpo=True)
        assert same == pytest.approx(loss, rel=1e-5) and off(found, whole) < 1e-5


def test_a_ragged_split_weighs_every_pair_the_same() -> None:
    """One pair, then three: averaging micro-batch means would give the lone pair three times its weight."""
    batch = pack(trees(4))
    algorithm = DPO(small())
    algorithm.reference, algorithm._agreed = small().reference("copy"), True

    def slope(parts: list[Batch]) -> Tensor:
        algorithm.zero_grad()
        for part in parts:
            algorithm.loss(part).backward()
        return torch.cat([p.grad.flatten() for p in algorithm.policy.parameters() if p.grad is not None])

    whole = slope([batch])
    assert off(slope([batch.select([0]), batch.select([1, 2, 3])]), whole) < 1e-5
    alone, rest = pack(trees(4)[:1]), pack(trees(4)[1:])  # each with its own totals: a mean of means
    assert off(slope([alone, rest]) / 2, whole) > 0.1


def test_the_step_one_gradient_is_that_of_the_log_odds() -> None:
    """At the start every pair's loss is ln 2 and its gradient is -beta / 2 d(log pi(chosen) - log pi(rejected))."""
    batch = pack(trees(5))
    algorithm = DPO(small(), objective=Sigmoid(0.2))
    algorithm.reference = algorithm.policy.reference("copy")
    algorithm._agreed = True
    ours = torch.autograd.grad(algorithm.loss(batch), list(algorithm.policy.parameters()))
    odds = batch.per_branch(algorithm.policy(batch).logp).view(-1, 2)
    theirs = torch.autograd.grad(-0.1 * (odds[:, 0] - odds[:, 1]).mean(), list(algorithm.policy.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert off(a, b) < 1e-5


def test_ipo_averages_only_where_asked() -> None:
    batch = pack([Tree([1, 2], [[3, 4, 5], [6]]), Tree([7], [[8, 9], [10, 11, 12, 13]])])
    ref = torch.randn(len(batch)) * (batch.branch >= 0)
    for per_token in (False, True):
        algorithm = DPO(small(), objective=IPO(0.2, per_token))
        algorithm.reference, algorithm._agreed = Fixed(ref), True
        ratio = batch.per_branch(algorithm.policy(batch).logp - ref)
        ratio = ratio / torch.tensor([3.0, 1.0, 2.0, 4.0]) if per_token else ratio
        expected = ((ratio[0::2] - ratio[1::2] - 2.5) ** 2).mean()
        assert float(algorithm.loss(batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_sft_term_is_the_better_answers_mean_loss_per_token() -> None:
    batch = pack([Tree([1, 2], [[3, 4, 5], [6]]), Tree([7], [[8, 9], [10, 11, 12, 13]])])
    plain, mixed = DPO(small()), DPO(small(), sft_weight=0.3)
    for algorithm in (plain, mixed):
        algorithm.reference, algorithm._agreed = small().reference("copy"), True
    logp = plain.policy(batch).logp
    nll = -(batch.per_branch(logp)[[0, 2]] / torch.tensor([3.0, 2.0])).mean()
    assert float((mixed.loss(batch) - plain.loss(batch)).detach()) == pytest.approx(0.3 * float(nll.detach()), rel=1e-4)


@pytest.mark.parametrize("objective", [Sigmoid(0.3), SimPO()], ids=repr)
def test_wpo_weighs_pairs_by_how_likely_the_policy_says_them(objective: Objective) -> None:
    """exp of the mean over trained tokens of log π(y) - log Σ_v π(v)², of both; and no gradient goes through it."""
    batch = pack([Tree([1, 2], [[3, 4, 5], [6]], None, [[1, 0, 1], [1]]), Tree([7], [[8, 9], [10, 11, 12, 13]])])
    algorithm = DPO(small(), objective=objective, wpo=True)
    algorithm.reference, algorithm._agreed = Fixed(torch.randn(len(batch)) * (batch.branch >= 0)), True
    policy = algorithm.policy
    hidden = policy.backbone.hidden(batch)
    logits = policy.backbone.head(hidden).detach().double()
    likely = []
    for span in batch.structure():
        for _, start, stop in span.responses:
            places = [t for t in range(start, stop) if batch.weight[t]]
            p = [logits[batch.parent[t]].softmax(-1) for t in places]
            aligned = [float(q[batch.tokens[t]] / q.square().sum()) for q, t in zip(p, places, strict=True)]
            likely.append(math.prod(aligned) ** (1 / len(aligned)))
    plain = DPO(policy, objective=objective)
    plain.reference, plain._agreed = algorithm.reference, True
    whole = batch.totals
    parts = []
    for row, weight in ((0, likely[0] * likely[1]), (1, likely[2] * likely[3])):
        part = batch.select([row])
        assert part.totals == whole
        if objective.needs_reference:
            start, stop = (0, 6) if row == 0 else (6, len(batch))
            plain.reference = Fixed(algorithm.reference(batch)[start:stop])
        parts.append(weight * plain.loss(part))
    ours, theirs = algorithm.loss(batch), sum(parts)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)  # type: ignore[union-attr]
    weights = (likely[0] * likely[1] + likely[2] * likely[3]) / 2
    assert float(algorithm._notes["pair_weight"]) == pytest.approx(weights, rel=1e-5)
    parameters = list(policy.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        assert off(a, b) < 1e-4


@pytest.mark.parametrize(
    ("objective", "least", "most"),
    [(Sigmoid(0.5, label_smoothing=0.2), math.log(0.8 / 0.2) / 0.5, 0.15), (IPO(0.5), 1.0, 0.15), (Hinge(0.5), 2.0, 9)],
    ids=["cdpo", "ipo", "hinge"],
)
def test_a_single_pair_reaches_the_known_optimum(objective: Any, least: float, most: float) -> None:
    """cDPO wants sigma(beta d) = 1 - e, IPO d = 1 / (2 beta), hinge d >= 1 / beta (Adam runs on a while)."""
    algorithm = DPO(small(), objective=objective, optimizer=lambda p: torch.optim.Adam(p, lr=2e-3), lr_scheduler=None)
    data = TreeData([Tree([5, 6], [[7, 8, 9], [10, 11]])], batch_size=1)
    metrics = fit(algorithm, data, max_epochs=120).callback_metrics
    assert least - 0.15 < float(metrics["train/margin"]) / objective.beta < least + most
    if isinstance(objective, Hinge):
        assert float(metrics["train/loss"]) == float(metrics["train/grad_norm"]) == 0.0


# -- without a reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", WITHOUT_REFERENCE, ids=repr)
def test_log_probs_are_given_and_nothing_else_is_asked(objective: Objective) -> None:
    batch = pack([Tree([1, 2], [[3, 4, 5], [6]]), Tree([7], [[8, 9], [10, 11, 12, 13]])])
    algorithm = DPO(small(), objective=objective)
    logp = batch.per_branch(algorithm.policy(batch).logp)
    logp = logp / torch.tensor([3.0, 1.0, 2.0, 4.0]) if objective.per_token else logp
    expected = objective(logp[0::2], logp[1::2]).mean()
    found = algorithm.loss(batch)
    assert algorithm.reference is None and not algorithm.has_reference
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parameters = list(algorithm.policy.parameters())
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert off(a, b) < 1e-5


@pytest.mark.parametrize("objective", WITHOUT_REFERENCE, ids=repr)
def test_no_reference_is_loaded(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a reference was asked for")

    monkeypatch.setattr(CausalLM, "reference", refuse)
    algorithm = DPO(small(), objective=objective, optimizer=adam, lr_scheduler=None)
    metrics = fit(algorithm, TreeData(trees(), trees(3), batch_size=4), max_epochs=2).callback_metrics
    assert algorithm.reference is None and "train/chosen_drift" not in metrics
    assert {"train/margin", "val/accuracy", "val/chosen_logp"} <= set(metrics)


@pytest.mark.parametrize("option", [{"reference": "copy"}, {"reference": "precomputed"}, {"reference_policy": None}])
def test_a_reference_that_would_be_ignored_is_refused(option: dict[str, Any]) -> None:
    option = {name: value or small() for name, value in option.items()}
    algorithm = DPO(small(), objective=SimPO(), **option)
    with pytest.raises(UserError, match=rf"--model.{[*option][0]}.*: ignored.*leave it out"):
        fit(algorithm, TreeData(trees(2), batch_size=2))


# -- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "kind"), [("full", "copy"), ("fresh", "adapter_off"), ("continued", "snapshot")])
def test_the_reference_stays_what_training_started_from_bit_for_bit(start: Start, kind: str) -> None:
    batch = pack(trees(4))
    pristine = policy(start).eval()(batch).logp.detach()
    algorithm = DPO(policy(start), optimizer=adam, lr_scheduler=None)
    trained = {name for name, p in algorithm.policy.named_parameters() if p.requires_grad}
    fit(algorithm, TreeData(trees(), batch_size=4), max_epochs=3)
    assert algorithm.reference is not None and algorithm.reference.kind == kind
    assert torch.equal(algorithm.reference(batch), pristine)
    assert (algorithm.policy.eval()(batch).logp - pristine).abs().max() > 0.1  # and the policy is somewhere else
    assert {name for name, p in algorithm.policy.named_parameters() if p.requires_grad} == trained
    assert (
        algorithm.policy.training is False
    )  # `eval` above; a forward of the reference leaves every module's mode alone


@pytest.mark.parametrize("start", ["full", "fresh", "continued"])
def test_checkpointing_recomputes_with_the_adapter_of_the_policy(start: Start) -> None:
    """The reference runs between the policy's forward and its backward; recomputation must not see its weights."""
    batch, slopes = pack(trees(4)), []
    for checkpointing in (False, True):
        algorithm = DPO(policy(start, gradient_checkpointing=checkpointing))
        algorithm.policy.build(dropout=False)
        algorithm.reference, algorithm._agreed = algorithm.policy.reference(), True
        with torch.no_grad():
            for parameter in algorithm.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        algorithm.loss(batch).backward()
        slopes.append(torch.cat([p.grad.flatten() for p in algorithm.policy.parameters() if p.grad is not None]))
    assert off(slopes[1], slopes[0]) < 1e-5


@pytest.mark.parametrize(
    ("start", "kind", "message"),
    [
        ("full", "adapter_off", "there is no adapter; use reference copy"),
        ("full", "snapshot", "there is no adapter; use reference copy"),
        ("continued", "adapter_off", "use reference snapshot"),
    ],
)
def test_a_kind_that_would_not_be_exact_is_refused(start: Start, kind: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        policy(start).reference(kind)


def test_more_than_an_adapter_in_training_is_copied() -> None:
    made = policy("fresh")
    made.model.base_model.model.model.norm.weight.requires_grad_(True)
    assert made.reference().kind == "copy"
    with pytest.raises(UserError, match=r"more than the adapter is trained \(.*norm.*\); use reference copy"):
        made.reference("adapter_off")


def test_an_adapter_that_does_not_start_as_zero_stops_before_the_first_step() -> None:
    made = policy("continued")
    made.adapter = LoraConfig(r=4)  # claims to be new, so that its reference is the model without it
    algorithm = DPO(made, optimizer=adam, lr_scheduler=None)
    before = weights_of(made)
    with pytest.raises(UserError, match="nats a token from its adapter_off reference.*--model.reference copy"):
        fit(algorithm, TreeData(trees(), batch_size=4))
    assert torch.equal(weights_of(made), before)


def test_dropout_is_off_in_the_policy_and_its_adapter() -> None:
    algorithm = DPO(policy("fresh"), optimizer=adam, lr_scheduler=None)
    fit(algorithm, TreeData(trees(2), batch_size=2))
    algorithm.train()
    batch = pack(trees(4))
    assert torch.equal(algorithm.policy(batch).logp, algorithm.policy(batch).logp)


class Spelling:
    """A tokenizer of another model."""

    def get_vocab(self) -> dict[str, int]:
        return {"other": 0}


def test_another_model_as_the_reference_needs_the_same_tokenizer() -> None:
    learner, other = small(), small("other")
    learner._tokenizer = Spelling()  # type: ignore[assignment]
    other._tokenizer = type("Else", (Spelling,), {"get_vocab": lambda self: {"else": 0}})()
    with pytest.raises(UserError, match="reference other has another tokenizer than llama.*reference_policy.path"):
        fit(DPO(learner, reference_policy=other), TreeData(trees(2), batch_size=2))
    with pytest.raises(UserError, match="give one of the two"):
        DPO(small(), reference="copy", reference_policy=small())


def test_another_model_as_the_reference_is_used_and_not_trained() -> None:
    learner, other = small(), small("other")
    learner._tokenizer = other._tokenizer = Spelling()  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    before, batch = weights_of(other), pack(trees(4))
    expected = other.eval()(batch).logp.detach()
    algorithm = DPO(learner, reference_policy=other, optimizer=adam, lr_scheduler=None)
    fit(algorithm, TreeData(trees(), batch_size=4))
    assert algorithm.reference is not None and torch.equal(algorithm.reference(batch), expected)
    assert torch.equal(weights_of(other), before)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_precomputed_trains_like_a_copy() -> None:
    ends = []
    for kind in ("copy", "precomputed"):
        algorithm = DPO(small(), optimizer=sgd, lr_scheduler=None, reference=kind)
        fit(algorithm, TreeData(trees(), trees(3), batch_size=4), max_epochs=3)
        ends.append(weights_of(algorithm.policy))
    assert off(ends[1], ends[0]) < 1e-6


@pytest.mark.parametrize(
    ("kind", "objective"), [("copy", Sigmoid()), ("precomputed", Sigmoid()), *(("auto", one) for one in OBJECTIVES)]
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path, kind: Any, objective: Objective) -> None:
    def run(epochs: int, **options: Any) -> DPO:
        algorithm = DPO(small(), objective=objective, optimizer=adam, lr_scheduler=None, reference=kind)
        fit(algorithm, TreeData(trees(), trees(3), batch_size=4), max_epochs=epochs, **options)
        return algorithm

    keep = ModelCheckpoint(tmp_path, filename="half", save_on_train_epoch_end=True)
    run(2, enable_checkpointing=True, callbacks=[keep])
    resumed = DPO(small(), objective=objective, optimizer=adam, lr_scheduler=None, reference=kind)
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(resumed, TreeData(trees(), trees(3), batch_size=4), ckpt_path=str(tmp_path / "half.ckpt"))
    whole = run(4)
    assert torch.equal(weights_of(resumed.policy), weights_of(whole.policy))
    batch = pack(trees(3))
    if objective.needs_reference:
        assert resumed.reference is not None and whole.reference is not None
        assert torch.equal(resumed.reference(batch), whole.reference(batch))


def test_what_is_logged() -> None:
    algorithm = DPO(small(), optimizer=sgd, lr_scheduler=None)
    metrics = fit(algorithm, TreeData(trees(), trees(5), batch_size=8)).callback_metrics
    for name in (
        "chosen_reward",
        "rejected_reward",
        "chosen_logp",
        "rejected_logp",
        "margin",
        "accuracy",
        "chosen_drift",
    ):
        assert f"train/{name}" in metrics and f"val/{name}" in metrics
    assert float(metrics["train/margin"]) == pytest.approx(0.0, abs=1e-6)
    logp = pack(trees()).per_branch(small().eval()(pack(trees())).logp.detach()).view(-1, 2).mean(0)
    assert float(metrics["train/chosen_logp"]) == pytest.approx(float(logp[0]), rel=1e-4)
    assert float(metrics["train/rejected_logp"]) == pytest.approx(float(logp[1]), rel=1e-4)
    margin = metrics["val/chosen_reward"] - metrics["val/rejected_reward"]
    assert float(metrics["val/margin"]) == pytest.approx(float(margin), abs=1e-5)
