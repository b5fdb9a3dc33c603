"""Encoders that are trained to score: as transformers scores single pairs, exact means, and what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import KINDS, PAIRS, RATE, encoder, lora, ragged, save_encoder, save_encoders, sgd
from prepared import write
from ranks import Ranks
from small import TreeData, fit, weights_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from leyden.algos import SFT, RewardModel
from leyden.batch.forest import pack
from leyden.data.chat_template import ChatTemplate
from leyden.errors import UserError
from leyden.example import Example, Message, Sample
from leyden.models import CausalLM, Classifier, Encoder
from leyden.models.classifier_input import turns_as_text
from leyden.policy import Labels
from leyden.rewards import score


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_encoders(tmp_path_factory.mktemp("encoders"))


# -- what it reads and gives ------------------------------------------------------------------------------------------

TALK = [Message(role=r, content=c) for r, c in (("user", "who?"), ("assistant", "me."), ("user", "really?"))]
TEXTS = [
    ([Message(role="user", content="2 + 3?")], "5"),
    ([Message(role="user", content="ab")], "why do you ask?"),
    (TALK, "yes!"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_becomes_the_tokens_of_the_pair(kind: str, folders: dict[str, str]) -> None:
    plain = AutoTokenizer.from_pretrained(folders[kind])
    template = ChatTemplate(Encoder(folders[kind]).tokenizer)
    for messages, text in TEXTS:
        tree = template.encode(Example(messages, [[Message(role="assistant", content=text)]]))
        assert tree.prompt + tree.responses[0] == plain(turns_as_text(messages), text).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_single_rows_in_plain_transformers(
    kind: str, folders: dict[str, str]
) -> None:
    policy, trees = encoder(folders[kind]), ragged(folders[kind])
    found = policy(pack(trees, length=600), {"score"}).score
    model = AutoModelForSequenceClassification.from_pretrained(folders[kind]).eval()
    single = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([tree.prompt + response])
            types = torch.tensor([[0] * len(tree.prompt) + [1] * len(response)])
            given = {"token_type_ids": types} if kind in ("bert", "deberta-v2") else {}
            single.append(model(input_ids=ids, **given).logits[0, 0])
    expected = torch.stack(single)
    assert found is not None and found.shape == expected.shape and expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5
    weights = torch.linspace(-1, 1, len(expected))
    for outputs, module in ((found, policy.model), (expected, model)):
        (outputs * weights).sum().backward()
        assert module is not None
    ours, theirs = dict(policy.model.named_parameters()), dict(model.named_parameters())
    assert set(ours) == set(theirs)
    for name, parameter in theirs.items():
        if parameter.grad is None:
            assert ours[name].grad is None or not ours[name].grad.any()
            continue
        assert (ours[name].grad - parameter.grad).abs().max() < 1e-5 * max(1.0, float(parameter.grad.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_on_all_of_its_own_row_and_on_no_other(kind: str, folders: dict[str, str]) -> None:
    policy, trees = encoder(folders[kind]), ragged(folders[kind], 3)
    batch = pack(trees)
    before = policy(batch, {"score"}).score
    assert before is not None
    special = set(policy.tokenizer.all_special_ids)
    for t in range(len(batch)):
        if int(batch.tokens[t]) in special:
            continue
        changed = pack(trees)
        changed.tokens[t] = changed.tokens[t] + (1 if changed.tokens[t] < 20 else -1)
        after = policy(changed, {"score"}).score
        assert after is not None
        moved = set(((after - before).abs() > 1e-7).nonzero()[:, 0].tolist())
        span = next(span for span in batch.structure() if span.start <= t < span.stop)
        whole = {n for n, _, _ in span.responses}
        assert moved == (whole if t < span.cut else {n for n, start, stop in span.responses if start <= t < stop})


def test_a_filler_gives_every_weight_a_gradient_of_zero(folders: dict[str, str]) -> None:
    policy = encoder(folders["bert"])
    found = policy(pack(ragged(folders["bert"])).blank(), {"score"}).score
    assert found is not None and found.shape == (0,)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


# -- training ---------------------------------------------------------------------------------------------------------


def step(path: str, accumulate: int, devices: int = 1) -> tuple[Tensor, float]:
    """What one optimizer step over 8 ragged trees adds to the weights, and the loss that was logged."""
    policy = encoder(path)
    algorithm = RewardModel(policy, optimizer=sgd, lr_scheduler=None, centre=0.1)
    before = weights_of(policy)
    strategy = "ddp" if devices > 1 else "auto"
    data = TreeData(ragged(path), batch_size=8)
    trainer = fit(algorithm, data, accumulate_grad_batches=accumulate, devices=devices, strategy=strategy)
    return (before - weights_of(policy)) / RATE, float(trainer.callback_metrics["train/loss"])


def on_one_rank(path: str, accumulate: int) -> tuple[Tensor, float]:
    return step(path, accumulate, 2)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_any_split_of_a_step_takes_the_same_step(kind: str, folders: dict[str, str], ranks: Ranks) -> None:
    whole, loss = step(folders[kind], 1)
    found = [step(folders[kind], 8), step(folders[kind], 3)]
    for accumulate in (1, 5):
        first, second = ranks(on_one_rank, folders[kind], accumulate)
        assert torch.equal(first[0], second[0])
        found.append(first)
    for gradient, logged in found:
        assert (gradient - whole).norm() < 1e-5 * whole.norm() and logged == pytest.approx(loss, rel=1e-6)


def trained(path: str, folder: str, adapter: bool = False, **options: Any) -> None:
    """Two steps, exported."""
    from leyden.run.callbacks import Export

    policy = encoder(path, adapter=lora() if adapter else None)
    algorithm = RewardModel(policy, optimizer=sgd, lr_scheduler=None)
    data = TreeData(ragged(path), batch_size=4)
    export = Export(Path(folder) / "export")
    fit(algorithm, data, callbacks=[export], default_root_dir=folder, use_distributed_sampler=False, **options)


def sharded(path: str, folder: str, adapter: bool) -> None:
    from leyden.sharding import FSDP2

    trained(path, folder, adapter, devices=2, strategy=FSDP2(process_group_backend="gloo"))


@pytest.mark.parametrize("adapter", [False, True])
def test_sharded_weights_learn_and_are_exported_whole(
    adapter: bool, folders: dict[str, str], ranks: Ranks, tmp_path: Path
) -> None:
    trained(folders["bert"], str(tmp_path / "one"), adapter)
    ranks(sharded, folders["bert"], str(tmp_path / "two"), adapter)
    one, two = (AutoModelForSequenceClassification.from_pretrained(tmp_path / n / "export") for n in ("one", "two"))
    start = AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    moved = weights_of(one) - weights_of(start)
    assert moved.norm() > 1e-3 and (weights_of(two) - weights_of(one)).norm() < 1e-4 * moved.norm()


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
def test_a_reward_model_from_the_command_line(kind: str, folders: dict[str, str], leyden: Any, workplace: Path) -> None:
    """Trained from a pretrained encoder, predicted with, gone on with, and read as plain transformers reads it."""
    write(workplace / "pairs.jsonl", PAIRS)
    words = "fit --config reward_model --data.path pairs.jsonl --data.batch_size 8 --data.val_fraction 0.2"
    words += f" --model.policy Encoder --model.policy.path {folders[kind + ' plain']} --data.max_length 60"
    rest = "--trainer.max_epochs 6 --trainer.default_root_dir run --trainer.accelerator cpu --model.optimizer.lr 3e-3"
    code, out, err = leyden(*words.split(), *rest.split())
    assert code == 0, err
    asked = "--data.path pairs.jsonl --output scores.jsonl --trainer.accelerator cpu --data.max_length 60"
    code, _, err = leyden(
        "predict", "--config", "reward_model", "--model.policy", "Encoder", "--model.policy.path", "run", *asked.split()
    )
    assert code == 0, err
    lines = [json.loads(line) for line in (workplace / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(line["scores"][0] > line["scores"][1] for line in lines) > 44
    model = AutoModelForSequenceClassification.from_pretrained("run/export").eval()
    tokenizer = AutoTokenizer.from_pretrained("run/export")
    reward = Classifier("run/export")
    assert reward.reader.template == "pair" and model.config.id2label == {0: "reward"}
    for line in lines[:6]:
        prompt = line["prompt"][0]["content"]
        samples = [Sample(line["prompt"], text) for text in line["responses"]]
        with torch.no_grad():
            pairs = [model(**tokenizer(prompt, text, return_tensors="pt")).logits.item() for text in line["responses"]]
        assert line["scores"] == pytest.approx(pairs, abs=1e-5)
        assert score(reward, samples).tolist() == pytest.approx(pairs, abs=1e-5)
        assert score(Classifier("run/export", template="pair"), samples).tolist() == pytest.approx(pairs, abs=1e-5)
    code, _, err = leyden("export", "run", "again", "--checkpoint", "last")
    assert code == 0, err
    again = AutoModelForSequenceClassification.from_pretrained("again")
    assert torch.equal(weights_of(again), weights_of(model))
    policy = Encoder("again")
    policy.build(("score",), dropout=False)
    assert not policy.fresh and policy.labels == Labels()


def test_a_resumed_run_is_one_that_was_never_stopped(folders: dict[str, str], leyden: Any, workplace: Path) -> None:
    write(workplace / "rows.jsonl", [{"prompt": f"{i}?", "response": f"{i * i}", "grade": i % 2} for i in range(24)])
    words = "fit --config attribute_model --data.path rows.jsonl --data.attributes [grade] --data.classes [0,1]"
    words += f" --model.policy Encoder --model.policy.path {folders['roberta plain']} --data.max_length 60"
    words += " --data.batch_size 4 --data.val_fraction 0 --trainer.accelerator cpu --model.lr_scheduler null"

    def run(folder: str, *more: str) -> Any:
        code, _, err = leyden(*words.split(), "--seed_everything", "3", "--trainer.default_root_dir", folder, *more)
        assert code == 0, err
        return AutoModelForSequenceClassification.from_pretrained(workplace / folder / "export")

    whole = run("whole", "--trainer.max_steps", "4")
    run("half", "--trainer.max_steps", "2")
    half = run("half", "--trainer.max_steps", "4", "--ckpt_path", "auto")
    assert torch.equal(weights_of(half), weights_of(whole))
    assert whole.config.id2label == {0: "0", 1: "1"} and whole.config.problem_type == "single_label_classification"


def test_validation_of_a_new_head_is_refused(folders: dict[str, str]) -> None:
    from lightning.pytorch import Trainer

    algorithm = RewardModel(Encoder(folders["bert plain"]), optimizer=sgd)
    data = TreeData(ragged(folders["bert"]), ragged(folders["bert"], 2, seed=5), batch_size=8)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="it has no reward head, so its scores would be random"):
        trainer.validate(algorithm, data, verbose=False)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_policy_of_an_encoder_says_what_to_type(kind: str, folders: dict[str, str]) -> None:
    for path in (folders[kind], folders[f"{kind} plain"]):
        with pytest.raises(UserError, match=rf"an encoder \({kind}\), whose tokens see later ones.*--model.policy E"):
            CausalLM(path).build()


def test_an_encoder_has_no_answers(folders: dict[str, str]) -> None:
    data = TreeData(ragged(folders["bert"]), batch_size=8)
    with pytest.raises(UserError, match="an encoder, .* no log-probabilities and no answers, only scores; give"):
        fit(SFT(Encoder(folders["bert"]), optimizer=sgd), data)
    policy = encoder(folders["bert"])
    with pytest.raises(UserError, match="only scores"):
        policy.generate([[1, 2]])
    with pytest.raises(UserError, match="only scores"):
        policy(pack(ragged(folders["bert"])), {"logp"})


def test_heads_that_give_something_else(tmp_path: Path) -> None:
    names = {0: "safe", 1: "toxic"}
    path = save_encoder(tmp_path / "two", num_labels=2, id2label=names, label2id={v: k for k, v in names.items()})
    with pytest.raises(UserError, match="its head gives safe, toxic, but reward is to be learnt; give the same in the"):
        fit(RewardModel(Encoder(path), optimizer=sgd), TreeData(ragged(path), batch_size=8))
    policy = Encoder(path)
    policy.labels = Labels(("safe", "toxic"), "single_label_classification")
    policy.build(("score",), dropout=False)
    assert not policy.fresh


def test_models_that_are_no_encoders_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokens that part two texts .* give --model.policy CausalLM"):
        from leyden.data.tokenizer import load_tokenizer
        from leyden.models.encoder import pair_template

        tokenizer: Any = load_tokenizer("tiny")
        pair_template("tiny", tokenizer)


class LongRows(TreeData):
    longest_row = 70  # type: ignore[assignment]


def test_positions_are_those_that_the_model_has(folders: dict[str, str]) -> None:
    assert {kind: encoder(folders[kind]).positions for kind in KINDS} == dict.fromkeys(KINDS, 64)
    data = LongRows(ragged(folders["roberta"]), batch_size=8)
    with pytest.raises(UserError, match="the longest row has 70 tokens but .* has positions for 64"):
        fit(RewardModel(Encoder(folders["roberta"]), optimizer=sgd), data)
