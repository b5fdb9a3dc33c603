"""Score heads, and reward models as folders: plain transformers and PEFT must give the same scores without us."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from small import LLAMA
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from leyden.batch.forest import Tree, pack
from leyden.data.chat_template import ChatTemplate
from leyden.data.tokenizer import load_tokenizer, stop_ids
from leyden.errors import UserError
from leyden.example import Example, Message
from leyden.models import CausalLM
from leyden.models.backbone import base_of
from leyden.models.heads import make_head, saved_head
from leyden.models.saving.scoring_tokenizer import pad_token, scoring_tokenizer

LORA = LoraConfig(r=4, target_modules="all-linear")
QUESTION: list[Message] = [{"role": "user", "content": "안녕? How are you?"}]
TALKS: list[list[Message]] = [
    [{"role": "assistant", "content": "네."}],
    [{"role": "assistant", "content": "Fine, thank you. 잘 지내요, 당신은요? " * 3}],
    [
        {"role": "assistant", "content": "Well!"},
        {"role": "user", "content": "왜?"},
        {"role": "assistant", "content": "날씨가 좋아요."},
    ],
]
# Phi 3 writes one more token after the last turn; the bare one writes no token at all where a turn ends.
PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
BARE = (
    "{%- for m in messages -%}\n{{ m['role'] + ': ' + m['content'] + '\n' }}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}\n"
)
FAMILIES = {
    "LlamaConfig": LLAMA,
    "Qwen2Config": LLAMA | {"tie_word_embeddings": True},
    "Gemma3TextConfig": LLAMA | {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 2},
    "GPTNeoXConfig": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "GPT2Config": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0),
}


def folder_of(
    tmp_path: Path, configuration: str = "LlamaConfig", pad_is_eos: bool = False, **options: Any
) -> tuple[str, Any]:
    """A folder with random weights and the embedded tokenizer."""
    tokenizer = load_tokenizer("tiny")
    if pad_is_eos:  # as in SmolLM2: one token ends turns and texts, and pads
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer)} | ({"n_positions": 512} if "GPT2" in configuration else {})
    size |= {} if "GPT2" in configuration else {"max_position_embeddings": 512}
    config = getattr(transformers, configuration)(**(FAMILIES.get(configuration, LLAMA) | size | options))
    config.pad_token_id = tokenizer.pad_token_id if pad_is_eos else config.pad_token_id
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # defaults are so small that attention would hardly matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), tokenizer


def reward(path: str = "tiny", **options: Any) -> CausalLM:
    """A policy with a score head; an adapter is moved away from zero."""
    torch.manual_seed(1)
    policy = CausalLM(path, **options)
    policy.build(("score",), dropout=False)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy


def tree_of(policy: CausalLM) -> Tree:
    return ChatTemplate(policy.tokenizer).encode(Example(QUESTION, TALKS))


@torch.no_grad()
def ours(policy: CausalLM) -> torch.Tensor:
    found = policy(pack([tree_of(policy)]), {"score"}).score
    assert found is not None and found.dtype == torch.float32
    return found


@torch.no_grad()
def plain(model: Any, tokenizer: Any, side: str = "right", talks: Any = TALKS) -> torch.Tensor:
    """What a user of transformers does: render, pad, run."""
    tokenizer.padding_side = side
    talks = [QUESTION + talk for talk in talks]
    batch = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
    scores: torch.Tensor = model.eval()(**batch).logits[:, 0].float()
    return scores


def exported(policy: CausalLM, folder: Path, **options: Any) -> tuple[Any, Any]:
    policy.save(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)


# -- the head ---------------------------------------------------------------------------------------------------------


def test_a_new_head_scores_with_variance_one() -> None:
    """States of a normalised layer have squares near 1, so weights of variance 1 / (H + 1) give scores near N(0, 1)."""
    torch.manual_seed(0)
    head = make_head(10_000)
    assert head.weight.shape == (1, 10_000) and head.weight.dtype == torch.float32 and head.bias is None
    weight = head.weight.detach()
    assert float(weight.std()) == pytest.approx(10_001**-0.5, rel=0.02) and abs(float(weight.mean())) < 5e-4


# -- where plain transformers reads the score -------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "plain", PHI, BARE], ids=["chatml", "plain", "phi", "bare"])
def test_the_exported_template_writes_the_very_tokens_of_our_trees(template: str | None) -> None:
    tokenizer = load_tokenizer("tiny")
    ours = ChatTemplate(tokenizer, template)
    tokenizer.chat_template = ours.source
    changed = scoring_tokenizer(tokenizer, stop_ids(tokenizer), None)
    tree = ours.encode(Example(QUESTION, TALKS))
    for talk, response in zip(TALKS, tree.responses, strict=True):
        assert changed.apply_chat_template(QUESTION + talk, return_dict=False) == tree.prompt + response
        whole = tokenizer.apply_chat_template(QUESTION + talk, return_dict=False)
        assert template == "plain" or whole != tree.prompt + response  # without the change another token is scored
    for answer in (True, False):  # what is not answered yet is written as before
        asked = dict(tokenize=False, add_generation_prompt=answer)
        assert changed.apply_chat_template(QUESTION, **asked) == tokenizer.apply_chat_template(QUESTION, **asked)
    again = scoring_tokenizer(changed, stop_ids(changed), None)
    assert again.chat_template == changed.chat_template and again.pad_token == changed.pad_token
    assert changed.padding_side == "right" and tokenizer.chat_template == ours.source


def test_a_pad_token_ends_no_text() -> None:
    tokenizer = load_tokenizer("tiny")
    names = {token: i for i, token in ((i, tokenizer.convert_ids_to_tokens(i)) for i in range(4))}
    end, pad, turn_end = names["<|endoftext|>"], names["<|pad|>"], names["<|im_end|>"]
    assert pad_token(tokenizer, {end, turn_end}) == pad
    assert pad_token(tokenizer, {turn_end}, configured=pad) == pad
    tokenizer.pad_token = "<|im_end|>"
    assert pad_token(tokenizer, {end, turn_end}, configured=turn_end) == pad  # by its name
    tokenizer.eos_token = "<|im_end|>"
    assert pad_token(tokenizer, {turn_end}, configured=end) == end  # what the model's configuration says comes first
    assert pad_token(tokenizer, {turn_end}, configured=500) == pad  # an ordinary token is not kept


def words(specials: dict[str, str], **more: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*specials.values(), "?", "leyden", "-", "probe", "user", "answer"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=specials.get("unk_token")))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **specials, **more)


def test_an_unknown_token_pads_only_where_no_text_gives_it() -> None:
    tokenizer = words({"eos_token": "</s>", "unk_token": "<unk>"})
    assert pad_token(tokenizer, {0}) is None
    assert scoring_tokenizer(tokenizer, {0}, None).pad_token_id == len(tokenizer)  # so a new one is added
    byte_level = load_tokenizer("tiny")  # knows all bytes
    byte_level.pad_token, byte_level.unk_token = byte_level.eos_token, "<|pad|>"
    assert byte_level.convert_ids_to_tokens(pad_token(byte_level, stop_ids(byte_level)) or 0) == "<|pad|>"


# -- full weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_full_weights_score_the_same_in_plain_transformers(family: str, pad_is_eos: bool, tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path, family, pad_is_eos)
    policy = reward(path)
    assert policy.fresh == {"score"} and policy.backbone.backend(torch.device("cpu")) == "segments"
    expected = ours(policy)
    model, tokenizer = exported(policy, tmp_path / "out")
    assert type(model).__name__.endswith("ForSequenceClassification") and expected.std() > 0.05
    sides = ["right"] if family == "GPT2Config" else ["right", "left"]  # learned positions count the padding
    for side in sides:
        assert (plain(model, tokenizer, side) - expected).abs().max() < 1e-5
    for number, talk in enumerate(TALKS):  # whatever stands beside it
        assert (plain(model, tokenizer, talks=[talk]) - expected[number]).abs().max() < 1e-5
    if pad_is_eos:  # what would happen if padding were left as it was
        model.config.pad_token_id = tokenizer.eos_token_id
        assert (plain(model, tokenizer) - expected).abs().max() > 1e-2


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    policy = reward()
    policy.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["id2label"] == {"0": "reward"}
    assert config["pad_token_id"] == policy.tokenizer.convert_tokens_to_ids("<|pad|>")
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    tree = tree_of(policy)
    (said,) = pipeline("text-classification", str(tmp_path))(policy.tokenizer.decode(tree.prompt + tree.responses[0]))
    assert said["label"] == "reward" and said["score"] == pytest.approx(float(ours(policy)[0]), abs=1e-5)


def test_a_pad_token_that_has_to_be_added_gets_a_row_of_its_own(tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path)
    policy = reward(path)
    policy._tokenizer = only_eos(policy.tokenizer)
    expected = ours(policy)
    model, tokenizer = exported(policy, tmp_path / "out")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 4096 and model.config.vocab_size == 4097
    assert base_of(policy.model).config.vocab_size == 4096  # the policy can be trained on
    assert (plain(model, tokenizer) - expected).abs().max() < 1e-5
    again = reward(str(tmp_path / "out"))
    assert torch.equal(ours(again), expected) and not again.fresh


def only_eos(tokenizer: Any) -> Any:
    """The same tokenizer with a single special token, and a template that uses no other."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<|endoftext|>"]
    state["model"]["vocab"] = {token.replace("|pad|", "|odd|"): i for token, i in state["model"]["vocab"].items()}
    inner = Tokenizer.from_str(json.dumps(state))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + (eos_token if m['role'] == 'assistant' else '\n')"
        " }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    return made


def test_a_head_keeps_its_digits_beside_a_body_in_bfloat16(tmp_path: Path) -> None:
    """On disk. Plain transformers loads all of it in bfloat16, 8 bits, unless it is told otherwise."""
    policy = reward(dtype="bfloat16")
    expected = ours(policy)
    model, tokenizer = exported(policy, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["score.weight"], policy.heads["score"].weight.detach())
    assert stored["model.norm.weight"].dtype == model.score.weight.dtype == torch.bfloat16
    assert (plain(model, tokenizer) - expected).abs().max() < 0.03
    assert torch.equal(ours(reward(str(tmp_path), dtype="bfloat16")), expected)
    wide = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.score.weight, policy.heads["score"].weight)
    assert (plain(wide, tokenizer) - expected).abs().max() < 0.03


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config"])
def test_an_adapter_scores_the_same_in_plain_peft(family: str, pad_is_eos: bool, tmp_path: Path, caplog: Any) -> None:
    path, _ = folder_of(tmp_path, family, pad_is_eos)
    policy = reward(path, adapter=replace(LORA, fan_in_fan_out=family == "GPT2Config"))
    expected = ours(policy)
    with caplog.at_level(logging.WARNING, "leyden"):
        policy.save(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # the base model's own configuration is not ours to change
    assert f"set config.pad_token_id = {tokenizer.pad_token_id} on the base model" in caplog.text
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert (plain(model, tokenizer) - expected).abs().max() < 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    again = reward(str(tmp_path / "out"))
    with torch.no_grad():  # `reward` moves adapters: back to what was saved
        for name, parameter in policy.named_parameters():
            dict(again.named_parameters())[name].copy_(parameter)
    assert not again.fresh and (ours(again) - expected).abs().max() < 1e-6


def test_an_adapter_of_the_embedded_model_needs_no_more_than_its_folder(tmp_path: Path, caplog: Any) -> None:
    policy = reward(adapter=LORA)
    with caplog.at_level(logging.WARNING, "leyden"):
        policy.save(tmp_path)
    assert not caplog.text  # its pad token is its own
    origin = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    base = AutoModelForSequenceClassification.from_pretrained(origin, num_labels=1, dtype=torch.float32)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), PeftModel.from_pretrained(base, tmp_path)
    for side in ("right", "left"):
        assert (plain(model, tokenizer, side) - ours(policy)).abs().max() < 1e-5


def test_an_adapter_whose_pad_token_is_new_says_so_and_loads_with_one_more_row(tmp_path: Path, caplog: Any) -> None:
    path, _ = folder_of(tmp_path)
    policy = reward(path, adapter=LORA)
    policy._tokenizer = only_eos(policy.tokenizer)
    expected = ours(policy)
    with caplog.at_level(logging.WARNING, "leyden"):
        policy.save(tmp_path / "out")
    assert "call resize_token_embeddings(len(tokenizer)) and set config.pad_token_id = 4096" in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)  # adds the row
    model.config.pad_token_id = 4096
    assert (plain(model, tokenizer) - expected).abs().max() < 1e-5


# -- coming back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA])
def test_an_exported_reward_model_goes_on_where_it_was(
    adapter: LoraConfig | None, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    policy = reward(adapter=adapter)
    policy.save(tmp_path)
    capfd.readouterr()
    again = CausalLM(str(tmp_path))
    again.build(("score",), dropout=False)
    assert again.fresh == frozenset() and torch.equal(again.heads["score"].weight, policy.heads["score"].weight)
    assert (ours(again) - ours(policy)).abs().max() < 1e-6
    assert trained(again) == trained(policy) and "score.weight" in trained(again)
    said = "".join(capfd.readouterr())
    assert "LOAD REPORT" not in said and "score" not in said + caplog.text  # nothing is missing


def trained(policy: CausalLM) -> set[str]:
    return {name.removeprefix("heads.") for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_reward_model_starts_from_what_was_fine_tuned(adapter: LoraConfig | None, tmp_path: Path) -> None:
    tuned = CausalLM(adapter=adapter)
    tuned.build()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    tuned.save(tmp_path)
    policy = CausalLM(str(tmp_path))
    policy.build(("score",), dropout=False)
    assert policy.fresh == {"score"}
    batch = pack([tree_of(policy)])
    with torch.no_grad():
        assert (policy.backbone.hidden(batch) - tuned.backbone.hidden(batch)).abs().max() < 1e-5
    names = trained(policy)
    assert "score.weight" in names and all("lora_" in n or n == "score.weight" or adapter is None for n in names)


def test_the_language_head_is_not_trained_but_tied_embeddings_are(tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path)  # not tied
    assert not any("lm_head" in name for name in trained(reward(path)))
    assert any("embed_tokens" in name for name in trained(reward()))  # tied


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_model_without_sequence_classification_is_refused_before_training(tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path, "MambaConfig", hidden_size=16, num_hidden_layers=1, state_size=4)
    CausalLM(path).build()
    with pytest.raises(UserError, match="no sequence classification with one score for MambaForCausalLM"):
        reward(path)


def test_an_adapter_on_the_language_head_is_refused(tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path)
    with pytest.raises(UserError, match=r"the adapter changes .*lm_head.*, which a reward model does not have"):
        reward(path, adapter=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    reward().save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("score.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it says that it is a reward model, but has no score.weight"):
        reward(str(tmp_path))
    save_file(tensors | {"score.weight": head.repeat(2, 1)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its head is \[2, 192\], but a reward is one number"):
        reward(str(tmp_path))
    assert saved_head("no/such-name", "score") is None


def test_a_reward_model_has_no_answers_unless_its_embeddings_are_its_head(tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path)
    reward(path).save(tmp_path / "out")
    with pytest.raises(UserError, match="a reward model, which has no language-model head"):
        CausalLM(str(tmp_path / "out")).build()
    reward().save(tmp_path / "tied")
    tied = CausalLM(str(tmp_path / "tied"))
    tied.build()
    assert type(base_of(tied.model)).__name__ == "LlamaForCausalLM" and not tied.heads
