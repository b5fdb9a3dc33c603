"""Small models with random weights, and examples in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from leyden.batch.forest import Totals, Tree
from leyden.batch.tree import BORROWED
from leyden.data.datamodule import DataModule, PlannedData
from leyden.data.tokenizer import load_tokenizer
from leyden.models import CausalLM
from leyden.models.load import enable_checkpointing

NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout", "embedding_dropout")
LLAMA = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


class Numbers:
    """A stand-in for a tokenizer: token 0 ends a response, and every token is spelled as its number."""

    eos_token_id, bos_token_id, chat_template, name_or_path, vocab_size = 0, None, None, "numbers", 97

    def __len__(self) -> int:
        return 97

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(97)}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 96 for letter in text]}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def small(name: str = "llama", configuration: str = "LlamaConfig", options: Any = None, **kwargs: Any) -> CausalLM:
    """A CausalLM around random weights, without a folder on disk."""
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**(options or LLAMA))
    for key in NO_DROPOUT:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    policy = CausalLM(path=name, **kwargs)
    policy._tokenizer = Numbers()  # type: ignore[assignment]
    policy.model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in policy.model.parameters():  # defaults are so small that attention would hardly matter
            parameter.add_(torch.randn_like(parameter) * 0.15)
    policy.positions = getattr(config, "max_position_embeddings", None)
    policy._choose_attention()
    if policy.gradient_checkpointing:
        enable_checkpointing(policy.path, policy.backbone.base)
    policy.train()
    return policy


def teacher() -> CausalLM:
    """Another model than that of `small`, wider and with one layer."""
    return small("teacher", options=LLAMA | {"hidden_size": 64, "num_hidden_layers": 1})


def save_llama(folder: Path, noise: float = 0.0) -> None:
    """A Llama of two narrow layers with the embedded tokenizer, as a folder.

    Args:
        noise: deviation of what is added to its weights, whose defaults are so small that attention hardly matters.
    """
    tokenizer: Any = load_tokenizer("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def some_trees(count: int = 8, seed: int = 0, responses: int = 1) -> list[Tree]:
    """Trees of very different lengths, with weights of 0 among them."""
    r = random.Random(seed)
    out = []
    for row in range(count):
        answers = [[r.randrange(97) for _ in range(r.randint(1, 12))] for _ in range(responses)]
        weights = [[*(r.choice([0.0, 1.0]) for _ in a[1:]), 1.0] for a in answers]
        out.append(Tree([r.randrange(97) for _ in range(r.randint(1, 9))], answers, None, weights, row))
    return out


def labelled_trees(count: int = 8, seed: int = 0) -> list[Tree]:
    """The same with one response that is good or bad each, and one that was borrowed, as KTO takes them."""
    trees = some_trees(count, seed, responses=2)
    for number, tree in enumerate(trees):
        tree.scores = [float(number % 3 != 0), BORROWED]
    return trees


class InMemory:
    """Trees in a list, as a DataModule's trees."""

    def __init__(self, trees: list[Tree]) -> None:
        self.trees = trees
        self.lengths = [len(tree) for tree in trees]
        self.totals: list[Totals] = [tree.totals() for tree in trees]

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> Tree:
        return self.trees[index]


class TreeData(PlannedData):
    """A DataModule over trees in memory."""

    def __init__(self, trees: list[Tree], held: list[Tree] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train_trees, self.val_trees = InMemory(trees), InMemory(held or [])

    def source(self, row: int) -> str:
        return f"memory:{row + 1}"


def fit(algorithm: Any, data: DataModule, wrap: Callable[[Any], Any] | None = None, **options: Any) -> Any:
    """Train without a trace on disk, on the CPU unless `accelerator` says otherwise; returns the Trainer."""
    from lightning.pytorch import Trainer

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    usual = dict(accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=1)
    trainer = Trainer(**(quiet | usual | options))
    trainer.fit(algorithm, data)
    return trainer


def weights_of(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def saved(folder: Path, options: Any = None, noise: float = 0.0) -> str:
    """The path of a folder with a Llama of random weights, made larger by noise so that what rounding loses shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**(options or LLAMA)))
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    return str(folder)
