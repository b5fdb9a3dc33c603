"""Sequence classifiers as rewards: the scores that transformers gives single texts, labels, templates, long texts."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import KINDS, save_encoder
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from leyden.data.tokenizer import load_tokenizer
from leyden.errors import UserError
from leyden.example import Sample
from leyden.models import Classifier, ModelReward
from leyden.models.classifier_input import turns_as_text
from leyden.rewards import WeightedSum, score

LABELS = {0: "safe", 1: "Toxic", 2: "spam"}
NAMED = dict(num_labels=3, id2label=LABELS, label2id={name: i for i, name in LABELS.items()})


def sample(prompt: Any, answer: str, line: int = 1) -> Sample:
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return Sample(turns, answer, source=f"rows.jsonl:{line}")


TALK = [
    {"role": "system", "content": "be kind."},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "me."},
    {"role": "user", "content": "really?"},
]
SAMPLES = [
    sample("2 + 3?", "5"),
    sample("2 + 3?", "6, no: 5. why do you ask?", 2),
    sample(TALK, "yes!", 3),
    sample("hi", "", 4),
    sample("한국어 a", "네요 0", 5),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("classifiers")
    made = {kind: save_encoder(folder / kind, kind, **NAMED) for kind in KINDS}
    made["long"] = save_encoder(folder / "long", positions=256, **NAMED)
    made["one"] = save_encoder(folder / "one", num_labels=1)
    made["number"] = save_encoder(folder / "number", num_labels=1, problem_type="regression")
    made["several"] = save_encoder(folder / "several", problem_type="multi_label_classification", **NAMED)
    made["plain"] = save_encoder(folder / "plain", head=False)
    return made


def alone(path: str, *texts: Any, dtype: Any = torch.float32) -> Tensor:
    """The logits of plain transformers, one text or pair at a time, without padding: [R, K]."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*text, return_tensors="pt")).logits for text in texts])


def pairs(samples: list[Sample]) -> list[tuple[str, str]]:
    return [(turns_as_text(one.messages), one.response) for one in samples]


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_single_texts_in_plain_transformers(kind: str, folders: dict[str, str]) -> None:
    expected = alone(folders[kind], *pairs(SAMPLES))
    assert expected.std() > 0.01
    for place, label in [(0, "safe"), (1, "toxic"), (1, "Toxic"), (2, 2), (2, "2")]:
        assert (score(Classifier(folders[kind], label), SAMPLES) - expected[:, place]).abs().max() < 1e-5
    for seed, budget in ((0, 16384), (1, 40), (2, 1)):  # any order, any company
        order = random.Random(seed).sample(range(len(SAMPLES)), len(SAMPLES))
        reward = Classifier(folders[kind], 1, batch_tokens=budget)
        assert reward.together
        found = score(reward, [SAMPLES[place] for place in order])
        assert (found - expected[order, 1]).abs().max() < 1e-5


def test_the_second_text_has_types_of_its_own(folders: dict[str, str]) -> None:
    """With the types left out BERT would score otherwise, so that the test above sees them."""
    model = AutoModelForSequenceClassification.from_pretrained(folders["bert"]).eval()
    encoded = AutoTokenizer.from_pretrained(folders["bert"])("2 + 3?", "5", return_tensors="pt")
    with torch.no_grad():
        same, other = model(**encoded).logits, model(**{**encoded, "token_type_ids": encoded.input_ids * 0}).logits
    assert encoded.token_type_ids.tolist()[0][-2:] == [1, 1] and (same - other).abs().max() > 1e-3


def test_forwards_keep_to_the_budget(folders: dict[str, str]) -> None:
    reward, seen = Classifier(folders["bert"], 0, batch_tokens=60), list[Any]()
    reward.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    reward(SAMPLES * 3)
    assert len(seen) > 2 and all(ids.numel() <= 60 or len(ids) == 1 for ids in seen)
    assert sum(map(len, seen)) == 3 * len(SAMPLES) and seen[0].shape[1] == max(ids.shape[1] for ids in seen)


def test_it_is_not_trained_and_half_precision_is_its_own(folders: dict[str, str]) -> None:
    reward = Classifier(folders["roberta"], 0)
    reward.train()
    assert not any(part.training for part in reward.modules()) and not any(p.requires_grad for p in reward.parameters())
    expected = score(reward, SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(SAMPLES), expected)
    half = score(Classifier(folders["roberta"], 0, dtype="bfloat16"), SAMPLES)
    assert half.dtype == torch.float32 and 0 < (half - expected).abs().max() < 0.2
    assert reward([]).shape == (0,)


@pytest.mark.parametrize("kind", ["bert", "several", "one"])
def test_probabilities(kind: str, folders: dict[str, str]) -> None:
    logits = alone(folders[kind], *pairs(SAMPLES))
    probability = logits.softmax(-1) if kind == "bert" else logits.sigmoid()
    label = None if kind == "one" else "spam"
    for output, expected in (("probability", probability), ("log_probability", probability.log())):
        found = score(Classifier(folders[kind], label, output=output), SAMPLES)  # type: ignore[arg-type]
        assert (found - expected[:, -1]).abs().max() < 1e-5


def test_weights_of_several_labels_and_their_terms(folders: dict[str, str]) -> None:
    logits = alone(folders["bert"], *pairs(SAMPLES))
    reward = Classifier(folders["bert"], weights={"toxic": -1.0, "safe": 0.5})
    assert (score(reward, SAMPLES) - (0.5 * logits[:, 0] - logits[:, 1])).abs().max() < 1e-5
    assert list(reward.terms) == ["Toxic", "safe"] and (reward.terms["Toxic"] - logits[:, 1]).abs().max() < 1e-5
    inside = WeightedSum([reward])
    score(inside, SAMPLES)
    assert list(inside.terms) == ["Classifier", "Classifier.Toxic", "Classifier.safe"]


# -- what is read -----------------------------------------------------------------------------------------------------


def test_texts_of_your_own(folders: dict[str, str]) -> None:
    prompts, answers = zip(*pairs(SAMPLES), strict=True)
    for template, texts in {
        "{response}": answers,
        "q: {prompt} a: {response}{unquoted": [
            f"q: {p} a: {a}{{unquoted" for p, a in zip(prompts, answers, strict=True)
        ],
        "{conversation}": [
            "\n".join(f"{t['role'].capitalize()}: {t['content']}" for t in s.messages) + f"\nAssistant: {s.response}"
            for s in SAMPLES
        ],
    }.items():
        expected = alone(folders["long"], *((text,) for text in texts))[:, 0]
        assert (score(Classifier(folders["long"], 0, template=template), SAMPLES) - expected).abs().max() < 1e-5


CHAT = "{% for m in messages %}[CLS]{{ m.role }}: {{ m.content }}[SEP]{% endfor %}"


def test_a_chat_template_where_there_is_one(folders: dict[str, str], tmp_path: Path) -> None:
    path = save_encoder(tmp_path / "chat", positions=256, **NAMED)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    assert Classifier(path, 0).reader.template == "chat" and Classifier(folders["bert"], 0).reader.template == "pair"
    model, expected = AutoModelForSequenceClassification.from_pretrained(path).eval(), []
    for one in SAMPLES:
        turns = [*one.messages, {"role": "assistant", "content": one.response}]
        encoded = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        asked = tokenizer.apply_chat_template(one.messages, return_dict=True)["input_ids"]
        encoded["token_type_ids"] = (torch.arange(encoded["input_ids"].shape[1]) >= len(asked)).long()[None]
        with torch.no_grad():
            expected.append(model(**encoded).logits)
    assert (score(Classifier(path, 0), SAMPLES) - torch.cat(expected)[:, 0]).abs().max() < 1e-5
    pair = alone(folders["long"], *pairs(SAMPLES))[:, 0]
    assert (score(Classifier(path, 0, template="pair"), SAMPLES) - pair).abs().max() < 1e-5
    with pytest.raises(UserError, match=r"rows.jsonl:9.*256; leave out long prompts"):
        score(Classifier(path, 0), [sample("a " * 280, "b", 9)])


def test_a_decoder_with_a_classification_head(tmp_path: Path) -> None:
    """Its last token is found by the pad token of the model."""
    tokenizer: Any = load_tokenizer("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, num_labels=3,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    expected = []
    for one in SAMPLES:
        turns = [*one.messages, {"role": "assistant", "content": one.response}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected.append(model.eval()(ids).logits)
    reward = Classifier(str(tmp_path / "llama"), 2)
    assert reward.reader.template == "chat" and reward.together
    assert (score(reward, SAMPLES) - torch.cat(expected)[:, 2]).abs().max() < 1e-5


def test_models_that_padding_would_change_score_texts_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a pad token a decoder cannot tell where a padded row ends."""
    tokenizer: Any = load_tokenizer("tiny")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    reward = Classifier(str(tmp_path / "llama"), 0)
    assert not reward.together and "scored one by one" in caplog.text
    assert (score(reward, SAMPLES)[1] - score(reward, SAMPLES[1:2])[0]).abs() < 1e-6


# -- long texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_cut_on_the_left_and_answers_never(
    kind: str, folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    long = [sample("ab c? " * 40, "d e", 7), sample("1 2 3 " * 40, "f!", 8), *SAMPLES[:2]]
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    tokenizer.truncation_side = "left"
    model = AutoModelForSequenceClassification.from_pretrained(folders[kind]).eval()
    expected = []
    for one in long:
        encoded = tokenizer(
            one.messages[0]["content"], one.response, truncation="only_first", max_length=64, return_tensors="pt"
        )
        with torch.no_grad():
            expected.append(model(**encoded).logits[0, 1])
    reward = Classifier(folders[kind], 1)
    assert reward.reader.limit == 64
    with caplog.at_level(logging.WARNING):
        assert (score(reward, long) - torch.stack(expected)).abs().max() < 1e-5
        score(reward, long)
    assert reward.reader.shortened == 4
    assert caplog.text.count("prompts are cut on the left where there are more (first: rows.jsonl:7, ") == 1
    with pytest.raises(UserError, match=r"rows.jsonl:9 .*answers are not cut; lower --model.sampling.max_new_tokens"):
        score(reward, [sample("a", "b c " * 70, 9)])


def test_a_text_of_your_own_loses_as_little_of_its_prompt_as_it_must(folders: dict[str, str]) -> None:
    reward = Classifier(folders["bert"], 0, template="x {prompt} y {response} z", max_length=20)
    words = [f"{n % 10}" for n in range(50)]
    encoded = reward.reader(sample(" ".join(words), "b"))
    text = reward.reader.tokenizer.decode(encoded.ids, skip_special_tokens=True)
    assert len(encoded) == 20 and text == f"x {' '.join(words[-14:])} y b z"
    reward = Classifier(folders["bert"], 0, template="{conversation}", max_length=30)
    encoded = reward.reader(sample(TALK * 5, "b"))
    text = reward.reader.tokenizer.decode(encoded.ids, skip_special_tokens=True)
    assert len(encoded) <= 30 and text.replace(" ", "").endswith("really?assistant:b")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {}, "3 labels, so say which is the reward by label; its labels are 0 safe, 1 Toxic, 2 spam$"),
        ("bert", {"label": "toxc"}, "no label 'toxc'; did you mean 'Toxic'.; its labels are 0 safe, 1 Toxic, 2 spam$"),
        ("bert", {"label": 3}, "no label 3; its labels are 0 safe"),
        ("bert", {"label": -1}, "no label -1; its labels are 0 safe"),
        ("one", {"label": "reward"}, "no label 'reward'.*; its labels are 0 LABEL_0$"),
        ("bert", {"label": 1, "weights": {"safe": 1.0}}, "label 1 and weights; give one of them"),
        ("bert", {"weights": {}}, "weights {}; give {LABEL: a finite number, …}; its labels are"),
        ("bert", {"weights": {"safe": float("nan")}}, "give {LABEL: a finite number"),
        ("bert", {"weights": {"sfe": 1.0}}, "no label 'sfe'; did you mean 'safe'"),
        ("bert", {"weights": {"safe": 1.0, "0": 1.0}}, "name a label twice"),
        ("number", {"output": "probability"}, "a regression head, whose numbers are no logits; leave out output prob"),
        ("bert", {"label": 0, "batch_tokens": 0}, "batch_tokens 0; give the most tokens"),
        ("bert", {"label": 0, "max_length": 65}, "max_length 65; give 2 to 64 tokens"),
        ("roberta", {"label": 0, "max_length": 66}, "max_length 66; give 2 to 64 tokens"),
        ("bert", {"label": 0, "max_length": 1}, "max_length 1; give 2 to 64 tokens"),
        ("bert", {"label": 0, "template": "chat"}, "template chat, but its tokenizer has no chat template; give templ"),
        ("bert", {"label": 0, "template": "pairs"}, "template 'pairs'; did you mean 'pair'.; give pair, chat, or a te"),
        ("bert", {"label": 0, "template": "{promt} {response}"}, "template has {promt}; did you mean 'prompt'.; it ma"),
        ("bert", {"label": 0, "template": "{prompt}"}, "has no answer in it; add {response}"),
        ("plain", {}, r"no trained classifier \(\S+ is missing\), so its scores would be random"),
        ("tiny", {}, r"no trained classifier \(score.weight is missing\)"),
    ],
)
def test_mistakes_are_one_line(kind: str, options: dict[str, Any], message: str, folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=message) as error:
        Classifier(folders.get(kind, kind), **options)
    assert "\n" not in str(error.value) and str(error.value).startswith((folders.get(kind, kind), "Classifier"))


def test_folders_that_are_no_classifiers(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder; did you mean 'bert'"):
        Classifier(folders["bert"] + "t")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter; give --model.reward ModelReward"):
        Classifier(str(tmp_path / "adapter"))
    unsafe = Path(save_encoder(tmp_path / "unsafe"))
    torch.save(AutoModelForSequenceClassification.from_pretrained(unsafe).state_dict(), unsafe / "pytorch_model.bin")
    (unsafe / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its classifier cannot be loaded .*safetensors") as error:
        Classifier(str(unsafe))
    assert "\n" not in str(error.value)


def test_a_separator_is_needed_for_pairs(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer("tiny")
    tokenizer.chat_template = None
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="puts nothing between two texts; give template a text such as"):
        Classifier(str(tmp_path / "gpt2"), 0)
    assert score(Classifier(str(tmp_path / "gpt2"), 0, template="{prompt}\n{response}"), SAMPLES).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_reward_of_an_encoder_says_what_to_type(kind: str, folders: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match=r"an encoder \(\S+\), whose .* to score with one --model.reward Classifier$"
    ) as error:
        ModelReward(folders[kind])
    assert "\n" not in str(error.value)
