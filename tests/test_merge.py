"""Adapters worked into their bases: the model with its adapter to rounding, or a refusal in one line."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prepared import write
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from leyden.errors import UserError
from leyden.models import quantized
from leyden.models.export.merge_adapter import merged
from leyden.paths import resolve

TOKENS = torch.tensor([[5, 80, 300, 7, 1200, 44, 2]])


def base(folder: Path, tied: bool) -> str:
    """A random model, with the tokenizer of the embedded one."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=2, tie_word_embeddings=tied, eos_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(folder)
    return str(folder)


def shaken(model: Any) -> Any:
    """With an adapter that is far from the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float().log_softmax(-1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    return {tied: base(tmp_path_factory.mktemp("base") / f"tied-{tied}", tied) for tied in (True, False)}


LORA: dict[str, Any] = dict(r=4, lora_alpha=8, task_type="CAUSAL_LM")
KINDS: dict[str, Any] = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "down_proj"], **LORA),
    "dora": peft.LoraConfig(target_modules=["q_proj"], use_dora=True, **LORA),
    "rslora": peft.LoraConfig(target_modules=["q_proj"], use_rslora=True, **LORA),
    "head": peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA),
    "embedding": peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], **LORA),
    "both": peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], **LORA),
    "saved head": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
    "saved embedding": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LORA),
    "tokens": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 80], **LORA),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": peft.LoHaConfig(r=4, alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied layers, which is what this is about
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_log_probs_are_those_of_the_adapter(
    kind: str, tied: bool, bases: dict[bool, str], tmp_path: Path
) -> None:
    adapted = shaken(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases[tied]), KINDS[kind]))
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[tied]), tmp_path / "adapter")
    expected = log_probs(again)  # as PEFT loads it: that is what a user has
    AutoTokenizer.from_pretrained(bases[tied]).save_pretrained(tmp_path / "adapter")
    policy, cost = merged(str(tmp_path / "adapter"), "float32")
    assert cost.apart < 1e-5
    policy.save(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(whole), expected, atol=1e-5, rtol=0)
    same = bool(torch.equal(whole.get_input_embeddings().weight, whole.get_output_embeddings().weight))
    assert whole.config.tie_word_embeddings == same


@pytest.mark.filterwarnings("ignore")
def test_rows_for_added_tokens_are_merged_too(bases: dict[bool, str], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases[True])
    model.resize_token_embeddings(4100, mean_resizing=False)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LORA)
    adapted = shaken(peft.get_peft_model(model, config))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    AutoTokenizer.from_pretrained(bases[True]).save_pretrained(tmp_path / "adapter")
    policy, _ = merged(str(tmp_path / "adapter"), "float32")
    embedding = policy.model.get_input_embeddings().weight
    assert embedding.shape == (4100, 32)
    inner = adapted.get_base_model().get_input_embeddings().modules_to_save["default"].weight
    torch.testing.assert_close(embedding, inner)
    del inner, embedding
    wide = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"does not fit .*; name the model that it was trained on by --model\.policy"):
        merged(str(tmp_path / "adapter"), "float32", base=str(tmp_path / "wide"))


def test_what_cannot_be_merged_says_so(bases: dict[bool, str], tmp_path: Path, monkeypatch: Any) -> None:
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases[False]), KINDS["lora"])
    shaken(adapted).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(bases[False]).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(UserError, match="cannot merge this adapter truly; use it as an adapter"):
        merged(str(tmp_path / "adapter"), "float32")

    def refuse(self: Any) -> Any:
        raise NotImplementedError("not for this kind")

    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", refuse, raising=False)
    with pytest.raises(UserError, match=r"PEFT cannot merge LoraConfig \(not for this kind\); use it as an adapter"):
        merged(str(tmp_path / "adapter"), "float32")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_folder_that_is_quantised_already(bits: int, bases: dict[bool, str], tmp_path: Path) -> None:
    """The values of the packed weights are what the adapter is added to; the folder that is written is a plain one."""
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(bases[False], quantization_config=how, device_map={"": "cpu"})
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(bases[False]).save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"})
    quantized.unpack_across_rows()  # as where Leyden loads them
    for layer in again.modules():  # bitsandbytes' kernel for such processors rounds, and takes no layer so narrow
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    shaken(peft.get_peft_model(again, KINDS["lora"])).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(bases[False]).save_pretrained(tmp_path / "adapter")
    policy, _ = merged(str(tmp_path / "adapter"), "float32")
    policy.save(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(whole.config, "quantization_config", None) is None
    # eight-bit layers round what they multiply, too
    torch.testing.assert_close(log_probs(whole), log_probs(again), atol=1e-5 if bits == 4 else 0.1, rtol=0)


# -- where a base is, and which adapter is trained -------------------------------------------------------------------


def fit(*words: str) -> int:
    from leyden.cli.launcher import main

    small = "--data.batch_size 4 --trainer.max_steps 1 --data.max_length 64 --trainer.enable_progress_bar false".split()
    return main(["fit", *words, *small])


ROWS = [{"prompt": f"{i} + {i}?", "response": f"{2 * i}."} for i in range(6)]
PAIRS = [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "no"} for i in range(6)]


def test_an_adapter_finds_its_base_from_elsewhere_and_takes_another(
    bases: dict[bool, str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from leyden.cli.launcher import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    shutil.copytree(bases[False], tmp_path / "base")
    rows = write(tmp_path / "rows.jsonl", ROWS)
    start = ["--config", "sft", "--config", "lora", "--data.path", rows, "--trainer.default_root_dir", "run"]
    assert fit(*start, "--model.policy.path", "./base") == 0
    config = json.loads((tmp_path / "run/export/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ask = ["predict", "--config", "sft", "--data.path", rows, "--model.sampling.max_new_tokens", "2"]
    assert main([*ask, "--model.policy.path", "../run", "--output", "a.jsonl"]) == 0  # a run's folder is its export
    assert main(["export", "../run", "../merged", "--merge"]) == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main([*ask, "--model.policy.path", "../run/export", "--output", "b.jsonl"]) == 2
    said = capsys.readouterr().err
    assert f"the adapter's base {tmp_path / 'base'} cannot be loaded; name its folder, or a hub name, by" in said
    assert said.strip().endswith("by --model.policy.base") and said.count("\n") == 1
    assert main(["export", "../run", "../merged2", "--merge"]) == 2
    assert capsys.readouterr().err.strip().endswith("by --base")
    other = ["--model.policy.path", "../run/export", "--model.policy.base", "../moved"]
    assert main([*ask, *other, "--output", "b.jsonl"]) == 0
    assert (tmp_path / "elsewhere/b.jsonl").read_bytes() == (tmp_path / "elsewhere/a.jsonl").read_bytes()
    assert main(["export", "../run", "../merged2", "--merge", "--base", "../moved"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "merged2" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert main(["export", "../run", "../adapter", "--base", "../moved"]) == 0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


def test_an_adapter_that_is_asked_for_twice_is_trained_on(
    bases: dict[bool, str], tmp_path: Path, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    """From its start, so the first loss of DPO is that of equal policies: log 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    rows, pairs = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "pairs.jsonl", PAIRS)
    sft = ["--config", "sft", "--config", "lora", "--data.path", rows, "--model.optimizer.lr", "1e-2"]
    assert fit(*sft, "--model.policy.path", bases[False], "--trainer.default_root_dir", "sft") == 0
    dpo = ["--config", "dpo", "--data.path", pairs, "--model.policy.path", "sft"]
    assert fit(*dpo, "--config", "lora", "--trainer.default_root_dir", "dpo", "--model.policy.adapter.r", "2") == 0
    assert "sft: an adapter already, which is trained on" in caplog.text
    assert "its own r hold, not those of --model.policy.adapter" in caplog.text
    first = (tmp_path / "dpo/metrics.csv").read_text().splitlines()
    losses = dict(zip(first[0].split(","), first[-1].split(","), strict=True))
    assert float(losses["train/loss"]) == pytest.approx(0.693147, abs=1e-5)
    assert fit(*dpo, "--trainer.default_root_dir", "other", "--model.policy.adapter", "IA3Config") == 2
    assert "LoraConfig, and IA3Config is asked for; leave out --model.policy.adapter" in capsys.readouterr().err


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_rights_that_the_umask_says(
    umask: int, bases: dict[bool, str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("LEYDEN_CACHE", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        rows = write(tmp_path / "rows.jsonl", ROWS)
        assert fit("--config", "sft", "--data.path", rows, "--model.policy.path", bases[True],
                   "--trainer.default_root_dir", "run") == 0  # fmt: skip
        from leyden.cli.launcher import main

        assert main(["export", "run", "out", "--checkpoint", "last"]) == 0
    finally:
        os.umask(before)
    for path in (path for name in ("run", "out", "cache") for path in (tmp_path / name).rglob("*")):
        rights = stat.S_IMODE(path.stat().st_mode)
        assert rights == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(rights))


def test_named_templates_stay_and_the_end_of_a_turn_is_known(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    own = tokenizer.chat_template
    base(tmp_path / "model", True)
    tokenizer.chat_template = {"default": own, "tool_use": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (tmp_path / "model/chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write(tmp_path / "rows.jsonl", ROWS)
    assert fit("--config", "sft", "--data.path", rows, "--model.policy.path", "./model",
               "--trainer.default_root_dir", "run") == 0  # fmt: skip
    generation = json.loads((tmp_path / "run/export/generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 3]
    assert AutoTokenizer.from_pretrained(tmp_path / "run/export").chat_template == tokenizer.chat_template
