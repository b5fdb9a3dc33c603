"""Four-bit weights: what is stored, what is computed, what is trained over them, and what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from ranks import Ranks
from small import LLAMA, Numbers, TreeData, fit, labelled_trees, saved, some_trees, weights_of
from test_on_policy import Questions, evens, resume

from leyden.algos import BCO, DPO, GRPO, KTO, PPO, SFT, Distillation, OnlineDPO, RejectionSampling, RewardModel
from leyden.batch.forest import pack
from leyden.checkpoint.callback import RNGState
from leyden.errors import UserError
from leyden.models import CausalLM, quantized
from leyden.objectives import CPO, EXO, NCA, ORPO, APODown, APOZero, SimPO
from leyden.policy.policy import Sampling
from leyden.precision import QLoRAPrecision
from leyden.run.progress import summarise

WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 128}
RATE = 5e-3
ADAPTER: dict[str, Any] = dict(r=4, target_modules="all-linear", init_lora_weights="gaussian")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama with weights large enough that what is lost in four bits shows."""
    path = saved(tmp_path_factory.mktemp("model"), WIDE, noise=0.1)
    saved(Path(path) / "teacher", WIDE, noise=0.2)
    return path


def policy_of(folder: str, adapter: bool = True, **options: Any) -> CausalLM:
    policy = CausalLM(folder, adapter=LoraConfig(**ADAPTER) if adapter else None, **options)
    policy._tokenizer = Numbers()  # type: ignore[assignment]
    return policy


def built(folder: str, compute: Any = "float32", **options: Any) -> CausalLM:
    policy, precision = policy_of(folder, **options), QLoRAPrecision(compute_dtype=compute)
    torch.manual_seed(1)
    with precision.module_init_context():
        policy.build()
    precision.convert_module(policy)
    return policy


def algorithm(kind: Any, folder: str, **options: Any) -> Any:
    torch.manual_seed(1)
    given: dict[str, Any] = dict(optimizer=lambda p: torch.optim.AdamW(p, lr=RATE), lr_scheduler=None)
    if kind in (PPO, GRPO, RejectionSampling, OnlineDPO, Distillation):
        given |= dict(reward=evens, sampling=Sampling(max_new_tokens=5), keep_rollouts=False, samples=2)
    if kind is Distillation:
        given |= dict(teacher=policy_of(f"{folder}/teacher", adapter=False, attention="rows"))
    return kind(policy_of(folder), **(given | options))


def data_for(kind: Any) -> Any:
    if kind in (PPO, GRPO, RejectionSampling, OnlineDPO, Distillation):
        return Questions(4, 4)
    trees = labelled_trees(8) if kind in (KTO, BCO) else some_trees(8, responses=1 if kind is SFT else 2)
    return TreeData(trees, batch_size=4)


def train(found: Any, kind: Any, compute: Any = "float32", **options: Any) -> Any:
    torch.manual_seed(2)
    return fit(found, data_for(kind), plugins=[QLoRAPrecision(compute_dtype=compute)], **options)


def bytes_of(policy: CausalLM) -> list[torch.Tensor]:
    """Everything that four-bit layers are stored as."""
    states = [layer.quant_state for layer in quantized.layers(policy.model)]
    return [
        *(layer.weight.detach().clone() for layer in quantized.layers(policy.model)),
        *(x.clone() for state in states for x in (state.absmax, state.state2.absmax, state.offset)),
    ]


# -- what is stored and computed -----------------------------------------------------------------------------------


def test_the_kernel_of_processors_is_tried_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the default device: while a model is built, that may be a GPU, whose memory the kernel cannot read."""
    monkeypatch.setattr(quantized, "_mended", [])
    with torch.device("meta"):
        quantized.unpack_across_rows()
    assert len(quantized._mended) == 1


@pytest.mark.parametrize("width", [32, 48, 96, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_of_every_width_have_the_values_of_their_blocks(width: int, kind: Any, tmp_path: Path) -> None:
    """Blocks of 64 values go on from row to row; a kernel that began one with each row took the scales of others."""
    policy = policy_of(saved(tmp_path, LLAMA | {"hidden_size": width}, noise=0.1), adapter=False)
    with QLoRAPrecision(quant_type=kind, double_quant=False, compute_dtype="float32").module_init_context():
        policy.build(dropout=False)
    for layer in quantized.layers(policy.model):
        state = layer.quant_state
        halves = torch.stack([layer.weight.data.flatten() >> 4, layer.weight.data.flatten() & 15], 1).flatten().long()
        exact = (state.code[halves] * state.absmax.repeat_interleave(state.blocksize)).view(state.shape)
        torch.testing.assert_close(quantized.unpacked(layer.weight), exact, atol=1e-6, rtol=0)
        x = torch.randn(3, layer.in_features, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(layer(x), x @ exact.T, atol=1e-4, rtol=0)
        torch.testing.assert_close(x.grad, exact.sum(0).expand(3, -1), atol=1e-4, rtol=0)


def test_a_parameter_takes_half_a_byte_and_a_little(folder: str) -> None:
    """4 bits, 8 for the scale of 64 weights, 32 for that of 256 scales: 4.127 bits; small layers have tables beside."""
    policy = built(folder)
    found = list(quantized.layers(policy.model))
    assert len(found) == 2 * 7
    for layer in found:
        count, state = layer.quant_state.shape.numel(), layer.quant_state
        size = layer.weight.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
        assert layer.weight.dtype == torch.uint8 and size <= count * 0.516 + 4
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert summarise(policy).startswith(f"{base.num_parameters() + trained:,} parameters")
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    assert type(policy.model.get_base_model().lm_head) is torch.nn.Linear


def unpacked(policy: CausalLM, folder: str) -> CausalLM:
    """The same policy with its four-bit weights written out, so that nothing of bitsandbytes computes."""
    plain = policy_of(folder)
    plain.build()
    layers = dict(plain.model.named_modules())
    with torch.no_grad():
        for name, layer in policy.model.named_modules():
            if getattr(layer, "quant_state", None) is not None:
                layers[name].weight.copy_(quantized.unpacked(layer.weight))
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                own[name].copy_(parameter)
    return plain


def test_it_computes_and_learns_what_unpacked_weights_do(folder: str) -> None:
    """And these are not the weights that were read: something was quantised."""
    policy = built(folder)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    plain, batch = unpacked(policy, folder), pack(some_trees(6, responses=2))
    logps, grads = [], []
    for model in (policy, plain):
        logp = model(batch).logp
        batch.token_mean(-logp).backward()
        logps.append(logp.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*logps, rtol=1e-4, atol=1e-4)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 28
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)
    read = policy_of(folder)
    read.build()
    with torch.no_grad():
        assert (read(batch).logp - logps[0]).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_no_gradient(folder: str, checkpointing: bool) -> None:
    batch, grads = pack(some_trees(4)), []
    for on in (False, checkpointing):
        policy = built(folder, gradient_checkpointing=on)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        batch.token_mean(-policy(batch).logp).backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)


# -- every algorithm --------------------------------------------------------------------------------------------------

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (SFT, {}),
    (RewardModel, {}),
    (DPO, {}),
    *((DPO, {"objective": one}) for one in (SimPO(), CPO(), ORPO(), APOZero(), APODown(), NCA(), EXO())),
    (DPO, {"wpo": True}),
    (KTO, {}),
    (BCO, {}),
    (PPO, {}),
    (PPO, {"value": "adapter"}),
    (GRPO, {}),
    (RejectionSampling, {}),
    (Distillation, {}),
    (OnlineDPO, {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_algorithm_trains_over_a_base_that_stays_bit_for_bit(
    kind: Any, options: dict[str, Any], folder: str
) -> None:
    found = algorithm(kind, folder, **options)
    kept: list[Any] = []

    def begin() -> None:
        kept.append((bytes_of(found.policy), weights_of(found.policy)))

    found.on_train_start = begin
    trainer = train(found, kind, "bfloat16", max_epochs=2)
    before, weights = kept[0]
    after = bytes_of(found.policy)
    assert trainer.global_step > 0 and len(before) == len(after) == 14 * 4
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(weights, weights_of(found.policy))
    if kind is DPO and found.uses_reference:
        assert found.reference.kind == "adapter_off"


@pytest.fixture
def shared(folder: str, tmp_path: Path) -> Any:
    """A reward model's adapter that stands on the policy's base."""
    from leyden.models import ModelReward

    judge = algorithm(RewardModel, folder)
    train(judge, RewardModel)
    judge.policy.model.save_pretrained(tmp_path / "judge")
    _with_head(judge.policy, tmp_path / "judge")

    class Judge(ModelReward):
        def _trees(self, samples: Sequence[Any]) -> Any:
            from leyden.batch.tree import Tree

            numbers = [[int(word) for word in s.response.split()] or [0] for s in samples]
            return [Tree([1, 2], [row], row=i) for i, row in enumerate(numbers)], list(range(len(numbers)))

        def _finish(self, policy: Any) -> None:
            policy._tokenizer = Numbers()
            super()._finish(policy)

    return Judge(str(tmp_path / "judge"), base="policy")


def frozen_of(module: Any) -> set[int]:
    return {id(p) for n, p in module.named_parameters() if "lora" not in n and "heads" not in n}


def test_one_base_for_policy_reference_values_and_reward(folder: str, shared: Any) -> None:
    """PPO holds nothing twice: all frozen tensors of critic and reward model are the policy's."""
    found = algorithm(PPO, folder, value="adapter", reward=shared)
    train(found, PPO)
    own = {id(p) for p in found.policy.parameters() if not p.requires_grad}
    assert frozen_of(found.critic) == frozen_of(shared) == own
    assert found.reference.kind == "adapter_off" and not any(p.requires_grad for p in shared.parameters())


def test_an_evaluation_scores_on_the_base_of_the_policy_too(folder: str, shared: Any, tmp_path: Path) -> None:
    from test_evaluation import Fixed

    found, plain = algorithm(DPO, folder), algorithm(DPO, folder)
    trainer = train(found, DPO, callbacks=[Fixed(reward=shared, every_n_steps=1)], default_root_dir=tmp_path)
    assert frozen_of(shared) == {id(p) for p in found.policy.parameters() if not p.requires_grad}
    assert not any(p.requires_grad for p in shared.parameters()) and trainer.global_step > 0
    train(plain, DPO)
    assert torch.equal(weights_of(found.policy), weights_of(plain.policy)), "looking changes nothing"


def _with_head(policy: Any, folder: Path) -> None:
    """Write the score head beside the adapter, as an export does."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.score.weight": policy.heads["score"].weight.detach()}, file)


# -- resuming and ranks ---------------------------------------------------------------------------------------------


def test_resumed_is_never_stopped(folder: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    whole = algorithm(SFT, folder)
    train(whole, SFT, max_epochs=2, callbacks=[saver, RNGState()], enable_checkpointing=True)
    for step in (1, 3):
        again = algorithm(SFT, folder)
        resume(again, data_for(SFT), tmp_path / f"{step}.ckpt", max_epochs=2, callbacks=[RNGState()],
               plugins=[QLoRAPrecision(compute_dtype="float32")])  # fmt: skip
        assert torch.equal(weights_of(again.policy), weights_of(whole.policy))
    state = torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"]
    assert state and all("lora" in name for name in state)


def on_rank(folder: str, strategy: str) -> torch.Tensor:
    from lightning.pytorch.strategies import DDPStrategy

    found = algorithm(SFT, folder)
    train(found, SFT, max_epochs=2, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    return torch.cat([p.detach().flatten() for p in found.policy.parameters() if p.requires_grad])


def test_two_processes_learn_what_one_does(folder: str, ranks: Ranks) -> None:
    one = algorithm(SFT, folder)
    train(one, SFT, max_epochs=2)
    two = ranks(on_rank, folder, "ddp")
    mine = torch.cat([p.detach().flatten() for p in one.policy.parameters() if p.requires_grad])
    assert torch.equal(two[0], two[1])
    torch.testing.assert_close(two[0], mine, rtol=0, atol=2e-5)


def test_eight_bit_adam_learns_almost_the_same(folder: str) -> None:
    from bitsandbytes.optim import AdamW8bit

    ends = []
    for make in (torch.optim.AdamW, AdamW8bit):
        found = algorithm(SFT, folder, optimizer=lambda p, make=make: make(p, lr=RATE))
        trainer = train(found, SFT, max_epochs=4)
        ends.append(float(trainer.callback_metrics["train/loss"]))
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised(folder: str, tmp_path: Path) -> None:
    early = algorithm(SFT, folder)
    early.policy.build()
    with pytest.raises(UserError, match="built before the Trainer"):
        train(early, SFT)
    bare = SFT(policy_of(folder, adapter=False))
    with pytest.raises(UserError, match="nothing is trained.*--config lora"):
        train(bare, SFT)


def test_a_model_without_linear_layers(folder: str) -> None:
    policy = policy_of(folder)
    precision = QLoRAPrecision(keep=["proj"])
    with pytest.raises(UserError, match="no linear layer that could be stored in four bits"), \
            precision.module_init_context():  # fmt: skip
        policy.build()


def test_layers_can_be_kept_in_float(folder: str) -> None:
    policy, precision = policy_of(folder), QLoRAPrecision(keep=["down_proj"], compute_dtype="float32")
    with precision.module_init_context():
        policy.build()
    assert len(list(quantized.layers(policy.model))) == 2 * 6


def test_a_base_is_shared_only_with_adapters_on_it(folder: str, tmp_path: Path) -> None:
    from leyden.models import ModelReward

    with pytest.raises(UserError, match="no adapter, so it has no base to share"):
        ModelReward(folder, base="policy")
    policy = built(folder)
    policy.model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(folder, "elsewhere"))
    with pytest.raises(UserError, match="an adapter on elsewhere, but the policy stands on"):
        ModelReward(str(tmp_path), base="policy").attach(policy)
    with pytest.raises(UserError, match="has no fixed base"):
        ModelReward(str(tmp_path), base="policy").attach(small_whole(folder))


def small_whole(folder: str) -> CausalLM:
    policy = policy_of(folder, adapter=False)
    policy.build()
    return policy
