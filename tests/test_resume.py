"""A run that goes on under another configuration: learning rates, optimizers, lengths, averages of weights."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from peft import LoraConfig, get_peft_model
from small import LLAMA, TreeData, small, some_trees
from torch.optim import lr_scheduler as torch_schedulers

from leyden.algorithm import WarmupCosine
from leyden.algos import SFT
from leyden.checkpoint.find import find_checkpoint
from leyden.run.folder import _lock, claim_folder

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


class StopAt(Callback):
    """Ends training after so many steps of a longer plan."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def train(
    scheduler: Any = None,
    rows: int = 8,
    batch_size: int = 4,
    resumed: Path | None = None,
    save: Path | None = None,
    optimizer: Any = adamw,
    policy: Any = None,
    held: int = 0,
    **options: Any,
) -> tuple[Any, Rates]:
    """Train an SFT; the Trainer, and what each step took."""
    from lightning.pytorch import Trainer

    rates = Rates()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=[rates, *options.pop("callbacks", [])], **quiet, **options
    )
    algorithm = SFT(policy or small(), optimizer=optimizer, lr_scheduler=scheduler or (lambda o: WarmupCosine(o)))
    data = TreeData(some_trees(rows), some_trees(held), batch_size=batch_size)
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
    train(warm, save=tmp_path / "a.ckpt", max_epochs=3, callbacks=[StopAt(2)])
    _, after = train(warm, resumed=tmp_path / "a.ckpt", max_epochs=2, batch_size=1)
    assert after.rates[:2] == pytest.approx([BASE * 3 / 4, BASE])
    assert after.rates == pytest.approx(cosine(10, warmup=4)[2:])


def test_a_longer_run_that_is_stopped_again_keeps_its_plan(tmp_path: Path) -> None:
    """A third of the way, resumed with larger steps, and then stopped in the middle of an epoch of those."""
    train(save=tmp_path / "a.ckpt", max_epochs=1)
    more: Any = dict(max_epochs=3, batch_size=2)
    _, whole = train(resumed=tmp_path / "a.ckpt", **more)
    _, before = train(resumed=tmp_path / "a.ckpt", save=tmp_path / "b.ckpt", callbacks=[StopAt(4)], **more)
    _, after = train(resumed=tmp_path / "b.ckpt", **more)
    assert before.seen + after.seen == whole.seen
    assert len(before.seen) == 2 and whole.rates == pytest.approx(cosine(10)[2:])


SCHEDULES: dict[str, Callable[..., Any]] = {
    "cosine": lambda o, n: torch_schedulers.CosineAnnealingLR(o, T_max=4 * n),
    "linear": lambda o, n: torch_schedulers.LinearLR(o, 1.0, 0.1, total_iters=4 * n),
    "steps": lambda o, n: torch_schedulers.StepLR(o, n + 1, gamma=0.5),
    "cycle": lambda o, n: torch_schedulers.OneCycleLR(o, 1e-2, total_steps=24, pct_start=0.2 * n),
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

    options: Any = dict(max_steps=24, max_epochs=-1)
    train(scheduled(1), save=tmp_path / "a.ckpt", callbacks=[StopAt(3)], **options)
    options |= dict(callbacks=[StopAt(6)])
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


# -- averages of weights ---------------------------------------------------------------------------------------------

TIED = LLAMA | dict(tie_word_embeddings=True)


def lora() -> Any:
    policy = small()
    torch.manual_seed(0)
    policy.adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.model = get_peft_model(policy.model, policy.adapter)
    return policy


@pytest.mark.parametrize("make", [small, lambda: small(options=TIED), lora], ids=["full", "tied", "lora"])
def test_an_average_is_resumed_and_validated(make: Callable[[], Any], tmp_path: Path) -> None:
    """The average is a_t = (a_(t-1) + w_t) / 2 from a_1 = w_1 on. Stopped after two of four steps it is the same to the
    bit, and so is what is trained; a checkpoint's weights, the validated ones and those at the end are the average."""
    steps: list[torch.Tensor] = []
    validated: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            steps.append(trained(module))

        def on_validation_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if not trainer.sanity_checking:
                validated.append(trained(module))

    def trained(module: Any) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in module.parameters() if p.requires_grad])

    def run(epochs: int, resumed: Path | None = None, save: Path | None = None) -> Any:
        callbacks = [EMAWeightAveraging(decay=0.5), Watch()]
        return train(policy=make(), resumed=resumed, save=save, max_epochs=epochs, callbacks=callbacks, held=2)[0]

    whole = run(2, save=tmp_path / "whole.ckpt")
    average = average_of(steps)
    end = trained(whole.lightning_module)
    torch.testing.assert_close(end, average)
    torch.testing.assert_close(validated[-1], average)
    kept = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    torch.testing.assert_close(torch.cat([w.flatten() for w in kept["state_dict"].values()]), average)
    torch.testing.assert_close(torch.cat([w.flatten() for w in kept["current_model_state"].values()]), steps[-1])

    undisturbed, steps[:] = steps[:], []
    run(1, save=tmp_path / "half.ckpt")
    again = run(2, resumed=tmp_path / "half.ckpt")
    assert len(steps) == len(undisturbed) == 4
    torch.testing.assert_close(trained(again.lightning_module), average_of(steps))
    alone = train(policy=make(), resumed=tmp_path / "whole.ckpt", max_epochs=2, held=2)[0]  # without the callback
    assert torch.equal(trained(alone.lightning_module), undisturbed[-1])


def average_of(steps: list[torch.Tensor]) -> torch.Tensor:
    average = steps[0]
    for step in steps[1:]:
        average = average / 2 + step / 2
    return average


def test_an_average_that_never_began_is_not_exported(caplog: Any) -> None:
    late = EMAWeightAveraging(update_starting_at_step=100)
    trainer, _ = train(max_epochs=1, callbacks=[late])
    plain, _ = train(max_epochs=1)
    pairs = zip(trainer.lightning_module.parameters(), plain.lightning_module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert "EMAWeightAveraging averaged nothing in 2 steps" in caplog.text


# -- which checkpoint, and what is kept ------------------------------------------------------------------------------

FIT = "fit --model toy.Toy --model.policy toy.Bigrams --data toy.ToyData --data.path rows.jsonl".split()


def files(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").glob("*"))


def test_best_is_what_the_monitor_says(leyden: Any, workplace: Path) -> None:
    run = ["--trainer.default_root_dir", "a b/한글"]  # names with spaces and Hangul
    more = ["--checkpoint.monitor", "train/loss", "--checkpoint.mode", "max", "--checkpoint.save_last", "true"]
    more += ["--checkpoint.every_n_train_steps", "1"]
    assert leyden(*FIT, *run, *more, "--trainer.max_steps", "4", "--model.optimizer.lr", "1e-1")[0] == 0
    folder = workplace / "a b/한글"
    best = find_checkpoint("best", str(folder))
    rows = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    losses = [float(row["train/loss"]) for row in csv.DictReader(rows)]
    assert best is not None and best.name == f"step={losses.index(max(losses)) + 1:06}.ckpt"
    assert best != find_checkpoint("last", str(folder))
    assert leyden("validate", *FIT[1:], *run, "--ckpt_path", "best")[0] == 0
    best.unlink()
    code, _, err = leyden(*FIT, *run, *more, "--ckpt_path", "best")
    assert code == 2 and f"{best.name} was the best and is gone; take last" in err and err.count("\n") == 1
    assert leyden(*FIT, "--trainer.default_root_dir", "plain", "--trainer.max_steps", "1")[0] == 0
    code, _, err = leyden(*FIT, "--trainer.default_root_dir", "plain", "--ckpt_path", "best")
    assert code == 2 and "no measure is monitored; train with --checkpoint.monitor val/loss, or take last" in err


def test_a_pruned_run_keeps_its_export_alone(leyden: Any, workplace: Path) -> None:
    run = ["--trainer.default_root_dir", "a", "--checkpoint.prune", "true"]
    many = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
    assert leyden(*FIT, *run, *many, "--trainer.max_epochs", "100000", "--trainer.max_time", "00:00:00:01")[0] == 0
    assert files(workplace / "a")  # it did not come to its planned end
    step = len(files(workplace / "a")) + 1
    assert leyden(*FIT, *run, *many, "--ckpt_path", "last", "--trainer.max_steps", str(step))[0] == 0
    assert not files(workplace / "a") and (workplace / "a/export").is_dir()
    code, _, err = leyden(*FIT, *run, "--ckpt_path", "last")
    assert code == 2 and "the run has ended and kept none; start a new one from its export" in err


def test_one_process_at_a_time_trains_in_a_folder(leyden: Any, workplace: Path, monkeypatch: Any) -> None:
    pytest.importorskip("fcntl")
    run = ["--trainer.default_root_dir", "a"]
    assert leyden(*FIT, *run, "--trainer.max_steps", "1")[0] == 0
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(_lock, "__defaults__", (0.0,))
    other = claim_folder("a", "toy", resume=True, alone=True)
    code, _, err = leyden(*FIT, *run, "--ckpt_path", "last", "--trainer.max_steps", "2")
    assert code == 2 and "a: another process trains there; wait for its end" in err and err.count("\n") == 1
    other.release()
    assert leyden(*FIT, *run, "--ckpt_path", "last", "--trainer.max_steps", "2")[0] == 0


def test_a_run_that_was_moved_and_one_that_has_ended_say_so(leyden: Any, workplace: Path, caplog: Any) -> None:
    assert leyden(*FIT, "--trainer.default_root_dir", "a", "--trainer.max_steps", "2")[0] == 0
    (workplace / "a").rename(workplace / "b")
    again = ["fit", "--config", "b/config.yaml", "--ckpt_path", "last"]
    code, _, err = leyden(*again)
    assert code == 2 and "there is no a; if the run was moved, say where it is by --trainer.default_root_dir" in err
    assert not (workplace / "a").exists()
    assert leyden(*again, "--trainer.default_root_dir", "b")[0] == 0
    assert "training came to its end at step 2 already" in caplog.text
