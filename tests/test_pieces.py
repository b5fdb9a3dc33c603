"""Micro-batches that do not fit the memory: the same steps, taken in parts."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from small import TreeData, fit, small, some_trees, weights_of
from test_on_policy import Questions, evens

from leyden.algorithm.microbatches import MicroBatches, out_of_memory
from leyden.algos import DPO, PPO, SFT
from leyden.batch.forest import Batch, pack
from leyden.batch.trajectory import Trajectory
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.policy.policy import Sampling

FULL = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(FULL)


class Cramped(CausalLM):
    """A policy on a device that has room for so many tokens with gradients, and says so forward or backward."""

    room, backward, tries = 10**9, False, 0

    def forward(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(batch, *args, **kwargs)
        if batch.size <= self.room or not torch.is_grad_enabled():
            return out
        Cramped.tries += 1
        if not self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        # half of the gradients are there when it fails: those of the head and the norm above
        out.logp = _Fails.apply(0.5 * out.logp) + 0.5 * out.logp
        return out


def cramped(room: int, backward: bool = False) -> Cramped:
    policy = small()
    policy.__class__ = Cramped
    Cramped.room, Cramped.backward, Cramped.tries = room, backward, 0
    return policy  # type: ignore[return-value]


def algorithm(kind: Any, room: int, backward: bool = False) -> Any:
    options: dict[str, Any] = dict(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), lr_scheduler=None)
    if kind is PPO:
        options |= dict(reward=evens, sampling=Sampling(max_new_tokens=6), keep_rollouts=False, samples=2, epochs=2)
    return kind(cramped(room, backward), **options)


def data_for(kind: Any, size: int = 8) -> Any:
    return Questions() if kind is PPO else TreeData(some_trees(16, responses=1 if kind is SFT else 2), batch_size=size)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", [SFT, DPO, PPO])
def test_what_does_not_fit_is_cut_and_the_steps_stay(kind: Any, backward: bool, accumulate: int, caplog: Any) -> None:
    ends, logged = [], []
    for room in (10**9, 60 if kind is PPO else 45):
        found = algorithm(kind, room, backward)
        with caplog.at_level(logging.WARNING, "leyden"):
            trainer = fit(found, data_for(kind), max_epochs=2, accumulate_grad_batches=accumulate)
        ends.append(weights_of(found.policy))
        names = ("train/loss", "train/grad_norm", "train/tokens", "train/samples")
        logged.append([float(trainer.callback_metrics[name]) for name in names])
    assert Cramped.tries > 0 and len([r for r in caplog.records if "did not fit" in r.message]) == 1
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=0)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_a_row_alone_that_does_not_fit_stops_the_run() -> None:
    found = algorithm(SFT, 15)
    with pytest.raises(UserError, match=r"a single row of \d+ tokens does not fit the memory; set --data.max_length"):
        fit(found, data_for(SFT))


def test_other_errors_pass() -> None:
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError(FULL))
    found = algorithm(SFT, 10**9)

    def wrong(batch: Batch) -> Any:
        raise RuntimeError("shapes differ")

    found.loss = wrong
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(found, data_for(SFT))


def test_random_numbers_of_a_step_that_is_run_again_are_its_own() -> None:
    """Rows alone: what is cut off one micro-batch leaves the noise of the micro-batches before it as it was."""
    seen: list[list[float]] = []

    class Noisy(SFT):
        def loss(self, batch: Batch) -> torch.Tensor:
            seen[-1].append(float(torch.rand(())))
            return super().loss(batch)

    for room in (10**9, 44):
        seen.append([])
        found = Noisy(cramped(room), lr_scheduler=None)
        torch.manual_seed(5)
        fit(found, TreeData(some_trees(8), batch_size=8), accumulate_grad_batches=2)
    whole, cut = seen
    assert len(cut) > len(whole) and cut[0] == whole[0] and whole[0] in cut[1:]


def on_rank(most: int | None) -> torch.Tensor:
    from lightning.pytorch.strategies import DDPStrategy

    found = algorithm(DPO, 10**9)
    found.micro_batches.token_limit = most
    strategy = DDPStrategy(process_group_backend="gloo")
    fit(found, data_for(DPO), max_epochs=2, devices=2, strategy=strategy, accumulate_grad_batches=2)
    return weights_of(found.policy)


def test_parts_on_two_processes_are_wholes_on_one(ranks: Ranks) -> None:
    one = algorithm(DPO, 10**9)
    fit(one, data_for(DPO), max_epochs=2)
    two = ranks(on_rank, 20)
    assert torch.equal(two[0], two[1])
    torch.testing.assert_close(two[0], weights_of(one.policy), atol=2e-5, rtol=0)


def test_forwards_without_gradients_are_cut_too_and_none_runs_twice() -> None:
    pieces, ran = MicroBatches(), []

    def look(batch: Batch) -> list[int]:
        if batch.size > 30:
            raise RuntimeError(FULL)
        ran.append(batch.size)
        return batch.row.tolist()  # type: ignore[no-any-return]

    batch = pack(some_trees(9))
    assert sum(pieces.run(look, batch), []) == batch.row.tolist()
    assert sum(ran) == batch.size and len(ran) > 2
    with pytest.raises(UserError, match="a single row of"):
        pieces.run(lambda part: look(pack(some_trees(40, seed=1))), pack(some_trees(1)))


def test_parts_hold_every_tree_once_and_blanks_hold_none() -> None:
    batch, pieces = pack(some_trees(9, responses=2)), MicroBatches()
    assert pieces.of(batch) == [batch]
    pieces.shrink(batch)
    parts = pieces.of(batch)
    assert len(parts) > 1 and sum(part.size for part in parts) == batch.size
    assert torch.equal(torch.cat([part.row for part in parts]), batch.row)
    more = pieces.of(batch, 12)
    assert len(more) == 12 and [len(part.row) for part in more][-1] == 0
    blank = more[-1]
    assert blank.totals == batch.totals and len(blank.group) == 0 and float(blank.weight.sum()) == 0
    policy = small()
    assert blank.token_mean(policy(blank).logp).item() == 0
    assert len(Trajectory.of(some_trees(3)).blank().row) == 0


CAPPED = """
import resource, sys, torch
sys.path.insert(0, sys.argv[3])
from small import TreeData, fit, small, weights_of, LLAMA
from leyden.algos import SFT
from leyden.batch.forest import Tree
torch.set_num_threads(1)

def run(cap):
    policy = small(options=LLAMA | {"vocab_size": 8000, "hidden_size": 128, "intermediate_size": 512})
    trees = [Tree([1, 2], [[(7 * i + j) % 8000 for j in range(60)]], row=i) for i in range(64)]
    found = SFT(policy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr_scheduler=None)
    def begin():
        if cap:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + cap, resource.RLIM_INFINITY))
    found.on_train_start = begin
    fit(found, TreeData(trees, batch_size=64), max_epochs=2)
    return found

found = run(int(sys.argv[1]) << 20)
torch.save([weights_of(found.policy), found.micro_batches.token_limit], sys.argv[2])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory of a process can be capped on Linux only")
def test_a_real_cap_on_memory(tmp_path: Path) -> None:
    """The activations of 4,000 tokens in 96 MiB beyond what the process has: they fit in parts."""
    found = []
    for cap in (0, 96):
        file = str(tmp_path / f"{cap}.pt")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CAPPED, str(cap), file, str(Path(__file__).parent)],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(file, weights_only=True))
    assert found[0][1] is None and found[1][1] is not None
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=0)
