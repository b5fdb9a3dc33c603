"""A run that goes on under another configuration: learning rates, optimizers, lengths, averages of weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small import TreeData, small, some_trees
from torch.optim import lr_scheduler as torch_schedulers

from leyden.algorithm import WarmupCosine
from leyden.algos import SFT

BASE = 1e-3


def adamw(parameters: Any, lr: float = BASE) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr)


class Rates(Callback):
    """The learning rate, and the first of the betas, that each optimizer step takes."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        self.seen.append((group["lr"], group.get("betas", (0.0,))[0]))

    @property
    def rates(self) -> list[float]:
        return [rate for rate, _ in self.seen]


def train(
    scheduler: Any = None,
    rows: int = 8,
    batch_size: int = 4,
    resumed: Path | None = None,
    save: Path | None = None,
    optimizer: Any = adamw,
    **options: Any,
) -> tuple[Any, Rates]:
    """Train an SFT; the Trainer, and what each step took."""
    from lightning.pytorch import Trainer

    rates = Rates()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=[rates, *options.pop("callbacks", [])], **quiet, **options
    )
    algorithm = SFT(small(), optimizer=optimizer, lr_scheduler=scheduler or (lambda o: WarmupCosine(o)))
    data = TreeData(some_trees(rows), batch_size=batch_size)
    trainer.fit(algorithm, data, ckpt_path=resumed, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer, rates


def cosine(total: int, **options: Any) -> list[float]:
    """The rates of a schedule that was planned for this many steps."""
    planned = WarmupCosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE), **options)
    planned.plan(total)
    return [BASE * planned.factor(step) for step in range(total)]


@pytest.mark.parametrize(
    ("change", "total"),
    [
        (dict(batch_size=8), 3),  # one step in the second epoch
        (dict(batch_size=1), 10),
        (dict(rows=20), 7),
        (dict(accumulate_grad_batches=2), 4),
        (dict(max_epochs=3), 6),
        (dict(max_epochs=3, batch_size=3, rows=9), 8),
        (dict(max_epochs=-1, max_steps=5), 5),
        (dict(max_epochs=4, max_steps=5, batch_size=1), 5),
    ],
    ids=str,
)
def test_steps_already_taken_count(change: dict[str, Any], total: int, tmp_path: Path) -> None:
    """Two steps were taken in the first epoch; whatever the next ones are, the rate ends with the last of them."""
    train(save=tmp_path / "a.ckpt", max_epochs=1)
    trainer, after = train(resumed=tmp_path / "a.ckpt", **(dict(max_epochs=2) | change))
    assert trainer.global_step == total
    assert after.rates == pytest.approx(cosine(total)[2:])


def test_a_warm_up_goes_on_where_it_was(tmp_path: Path) -> None:
    warm: Any = lambda o: WarmupCosine(o, warmup=4)  # noqa: E731
    train(warm, save=tmp_path / "a.ckpt", max_epochs=1)
    _, after = train(warm, resumed=tmp_path / "a.ckpt", max_epochs=2, batch_size=1)
    assert after.rates[:2] == pytest.approx([BASE * 3 / 4, BASE])
    assert after.rates == pytest.approx(cosine(10, warmup=4)[2:])


def test_a_longer_run_that_is_stopped_again_keeps_its_plan(tmp_path: Path) -> None:
    """A third of the way, resumed with larger steps, and then stopped in the middle of an epoch of those."""
    train(save=tmp_path / "a.ckpt", max_epochs=1)
    more: Any = dict(max_epochs=3, batch_size=2)
    _, whole = train(resumed=tmp_path / "a.ckpt", **more)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    _, before = train(resumed=tmp_path / "a.ckpt", save=tmp_path / "b.ckpt", callbacks=[Stop()], **more)
    _, after = train(resumed=tmp_path / "b.ckpt", **more)
    assert before.seen + after.seen == whole.seen
    assert len(before.seen) == 2 and whole.rates == pytest.approx(cosine(10)[2:])


SCHEDULES: dict[str, Callable[..., Any]] = {
    "cosine": lambda o, n: torch_schedulers.CosineAnnealingLR(o, T_max=4 * n),
    "linear": lambda o, n: torch_schedulers.LinearLR(o, 1.0, 0.1, total_iters=4 * n),
    "steps": lambda o, n: torch_schedulers.StepLR(o, n + 1, gamma=0.5),
    "cycle": lambda o, n: torch_schedulers.OneCycleLR(o, 1e-2, total_steps=12 * n),
    "two": lambda o, n: torch_schedulers.SequentialLR(
        o, [torch_schedulers.ConstantLR(o, 0.5, 3), torch_schedulers.ExponentialLR(o, 0.9**n)], [3]
    ),
    "ours": lambda o, n: WarmupCosine(o, warmup=2 * n, floor=0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on_as_it_is_configured_now(name: str, tmp_path: Path) -> None:
    """Unchanged it is to the bit what it would have been, momenta included; with other arguments or another base rate
    what it would have been with those."""

    def scheduled(n: int) -> Any:
        return lambda o: SCHEDULES[name](o, n)

    options: Any = dict(max_steps=6, max_epochs=-1)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    train(scheduled(1), save=tmp_path / "a.ckpt", callbacks=[Stop()], **options)
    for n, lr in ((1, BASE), (2, BASE), (1, 3 * BASE)):
        optimizer = lambda p, lr=lr: adamw(p, lr)  # noqa: E731
        _, whole = train(scheduled(n), optimizer=optimizer, **options)
        _, after = train(scheduled(n), optimizer=optimizer, resumed=tmp_path / "a.ckpt", **options)
        assert after.seen == whole.seen[3:], (n, lr)


def test_another_schedule_or_optimizer_goes_on_from_the_step(tmp_path: Path, caplog: Any) -> None:
    train(save=tmp_path / "a.ckpt", max_epochs=1)
    steps = lambda o: torch_schedulers.StepLR(o, 3, gamma=0.5)  # noqa: E731
    _, after = train(steps, resumed=tmp_path / "a.ckpt", max_epochs=2)
    assert after.rates == [BASE, BASE / 2]
    train(steps, save=tmp_path / "b.ckpt", max_epochs=1)
    _, after = train(resumed=tmp_path / "b.ckpt", max_epochs=2, optimizer=lambda p: adamw(p, 2 * BASE))
    assert after.rates == pytest.approx([2 * rate for rate in cosine(4)[2:]])
    with caplog.at_level(logging.WARNING, logger="leyden"):
        trainer, after = train(
            resumed=tmp_path / "a.ckpt", max_epochs=2, optimizer=lambda p: torch.optim.SGD(p, lr=BASE, momentum=0.9)
        )
    assert "SGD starts anew: the checkpoint has the state of torch.optim.adamw.AdamW" in caplog.text
    assert all(set(state) == {"momentum_buffer"} for state in trainer.optimizers[0].state.values())
    assert after.rates == pytest.approx(cosine(4)[2:])
