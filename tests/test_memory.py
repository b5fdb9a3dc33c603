"""The formulas of `leyden plan` against what autograd, optimizers, caches and bitsandbytes really hold."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from small import LLAMA, Numbers

from leyden.batch.forest import Tree, pack
from leyden.errors import UserError
from leyden.models import CausalLM, quantized
from leyden.models.attention.kv_cache import Cache
from leyden.models.planner import memory
from leyden.models.planner.blueprint import base_path, blueprint
from leyden.models.planner.memory import Arithmetic, Kept, Shape
from leyden.precision import QLoRAPrecision

SIZES: dict[str, Any] = LLAMA | {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "head_dim": 24}
OTHERS: dict[str, dict[str, Any]] = {
    "Exaone4Config": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "GPT2Config": {"bos_token_id": 0, "eos_token_id": 0},
}
ADAPTER = LoraConfig(r=4, target_modules="all-linear")
TOKENS = 50


def write(folder: Path, kind: str = "LlamaConfig", layers: int = 3, **changes: Any) -> str:
    """A folder with random weights."""
    options = SIZES | OTHERS.get(kind, {}) | {"num_hidden_layers": layers} | changes
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"][:layers]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def built(folder: str, dtype: Any, adapter: bool, four: bool, compute: str = "float32") -> CausalLM:
    policy = CausalLM(folder, dtype, LoraConfig(r=4, target_modules="all-linear") if adapter else None)
    policy._tokenizer = Numbers()  # type: ignore[assignment]
    precision = QLoRAPrecision(compute_dtype=compute)  # type: ignore[arg-type]
    with precision.module_init_context() if four else nullcontext():
        policy.build()
    return policy


def saved(policy: CausalLM, autocast: bool) -> int:
    """Bytes that autograd keeps of one forward pass, weights and their copies left out."""
    weights = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())}
    shapes = {p.shape for p in policy.parameters()} | {p.T.shape for p in policy.parameters() if p.ndim == 2}
    found: dict[int, tuple[int, Any]] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and x.shape not in shapes:
            found[storage.data_ptr()] = storage.nbytes(), x  # held, so that no other takes its place
        return x

    batch = pack([Tree([1] * 8, [[2] * (TOKENS - 8)])])
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), context:
        policy(batch)
    return sum(size for size, _ in found.values())


WAYS: dict[str, tuple[str, bool, bool, bool]] = {  # dtype, adapter, four bits, autocast
    "full": ("float32", False, False, False),
    "full-bfloat16": ("bfloat16", False, False, False),
    "full-mixed": ("float32", False, False, True),
    "lora": ("float32", True, False, False),
    "lora-bfloat16": ("bfloat16", True, False, False),
    "lora-mixed": ("bfloat16", True, False, True),
    "qlora": ("bfloat16", True, True, False),
    "qlora-mixed": ("bfloat16", True, True, True),
    "qlora-mixed-float32": ("float32", True, True, True),
}
CASES = [("LlamaConfig", way) for way in WAYS] + [
    (kind, way) for kind in ("Qwen3Config", "Exaone4Config") for way in ("full", "full-bfloat16", "qlora")
]


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_layer_keeps_what_autograd_keeps(kind: str, way: str, tmp_path: Path) -> None:
    dtype, adapter, four, autocast = WAYS[way]
    compute = "bfloat16" if autocast else "float32"
    folders = [write(tmp_path / str(layers), kind, layers) for layers in (2, 3)]
    two, three = (saved(built(folder, dtype, adapter, four, compute), autocast) for folder in folders)
    plan = blueprint(folders[1], ADAPTER if adapter else None)
    how = Arithmetic(2 if dtype == "bfloat16" else 4, autocast, four)
    assert memory.layer(plan.shape, plan.kept, how) * TOKENS == three - two


def test_all_layers_and_the_top_of_the_model(tmp_path: Path) -> None:
    folder = write(tmp_path)
    plan = blueprint(folder)
    found = memory.activations(TOKENS, plan.shape, plan.kept, Arithmetic(), False)
    assert found == pytest.approx(saved(built(folder, "float32", False, False), False), rel=0.03)
    less = memory.activations(TOKENS, plan.shape, plan.kept, Arithmetic(), True)
    assert less < found / 3  # the inputs of three layers instead of all that they keep


def test_only_adapted_layers_keep_their_inputs(tmp_path: Path) -> None:
    folder = write(tmp_path)
    some = blueprint(folder, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).kept
    assert some == Kept(2, 0, 0, 0, norms=False, ranks=4)
    assert blueprint(folder, ADAPTER).kept == Kept(3, 1, 2, 1, norms=False, ranks=28)
    assert blueprint(folder, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)).kept.dropout


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config", "GPT2Config"])
def test_parameters_are_counted_exactly(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path, kind)
    whole, plan = built(folder, "float32", False, False), blueprint(folder)
    assert (plan.total, plan.reached) == (whole.model.num_parameters(), whole.model.num_parameters())
    four = built(folder, "bfloat16", True, True)
    with_adapter = blueprint(folder, ADAPTER)
    assert with_adapter.adapter == sum(p.numel() for p in four.parameters() if p.requires_grad)
    states = [layer.quant_state for layer in quantized.layers(four.model)]
    assert plan.quantised == sum(state.shape.numel() for state in states)
    size = sum(layer.weight.numel() for layer in quantized.layers(four.model))
    size += sum(state.absmax.numel() + 4 * state.state2.absmax.numel() for state in states)
    assert memory.quantised(plan.quantised) == pytest.approx(size, rel=0.01)
    assert memory.quantised(1, double=False) == 4.5 / 8


def test_layers_that_four_bits_leave_alone(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert blueprint(folder).quantised - blueprint(folder, keep=["down_proj"]).quantised == 3 * 64 * 160


def test_an_adapter_folder_stands_for_its_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    policy = built(base, "float32", True, False)
    policy.model.save_pretrained(tmp_path / "adapter")
    found = blueprint(str(tmp_path / "adapter"))
    assert (found.total, found.adapter) == (blueprint(base).total, blueprint(base, ADAPTER).adapter)
    assert base_path(str(tmp_path / "adapter")) == base and base_path(base) == base


def test_no_weights_are_needed_and_a_missing_configuration_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert blueprint(folder).total
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    for name in ("empty", "odd"):
        with pytest.raises(UserError, match="its configuration cannot be read") as raised:
            blueprint(str(tmp_path / name))
        assert "--model.policy.path" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {}), ("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {}), ("RMSprop", {}), ("Adam", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_keep_what_is_planned(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = getattr(torch.optim, name)([weight], lr=1e-3, **options)
    optimizer.step()
    state = optimizer.state[weight].values()
    size = sum(x.numel() * x.element_size() for x in state if isinstance(x, torch.Tensor) and x.numel() > 1)
    assert memory.optimizer(name, weight.numel(), dtype.itemsize, "momentum" in options) == size


def test_eight_bit_optimizers_keep_two_bytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(256, 256))
    weight.grad = torch.ones_like(weight)
    optimizer = bnb.optim.AdamW8bit([weight], lr=1e-3)
    optimizer.step()
    state = {name: x for name, x in optimizer.state[weight].items() if isinstance(x, torch.Tensor)}
    size = sum(x.numel() * x.element_size() for name, x in state.items() if not name.startswith("qmap"))
    assert memory.optimizer("AdamW8bit", weight.numel(), 4) == size
    assert memory.optimizer("PagedAdamW", 10, 2) == 80


def test_the_cache_takes_what_is_planned() -> None:
    shape = Shape(2, 32, 32, 16, 48, True, 64, 0, 2, 97, 0, 0)
    cache = Cache(rows=5, prompts=3, longest=11, device=torch.device("cpu"))
    key = torch.zeros(1, 2, 7, 8)  # two key heads of width 8
    for call in range(2):
        cache.layer(call, key, key)
    cache.open([4])
    cache.enter([0] * 5)
    for _ in range(70):
        cache.advance()
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (*layer.prompts, *layer.own))
    assert cache.columns == 128
    assert memory.cache(5, 3, 11, 70, shape, Arithmetic()) == held
    assert memory.cache(5, 3, 11, 32, shape, Arithmetic()) < memory.cache(5, 3, 11, 33, shape, Arithmetic())
    assert memory.token_cache(shape, Arithmetic(autocast=True)) == memory.token_cache(shape, Arithmetic()) / 2


def test_logits_are_never_more_than_a_chunk() -> None:
    shape = Shape(2, 32, 32, 16, 48, True, 64, 0, 2, 100_000, 0, 0)
    few, many, more = (memory.logits(n, shape, Arithmetic(cuda=True)) for n in (10, 10_000, 10_000_000))
    assert few == 10 * 100_000 * (4 + 2 * 4) and many == more == (256 + 128) << 20


def test_a_step_works_with_square_roots() -> None:
    assert memory.step(1000, 100, 4, in_place=True, cuda=True) == 0
    assert memory.step(1000, 100, 4, in_place=False, cuda=True) == 4000
    assert memory.step(1000, 100, 4, in_place=False, cuda=False) == 800
