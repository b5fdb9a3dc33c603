"""The simulated GPU is strict where a real one is: what would fail there for these reasons fails here. Nothing in the
tests is special to it, so they are for a real GPU too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from waits import waits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, or SIMULATED_GPU=1")


@pytest.mark.parametrize(
    "meet",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there.index_select(0, here.argmax(1)),
        lambda here, there: torch.nn.functional.embedding(here.argmax(1), there),
        lambda here, there: there.add_(here),
        lambda here, there: torch.where(here > 0, there, 0.0),
        lambda here, there: there.masked_fill(here > 0, 0.0),
        lambda here, there: torch.stack([there, here]),
        lambda here, there: there.index_select(0, torch.tensor(1)),
        lambda here, there: there.masked_fill(torch.tensor(True), 0.0),
    ],
)
def test_tensors_of_two_devices_never_meet(meet: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="same device|is on cpu|on the same"):
        meet(torch.ones(3, 3), torch.ones(3, 3, device="cuda"))


@pytest.mark.parametrize(
    ("act", "waiting"),
    [
        (lambda x: x.sum().item(), True),
        (lambda x: bool((x > 0).all()), True),
        (lambda x: x.tolist(), True),
        (lambda x: x.cpu(), True),
        (lambda x: x.nonzero(), True),
        (lambda x: x[x > 0], True),
        (lambda x: x.unique(), True),
        (lambda x: torch.equal(x, x), True),
        (lambda x: torch.tensor([1.0, 2.0], device="cuda"), True),
        (lambda x: torch.ones(2).to("cuda"), True),
        (lambda x: torch.ones(2).to("cuda", non_blocking=True), False),
        (lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True), False),
        (lambda x: torch.ones(2, device="cuda") + x.sum(), False),
        (lambda x: (x @ x).softmax(-1).cumsum(0).sort().values[:2, torch.arange(2, device="cuda")], False),
        (lambda x: torch.where(x > 0, x, 0.0).masked_fill(x > 1, 2.0), False),
        (lambda x: x.requires_grad_().sum().backward(), False),
    ],
)
def test_waits_are_counted(act: Callable[[Tensor], object], waiting: bool) -> None:
    x = torch.arange(9.0, device="cuda").view(3, 3)
    act(x.clone())  # kernels are loaded
    with waits() as places:
        act(x.clone())
    assert bool(places) is waiting


def test_integers_are_not_multiplied() -> None:
    x = torch.ones(3, 3, dtype=torch.long, device="cuda")
    with pytest.raises(RuntimeError, match="not implemented"):
        x @ x


def test_counts_of_integers() -> None:
    x = torch.tensor([0, 1, 1, 3], dtype=torch.int, device="cuda")
    assert torch.histc(x, bins=4, min=0, max=3).tolist() == [1, 2, 0, 1]


def test_gradients_are_those_of_the_processor() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)), torch.randn(4, 5)
    grads = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        model.to(device)(x.to(device)).square().sum().backward()
        grads.append([p.grad.cpu().clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_is_recorded_is_replayed_on_the_same_memory() -> None:
    total, given = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    made: list[Tensor] = []

    def run() -> None:
        made[:] = [given * 3 + total[:1]]  # the view is of what stands there when it is replayed
        total.add_(given.index_select(0, torch.zeros(2, dtype=torch.long, device="cuda")))

    run()
    total.zero_()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        graph.capture_begin()
        run()
        graph.capture_end()
    assert total.tolist() == [0, 0]  # recorded, not executed
    graph.replay()
    assert total.tolist() == [1, 1] and made[0].tolist() == [3, 3]
    given.fill_(5)
    graph.replay()
    assert total.tolist() == [6, 6] and made[0].tolist() == [16, 16]


def test_random_numbers_are_the_devices_own() -> None:
    torch.manual_seed(3)
    here = torch.rand(4)
    torch.manual_seed(3)
    there = torch.rand(4, device="cuda")
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.rand(4), here)  # the processor's generator has not moved
    after = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), after) and not torch.equal(after, there)


def test_files_keep_where_tensors_were(tmp_path: Path) -> None:
    x = torch.arange(3.0, device="cuda")
    torch.save({"x": x}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["x"].is_cuda
    assert torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)["x"].tolist() == [0, 1, 2]
