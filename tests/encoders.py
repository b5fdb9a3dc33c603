"""Small encoders of random weights with tokenizers of their own, as folders: BERT, RoBERTa, DeBERTa, ModernBERT."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from leyden.batch.forest import Tree
from leyden.data.chat_template import ChatTemplate
from leyden.example import Example, Message
from leyden.models import Encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789?!.,:+=은는이가다요네한국어"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
KINDS = ("bert", "roberta", "deberta-v2", "modernbert")


def _wordpiece() -> PreTrainedTokenizerFast:
    """[CLS] A [SEP] B [SEP], types 0 and 1, as BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return _with_pairs(made, "[CLS]", "[SEP]", "[PAD]", "[UNK]")


def _unigram() -> PreTrainedTokenizerFast:
    """The same around words that begin with a blank, as DeBERTa's."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    made = Tokenizer(models.Unigram([(piece, 0.0) for piece in special] + [(c, -2.0) for c in "▁" + LETTERS], unk_id=3))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _with_pairs(made, "[CLS]", "[SEP]", "[PAD]", "[UNK]")


def _with_pairs(made: Tokenizer, cls: str, sep: str, pad: str, unk: str) -> PreTrainedTokenizerFast:
    made.add_special_tokens([AddedToken(text, special=True) for text in (cls, sep, pad, unk)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(text, made.token_to_id(text)) for text in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token=cls, sep_token=sep, pad_token=pad, unk_token=unk,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _bytes() -> PreTrainedTokenizerFast:
    """<s> A </s></s> B </s> over bytes, without types, as RoBERTa's; pads with 1."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")])
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", cls_token="<s>", sep_token="</s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def save_encoder(folder: Path, kind: str = "bert", head: bool = True, positions: int = 64, **options: Any) -> str:
    """An encoder of two narrow layers as a folder: a sequence classifier, or without a head as pretraining leaves it.

    Args:
        kind: one of `KINDS`.
        options: of its configuration, such as `num_labels`.
    """
    made = {"bert": _wordpiece, "roberta": _bytes, "deberta-v2": _unigram, "modernbert": _wordpiece}
    names = {"bert": "Bert", "roberta": "Roberta", "deberta-v2": "DebertaV2", "modernbert": "ModernBert"}
    tokenizer, name, sizes = made[kind](), names[kind], dict[str, Any](SIZES)
    if kind == "roberta":  # counts positions from its pad token on
        sizes |= dict(max_position_embeddings=positions + 2, pad_token_id=1, bos_token_id=0, eos_token_id=2)
        sizes |= dict(type_vocab_size=1)
    else:
        sizes |= dict(max_position_embeddings=positions, pad_token_id=0, type_vocab_size=2)
    if kind == "modernbert":  # its windows are of a few tokens, and no token has a type
        del sizes["type_vocab_size"]
        sizes |= dict(cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, local_attention=8)
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if kind == "deberta-v2":
        sizes |= dict(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
        sizes |= dict(norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **sizes, **options)
    model = getattr(transformers, f"{name}ForSequenceClassification" if head else f"{name}ForMaskedLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # defaults are so small that attention would hardly matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_encoders(folder: Path) -> dict[str, str]:
    """One of each kind with a head for one number, and one without a head as `KIND plain`."""
    made = {kind: save_encoder(folder / kind, kind, num_labels=1) for kind in KINDS}
    return made | {f"{kind} plain": save_encoder(folder / f"{kind}-plain", kind, head=False) for kind in KINDS}


PAIRS: list[dict[str, Any]] = [
    {"prompt": f"{i} + 1?", "chosen": "yes " * (i % 3 + 1), "rejected": "no " * (i % 2 + 1)} for i in range(48)
]
RATE = 0.5


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, weight_decay=0.0)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options)


def encoder(path: str, **options: Any) -> Encoder:
    torch.manual_seed(0)
    policy = Encoder(path, **options)
    policy.build(("score",), dropout=False)
    return policy


def ragged(path: str, count: int = 8, seed: int = 0) -> list[Tree]:
    """Prompts with two or three responses, as the tokenizer joins two texts."""
    r, tokenizer = random.Random(seed), Encoder(path).tokenizer
    template = ChatTemplate(tokenizer)
    trees = []
    for row in range(count):
        words = ["".join(r.choice("abcdef 123?") for _ in range(r.randint(1, 9))).strip() or "a" for _ in range(4)]
        texts = list(dict.fromkeys(words[1:]))[: r.randint(2, 3)]
        texts = texts if len(texts) > 1 else [*texts, "zz"]
        turns = [[Message(role="assistant", content=text)] for text in texts]
        tree = template.encode(Example([Message(role="user", content=words[0])], turns))
        tree.row = row
        trees.append(tree)
    return trees
