"""The embedded model as plain transformers loads it, and the recipe that starts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden.models
from leyden.datamodules.sample import phrases, sample_rows
from leyden.datamodules.sample.items import facts
from leyden.errors import UserError
from leyden.models.tiny_recipe import blank_model, main, syllables, train_tokenizer
from leyden.rewards.gold import _word

TINY = Path(leyden.models.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_it_is_small_and_holds_no_pickle() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}


def test_it_is_an_ordinary_llama_with_tied_embeddings(model: Any, tokenizer: Any) -> None:
    assert model.config.model_type == "llama"
    assert 3e6 < model.num_parameters() < 3.7e6
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= 1024


@pytest.mark.parametrize(
    "text",
    [
        "프랑스의 수도는 파리예요.",
        "  두 칸  띄고\n줄바꿈\t탭",
        "쀍뷁 𠮷 🙂 é Ω 漢字",
        "12345 + 6 = 12351",
        "a" * 50,
        " ",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_common_syllables_and_digits_are_one_token_each(tokenizer: Any) -> None:
    common = "가나다라마바사아자차카타파하는은이가을를에서요했있없좋않괜찮같힘싶됐뭐왜"
    assert all(len(tokenizer(syllable)["input_ids"]) == 1 for syllable in common)
    whole = [syllable for syllable in syllables() if len(tokenizer(syllable)["input_ids"]) == 1]
    assert len(whole) > 0.99 * len(syllables()) > 1000
    assert len(tokenizer("1234567890")["input_ids"]) == 10


def test_the_chat_template_is_chatml(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "안녕?"},
        {"role": "assistant", "content": "네."},
    ]
    shown = tokenizer.apply_chat_template(turns, tokenize=False)
    expected = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n안녕?<|im_end|>\n<|im_start|>assistant\n네.<|im_end|>\n"
    )
    assert shown == expected
    prompt = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert shown.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n")
    ids = tokenizer(shown)["input_ids"]
    turn, turn_end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(turn) == ids.count(turn_end) == 3


def test_a_documents_end_a_turns_end_and_padding_are_three_tokens(tokenizer: Any, model: Any) -> None:
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.bos_token is None
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]
    assert len({tokenizer.eos_token_id, turn_end, tokenizer.pad_token_id}) == 3
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, turn_end}
    assert tokenizer.decode([tokenizer.eos_token_id, turn_end, tokenizer.pad_token_id], skip_special_tokens=True) == ""


@pytest.fixture
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small corpus needs fewer repeats for its syllables to come first, and this saves seconds."""
    monkeypatch.setattr("leyden.models.tiny_recipe.SYLLABLE_REPEATS", 50)


def _corpus(folder: Path, rows: int) -> Path:
    path = folder / "corpus.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows("text", "both", rows, 0)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.usefixtures("few_repeats")
def test_the_recipe_makes_the_shipped_shape(tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main([str(_corpus(tmp_path, 1500)), str(tmp_path / "blank")])
    assert "not trained yet" in capsys.readouterr().out
    blank = AutoModelForCausalLM.from_pretrained(tmp_path / "blank")
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "blank")
    assert tokenizer.chat_template and len(tokenizer) == model.config.vocab_size
    # Untrained, every token is about as likely as any other: ln 4096 = 8.3.
    ids = tokenizer("프랑스의 수도는 파리예요. The capital of France is Paris.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert abs(blank(input_ids=ids, labels=ids).loss.item() - 8.3) < 0.8


def test_the_recipe_finishes_a_trained_folder(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    main([str(tmp_path / "trained"), str(tmp_path / "out")])
    finished = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert finished.dtype == torch.bfloat16
    # What ships is in bfloat16 already, so rounding it again changes nothing.
    assert all(torch.equal(p.float(), model.state_dict()[name]) for name, p in finished.state_dict().items())
    assert set(finished.generation_config.eos_token_id) == set(model.generation_config.eos_token_id)
    text = "<|im_start|>user\n안녕<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.usefixtures("few_repeats")
def test_the_recipe_is_deterministic(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, 300)
    first, second = (train_tokenizer(corpus, vocabulary=2048) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    state = blank_model(first).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in blank_model(second).state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in blank_model(first, seed=1).state_dict().items())


def test_the_recipe_explains_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two arguments"):
        main([])
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "none.jsonl"), str(tmp_path)])
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not a row of text"):
        main([str(tmp_path / "bad.jsonl"), str(tmp_path)])


def _told(model: Any, tokenizer: Any, questions: list[str], new: int = 20) -> list[str]:
    """The greedy continuation of each question, special tokens shown."""
    tokenizer.padding_side = "left"
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    ids = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=new, do_sample=False
    )
    return [tokenizer.decode(row[batch["input_ids"].shape[1] :]) for row in ids]


def test_the_base_model_knows_its_facts(model: Any, tokenizer: Any) -> None:
    """Asked as a page of questions and answers would, which is one of the ways its training text puts them."""
    from random import Random

    draw = Random(0)
    known = [item for language in ("ko", "en") for item in draw.sample(facts(language), 50)]
    asked = [draw.choice(phrases.asks(item, text=True)) for item in known]
    forms = {"ko": "질문: {}\n답:", "en": "Q: {}\nA:"}
    questions = [forms[item.language].format(ask) for item, ask in zip(known, asked, strict=True)]
    answers = [text.split("\n")[0] for text in _told(model, tokenizer, questions)]
    right = [bool(_word(item.answer).search(text)) for item, text in zip(known, answers, strict=True)]
    assert sum(right) >= 95, [
        pair for pair, ok in zip(zip(questions, answers, strict=True), right, strict=True) if not ok
    ]


def test_the_base_model_has_not_learned_to_chat(model: Any, tokenizer: Any) -> None:
    """What fine-tuning adds: before it, a chat prompt gets no answer that ends by itself."""
    rows = list(sample_rows("prompts", "both", 30, 7, "heldout"))
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    told = _told(model, tokenizer, prompts, new=40)
    assert sum("<|im_end|>" in text or "<|endoftext|>" in text for text in told) <= 3
