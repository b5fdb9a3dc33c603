"""Experts of a mixture: grouped products against the model's own loop over experts, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small import LLAMA, Numbers
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from leyden.batch.forest import Tree, pack
from leyden.models import CausalLM, experts
from leyden.models.backbone import base_of
from leyden.policy.policy import Sampling

LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
ROUTED = dict(num_experts_per_tok=2, moe_intermediate_size=16)
KINDS: dict[str, Callable[..., PreTrainedConfig]] = {
    "qwen3_moe": lambda **more: Qwen3MoeConfig(**(LLAMA | ROUTED | dict(num_experts=8, head_dim=8) | more)),
    "mixtral": lambda **more: MixtralConfig(**(LLAMA | dict(num_local_experts=8, num_experts_per_tok=2) | more)),
    "deepseek_v3": lambda **more: DeepseekV3Config(
        **(LLAMA | LATENT | ROUTED | dict(num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1))
        | dict(first_k_dense_replace=1) | more
    ),
}  # fmt: skip
TREES = [Tree([5, 9, 2, 40], [[7, 8, 1], [60, 3, 3, 3, 12, 0]]), Tree([11, 30], [[4, 96, 17]])]


def written(folder: Path, kind: str, **more: Any) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind](**more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return str(folder)


def built(folder: str, dtype: Any = "float32", **options: Any) -> CausalLM:
    policy = CausalLM(folder, dtype, **options)
    policy._tokenizer = Numbers()  # type: ignore[assignment]
    policy.build()
    return policy


def results(policy: CausalLM, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp = policy(pack(TREES)).logp
    parameters = [p for p in policy.parameters() if p.requires_grad]
    grads = torch.autograd.grad((logp * torch.linspace(-1, 2, len(logp))).sum(), parameters, allow_unused=True)
    return logp, torch.cat([g.float().flatten() for g in grads if g is not None])


def both(policy: CausalLM, autocast: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probs and gradients by grouped products, and by the model's own loop."""
    base, found = base_of(policy.model), []
    assert base.config._experts_implementation == experts.EXPERTS
    for way in (experts.EXPERTS, "eager"):
        base.set_experts_implementation(way)
        found.append(results(policy, autocast))
    base.set_experts_implementation(experts.EXPERTS)
    return found


def apart(pair: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    (logp, grads), (own_logp, own_grads) = pair
    return float((logp - own_logp).abs().max().detach()), float((grads - own_grads).norm() / own_grads.norm())


@pytest.fixture
def grouped_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Dtypes of the weights of every grouped product that ran."""
    calls: list[torch.dtype] = []
    product = torch.nn.functional.grouped_mm

    def counted(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(weight.dtype)
        return product(x, weight, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    experts.grouped_runs.cache_clear()
    yield calls
    experts.grouped_runs.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_equals_the_loop_over_experts(
    kind: str, dtype: str, near: float, tmp_path: Path, grouped_calls: list[torch.dtype]
) -> None:
    policy = built(written(tmp_path, kind), dtype)
    assert grouped_calls and set(grouped_calls) == {getattr(torch, dtype)}
    assert dtype == "bfloat16" or policy.attention == "auto"  # rounding turns a router, and the checks at build see it
    logp, gradient = apart(both(policy))
    assert logp < 10 * near and gradient < 2 * near


def test_a_wrong_expert_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = built(written(tmp_path, "qwen3_moe"))
    right = experts.grouped_mm_experts_forward

    def wrong(module: Any, hidden: Any, chosen: torch.Tensor, weights: Any) -> Any:
        return right(module, hidden, chosen.flip(-1), weights)

    monkeypatch.setattr(experts, "grouped_mm_experts_forward", wrong)
    assert min(apart(both(policy))) > 1e-3


def test_autocast_reaches_the_products(tmp_path: Path, grouped_calls: list[torch.dtype]) -> None:
    """Float32 weights under autocast are multiplied in bfloat16, and their gradients are float32 again."""
    policy = built(written(tmp_path, "qwen3_moe"))
    grouped_calls.clear()
    logp, gradient = apart(both(policy, autocast=True))
    assert set(grouped_calls) == {torch.bfloat16} and logp < 0.3 and gradient < 0.1
    exact, rough = results(policy), results(policy, autocast=True)
    assert apart([rough, exact])[1] < 0.1 and rough[1].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft's own, of experts that it leaves alone
@pytest.mark.parametrize("target", [dict(target_modules="all-linear"), dict(target_parameters=["experts.down_proj"])])
def test_under_an_adapter_and_checkpointing(target: Any, tmp_path: Path, grouped_calls: list[torch.dtype]) -> None:
    adapter = LoraConfig(r=2, init_lora_weights=False, **target)
    policy = built(written(tmp_path, "qwen3_moe"), adapter=adapter, gradient_checkpointing=True)
    grouped_calls.clear()
    logp, gradient = apart(both(policy))
    assert grouped_calls and logp < 1e-4 and gradient < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_in_four_bits_experts_stay_as_they_are(tmp_path: Path, grouped_calls: list[torch.dtype]) -> None:
    from leyden.precision import QLoRAPrecision

    folder = written(tmp_path, "qwen3_moe")
    with QLoRAPrecision(compute_dtype="bfloat16").module_init_context():
        policy = built(folder, "bfloat16", adapter=LoraConfig(r=2, target_modules="all-linear"))
    assert set(grouped_calls) == {torch.bfloat16}
    stacked = [p for p in policy.model.parameters() if p.dim() == 3]
    assert stacked and all(p.dtype == torch.bfloat16 and not p.requires_grad for p in stacked)
    logp, gradient = apart(both(policy))
    assert logp < 0.5 and gradient < 0.1


@pytest.mark.parametrize(("dtype", "hidden", "inner"), [("bfloat16", 36, 16), ("bfloat16", 32, 12), ("float32", 32, 6)])
def test_widths_that_the_kernel_refuses_go_the_models_own_way(
    dtype: str, hidden: int, inner: int, tmp_path: Path, grouped_calls: list[torch.dtype]
) -> None:
    """Rows of no multiple of 16 bytes would be an error."""
    folder = written(tmp_path, "qwen3_moe", hidden_size=hidden, moe_intermediate_size=inner)
    policy = built(folder, dtype)
    grouped_calls.clear()
    assert apart(both(policy)) == (0.0, 0.0) and not grouped_calls
    base = base_of(policy.model)
    base.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="16 bytes"):
        policy(pack(TREES))


def test_a_device_without_grouped_products_is_found_by_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no such kernel on this device")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", missing)
    experts.grouped_runs.cache_clear()
    policy = built(written(tmp_path, "mixtral"))
    assert apart(both(policy)) == (0.0, 0.0)
    experts.grouped_runs.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_token_by_token(kind: str, tmp_path: Path, grouped_calls: list[torch.dtype]) -> None:
    """The log-probs that sampling gives are those of the packed batch by the model's own loop."""
    policy = built(written(tmp_path, kind))
    grouped_calls.clear()
    prompts = [tree.prompt for tree in TREES]
    answers = policy.generate(prompts, 3, Sampling(max_new_tokens=6), keys=[1, 2])
    assert grouped_calls
    base_of(policy.model).set_experts_implementation("eager")
    batch = pack([Tree(p, [r.tokens for r in rows]) for p, rows in zip(prompts, answers, strict=True)])
    logp = policy(batch).logp
    for span, rows in zip(batch.structure(), answers, strict=True):
        for (_, start, stop), response in zip(span.responses, rows, strict=True):
            assert torch.allclose(logp[start:stop], torch.tensor(response.logp), atol=1e-4)


def test_the_folder_says_nothing_of_it(tmp_path: Path) -> None:
    policy = built(written(tmp_path / "model", "qwen3_moe"))
    base_of(policy.model).save_pretrained(tmp_path / "saved")
    assert experts.EXPERTS not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
