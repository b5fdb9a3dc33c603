"""Reward models: loss and gradient, where the score is read, how agreement is measured, and what predict does."""

from __future__ import annotations

import json
import math
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks import Ranks
from small import TreeData, fit, small, weights_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from leyden.algorithm.scalar_head import calibration, length_sums, pair_sums
from leyden.algos import RewardModel
from leyden.batch.forest import Tree, pack
from leyden.batch.tree import chunk_by_tokens
from leyden.errors import UserError
from leyden.example import Example
from leyden.losses import bradley_terry, plackett_luce
from leyden.models import CausalLM
from leyden.policy.policy import Sampling

RATE = 0.5


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, weight_decay=0.0)


def ragged(count: int = 8, seed: int = 0, most: int = 4) -> list[Tree]:
    """Prompts with two to `most` ranked responses of different lengths, scored; some last tokens have weight 0."""
    r = random.Random(seed)
    out = []
    for row in range(count):
        answers = [[r.randrange(97) for _ in range(r.randint(1, 9))] for _ in range(r.randint(2, most))]
        scores = sorted((r.random() * 3 for _ in answers), reverse=True)
        weights = [[float(r.random() < 0.6) for _ in a] for a in answers]
        out.append(Tree([r.randrange(97) for _ in range(r.randint(1, 9))], answers, scores, weights, row))
    return out


def scorer(**kwargs: Any) -> CausalLM:
    policy = small(**kwargs)
    policy.build(("score",), dropout=False)
    return policy


def given(values: list[float], counts: list[int], scores: list[list[float]] | None = None, **options: Any) -> Any:
    """(loss, gradient by reward) of a RewardModel where the policy gives these rewards."""
    trees = [Tree([1], [[2]] * n, scores and scores[i], row=i) for i, n in enumerate(counts)]
    algorithm = RewardModel(small(), **options)
    r = torch.tensor(values, requires_grad=True)
    algorithm.rewards = lambda batch: r  # type: ignore[method-assign]
    loss = algorithm.loss(pack(trees))
    loss.backward()
    assert r.grad is not None
    return float(loss.detach()), r.grad.tolist()


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- the loss, by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["pairs", "plackett_luce"])
@pytest.mark.parametrize(
    ("rewards", "expected", "slope"),
    [
        ((0.7, 0.7), math.log(2), 0.5),
        ((1.0, 0.0), 0.313262, 1 - s(1)),  # ln(1 + 1/e)
        ((0.0, 1.0), 1.313262, s(1)),
        ((200.0, 0.0), 0.0, 0.0),
        ((-100.0, 100.0), 200.0, 1.0),
    ],
)
def test_golden_values_of_a_pair(ranking: Any, rewards: tuple[float, float], expected: float, slope: float) -> None:
    loss, gradient = given(list(rewards), [2], ranking=ranking)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert gradient == pytest.approx([-slope, slope], abs=1e-5 if max(map(abs, rewards)) > 50 else 1e-6)


def test_golden_values_of_margin_and_centring() -> None:
    """r = (1.5, 0.2) with m = 0.3 leaves a difference of 1; centring adds 0.01 * 1.7^2 and 2 * 0.01 * 1.7 a reward."""
    loss, gradient = given([1.5, 0.2], [2], [[0.8, 0.2]], margin=0.5)
    assert loss == pytest.approx(0.313262, abs=1e-6)
    assert gradient == pytest.approx([s(1) - 1, 1 - s(1)], abs=1e-6)
    loss, gradient = given([1.5, 0.2], [2], [[0.8, 0.2]], margin=0.5, centre=0.01)
    assert loss == pytest.approx(0.313262 + 0.0289, abs=1e-6)
    assert gradient == pytest.approx([s(1) - 1 + 0.034, 1 - s(1) + 0.034], abs=1e-6)


def test_prompts_weigh_the_same_however_many_responses_they_have() -> None:
    """Three responses are three pairs of weight 1/3; with the pair beside them each prompt counts for a half."""
    a, b, c, d, e = 1.0, 0.0, -1.0, 0.5, 0.0
    loss, gradient = given([a, b, c, d, e], [3, 2])
    pairs = [a - b, a - c, b - c]
    expected = (sum(-math.log(s(x)) for x in pairs) / 3 - math.log(s(d - e))) / 2
    assert loss == pytest.approx(expected, abs=1e-6)
    first, third = -(2 - s(a - b) - s(a - c)) / 6, (2 - s(a - c) - s(b - c)) / 6
    half = (1 - s(d - e)) / 2
    assert gradient == pytest.approx([first, -first - third, third, -half, half], abs=1e-6)


def probability(r: list[float], order: tuple[int, ...]) -> float:
    """Of drawing responses in this order: each time one of those left, with odds exp(r)."""
    out, left = 1.0, list(order)
    while left:
        out *= math.exp(r[left[0]]) / sum(math.exp(r[i]) for i in left)
        left.pop(0)
    return out


def test_plackett_luce_is_the_probability_of_the_ranking() -> None:
    rewards, counts = [0.3, -1.2, 0.9, 2.0, -0.5, 0.1, 0.4], [3, 4]
    assert sum(probability(rewards[:3], order) for order in permutations(range(3))) == pytest.approx(1)
    assert sum(probability(rewards[3:], order) for order in permutations(range(4))) == pytest.approx(1)

    def expected(r: list[float]) -> float:
        return -(math.log(probability(r[:3], (0, 1, 2))) + math.log(probability(r[3:], (0, 1, 2, 3)))) / 2

    loss, gradient = given(rewards, counts, ranking="plackett_luce")
    assert loss == pytest.approx(expected(rewards), abs=1e-6)
    for i, slope in enumerate(gradient):  # central differences of the probabilities
        up, down = ([x + step * (i == j) for j, x in enumerate(rewards)] for step in (1e-5, -1e-5))
        assert slope == pytest.approx((expected(up) - expected(down)) / 2e-5, abs=1e-5)


def test_plackett_luce_of_padded_rows_and_far_rewards_stays_finite() -> None:
    scores = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    loss = plackett_luce(scores, mask)
    assert loss.tolist() == [0.0, 400.0]
    loss.sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert (scores.grad - torch.tensor([[0.0, 0, 0], [-1, 1, 0]])).abs().max() < 1e-5  # 200 has 5 digits left


@pytest.mark.parametrize("options", [{}, {"ranking": "plackett_luce"}])
def test_a_constant_added_to_all_rewards_leaves_the_loss(options: dict[str, Any]) -> None:
    values = [0.3, -1.2, 0.9, 2.0, -0.5]
    loss, gradient = given(values, [3, 2], **options)
    shifted, same = given([v + 5 for v in values], [3, 2], **options)
    assert shifted == pytest.approx(loss, abs=1e-5) and same == pytest.approx(gradient, abs=1e-5)
    assert sum(gradient) == pytest.approx(0, abs=1e-6)  # so nothing pushes the mean anywhere
    assert given([v + 5 for v in values], [3, 2], centre=0.1)[0] > given(values, [3, 2], centre=0.1)[0] + 1


def test_options_that_would_be_ignored_are_errors() -> None:
    with pytest.raises(UserError, match="--model.margin is between two responses"):
        RewardModel(small(), ranking="plackett_luce", margin=1.0)
    with pytest.raises(UserError, match="give 0 or more"):
        RewardModel(small(), centre=-0.1)
    with pytest.raises(UserError, match="--model.sampling: RewardModel scores answers and samples none"):
        RewardModel(small(), sampling=Sampling(temperature=1.0))
    trees = [Tree(t.prompt, t.responses, None, t.weights, t.row) for t in ragged(4)]
    with pytest.raises(UserError, match=r"memory:\d: --model.margin needs rows with scores"):
        fit(RewardModel(small(), margin=1.0, optimizer=sgd), TreeData(trees, batch_size=4))


# -- where the score is read ------------------------------------------------------------------------------------------


def test_scores_are_the_head_on_the_last_token_of_each_path() -> None:
    """Against the plain Hugging Face model, one response at a time."""
    policy, trees = scorer(), ragged()
    found = policy(pack(trees, length=400), {"score"}).score
    policy.model.set_attn_implementation("sdpa")
    expected = []
    for tree in trees:
        for response in tree.responses:
            hidden = policy.model.model(torch.tensor([tree.prompt + response])).last_hidden_state[0, -1]
            expected.append(policy.heads["score"].weight[0] @ hidden)
    assert found is not None and (found - torch.stack(expected)).abs().max() < 1e-5


def test_a_score_depends_on_its_own_path_alone() -> None:
    policy, trees = scorer(), ragged(3)
    batch = pack(trees)
    before = policy(batch, {"score"}).score
    assert before is not None
    for t in range(len(batch)):
        changed = pack(trees)
        changed.tokens[t] = (changed.tokens[t] + 1) % 97
        after = policy(changed, {"score"}).score
        assert after is not None
        moved = set((after != before).nonzero()[:, 0].tolist())
        span = next(span for span in batch.structure() if span.start <= t < span.stop)
        whole = {n for n, _, _ in span.responses}
        assert moved == (whole if t < span.cut else {n for n, start, stop in span.responses if start <= t < stop})


def gradient_of(policy: CausalLM, batch: Any) -> tuple[Tensor, Tensor]:
    loss = RewardModel(policy, margin=0.5, centre=0.1).loss(batch)
    policy.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("other", ["unshared", "dense", "rows"])
def test_packed_and_separate_are_the_same_in_values_and_gradients(other: str) -> None:
    batch = pack(ragged())
    loss, gradient = gradient_of(scorer(), batch)
    if other == "unshared":
        again, same = gradient_of(scorer(), batch.unshare())
    else:
        again, same = gradient_of(scorer(attention=other), batch)
    assert loss == pytest.approx(float(again), rel=1e-5)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


def test_only_the_body_and_the_score_head_get_gradients() -> None:
    policy = scorer()  # its LM head is a matrix of its own
    gradient_of(policy, pack(ragged()))
    without = [name for name, p in policy.named_parameters() if p.grad is None]
    assert without == ["model.lm_head.weight"] and not policy.model.lm_head.weight.requires_grad
    assert policy.heads["score"].weight.grad is not None


def test_an_adapter_trains_itself_and_the_head() -> None:
    policy = small()
    policy.adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    policy.model = get_peft_model(policy.model, policy.adapter)
    algorithm = RewardModel(policy, optimizer=sgd, lr_scheduler=None)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    fit(algorithm, TreeData(ragged(), batch_size=4), max_epochs=2)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before.get(name, p * 0))}
    assert moved == {name for name in dict(policy.named_parameters()) if "lora_" in name} | {"heads.score.weight"}
    batch = pack(ragged())
    scores = [policy.train()(batch, {"score"}).score for _ in range(2)]  # an adapter's dropout is off too
    assert torch.equal(scores[0], scores[1])


# -- steps ------------------------------------------------------------------------------------------------------------


def step(accumulate: int, devices: int = 1, options: dict[str, Any] | None = None) -> tuple[Tensor, float]:
    """What one optimizer step over 8 ragged trees adds to the weights, and the loss that was logged."""
    torch.manual_seed(3)  # of the head
    policy = scorer()
    policy.heads["score"].weight.data.copy_(torch.linspace(-1, 1, 32)[None])
    algorithm = RewardModel(policy, optimizer=sgd, lr_scheduler=None, **(options or {}))
    before = weights_of(policy)
    strategy = "ddp" if devices > 1 else "auto"
    data = TreeData(ragged(), batch_size=8)
    trainer = fit(algorithm, data, accumulate_grad_batches=accumulate, devices=devices, strategy=strategy)
    return (before - weights_of(policy)) / RATE, float(trainer.callback_metrics["train/loss"])


def on_one_rank(accumulate: int, options: dict[str, Any]) -> tuple[Tensor, float]:
    return step(accumulate, 2, options)


@pytest.mark.parametrize("options", [{"margin": 0.5, "centre": 0.1}, {"ranking": "plackett_luce"}])
def test_any_split_of_a_step_takes_the_same_step(options: dict[str, Any], ranks: Ranks) -> None:
    whole, loss = step(1, options=options)
    found = [step(8, options=options), step(3, options=options)]
    for accumulate in (1, 5):  # 5 x 2 ranks is more micro-batches than rows: two of them are fillers of weight 0
        first, second = ranks(on_one_rank, accumulate, options)
        assert torch.equal(first[0], second[0])
        found.append(first)
    for gradient, logged in found:
        assert (gradient - whole).norm() < 1e-6 * whole.norm() and logged == pytest.approx(loss, rel=1e-6)


def separable(count: int, seed: int) -> list[Tree]:
    """The response with more small numbers is the better one."""
    r = random.Random(seed)

    def answer(good: bool) -> list[int]:
        return [r.randrange(1, 48) + 48 * (r.random() < (0.2 if good else 0.8)) for _ in range(r.randint(3, 8))]

    return [Tree([r.randrange(97) for _ in range(3)], [answer(True), answer(False)], row=i) for i in range(count)]


@pytest.mark.parametrize("ranking", ["pairs", "plackett_luce"])
def test_what_can_be_told_apart_is_learned(ranking: Any) -> None:
    torch.manual_seed(0)
    algorithm = RewardModel(small(), ranking=ranking, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3))
    data = TreeData(separable(512, 0), separable(200, 1), batch_size=32)
    metrics = fit(algorithm, data, max_epochs=4).callback_metrics
    assert metrics["val/accuracy"] > 0.9 and metrics["val/loss"] < 0.3 and metrics["train/accuracy"] > 0.9
    assert metrics["val/chosen_reward"] > 0 > metrics["val/rejected_reward"] and metrics["val/margin"] > 1


# -- agreement --------------------------------------------------------------------------------------------------------


def calibration_by_numpy(better: Any, worse: Any, share: Any) -> tuple[float, float]:
    """Accuracy and expected calibration error, bin by bin."""
    confidence = 1 / (1 + np.exp(-np.abs(better - worse)))
    right = np.where(better > worse, 1.0, np.where(better == worse, 0.5, 0.0))
    error, edges = 0.0, np.linspace(0.5, 1, 11)
    for k in range(10):
        inside = (confidence >= edges[k]) & ((confidence < edges[k + 1]) | (k == 9))
        if inside.any():
            weight = share[inside].sum()
            gap = np.average(right[inside], weights=share[inside]) - np.average(
                confidence[inside], weights=share[inside]
            )
            error += weight / share.sum() * abs(gap)
    return float(np.average(right, weights=share)), float(error)


def test_agreement_equals_a_plain_computation_and_adds_up() -> None:
    g = np.random.default_rng(0)
    better, worse, share = g.normal(0.4, 1.5, 500), g.normal(0, 1.5, 500), g.choice([1.0, 1 / 3], 500)
    better[:5] = worse[:5]
    reward, length = (
        g.normal(100, 1, 800),
        g.integers(1, 500, 800),
    )  # far from 0: sums of squares must keep their digits
    reward += length / 400

    def sums(part: slice) -> dict[str, float]:
        a, b, c, r, n = (torch.tensor(x[part]) for x in (better, worse, share, reward, length))
        return {k: float(v) for k, v in (pair_sums(a, b, c) | length_sums(r, n)).items()}

    whole, first, second = sums(slice(None)), sums(slice(0, 123)), sums(slice(123, None))
    found = calibration(whole)
    assert calibration({k: first[k] + second[k] for k in whole}) == pytest.approx(found, abs=1e-9)
    accuracy, error = calibration_by_numpy(better, worse, share)
    assert found["accuracy"] == pytest.approx(accuracy) and found["ece"] == pytest.approx(error)
    assert found["length_correlation"] == pytest.approx(np.corrcoef(reward, length)[0, 1], abs=1e-9)
    assert found["margin"] == pytest.approx(np.average(better - worse, weights=share))
    assert found["chosen_reward"] == pytest.approx(np.average(better, weights=share))
    gap, right = np.abs(better - worse), (1 + np.sign(better - worse)) / 2
    for name, low, high in (("0_0.5", 0, 0.5), ("0.5_1", 0.5, 1), ("1_2", 1, 2), ("2", 2, np.inf)):
        inside = (gap >= low) & (gap < high)
        expected = np.average(right[inside], weights=share[inside])
        assert found[f"accuracy_margin_{name}"] == pytest.approx(expected)


def test_agreement_in_cases_known_exactly() -> None:
    def of(better: list[float], worse: list[float]) -> dict[str, float]:
        pair = torch.tensor(better), torch.tensor(worse)
        sums = pair_sums(*pair, torch.full((len(better),), 1 / len(better))) | length_sums(pair[0], torch.ones(1))
        return calibration({k: float(v) for k, v in sums.items()})

    sure = math.log(4)  # the better one wins with probability 0.8
    honest = of([sure] * 4 + [0.0], [0.0] * 4 + [sure])
    assert honest["accuracy"] == pytest.approx(0.8) and honest["ece"] == pytest.approx(0, abs=1e-7)
    boastful = of([sure, 0.0], [0.0, sure])  # right in half of the cases
    assert boastful["ece"] == pytest.approx(0.3) and "accuracy_margin_0_0.5" not in boastful
    assert of([1e4], [0.0])["ece"] == 0 and of([1.0], [1.0])["accuracy"] == 0.5
    assert of([1.0], [1.0])["length_correlation"] == 0 and calibration({}) == {}


@pytest.mark.parametrize("size", [1, 3, 100])
def test_validation_measures_all_pairs_however_they_are_batched(size: int) -> None:
    policy, held = scorer(), ragged(9, seed=5)
    with torch.no_grad():
        r = policy.eval()(pack(held), {"score"}).score
    assert r is not None
    better, worse, share, start = [], [], [], 0
    for tree in held:
        mine = r[start : start + len(tree.responses)].tolist()
        pairs = [(a, b) for i, a in enumerate(mine) for b in mine[i + 1 :]]
        better, worse = better + [a for a, _ in pairs], worse + [b for _, b in pairs]
        share, start = share + [1 / len(pairs)] * len(pairs), start + len(mine)
    lengths = [len(response) for tree in held for response in tree.responses]
    algorithm = RewardModel(policy, margin=1.0, centre=1.0, optimizer=sgd)
    algorithm.progress["samples"] = 1.0  # as after training
    metrics = validate(algorithm, TreeData(ragged(), held, batch_size=size))
    accuracy, error = calibration_by_numpy(*(np.array(x) for x in (better, worse, share)))
    losses = [-math.log(s(a - b)) for a, b in zip(better, worse, strict=True)]
    assert metrics["val/loss"] == pytest.approx(np.average(losses, weights=share), abs=1e-5)  # the plain one
    assert metrics["val/accuracy"] == pytest.approx(accuracy) and metrics["val/ece"] == pytest.approx(error, abs=1e-5)
    assert metrics["val/length_correlation"] == pytest.approx(np.corrcoef(r.numpy(), lengths)[0, 1], abs=1e-5)


def validate(algorithm: RewardModel, data: TreeData, **options: Any) -> dict[str, float]:
    from lightning.pytorch import Trainer

    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = Trainer(accelerator="cpu", **quiet)  # type: ignore[arg-type]
    trainer.validate(algorithm, data, verbose=False, **options)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


# -- scoring ----------------------------------------------------------------------------------------------------------


def test_a_head_that_was_never_trained_scores_nothing(tmp_path: Path) -> None:
    algorithm = RewardModel(small(), optimizer=sgd)
    data = TreeData(ragged(), ragged(2, seed=5), batch_size=8)
    with pytest.raises(UserError, match="llama: it has no reward head, so its scores would be random"):
        validate(algorithm, data)
    trainer = fit(algorithm, data)
    expected = validate(algorithm, data)  # now it has
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = RewardModel(small(), optimizer=sgd)
    assert validate(again, data, ckpt_path=tmp_path / "a.ckpt") == pytest.approx(expected, rel=1e-6)


def test_packs_hold_the_budget_and_the_order() -> None:
    trees = ragged(9)
    found = list(chunk_by_tokens(trees, 40))
    assert [tree for part in found for tree in part] == trees and len(found) > 2
    assert all(sum(map(len, part)) <= 40 or len(part) == 1 for part in found)
    assert [len(part) for part in chunk_by_tokens(trees, 1)] == [1] * 9 and list(chunk_by_tokens([], 40)) == []


ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 3은?", "chosen": "5입니다.", "rejected": "정말 좋은 질문입니다. 2 + 3은 6입니다.", "id": 7},
    {"prompt": [{"role": "user", "content": "Hi"}], "responses": ["Hello!", "Go away.", "Hello, how are you?"]},
    {"prompt": "누구세요?", "response": "저는 레이든입니다."},
]


def test_predict_scores_the_responses_of_a_file_as_plain_transformers_does(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    from leyden.datamodules import PreferenceData

    torch.manual_seed(0)
    made = CausalLM()
    made.build(("score",), dropout=False)
    made.save(tmp_path / "reward")
    expected = []
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        said = row.get("responses") or [row[key] for key in ("chosen", "rejected", "response") if key in row]
        talks = [[*prompt, {"role": "assistant", "content": text}] for text in said]
        batch = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            expected.append((prompt, said, model(**batch).logits[:, 0].tolist()))

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    for number, (prompt, said, scores) in enumerate(expected):
        algorithm = RewardModel(CausalLM(str(tmp_path / "reward")))
        data = PreferenceData(str(tmp_path / f"{number}.jsonl"), max_tokens=64)
        (found,) = [row for batch in trainer.predict(algorithm, data) or [] for row in batch]
        assert found["prompt"] == prompt and found["row"] == ROWS[number]
        if len(said) == 1:
            assert found["response"] == said[0] and found["score"] == pytest.approx(scores[0], abs=2e-5)
        else:
            assert found["responses"] == said and found["scores"] == pytest.approx(scores, abs=2e-5)


def test_an_answer_of_several_turns_keeps_them_and_scores_do_not_depend_on_the_budget() -> None:
    policy = scorer()
    turns: Any = [{"role": r, "content": c} for r, c in (("assistant", "a"), ("user", "b"), ("assistant", "c"))]
    trees = ragged(5)
    chunk = [(Example([], [turns] * len(tree.responses), row={"n": tree.row}), tree) for tree in trees]
    found = []
    for budget in (1, 50, 10_000):
        algorithm = RewardModel(policy.eval())
        data = TreeData([], max_tokens=budget)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(algorithm), "data", data)
            found.append(algorithm.predict_step(chunk, 0))
    assert all(row["responses"][0] == turns for row in found[0])
    scores = [[score for row in rows for score in row["scores"]] for rows in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and scores[0] == pytest.approx(scores[2], abs=1e-5)
    assert len(scores[0]) == sum(len(tree.responses) for tree in trees)


def test_bradley_terry_is_a_function_of_tensors() -> None:
    found = bradley_terry(torch.tensor([1.3, 0.0]), torch.tensor([0.3, 0.0]))
    assert found.tolist() == pytest.approx([0.313262, math.log(2)], abs=1e-6)
