"""Exact means, the guard, schedules and resuming: what every algorithm inherits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Ranks
from small import TreeData, fit, small, some_trees, weights_of
from torch import Tensor

from leyden.algorithm.algorithm import Algorithm
from leyden.algorithm.schedules import WarmupCosine, parameter_groups
from leyden.algos import SFT
from leyden.batch.forest import Batch, Tree, pack
from leyden.data.step_plan import PlannedLoader, plan_steps
from leyden.errors import UserError
from leyden.losses import negative_log_likelihood

RATE = 0.5


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, weight_decay=0.0)


class Mixed(Algorithm):
    """A loss that mixes units: a mean over tokens, one over responses and one over prompts."""

    def loss(self, batch: Batch) -> Tensor:
        logp = self.policy(batch).logp
        responses = batch.per_branch(logp)
        prompts = batch.per_prompt(responses).square()
        return -batch.token_mean(logp) + 0.1 * batch.response_mean(responses.tanh()) + 0.01 * batch.prompt_mean(prompts)


def gradient(kind: type[Algorithm], accumulate: int, devices: int = 1, steps: int = 1) -> Tensor:
    """What optimizer steps over 8 ragged trees add to the weights, as plain SGD tells it."""
    algorithm = kind(small(), optimizer=sgd, lr_scheduler=None)
    before = weights_of(algorithm)
    data = TreeData(some_trees(8, responses=2), batch_size=8 // steps)
    strategy = "ddp" if devices > 1 else "auto"
    fit(algorithm, data, accumulate_grad_batches=accumulate, devices=devices, strategy=strategy, max_epochs=1)
    return (before - weights_of(algorithm)) / RATE


def on_one_rank(kind_name: str, accumulate: int, steps: int) -> Tensor:
    return gradient({"SFT": SFT, "Mixed": Mixed}[kind_name], accumulate, 2, steps)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", [SFT, Mixed])
def test_any_split_of_a_step_takes_the_same_step(kind: type[Algorithm], ranks: Ranks) -> None:
    whole = gradient(kind, 1)
    assert off(gradient(kind, 8), whole) < 1e-6  # 8 micro-batches of 1
    assert off(gradient(kind, 3), whole) < 1e-6  # ragged: 3 micro-batches of unequal rows
    for accumulate in (1, 4, 5):  # 5 x 2 ranks is more micro-batches than rows: two of them are fillers of weight 0
        first, second = ranks(on_one_rank, kind.__name__, accumulate, 1)
        assert torch.equal(first, second)
        assert off(first, whole) < 1e-6


def test_several_steps_on_two_processes(ranks: Ranks) -> None:
    assert off(ranks(on_one_rank, "SFT", 1, 2)[0], gradient(SFT, 1, steps=2)) < 1e-6


def test_the_mean_is_over_tokens_of_the_step_and_not_of_micro_batches() -> None:
    """Token losses 4 | 1 1 1: the mean of means is 2.5, the mean is 1.75."""
    one, three = pack([Tree([1], [[2]])]), pack([Tree([1], [[2, 3, 4]])])
    one.totals = three.totals = one.totals + three.totals
    shares = [b.token_mean(x) for b, x in ((one, torch.tensor([0.0, 4.0])), (three, torch.tensor([0.0, 1, 1, 1])))]
    assert float(sum(shares)) == 1.75


def test_gradient_of_a_step_is_that_of_the_formula() -> None:
    """Against a loop over rows through the plain Hugging Face model."""
    policy = small()
    trees = some_trees(8, responses=2)
    total = sum(sum(map(sum, t.weights or [])) for t in trees)
    policy.model.set_attn_implementation("sdpa")
    loss = torch.zeros(())
    for tree in trees:
        for response, weights in zip(tree.responses, tree.weights or [], strict=True):
            ids = torch.tensor([tree.prompt + response])
            logp = policy.model(ids).logits[0].log_softmax(-1)
            for i, (token, weight) in enumerate(zip(response, weights, strict=True)):
                loss = loss - weight * logp[len(tree.prompt) + i - 1, token] / total
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    assert off(gradient(SFT, 2), expected) < 1e-5


def test_logged_loss_is_the_mean_over_the_step() -> None:
    algorithm = SFT(small(), optimizer=sgd)
    batch = pack(some_trees(8, responses=2))
    expected = float(algorithm.loss(batch).detach())
    trainer = fit(algorithm, TreeData(some_trees(8, responses=2), batch_size=8), accumulate_grad_batches=3)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert logged["train/samples"] == 8 and logged["train/tokens"] == batch.size
    assert logged["train/grad_norm"] == pytest.approx(float(gradient(SFT, 1).norm()), rel=1e-5)


def test_validation_is_the_exact_mean_however_it_is_batched() -> None:
    held = some_trees(7, seed=5)
    policy = small()
    expected = float(pack(held).token_mean(-policy(pack(held)).logp).detach())
    trainer = fit(SFT(small(), optimizer=sgd), TreeData(some_trees()))
    for size in (1, 3, 100):
        trainer.validate(SFT(policy), TreeData(some_trees(), held, batch_size=size), verbose=False)
        assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-6)
    trainer.validate(SFT(policy, label_smoothing=0.3), TreeData(some_trees(), held), verbose=False)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-6)


def test_bits_per_character() -> None:
    held = some_trees(3, seed=5)
    algorithm, batch = SFT(small()), pack(held)
    sums = {name: float(value.detach()) for name, value in algorithm.validation_sums(batch).items()}
    text = " ".join(str(t) for t in batch.tokens[batch.weight > 0].tolist())
    bits = sums["loss"] * float(batch.weight.sum()) / torch.tensor(2.0).log().item() / len(text)
    assert algorithm.validation_metrics(sums)["bits_per_character"] == pytest.approx(bits)


class Poisoned(SFT):
    def loss(self, batch: Batch) -> Tensor:
        bad = torch.isin(batch.row, torch.tensor([3, 5]))
        return super().loss(batch) + batch.prompt_mean(torch.where(bad, torch.nan, 0.0))


def test_a_non_finite_loss_names_its_rows() -> None:
    with pytest.raises(UserError, match=r"step 0: the loss is nan, from memory:(4, memory:6|6, memory:4);") as caught:
        fit(Poisoned(small(), optimizer=sgd), TreeData(some_trees(8), batch_size=8))
    assert "memory:1," not in str(caught.value)


def test_a_non_finite_gradient_names_the_step() -> None:
    class Steep(SFT):
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) + 0 * (self.policy(batch).logp.sum() * 0).sqrt()

    with pytest.raises(UserError, match=r"step 0: the gradient is nan, from memory:"):
        fit(Steep(small(), optimizer=sgd), TreeData(some_trees(2), batch_size=2))


def test_label_smoothing() -> None:
    logp, mean = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -5.0])
    assert negative_log_likelihood(logp, mean, 0.1).tolist() == pytest.approx([1.2, 2.3])
    with pytest.raises(ValueError):
        negative_log_likelihood(logp, None, 0.1)


def test_warmup_and_cosine() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, warmup=4, floor=0.1)
    schedule.plan(14)
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way between step 4 and step 14
    assert rates[14:] == pytest.approx([0.2, 0.2])
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))


def test_norms_and_biases_do_not_decay() -> None:
    decayed, free = parameter_groups(small())
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert "weight_decay" not in decayed and free["weight_decay"] == 0.0


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_resuming_is_as_if_it_had_never_stopped(stop: int, tmp_path: Path) -> None:
    data = dict(batch_size=4)
    whole = SFT(small(), optimizer=adamw)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(
        whole,
        TreeData(some_trees(16), **data),
        max_epochs=2,
        callbacks=[saver],
        enable_checkpointing=True,
        accumulate_grad_batches=2,
    )
    again = SFT(small(), optimizer=adamw)
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
    )
    trainer.fit(again, TreeData(some_trees(16), **data), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert torch.equal(weights_of(whole), weights_of(again)) and again.progress == whole.progress


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    algorithm = SFT(small(), optimizer=sgd)
    trainer = fit(algorithm, TreeData(some_trees(4)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = SFT(small(options=None), optimizer=sgd)
    other.policy.model.model.layers[0].requires_grad_(False)
    with pytest.raises(UserError, match="does not fit this model: 9 weights are only in the checkpoint"):
        trainer.fit(other, TreeData(some_trees(4)), ckpt_path=tmp_path / "a.ckpt")


def test_plans_keep_every_row_once() -> None:
    lengths = [len(t) for t in some_trees(23)]
    made = plan_steps(range(23), lengths, 4, 1000, accumulate=2, world=2, seed=1)
    assert sorted(r for step in made.steps for micro in step for r in micro) == list(range(23))
    assert len(made.steps) == 6 and {len(step) for step in made.steps} == {4} and made.accumulate == 2
    assert plan_steps(range(23), lengths, 4, 1000, seed=2) != plan_steps(range(23), lengths, 4, 1000, seed=1)


def test_plan_errors_say_what_fits() -> None:
    with pytest.raises(
        UserError, match=r"longest row has 30 tokens but a micro-batch holds 20; set --data.max_tokens 30"
    ):
        plan_steps(range(2), [30, 5], 2, 20)
    with pytest.raises(UserError, match=r"--trainer.accumulate_grad_batches 4"):
        plan_steps(range(8), [10] * 8, 8, 20)
    assert plan_steps(range(8), [10] * 8, 8, 20, accumulate=4).accumulate == 4


def test_the_order_is_of_seed_and_epoch_and_shared_by_ranks() -> None:
    trees = TreeData(some_trees(12)).train_trees
    assert trees is not None
    made = plan_steps(range(12), trees.lengths, 2, 1000, world=2, seed=0)
    first, second = (PlannedLoader(trees, made, rank, seed=3) for rank in (0, 1))
    for _ in range(2):
        rows = [sorted([*a.row.tolist(), *b.row.tolist()]) for a, b in zip(first, second, strict=True)]
        assert sorted(r for step in rows for r in step) == list(range(12))
    assert first.order(0) != first.order(1) and first.order(1) == second.order(1)
    assert copy.deepcopy(first).order(5) == first.order(5)


def test_the_longest_micro_batch_comes_first_in_the_first_epoch_alone() -> None:
    trees = TreeData(some_trees(20)).train_trees
    assert trees is not None
    loader = PlannedLoader(trees, plan_steps(range(20), trees.lengths, 4, 1000, 2, seed=0), seed=7)
    epochs = [[batch.size for batch in loader] for _ in range(3)]
    assert epochs[0][0] == max(epochs[0]) and sorted(epochs[0]) == sorted(epochs[1])
    assert any(sizes[0] < max(sizes) for sizes in epochs[1:])


def test_the_configuration_is_the_truth_on_resume(tmp_path: Path) -> None:
    """A longer training and another learning rate hold from the first resumed step on."""
    first = SFT(small(), optimizer=adamw)
    fit(first, TreeData(some_trees(8), batch_size=4)).save_checkpoint(tmp_path / "a.ckpt")
    again = SFT(small(), optimizer=lambda p: torch.optim.AdamW(p, lr=4e-3, weight_decay=0.2))
    rates: list[float] = []
    again.on_before_zero_grad = lambda o: rates.append(o.param_groups[0]["lr"])  # type: ignore[method-assign]
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(again, TreeData(some_trees(8), batch_size=4), ckpt_path=tmp_path / "a.ckpt")
    planned = WarmupCosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    planned.plan(8)
    assert rates == pytest.approx([4e-3 * planned.factor(step) for step in range(2, 8)])
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_by_the_known_norm_is_clipping(
    algorithm: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of Lightning's own clipping, bit for bit, with the norm worked out once a step."""
    measured: list[int] = []
    norm = torch.nn.utils.get_total_norm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        measured.append(1)
        return norm(*args, **kwargs)

    class Plain(SFT):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(*args, **kwargs)

    ends = []
    for kind in (SFT, Plain):
        found = kind(small(), optimizer=adamw, lr_scheduler=None)
        with monkeypatch.context() as watched:
            watched.setattr(torch.nn.utils, "get_total_norm", counted)
            watched.setattr(torch.nn.utils.clip_grad, "_get_total_norm", counted)
            clipping = dict(gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
            fit(found, TreeData(some_trees(12), batch_size=4), precision=precision, **clipping)
        ends.append((weights_of(found), len(measured)))
        measured.clear()
    (ours, once), (plain, twice) = ends
    assert torch.equal(ours, plain)
    assert once == 3 and twice == (6 if algorithm == "norm" else 3)


def test_fused_optimizers_clip_under_mixed_precision() -> None:
    """Lightning refuses that by itself."""
    algorithm = SFT(small(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=True), lr_scheduler=None)
    before = weights_of(algorithm)
    fit(algorithm, TreeData(some_trees(8), batch_size=8), precision="bf16-mixed", gradient_clip_val=0.01)
    assert float((weights_of(algorithm) - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 8), (3, 8), (1.0, 16)])
def test_limits_cut_whole_steps_once(limit: float, expected: int) -> None:
    """16 rows in 4 steps of 2 micro-batches: half of it is 2 steps, and 3 micro-batches round up to 2 steps."""
    algorithm = SFT(small(), optimizer=sgd)
    trainer = fit(
        algorithm, TreeData(some_trees(16), batch_size=4), accumulate_grad_batches=2, limit_train_batches=limit
    )
    assert algorithm.progress["samples"] == expected and trainer.global_step == expected // 4


@pytest.mark.parametrize("limit", [0.5, 2])
def test_limited_validation_is_the_mean_over_the_rows_it_drew(limit: float) -> None:
    held = some_trees(12, seed=5)
    data = TreeData(some_trees(), held, batch_size=3)
    algorithm = SFT(small())
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                      enable_checkpointing=False, limit_val_batches=limit)  # fmt: skip
    trainer.validate(algorithm, data, verbose=False)
    drawn = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:6].tolist()
    batch = pack([held[i] for i in drawn])
    expected = float(batch.token_mean(-algorithm.policy(batch).logp).detach())
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-6)


def stop_on_one_rank() -> str:
    """Only one of the two ranks holds the poisoned rows; both must stop."""
    trees = [Tree(t.prompt, t.responses, None, t.weights, 3 if i == 0 else 0) for i, t in enumerate(some_trees(2))]
    try:
        fit(Poisoned(small(), optimizer=sgd), TreeData(trees, batch_size=2), devices=2, strategy="ddp")
    except UserError as error:
        return str(error)
    return "went on"


def test_a_bad_row_on_one_rank_stops_every_rank(ranks: Ranks) -> None:
    said = sorted(ranks(stop_on_one_rank))
    assert "from memory:4" in said[0] and "rows of another process" in said[1]


class Cramped(SFT):
    """Its second process has memory for two rows at once, while it validates."""

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        if self.trainer.global_rank == 1 and len(batch.structure()) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().validation_sums(batch)


def cramped_on_one_rank() -> tuple[Tensor, int | None]:
    algorithm = Cramped(small(), optimizer=sgd, lr_scheduler=None)
    before = weights_of(algorithm)
    data = TreeData(some_trees(8, responses=2), some_trees(8, seed=1), batch_size=8)
    fit(algorithm, data, devices=2, strategy="ddp", num_sanity_val_steps=-1)
    return (before - weights_of(algorithm)) / RATE, algorithm.micro_batches.token_limit


def test_memory_that_one_rank_lacked_in_validation_cuts_the_steps_of_every_rank(ranks: Ranks) -> None:
    """Else one adds gradients up over processes by itself while the other waits for DDP to do so."""
    (first, limit), (second, other) = ranks(cramped_on_one_rank)
    assert limit is not None and limit == other
    assert torch.equal(first, second) and off(first, gradient(SFT, 1)) < 1e-6


def predict_on_two(count: int, folder: str) -> list[str]:
    """Answers of each rank to `count` prompts."""
    import json

    from lightning.pytorch import Trainer

    from leyden.datamodules import InstructionData
    from leyden.models import CausalLM
    from leyden.policy.policy import Sampling

    file = Path(folder) / f"{count}.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(count)), encoding="utf-8")
    algorithm = SFT(CausalLM(), sampling=Sampling(max_new_tokens=2, temperature=0.0))
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False)
    batches = trainer.predict(algorithm, InstructionData(str(file)))
    return [row["prompt"][0]["content"] for batch in batches or [] for row in batch]


@pytest.mark.parametrize("count", [1, 5])
def test_every_prompt_is_answered_once_by_two_ranks(count: int, ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(predict_on_two, count, str(tmp_path))
    assert sorted(a for rank in answers for a in rank) == [f"{i}?" for i in range(count)]


def test_resuming_in_the_middle_of_another_plan_is_refused() -> None:
    trees = TreeData(some_trees(12)).train_trees
    assert trees is not None
    loader, other = (PlannedLoader(trees, plan_steps(range(12), trees.lengths, size, 1000), seed=0) for size in (2, 3))
    batches = iter(loader)
    next(batches)
    with pytest.raises(UserError, match="planned differently"):
        other.load_state_dict(loader.state_dict())
    assert len([next(batches) for _ in range(5)]) == 5
    other.load_state_dict(loader.state_dict())  # at the end of an epoch another plan may follow
    assert len(list(other)) == 4 and other.epoch == 1


def test_rows_beyond_the_model_s_positions_are_refused() -> None:
    long = [Tree([1] * 40, [[2] * 30])]
    with pytest.raises(UserError, match="70 tokens but llama has positions for 64; set --data.max_length 64"):
        fit(SFT(small(), optimizer=sgd), TreeData(long, batch_size=1))


def told_on_one_rank(folder: str, calls: int, start: str | None) -> tuple[int, Tensor]:
    """Train on two processes, of which the second gets a SIGTERM in one of its micro-batches: exit code and weights."""
    import os
    import signal

    from lightning.pytorch import Trainer

    from leyden.checkpoint.callback import Checkpoint, RNGState
    from leyden.checkpoint.signals import GracefulStop

    class Told(SFT):
        seen = 0

        def loss(self, batch: Batch) -> Tensor:
            self.seen += 1
            if self.seen == calls and self.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(batch)

    found, code = Told(small(), optimizer=adamw), 0
    callbacks = [RNGState(), GracefulStop(), Checkpoint(folder)]
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, accumulate_grad_batches=2,
                      callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0)  # fmt: skip
    try:
        trainer.fit(found, TreeData(some_trees(16), batch_size=4), ckpt_path=start, weights_only=True)
    except SystemExit as stop:
        code = int(str(stop.code))
    return code, weights_of(found)


def test_a_signal_to_one_process_stops_all_at_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks(told_on_one_rank, str(tmp_path / "whole"), 0, None)
    assert [code for code, _ in ranks(told_on_one_rank, str(tmp_path / "part"), 5, None)] == [143, 143]
    (file,) = (tmp_path / "part").iterdir()
    assert file.name == "step=000003.ckpt"  # the fifth micro-batch begins the third step
    again = ranks(told_on_one_rank, str(tmp_path / "part"), 0, str(file))
    assert all(code == 0 and torch.equal(end, whole[0][1]) for code, end in again)
