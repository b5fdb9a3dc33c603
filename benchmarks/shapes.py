"""Published shapes of models, as the values of their config.json, and models of such shapes with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
QWEN = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _sizes(*values: int) -> dict[str, Any]:
    return dict(zip(NAMES, values, strict=True))


PUBLISHED: dict[str, dict[str, Any]] = {
    "LGAI-EXAONE/EXAONE-4.0-1.2B": {
        "model_type": "exaone4",
        "architectures": ["Exaone4ForCausalLM"],
        **_sizes(2048, 4096, 30, 32),
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 102400,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 30,
    },
    "Qwen/Qwen3-1.7B": QWEN | _sizes(2048, 6144, 28, 16) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-4B": QWEN | _sizes(2560, 9728, 36, 32) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-8B": QWEN | _sizes(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "meta-llama/Meta-Llama-3-8B": LLAMA
    | _sizes(4096, 14336, 32, 32)
    | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    "meta-llama/Llama-2-7b-hf": LLAMA
    | _sizes(4096, 11008, 32, 32)
    | {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
}
"""By hub name."""
SMALL: dict[str, dict[str, Any]] = {
    name: LLAMA | _sizes(*sizes) | {"num_key_value_heads": keys, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    for name, sizes, keys, vocabulary, tied in (
        ("1M", (64, 160, 2, 4), 2, 4096, True),
        ("20M", (384, 1024, 10, 6), 2, 8192, False),
        ("60M", (512, 1536, 16, 8), 4, 8192, False),
        ("135M", (576, 1536, 30, 9), 3, 49152, True),
    )
}
"""Sizes that a processor trains, by their number of parameters."""


def write(shape: dict[str, Any], folder: Path) -> None:
    """A model folder that has a configuration and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")


def fill(folder: Path) -> None:
    """Random weights for it, and the embedded model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    copy_tokenizer(folder)


def copy_tokenizer(folder: Path) -> None:
    """The embedded model's tokenizer."""
    from leyden.paths import resolve

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(resolve("tiny")) / name, folder)
