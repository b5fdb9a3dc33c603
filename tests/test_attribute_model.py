"""Models of labelled answers: losses by hand, exact means, what is exported and read back, rows and their mistakes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from prepared import write
from ranks import Ranks
from small import TreeData, fit, save_llama, small, weights_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from leyden.algorithm.labels import labels_of
from leyden.algos import AttributeModel, RewardModel
from leyden.batch.forest import Tree, pack
from leyden.datamodules import AttributeData
from leyden.errors import UserError
from leyden.example import Sample
from leyden.models import CausalLM, Classifier, ModelReward
from leyden.policy import Labels
from leyden.rewards import score

RATE = 0.5
NAMES = ["helpfulness", "correctness", "verbosity"]
CLASSES = ["bad", "fair", "good"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, weight_decay=0.0)


class Labelled(TreeData):
    """Trees of one response in memory, whose labels are made of their row."""

    def __init__(self, trees: list[Tree], held: list[Tree] | None = None, classes: bool = False, **kwargs: Any) -> None:
        super().__init__(trees, held, **kwargs)
        self.attributes = ["grade"] if classes else list(NAMES)
        self.classes = list(CLASSES) if classes else None

    def labels(self, rows: Sequence[int]) -> Tensor:
        count = len(self.attributes)
        values = [[(row * 7 + 3 * k) % 5 if count > 1 else (row * 7) % 3 for k in range(count)] for row in rows]
        return torch.tensor(values, dtype=torch.float32).reshape(len(rows), count)


def answers(count: int = 8, seed: int = 0) -> list[Tree]:
    """One response each, of very different lengths."""
    r = random.Random(seed)
    return [
        Tree(
            [r.randrange(97) for _ in range(r.randint(1, 9))],
            [[r.randrange(97) for _ in range(r.randint(1, 12))]],
            row=i,
        )
        for i in range(count)
    ]


def given(outputs: Tensor, classes: bool) -> tuple[float, Tensor]:
    """(loss, gradient by output) where the head gives these outputs for rows 0, 1, 2 …"""
    algorithm, trees = AttributeModel(small()), answers(len(outputs))
    outputs = outputs.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(algorithm), "data", Labelled(trees, classes=classes))
        algorithm.policy.labels = labels_of(algorithm.data, "AttributeModel")
        algorithm.rewards = lambda batch: outputs  # type: ignore[method-assign]
        loss = algorithm.loss(pack(trees))
    loss.backward()
    assert outputs.grad is not None
    return float(loss.detach()), outputs.grad


# -- the losses, by hand ----------------------------------------------------------------------------------------------


def test_golden_values_of_attributes() -> None:
    """Labels of row 0 are (0, 3, 1), of row 1 (2, 0, 3): errors (1, -1, 2) and (0, 0, -3) are 6 / 3 and 9 / 3."""
    loss, gradient = given(torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 0.0]]), classes=False)
    assert loss == pytest.approx((2 + 3) / 2)
    expected = torch.tensor([[1.0, -1, 2], [0, 0, -3]]) * 2 / 3 / 2
    assert (gradient - expected).abs().max() < 1e-6


def test_golden_values_of_classes() -> None:
    """Classes of rows 0, 1, 2 are 0, 1, 2; softmax of (ln 2, 0, 0) is (1/2, 1/4, 1/4)."""
    outputs = torch.tensor([[math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss, gradient = given(outputs, classes=True)
    assert loss == pytest.approx((math.log(2) + math.log(4) + math.log(3)) / 3, abs=1e-6)
    expected = torch.tensor([[-1 / 2, 1 / 4, 1 / 4], [1 / 2, -3 / 4, 1 / 4], [1 / 3, 1 / 3, -2 / 3]]) / 3
    assert (gradient - expected).abs().max() < 1e-6


def test_outputs_are_the_head_on_the_last_token() -> None:
    policy, trees = small(), answers()
    policy.labels = Labels(tuple(NAMES))
    policy.build(("score",), dropout=False)
    found = policy(pack(trees, length=300), {"score"}).score
    policy.model.set_attn_implementation("sdpa")
    expected = [
        policy.heads["score"].weight
        @ policy.model.model(torch.tensor([tree.prompt + tree.responses[0]])).last_hidden_state[0, -1]
        for tree in trees
    ]
    assert found is not None and found.shape == (8, 3) and (found - torch.stack(expected)).abs().max() < 1e-5


# -- steps ------------------------------------------------------------------------------------------------------------


def step(accumulate: int, classes: bool, devices: int = 1) -> tuple[Tensor, float]:
    """What one optimizer step over 8 ragged answers adds to the weights, and the loss that was logged."""
    torch.manual_seed(3)  # of the head
    policy = small()
    policy.labels = Labels(tuple(CLASSES if classes else NAMES))
    policy.build(("score",), dropout=False)
    policy.heads["score"].weight.data.copy_(torch.linspace(-1, 1, 96).reshape(3, 32))
    algorithm = AttributeModel(policy, optimizer=sgd, lr_scheduler=None)
    before = weights_of(policy)
    strategy = "ddp" if devices > 1 else "auto"
    data = Labelled(answers(), classes=classes, batch_size=8)
    trainer = fit(algorithm, data, accumulate_grad_batches=accumulate, devices=devices, strategy=strategy)
    return (before - weights_of(policy)) / RATE, float(trainer.callback_metrics["train/loss"])


def on_one_rank(accumulate: int, classes: bool) -> tuple[Tensor, float]:
    return step(accumulate, classes, 2)


@pytest.mark.parametrize("classes", [False, True])
def test_any_split_of_a_step_takes_the_same_step(classes: bool, ranks: Ranks) -> None:
    whole, loss = step(1, classes)
    found = [step(8, classes), step(3, classes)]
    for accumulate in (1, 5):  # 5 x 2 ranks is more micro-batches than rows: two of them are fillers of weight 0
        first, second = ranks(on_one_rank, accumulate, classes)
        assert torch.equal(first[0], second[0])
        found.append(first)
    for gradient, logged in found:
        assert (gradient - whole).norm() < 1e-6 * whole.norm() and logged == pytest.approx(loss, rel=1e-6)


def countable(count: int, seed: int) -> list[Tree]:
    """Answers of which the first token says what `row` is, modulo 15, so that labels can be learnt."""
    r = random.Random(seed)
    return [
        Tree([5], [[1 + i % 15, *(r.randrange(50, 97) for _ in range(r.randint(1, 4)))]], row=i) for i in range(count)
    ]


@pytest.mark.parametrize("classes", [False, True])
def test_what_can_be_told_is_learnt(classes: bool) -> None:
    torch.manual_seed(0)
    algorithm = AttributeModel(small(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    data = Labelled(countable(480, 0), countable(90, 1), classes=classes, batch_size=32)
    metrics = fit(algorithm, data, max_epochs=6).callback_metrics
    if classes:
        assert metrics["val/accuracy"] > 0.95 and metrics["train/accuracy"] > 0.9
        assert all(metrics[f"val/recall_{name}"] > 0.9 for name in CLASSES)
    else:
        assert all(metrics[f"val/correlation_{name}"] > 0.95 for name in NAMES)
        errors = [float(metrics[f"val/error_{name}"]) for name in NAMES]
        assert max(errors) < 0.3 and float(metrics["val/loss"]) == pytest.approx(sum(errors) / 3, rel=1e-4)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("classes", [False, True])
def test_validation_measures_the_same_however_it_is_batched(size: int, classes: bool) -> None:
    from lightning.pytorch import Trainer

    policy, held = small(), answers(11, seed=5)
    policy.labels = Labels(tuple(CLASSES if classes else NAMES))
    policy.build(("score",), dropout=False)
    data = Labelled(answers(), held, classes=classes, batch_size=size)
    with torch.no_grad():
        out = policy.eval()(pack(held), {"score"}).score
    assert out is not None
    outputs, labels = out.double().numpy(), data.labels(range(11)).double().numpy()
    algorithm = AttributeModel(policy, optimizer=sgd)
    algorithm.progress["samples"] = 1.0  # as after training
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = Trainer(accelerator="cpu", **quiet)  # type: ignore[arg-type]
    trainer.validate(algorithm, data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if classes:
        right = outputs.argmax(-1) == labels[:, 0]
        logp = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
        expected = {"loss": -logp[np.arange(11), labels[:, 0].astype(int)].mean(), "accuracy": right.mean()}
        expected |= {f"recall_{name}": right[labels[:, 0] == k].mean() for k, name in enumerate(CLASSES)}
    else:
        expected = {"loss": ((outputs - labels) ** 2).mean()}
        for k, name in enumerate(NAMES):
            expected[f"error_{name}"] = ((outputs - labels) ** 2)[:, k].mean()
            expected[f"correlation_{name}"] = np.corrcoef(outputs[:, k], labels[:, k])[0, 1]
    assert metrics == {f"val/{name}": pytest.approx(float(value), abs=1e-5) for name, value in expected.items()}


def test_a_base_in_four_bits_stays_bit_for_bit(tmp_path: Path) -> None:
    from leyden.models import quantized
    from leyden.precision import QLoRAPrecision

    save_llama(tmp_path / "base", 0.05)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    algorithm = AttributeModel(CausalLM(str(tmp_path / "base"), adapter=adapter), optimizer=sgd, lr_scheduler=None)
    kept: list[Any] = []

    def packed() -> list[Tensor]:
        layers = quantized.layers(algorithm.policy.model)
        return [layer.get_parameter("weight").detach().clone() for layer in layers]

    algorithm.on_train_start = lambda: kept.append((packed(), weights_of(algorithm.policy.heads)))  # type: ignore[method-assign]
    data = Labelled(answers(), batch_size=4)
    fit(algorithm, data, plugins=[QLoRAPrecision(compute_dtype="float32")])
    before, head = kept[0]
    assert len(before) > 5 and all(torch.equal(a, b) for a, b in zip(before, packed(), strict=True))
    assert head.shape == (96,) and not torch.equal(head, weights_of(algorithm.policy.heads))


# -- what is exported -------------------------------------------------------------------------------------------------

TALK: Any = [{"role": "user", "content": "2 + 3은?"}]
SAMPLES = [
    Sample(TALK, "5입니다.", source="rows.jsonl:1"),
    Sample(TALK, "정말 좋은 질문입니다.", source="rows.jsonl:2"),
]


def saved(folder: Path, labels: Labels, **options: Any) -> str:
    torch.manual_seed(1)
    policy = CausalLM(**options)
    policy.labels = labels
    policy.build(("score",), dropout=False)
    policy.save(folder)
    return str(folder)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification"])
def test_an_export_is_a_sequence_classifier_and_a_reward_by_name(problem: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "whole", Labels(tuple(NAMES), problem))
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.problem_type == problem
    tokenizer = AutoTokenizer.from_pretrained(path)
    talks = [[*TALK, {"role": "assistant", "content": sample.response}] for sample in SAMPLES]
    batch = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(**batch).logits
    again = CausalLM(path)
    again.build(("score",), dropout=False)
    assert again.labels == Labels(tuple(NAMES), problem) and not again.fresh
    weights = {"verbosity": -0.5, "helpfulness": 1.0}
    reward = Classifier(path, weights=weights)
    assert (score(reward, SAMPLES) - (logits[:, 0] - 0.5 * logits[:, 2])).abs().max() < 1e-5
    assert (score(Classifier(path, "correctness"), SAMPLES) - logits[:, 1]).abs().max() < 1e-5
    if problem == "regression":
        with pytest.raises(UserError, match="a regression head"):
            Classifier(path, 0, output="probability")
    else:
        found = score(Classifier(path, 0, output="probability"), SAMPLES)
        assert (found - logits.softmax(-1)[:, 0]).abs().max() < 1e-5


def test_an_adapter_keeps_the_names_of_its_labels_and_merges_into_a_classifier(tmp_path: Path) -> None:
    from leyden.models.export.merge_adapter import merged

    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    path = saved(tmp_path / "adapter", Labels(tuple(NAMES)), adapter=adapter)
    again = CausalLM(path)
    again.build(("score",), dropout=False)
    assert again.labels == Labels(tuple(NAMES)) and again.heads["score"].weight.shape[0] == 3
    adapter_scores = score(ModelReward(path, label="verbosity"), SAMPLES)
    weighted = ModelReward(path, weights={"verbosity": 2.0, "helpfulness": -1.0})
    other = score(ModelReward(path, label=0), SAMPLES)
    assert (score(weighted, SAMPLES) - (2 * adapter_scores - other)).abs().max() < 1e-5
    assert list(weighted.terms) == ["verbosity", "helpfulness"]
    policy, _ = merged(path, "float32")
    policy.save(tmp_path / "merged")
    batch = pack([Tree([1, 2], [[3, 4]])])
    with torch.no_grad():
        expected = again.eval()(batch, {"score"}).score
        found = policy.eval()(batch, {"score"}).score
    assert expected is not None and found is not None and (found - expected).abs().max() < 1e-4
    found = score(Classifier(str(tmp_path / "merged"), "verbosity"), SAMPLES)
    assert found.std() > 0 and (found - adapter_scores).abs().max() < 1e-4


def test_heads_that_give_something_else(tmp_path: Path) -> None:
    path = saved(tmp_path / "whole", Labels(tuple(NAMES)))
    with pytest.raises(UserError, match="3 labels, so say which is the reward by label; its labels are 0 helpfulness"):
        ModelReward(path)
    with pytest.raises(UserError, match=r"its head is \[3, 192\], but a reward is one number"):
        fit(RewardModel(CausalLM(path), optimizer=sgd), TreeData(answers(), batch_size=4))
    for names in (("a", "b"), tuple(reversed(NAMES))):
        policy = CausalLM(path)
        policy.labels = Labels(names)
        with pytest.raises(
            UserError, match=f"its head gives {', '.join(NAMES)}, but {', '.join(names)} is to be learn"
        ):
            policy.build(("score",), dropout=False)
    with pytest.raises(UserError, match="TreeData has no labels; give --data AttributeData with --data.attributes"):
        fit(AttributeModel(small(), optimizer=sgd), TreeData(answers(), batch_size=4))


# -- rows -------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 3은?", "response": "5입니다.", "helpfulness": 4, "correctness": 4.0, "verbosity": "1"},
    {"prompt": "2 + 3은?", "response": "6입니다.", "helpfulness": 0, "correctness": 0, "verbosity": 1},
    {"prompt": "안녕?", "response": "네.", "helpfulness": 4, "correctness": 4, "verbosity": 0},
]
SEVERAL: dict[str, Any] = {"prompt": "안녕?", "responses": ["하나", "둘"]} | {name: [1, 2] for name in NAMES}


def read(folder: Path, rows: list[dict[str, Any]], **options: Any) -> AttributeData:
    from lightning.pytorch import Trainer

    options = {"attributes": NAMES, "val_fraction": 0.0} | options
    data = AttributeData(write(folder / "rows.jsonl", rows), **options)
    data.trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, default_root_dir=folder
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_every_answer_keeps_its_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data = read(tmp_path, ROWS)
    assert data.train_trees is not None and len(data.train_trees) == 3
    trees = [data.train_trees[i] for i in range(3)]
    assert data.labels([tree.row for tree in trees]).tolist() == [[4, 4, 1], [0, 0, 1], [4, 4, 0]]
    texts = [data.template.tokenizer.decode(tree.responses[0], skip_special_tokens=True) for tree in trees]
    assert texts == ["5입니다.", "6입니다.", "네."]
    assert data.labels([]).shape == (0, 3) and data.labels([trees[2].row]).tolist() == [[4, 4, 0]]
    assert "helpfulness" not in caplog.text.replace("attributes", "")  # nothing says that it is not read


def test_a_row_of_several_answers_has_lists(tmp_path: Path) -> None:
    data = read(tmp_path, [SEVERAL])
    assert data.train_trees is not None and len(data.train_trees) == 2
    assert data.labels([data.train_trees[i].row for i in range(2)]).tolist() == [[1, 1, 1], [2, 2, 2]]
    for name, value, message in (
        ("verbosity", 1, "rows.jsonl:1: 'verbosity' is one value for 2 answers; give a list with one each"),
        ("verbosity", [1], "'verbosity' has 1 values for 2 answers; give each its own"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path, [SEVERAL | {name: value}])


def test_classes_by_name(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": f"b{i}", "grade": grade} for i, grade in enumerate(["good", "bad", "good"])]
    data = read(tmp_path, rows, attributes=["grade"], classes=["bad", "good"])
    assert data.train_trees is not None
    assert data.labels([data.train_trees[i].row for i in range(3)]).tolist() == [[1], [0], [1]]
    numbers = [{"prompt": "a", "response": f"b{i}", "grade": grade} for i, grade in enumerate([True, "false", True])]
    data = read(tmp_path, numbers, attributes=["grade"], classes=[False, True])
    assert data.classes == ["false", "true"]
    assert data.labels([data.train_trees[i].row for i in range(3)]).tolist() == [[1], [0], [1]]  # type: ignore[index]
    numbers = [{"prompt": "a", "response": f"b{i}", "grade": grade} for i, grade in enumerate([2.0, "1", 2])]
    data = read(tmp_path, numbers, attributes=["grade"], classes=[1, "2"])
    assert data.labels([data.train_trees[i].row for i in range(3)]).tolist() == [[1], [0], [1]]  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"helpfulness": "x"}, {}, "rows.jsonl:5: 'helpfulness' is 'x', not a finite number; write a number"),
        ({"helpfulness": None}, {}, "rows.jsonl:5: 'helpfulness' is None, not a finite number"),
        ({}, {"attributes": ["helpfulnes"]}, "no column 'helpfulnes'; did you mean 'helpfulness'.; give it or drop"),
        ({"helpfulness": [1, 2]}, {}, "'helpfulness' has 2 values for 1 answers; give each its own"),
        (
            {},
            {"attributes": ["verbosity"], "classes": ["0", "2"]},
            "'verbosity' is 1, and the classes are 0 and 2; mend",
        ),
    ],
)
def test_rows_without_a_label_are_named(row: Any, options: Any, message: str, tmp_path: Path) -> None:
    last = {**ROWS[0], "response": "다른 답", "verbosity": 1} | row
    with pytest.raises(UserError, match=message):
        read(tmp_path, [*({**r, "verbosity": 0} for r in ROWS[:3]), ROWS[2], last], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": []}, r"--data.attributes \[\]: name the columns that are learnt, each once"),
        ({"attributes": ["a", "a"]}, "name the columns that are learnt, each once"),
        ({"attributes": ["a", "b"], "classes": ["x", "y"]}, "values of one attribute, and there are 2; leave it out"),
        ({"attributes": ["a"], "classes": ["x"]}, "give two or more values of a, each once"),
        ({"attributes": ["a"], "classes": ["x", "x"]}, "give two or more values of a, each once"),
    ],
)
def test_labels_that_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AttributeData("rows.jsonl", **options)


# -- the command line -------------------------------------------------------------------------------------------------

LORA = "--model.policy.adapter LoraConfig --model.policy.adapter.r 2 --model.policy.adapter.target_modules all-linear"


@pytest.mark.parametrize("more", ["", LORA])
def test_train_predict_and_reward_from_the_command_line(more: str, leyden: Any, workplace: Path) -> None:
    rows = [
        {"prompt": f"{i} + 1은?", "response": f"{i + i % 3}입니다.", "right": int(i % 3 == 1), "length": 3}
        for i in range(24)
    ]
    write(workplace / "rows.jsonl", rows)
    words = f"fit --config attribute_model --data.path rows.jsonl --data.attributes [right,length] {more}"
    words += " --data.batch_size 8"
    rest = "--trainer.max_steps 4 --trainer.default_root_dir run --trainer.accelerator cpu --model.optimizer.lr 1e-3"
    code, _, err = leyden(*words.split(), *rest.split(), "--data.val_fraction", "0.25")
    assert code == 0, err
    metrics = (workplace / "run" / "metrics.csv").read_text()
    assert "val/error_right" in metrics and "val/correlation_length" in metrics
    if more:
        code, _, err = leyden("export", "run", "merged", "--merge", "--dtype", "float32")
        assert code == 0, err
    code, _, err = leyden("export", "run", "again", "--checkpoint", "last")
    assert code == 0, err
    asked = "--data.path rows.jsonl --output scores.jsonl --trainer.accelerator cpu --data.attributes [right,length]"
    code, _, err = leyden("predict", "--config", "attribute_model", "--model.policy.path", "again", *asked.split())
    assert code == 0, err
    lines = [json.loads(line) for line in (workplace / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 24 and set(lines[0]["score"]) == {"right", "length"}
    folder = "merged" if more else "again"
    samples = [Sample([{"role": "user", "content": row["prompt"]}], row["response"]) for row in rows]
    found = score(Classifier(folder, "right"), samples)
    by_text = {(line["prompt"][0]["content"], line["response"]): line["score"]["right"] for line in lines}
    expected = [by_text[row["prompt"], row["response"]] for row in rows]
    assert found.tolist() == pytest.approx(expected, abs=1e-3 if more else 2e-5)


def test_a_resumed_run_is_one_that_was_never_stopped(leyden: Any, workplace: Path) -> None:
    write(workplace / "rows.jsonl", [{"prompt": f"{i}?", "response": f"{i * i}", "score": i} for i in range(24)])
    words = "fit --config attribute_model --data.path rows.jsonl --data.attributes [score] --data.batch_size 4"
    words += " --data.val_fraction 0 --trainer.accelerator cpu --model.lr_scheduler null --seed_everything 3"

    def run(folder: str, *more: str) -> Tensor:
        code, _, err = leyden(*words.split(), "--trainer.default_root_dir", folder, *more)
        assert code == 0, err
        model = AutoModelForSequenceClassification.from_pretrained(workplace / folder / "export")
        return weights_of(model)

    whole = run("whole", "--trainer.max_steps", "4")
    run("half", "--trainer.max_steps", "2")
    assert torch.equal(run("half", "--trainer.max_steps", "4", "--ckpt_path", "auto"), whole)
    assert score(ModelReward("half/export"), SAMPLES).isfinite().all()  # one number is a reward
