"""Compilation before the first step: nothing is compiled afterwards, and nothing else has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import TreeData, small, some_trees, weights_of
from small import fit as fit_on_cpu
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from leyden.algorithm.compile_ahead import compile_ahead, few_tokens
from leyden.algos import DPO, GRPO, PPO, SFT, RewardModel
from leyden.batch.forest import Tree, pack
from leyden.data import Prompt, PromptLoader
from leyden.data.datamodule import DataModule
from leyden.example import Example, Sample
from leyden.models import CausalLM
from leyden.models.attention import flex
from leyden.models.attention.dispatch import forest_attention
from leyden.models.attention.forest import AttentionArgs, Forest
from leyden.models.compile_ahead import compile_calls, uses_flex
from leyden.paths import kernel_folder
from leyden.policy import Sampling
from leyden.policy.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore")  # compilers warn of much


def fit(*args: Any, **options: Any) -> Any:
    """Train on the GPU, if there is one."""
    return fit_on_cpu(*args, accelerator="auto", **options)


class Prompts(DataModule):
    """Prompts of two to eight numbers, some of them held out."""

    def __init__(self, size: int = 4) -> None:
        super().__init__(size, 256)
        generator = torch.Generator().manual_seed(9)
        rows = [torch.randint(1, 97, (2 + i % 7,), generator=generator).tolist() for i in range(12)]
        self.prompts = [Prompt(i, Example([], source=f"q:{i}"), row) for i, row in enumerate(rows)]

    def source(self, row: int) -> str:
        return f"q:{row}"

    def train_dataloader(self) -> Any:
        return self._trainer().lightning_module.experience(PromptLoader(self.prompts[:9], self.batch_size))

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.prompts[9:], batch_size=3, collate_fn=list)


def evens(samples: Sequence[Sample]) -> list[float]:
    return [sum(int(word) % 2 == 0 for word in s.response.split()) / max(len(s.response.split()), 1) for s in samples]


def held(responses: int = 1) -> list[Tree]:
    """Rows beside those that are trained on."""
    return [replace(tree, row=100 + tree.row) for tree in some_trees(5, 1, responses)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def compiled(lora: bool = False, dropout: float = 0.0) -> CausalLM:
    """A small policy whose layers are compiled, by a compiler that is quick since it makes no kernels."""
    policy = small()
    if lora:
        policy.adapter = LoraConfig(target_modules=["q_proj", "up_proj"], r=2, lora_dropout=dropout)
        policy.model = get_peft_model(policy.model, policy.adapter)
    policy.compiled = True
    for block in policy.backbone.blocks():
        block.compile(dynamic=True, backend="eager")
    return policy


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.config.recompile_limit = 64
    torch.compiler.reset()
    counters.clear()


ON_POLICY: dict[str, Any] = dict(
    reward=evens, sampling=Sampling(max_new_tokens=6, temperature=0.9), minibatches=2, keep_rollouts=False
)
PAIRS = TreeData(some_trees(8, responses=2), held(2), batch_size=3)
RUNS: dict[str, tuple[Any, bool, dict[str, Any], Callable[[], DataModule]]] = {
    "sft": (SFT, False, {}, lambda: TreeData(some_trees(8), held(), batch_size=3)),
    "sft of an adapter": (SFT, True, {}, lambda: TreeData(some_trees(8), held(), batch_size=3)),
    "reward model": (RewardModel, False, {}, lambda: PAIRS),
    "dpo": (DPO, False, {}, lambda: PAIRS),
    "dpo of an adapter": (DPO, True, {}, lambda: PAIRS),
    "precomputed": (DPO, False, {"reference": "precomputed"}, lambda: PAIRS),
    "ppo": (PPO, False, ON_POLICY, Prompts),
    "ppo with a critic": (PPO, True, ON_POLICY | {"value": "adapter"}, Prompts),
    "grpo": (GRPO, True, ON_POLICY | {"samples": 3}, Prompts),
}


@pytest.mark.parametrize(
    "name", [name if name == "dpo" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_nothing_is_compiled_once_training_runs(name: str) -> None:
    kind, lora, options, data = RUNS[name]
    counted: list[int] = []

    class Counting(kind):  # type: ignore[misc, valid-type]
        def on_fit_start(self) -> None:
            super().on_fit_start()
            counted.append(graphs())

        def on_train_end(self) -> None:
            counted.append(graphs())

    algorithm = Counting(compiled(lora), optimizer=sgd, lr_scheduler=None, **options)
    fit(algorithm, data(), max_epochs=2, val_check_interval=1)
    assert counted[0] == counted[1] > 0


@pytest.mark.slow
def test_a_run_is_the_same_with_it_and_without() -> None:
    """With dropout, whose noise would differ had it drawn any."""
    weights = []
    for ahead in (True, False):
        algorithm = SFT(compiled(lora=True, dropout=0.5), optimizer=sgd)
        algorithm.policy.compiled = ahead
        torch.manual_seed(3)
        fit(algorithm, TreeData(some_trees(8), batch_size=3))
        weights.append(weights_of(algorithm.policy))
    assert torch.equal(*weights)


def test_gradients_modes_and_buffers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = SFT(compiled(lora=True), optimizer=sgd)
    algorithm.policy.backbone.body.eval()  # of which the user thought something
    seen: list[Any] = []

    def look() -> list[Any]:
        parts = [part.training for part in algorithm.modules()]
        grads = [None if p.grad is None else p.grad.sum().item() for p in algorithm.parameters()]
        return [parts, grads, [b.sum().item() for b in algorithm.buffers()], torch.get_rng_state().tolist()]

    def around(one: Any) -> None:
        learnt = next(p for p in one.parameters() if p.requires_grad)
        learnt.grad = torch.ones_like(learnt)  # whatever was there
        before = look()
        compile_ahead(one)
        seen.append(before == look())
        one.zero_grad()

    monkeypatch.setattr(SFT, "on_fit_start", around)
    fit(algorithm, TreeData(some_trees(4), batch_size=2))
    assert seen == [True]


def test_says_so_and_where(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, "leyden"):
        fit(SFT(compiled(), optimizer=sgd), TreeData(some_trees(4), batch_size=2))
    first, last = (record.getMessage() for record in caplog.records if "kernels" in record.getMessage())
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "this processor"
    assert first.startswith(f"compiling kernels for {place} before the first step") and str(tmp_path) in first
    assert last.startswith("kernels are compiled: ")


def test_a_model_that_is_not_compiled_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Unrehearsed(SFT):
        def rehearse(self, batch: Any) -> Any:
            raise AssertionError

    with caplog.at_level(logging.INFO, "leyden"):
        fit(Unrehearsed(small(), optimizer=sgd), TreeData(some_trees(4), batch_size=2))
    assert "kernels" not in caplog.text


def test_a_model_that_fails_trains_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SFT):
        def rehearse(self, batch: Any) -> Any:
            super().rehearse(batch)
            raise ValueError("no such tokens")

    trainer = fit(Broken(compiled(), optimizer=sgd), TreeData(some_trees(4), batch_size=2))
    assert trainer.global_step == 2
    assert "wait for them: no such tokens" in caplog.text


def test_the_tokens_specialise_nothing() -> None:
    batch = few_tokens()
    sizes = [len(x) for x in (batch.tokens, batch.row)] + [s.stop - s.cut for s in batch.structure()]
    assert len(set(sizes)) == len(sizes) and len(batch) == 53 and int(batch.tokens.max()) < 3


def test_sizes_are_those_of_the_plan() -> None:
    """Of training exactly; of validation at most, whatever a limit leaves."""
    trees, held = some_trees(9, 2), some_trees(7, 3)
    data = TreeData(trees, held, batch_size=4, max_tokens=64)
    seen: list[tuple[str, int]] = []

    class Watching(SFT):
        def training_step(self, batch: Any, index: int) -> Any:
            seen.append(("train", len(batch)))
            return super().training_step(batch, index)

        def validation_step(self, batch: Any, index: int) -> None:
            seen.append(("val", len(batch)))
            super().validation_step(batch, index)

    algorithm = Watching(small(), optimizer=sgd)
    fit(algorithm, data)
    train, val = ([n for kind, n in seen if kind == name] for name in ("train", "val"))
    assert algorithm.row_sizes == (min(train), max(train))
    assert data.held_sizes is not None and data.held_sizes[0] <= min(val) and max(val) == data.held_sizes[1]
    assert TreeData(trees).held_sizes is None


def test_kernels_are_kept_beside_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    assert kernel_folder() == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("LEYDEN_CACHE", str(tmp_path / "cache"))
    assert kernel_folder() == str(tmp_path / "cache" / "kernels")
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == kernel_folder()


# -- attention -------------------------------------------------------------------------------------------------------


def test_padded_lengths_of_one_compilation_for_all() -> None:
    assert [flex.padded(n) for n in (1, 256, 257, 1000)] == [256, 256, 384, 1024]
    assert flex.compiled_lengths(1, 900) == [37 * 128]


def test_padded_lengths_between_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "DYNAMIC", False)
    assert flex.compiled_lengths(1, 900) == [1024]
    assert flex.compiled_lengths(700, 5000) == [1024, 2048, 4096, 8192]
    assert flex.compiled_lengths(3000, 3500) == [4096]


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 5), (False, 15)])
def test_the_kernel_is_called_as_it_was_recorded(dynamic: bool, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of layer is compiled for every length, so that the layers themselves need nothing new."""
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    kernel = torch.compile(flex_attention, backend=backend, dynamic=dynamic, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(specialize_float=True):  # type: ignore[attr-defined]
            return kernel(*args, **kwargs)

    monkeypatch.setattr(flex, "DYNAMIC", dynamic)
    monkeypatch.setattr(flex, "SHORTEST", 128)
    monkeypatch.setattr(flex, "flex_attention", run)

    def layers(lengths: Sequence[int]) -> None:
        batch = pack([Tree([0] * n, [[0] * 5, [0] * 9]) for n in lengths])
        forest = Forest(batch, "flex")
        asked: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 7}, {"softcap": 1.5}, {}, {"scaling": 0.3})
        for heads, options in zip((2, 4, 4, 4, 4), asked, strict=True):
            # as layers make them: heads beside each other in memory, not tokens
            q, k, v = (torch.randn(1, len(batch), h, 16).transpose(1, 2) for h in (4, heads, heads))
            forest_attention(torch.nn.Identity(), q, k, v, None, forest=forest, **options)

    with torch.no_grad():
        with flex.recording() as calls:
            layers((3, 20))
        assert len(calls) == 5 and made == []
        compile_calls(calls, (40, 500), torch.device("cpu"))
        compiled_graphs = len(made)
        assert compiled_graphs == graphs
        for lengths in ((20, 11), (99, 1), (84, 30), (200, 12), (300, 50), (242, 242)):
            layers(lengths)
    assert len(made) == compiled_graphs


def test_lengths_are_compiled_one_by_one_where_torch_cannot_do_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        if flex.DYNAMIC:
            raise RuntimeError("unbacked symbols")
        lengths.append(query.shape[2])
        return query

    monkeypatch.setattr(flex, "DYNAMIC", True)
    monkeypatch.setattr(flex, "flex_attention", kernel)
    call = flex.Call(((4, 16), (4, 16), (4, 16)), (False,) * 3, torch.float32, AttentionArgs(), False, False)
    compile_calls([call], (40, 3000), torch.device("cpu"))
    assert lengths[-3:] == [1024, 2048, 4096] and not flex.DYNAMIC
    monkeypatch.setattr(flex, "DYNAMIC", True)
    out = flex.Flex().attend(*torch.randn(3, 1, 4, 9, 16), Forest(pack([Tree([0] * 9, [])]), "flex"), AttentionArgs())
    assert out.shape == (1, 9, 4, 16) and lengths[-1] == 1024 and not flex.DYNAMIC
    with monkeypatch.context() as broken:
        broken.setattr(flex, "flex_attention", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compile_calls([call], (40, 50), torch.device("cpu"))


def test_a_recorded_layer_has_the_shape_and_the_graph_of_attention() -> None:
    batch = few_tokens()
    q, k, v = (torch.randn(1, h, len(batch), 16, requires_grad=h == 4) for h in (4, 2, 2))
    with flex.recording() as calls:
        out, _ = forest_attention(torch.nn.Identity(), q, k, v, None, forest=Forest(batch, "flex"))
    assert out.shape == (1, len(batch), 4, 16) and out.requires_grad
    (call,) = calls
    assert call.needs_gradient == (True, False, False) and call.gradients and call.shapes == ((4, 16), (2, 16), (2, 16))


def test_attention_is_looked_for_on_gpus_alone() -> None:
    policy: Policy = small()
    assert not policy.is_compiled(few_tokens()) and not uses_flex(policy, few_tokens(), "flex")
