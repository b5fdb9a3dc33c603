"""A trained reward model as a reward: the scores that `leyden predict` gives, in the order of the samples."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from prepared import write
from torch import Tensor

from leyden.batch.forest import Tree, pack
from leyden.errors import UserError
from leyden.example import Message, Sample
from leyden.models import CausalLM, ModelReward
from leyden.rewards.function import Ensemble, WeightedSum, score

ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 3은?", "responses": ["5입니다.", "정말 좋은 질문입니다. 2 + 3은 6입니다.", "다섯"]},
    {"prompt": [{"role": "user", "content": "Hi"}], "responses": ["Hello!", "Go away."]},
    {
        "prompt": [
            {"role": "system", "content": "친절하게 답해."},
            {"role": "user", "content": "누구세요?"},
            {"role": "assistant", "content": "저는 레이든입니다."},
            {"role": "user", "content": "정말요?"},
        ],
        "responses": ["네, 정말이에요. 🙂", "  blanks  "],
    },
]


def messages_of(prompt: Any) -> list[Message]:
    return prompt if isinstance(prompt, list) else [Message(role="user", content=prompt)]


SAMPLES = [
    Sample(messages_of(row["prompt"]), text, source=f"rows.jsonl:{line}")
    for line, row in enumerate(ROWS, start=1)
    for text in row["responses"]
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Reward models with random weights: a whole model, an adapter; and an ordinary model."""
    folder = tmp_path_factory.mktemp("reward")
    made = {}
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    for name, options, wants in (
        ("whole", {}, ("score",)),
        ("adapter", {"adapter": adapter}, ("score",)),
        ("plain", {}, ("logp",)),
    ):
        torch.manual_seed(len(made))
        policy = CausalLM(**options)  # type: ignore[arg-type]
        policy.build(wants, dropout=False)
        policy.save(folder / name)
        made[name] = str(folder / name)
    return made


@pytest.fixture(scope="module")
def whole(folders: dict[str, str]) -> ModelReward:
    return ModelReward(folders["whole"])


def predicted(path: str, folder: Path, **data: Any) -> list[float]:
    """The scores that `leyden predict` gives to ROWS, in their order."""
    from lightning.pytorch import Trainer

    from leyden.algos import RewardModel
    from leyden.datamodules import PreferenceData

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    rows = PreferenceData(write(folder / "rows.jsonl", ROWS), path, **data)
    found = [row for part in trainer.predict(RewardModel(CausalLM(path)), rows) or [] for row in part]
    assert [row["responses"] for row in found] == [row["responses"] for row in ROWS]
    return [value for row in found for value in row["scores"]]


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_scores_are_those_of_predict(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    expected = predicted(folders[kind], tmp_path)
    scores = score(ModelReward(folders[kind]), SAMPLES)
    assert scores.tolist() == pytest.approx(expected, abs=2e-5) and scores.std() > 0.01


def test_template_and_system_prompt_as_predict_takes_them(folders: dict[str, str], tmp_path: Path) -> None:
    options = {"chat_template": "plain", "system_prompt": "짧게."}
    expected = predicted(folders["whole"], tmp_path, **options)
    scores = score(ModelReward(folders["whole"], **options), SAMPLES)  # type: ignore[arg-type]
    assert scores.tolist() == pytest.approx(expected, abs=2e-5)
    assert (scores - score(ModelReward(folders["whole"]), SAMPLES)).abs().min() > 1e-4


def test_any_order_any_company_and_any_budget_give_the_same_scores(whole: ModelReward) -> None:
    expected = torch.cat([whole([sample]) for sample in SAMPLES])
    for seed, budget in ((0, 16384), (1, 60), (2, 1)):
        order = random.Random(seed).sample(range(len(SAMPLES)), len(SAMPLES))
        whole.batch_tokens = budget
        found = whole([SAMPLES[place] for place in order])
        assert (found - expected[order]).abs().max() < 1e-5
    whole.batch_tokens = 16384
    assert whole([]).shape == (0,)


def test_prompts_are_shared_and_forwards_keep_to_the_budget(
    whole: ModelReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    forward = whole.policy.forward

    def watched(batch: Any, *args: Any) -> Any:
        seen.append(batch)
        return forward(batch, *args)

    monkeypatch.setattr(whole.policy, "forward", watched)
    same = [Sample(SAMPLES[0].messages, text) for text in ("하나", "둘", "셋", "넷", "하나")]
    whole([*same[:2], *SAMPLES[3:5], *same[2:]])
    (batch,) = seen
    assert len(batch.row) == 2 and len(batch.group) == 7  # two prompts
    assert batch.group.bincount().tolist() == [5, 2] or batch.group.bincount().tolist() == [2, 5]
    seen.clear()
    monkeypatch.setattr(whole, "batch_tokens", 40)
    whole(same * 3)
    assert len(seen) > 1 and all(batch.size <= 40 for batch in seen)


def by_hand(reward: ModelReward, prompt: list[int], response: list[int]) -> Tensor:
    with torch.no_grad():
        found = reward.policy(pack([Tree(prompt, [response])]), {"score"}).score
    assert found is not None
    return found


def test_a_response_that_was_cut_is_scored_at_its_last_token(whole: ModelReward) -> None:
    tokenizer = whole.policy.tokenizer
    asked = SAMPLES[0].messages
    prompt = whole.template.prompt(asked)
    words = tokenizer("5입니다. 그리고", add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids(whole.template.terminator)
    cut, ended = Sample(asked, "5입니다. 그리고", finished=False), Sample(asked, "5입니다. 그리고")
    found = whole([cut, ended, cut])
    assert (found[0] - by_hand(whole, prompt, words)).abs() < 1e-5 and found[0] == pytest.approx(float(found[2]))
    assert (found[1] - by_hand(whole, prompt, [*words, end])).abs() < 1e-5
    assert (found[0] - found[1]).abs() > 1e-4
    nothing = whole([Sample(asked, "", finished=False), Sample(asked, "")])  # has no last token of its own
    assert nothing.tolist() == pytest.approx([float(by_hand(whole, prompt, [end]))] * 2, abs=1e-5)


def test_it_is_not_trained_and_takes_no_part_in_what_is(folders: dict[str, str]) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    reward = ModelReward(folders["adapter"])
    assert torch.equal(torch.get_rng_state(), state)  # or a policy built after it would start elsewhere
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    expected = score(reward, SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward(SAMPLES)
    assert not scores.requires_grad and torch.equal(scores, expected)
    inside = WeightedSum([reward], [2.0])
    assert torch.equal(score(inside, SAMPLES), 2 * expected) and len(list(inside.parameters())) > 10
    inside.train()
    assert not reward.policy.training


def test_half_precision_of_its_own(folders: dict[str, str], whole: ModelReward) -> None:
    half = ModelReward(folders["whole"], dtype="bfloat16")
    scores, exact = score(half, SAMPLES), score(whole, SAMPLES)
    assert scores.dtype == torch.float32 and 0 < (scores - exact).abs().max() < 0.1


def test_what_has_no_reward_head(folders: dict[str, str], tmp_path: Path) -> None:
    for path in (folders["plain"], "tiny"):
        with pytest.raises(UserError, match="no reward head, so its scores would be random; give ModelReward the"):
            ModelReward(path)
    with pytest.raises(UserError, match="no such model folder; did you mean 'whole'"):
        ModelReward(folders["whole"] + "e")
    with pytest.raises(UserError, match="batch_tokens 0"):
        ModelReward(folders["whole"], batch_tokens=0)
    file = tmp_path / "model.ckpt"
    file.write_text("?")
    with pytest.raises(UserError, match="model.ckpt: there is no config.yaml in its folder or the one above"):
        ModelReward(str(file))
    (tmp_path / "config.yaml").write_text("model: {init_args: {policy: {class_path: leyden.models.CausalLM}}}")
    with pytest.raises(UserError, match="model.ckpt: no checkpoint of a run"):
        ModelReward(str(file))


def test_rows_that_cannot_be_scored_are_named(whole: ModelReward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole.policy, "positions", 30)
    with pytest.raises(UserError, match=r"^rows.jsonl:9 \(response '네 네 .*\d+ tokens of .* positions for 30; lower"):
        whole([*SAMPLES[3:5], Sample(SAMPLES[0].messages, "네 " * 30, source="rows.jsonl:9")])
    refusing = "{{ raise_exception('no system turns') if messages[0].role == 'system' }}" + str(whole.template.source)
    monkeypatch.setattr(whole.template, "source", refusing)
    with pytest.raises(UserError, match="^rows.jsonl:3 .*the chat template refuses the conversation .no system turns"):
        whole([SAMPLES[-1]])


# -- several on one base ----------------------------------------------------------------------------------------------


def adapters(folder: Path, count: int, **options: Any) -> list[str]:
    """Reward models with adapters of random weights on the embedded model."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        adapter = LoraConfig(r=4, target_modules="all-linear", **({"init_lora_weights": False} | options))
        policy = CausalLM(adapter=adapter)
        policy.build(("score",), dropout=False)
        policy.save(folder / str(seed))
        made.append(str(folder / str(seed)))
    return made


def test_adapters_on_one_base_hold_it_once_and_score_as_each_does_alone(tmp_path: Path) -> None:
    paths, alone = adapters(tmp_path, 3), []
    for path in paths:
        reward = ModelReward(path)
        alone.append(score(reward, SAMPLES))
        del reward  # so that the next one finds no base to share
        gc.collect()
    whole = Ensemble([ModelReward(path) for path in paths])
    found = score(whole, SAMPLES)
    for number, expected in enumerate(alone, start=1):
        assert torch.equal(whole.terms[f"ModelReward-{number}"], expected)
    stacked = torch.stack(alone)
    assert (found - (stacked.mean(0) - stacked.std(0, correction=0))).abs().max() < 1e-6
    assert whole.terms["spread"].min() > 1e-3
    own = [dict(reward.policy.named_parameters()) for reward in whole.rewards]  # type: ignore[attr-defined]
    for name, parameter in own[0].items():
        shared = "lora_" not in name and not name.startswith("heads.")
        assert all((other[name] is parameter) is shared for other in own[1:]), name
    held = {p.data_ptr(): p.numel() for p in whole.parameters()}
    base = sum(p.numel() for name, p in own[0].items() if "lora_" not in name and not name.startswith("heads."))
    each = sum(p.numel() for p in own[0].values()) - base
    assert sum(held.values()) == base + 3 * each
    whole.to(torch.float64)  # as to a device: what is shared stays shared
    own = [dict(reward.policy.named_parameters()) for reward in whole.rewards]  # type: ignore[attr-defined]
    assert all(
        own[0][name] is other[name]
        for name in own[0]
        if "lora_" not in name
        for other in own[1:3]
        if name in other and not name.startswith("heads.")
    )


def test_a_base_is_held_apart_where_it_would_not_be_the_same(tmp_path: Path) -> None:
    first, second = adapters(tmp_path / "a", 2)
    biased, _ = adapters(tmp_path / "b", 2, bias="all")
    one = ModelReward(first)

    def shares(other: ModelReward) -> bool:
        mine, theirs = (dict(reward.policy.named_parameters()) for reward in (one, other))  # type: ignore[union-attr]
        return any(p is theirs.get(name) for name, p in mine.items())

    assert shares(ModelReward(second)) and shares(ModelReward(second))
    assert not shares(ModelReward(second, dtype="bfloat16"))
    assert not shares(ModelReward(biased))  # its adapter is made of biases of the base, too
    expected = score(one, SAMPLES)
    ModelReward(biased)
    assert torch.equal(score(one, SAMPLES), expected)


# -- checkpoints -------------------------------------------------------------------------------------------------------

LORA = "--model.policy.adapter LoraConfig --model.policy.adapter.r 2 --model.policy.adapter.target_modules all-linear"


@pytest.mark.parametrize("adapter", ["", LORA])
def test_a_checkpoint_scores_like_the_export_of_its_run(adapter: str, leyden: Any, workplace: Path) -> None:
    pairs = [{"prompt": f"{i} + 1?", "chosen": f"{i + 1}입니다.", "rejected": f"{i}"} for i in range(8)]
    data = f"--data.path {write(workplace / 'pairs.jsonl', pairs)} --data.val_fraction 0 --data.system_prompt 짧게."
    steps = "--trainer.max_steps 2 --trainer.default_root_dir run --data.batch_size 4 --trainer.accelerator cpu"
    rate = "--model.optimizer.lr 1e-2 --data.chat_template plain"
    code, _, err = leyden("fit", "--config", "reward_model", *f"{data} {steps} {rate} {adapter}".split())
    assert code == 0, err
    (checkpoint,) = (workplace / "run" / "checkpoints").glob("*.ckpt")
    found = score(ModelReward(str(checkpoint)), SAMPLES)  # its config.yaml knows template and system prompt
    exported = score(ModelReward("run/export", system_prompt="짧게."), SAMPLES)
    assert (found - exported).abs().max() < 1e-5
    assert (found - score(ModelReward("run/export"), SAMPLES)).abs().max() > 1e-3
    answers = workplace / "scores.jsonl"
    settings = "--config run/config.yaml --data.path rows3.jsonl --data.val_path null --output scores.jsonl"
    write(workplace / "rows3.jsonl", ROWS)
    code, _, err = leyden("predict", *settings.split(), "--ckpt_path", str(checkpoint))
    assert code == 0, err
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert found.tolist() == pytest.approx([value for line in lines for value in line["scores"]], abs=2e-5)


def test_a_checkpoint_of_something_else(leyden: Any, workplace: Path) -> None:
    rows = write(workplace / "sft.jsonl", [{"prompt": f"{i}?", "response": "네."} for i in range(4)])
    options = "--data.val_fraction 0 --trainer.max_steps 1 --trainer.default_root_dir run --trainer.accelerator cpu"
    code, _, err = leyden("fit", "--config", "sft", "--data.path", rows, *options.split())
    assert code == 0, err
    (checkpoint,) = (workplace / "run" / "checkpoints").glob("*.ckpt")
    with pytest.raises(UserError, match="a checkpoint of SFT, which has no reward head; give one of a RewardModel"):
        ModelReward(str(checkpoint))
    text = (workplace / "run" / "config.yaml").read_text()
    (workplace / "run" / "config.yaml").write_text(text.replace("leyden.models.CausalLM", "leyden.not.There"))
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["policy.heads.score.weight"] = torch.zeros(1, 4)
    torch.save(state, checkpoint)
    with pytest.raises(UserError, match="the policy in its config.yaml cannot be made"):
        ModelReward(str(checkpoint))
    (workplace / "run" / "config.yaml").write_text(text)
    for head in (torch.zeros(1, 4), torch.zeros(1, 192)):  # of another size; and of a model whose LM head was trained
        state["state_dict"]["policy.heads.score.weight"] = head
        state["state_dict"]["policy.more"] = torch.zeros(1)
        torch.save(state, checkpoint)
        with pytest.raises(UserError, match="it does not fit tiny, which its config.yaml names"):
            ModelReward(str(checkpoint))
