"""The policy on top of an encoder: scores of responses and nothing else, one padded row each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.data.tokenizer import PROBE, load_tokenizer, stop_ids
from leyden.distributed import full_tensor
from leyden.errors import UserError
from leyden.fingerprint import fingerprint_weights
from leyden.models.build_checks import check_vocabulary
from leyden.models.classifier_input import PAIRED, positions_of, takes_types
from leyden.models.encoder_adapter import merged, with_adapter
from leyden.models.heads import ONE, name_labels, saved_labels
from leyden.models.load import enable_checkpointing, load_encoder
from leyden.models.reference import remove_dropout
from leyden.paths import resolve
from leyden.policy.policy import Outputs, Policy, Response
from leyden.precision import asked
from leyden.sharding import is_sharded

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
PAIR = (
    "{%- set answered = messages[-1].role == 'assistant' and not add_generation_prompt -%}" + PAIRED + "{{ BEFORE }}"
    "{%- if asked | length == 1 -%}{{ asked[0].content }}{%- else -%}"
    "{%- for turn in asked -%}"
    "{{ turn.role | capitalize }}: {{ turn.content }}{{ '' if loop.last else '\n' }}"
    "{%- endfor -%}{%- endif -%}"
    "{{ BETWEEN }}"
    "{%- if answered -%}{{ messages[-1].content }}{{ AFTER }}{%- endif -%}"
)
"""A conversation as the pair of texts that encoders read, with the special tokens between them: the same tokens as
`tokenizer(prompt, response)`."""


class Encoder(Policy):
    """An encoder (BERT, RoBERTa, DeBERTa, ModernBERT) with the classification head that transformers gives it, for
    reward models and attribute models. Attention runs both ways over prompt and response, so every response has a row
    of its own, packed batches are unrolled, and nothing can be generated.

    It reads a pair: the prompt as first text and the response as second, with its own separators and token types. Where
    the score is read is the head's affair: BERT's pooler and most others read the first token.

    Args:
        path: hub name or folder, of a pretrained encoder or of a classifier that training goes on with.
        dtype: dtype of the weights; nothing else sets it; with an adapter only float32.
        adapter: any PEFT configuration by class path, usually `LoraConfig`; without it all weights are trained. The
            head is trained whole, and so is what the encoder came without, like BERT's pooler. What is saved is the
            classifier with the adapter merged, a folder like any other.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Only for sources you trust.
    """

    def __init__(
        self,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        adapter: PeftConfig | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.dtype, self.adapter = path, getattr(torch, dtype), adapter
        self.gradient_checkpointing = gradient_checkpointing
        self.source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.model: PreTrainedModel | Any = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._fingerprint, self._new = "", frozenset[str]()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.path, **self.source)
            if tokenizer.chat_template is None:
                tokenizer.chat_template = pair_template(self.path, tokenizer)
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def stop(self) -> frozenset[int]:
        return stop_ids(self.tokenizer)

    def build(self, wants: Collection[str] = ("score",), dropout: bool = True) -> None:
        if set(wants) != {"score"}:
            raise _only_scores(self.path)
        if self.model is None:
            self._load()
        if not dropout:
            remove_dropout(self.model)
        self.train()

    def _load(self) -> None:
        self._check()
        folder, revision = resolve(self.path), self.source["revision"]
        saved = saved_labels(folder, revision)
        self.labels = self.labels or saved or ONE
        if (
            saved is not None
            and (len(saved.names) > 1 or len(self.labels.names) > 1)
            and saved.names != self.labels.names
        ):
            raise UserError(
                f"{self.path}: its head gives {', '.join(saved.names)}, but {', '.join(self.labels.names)} is to be "
                "learnt; give the same in the same order, or a model without a head"
            )
        self.model, new = load_encoder(self.path, self.dtype, len(self.labels.names), **self.source)
        name_labels(self.model.config, self.labels)
        self.fresh = frozenset({"score"} if new else ())
        self.positions = positions_of(self.model)
        self.embeddings = self.model.get_input_embeddings().num_embeddings
        check_vocabulary(self.path, self.tokenizer, self.embeddings, self.stop)
        self._new = frozenset(new)
        own = (item for item in self.model.named_parameters() if item[0] not in new)
        self._fingerprint = fingerprint_weights(own)  # a new head starts at random
        if self.adapter is not None:
            self.model = with_adapter(self.model, self.adapter, new).get_base_model()
        if self.gradient_checkpointing:
            enable_checkpointing(self.path, self.model)

    def _check(self) -> None:
        """Refuse four bits, the folder of an adapter, and a new adapter in half precision. Raises `UserError`."""
        if asked() is not None:
            raise UserError(
                f"{self.path}: encoders are small and are not loaded in four bits; give --config lora for --config "
                "qlora, or leave out the plugin QLoRAPrecision"
            )
        if (Path(resolve(self.path)) / "adapter_config.json").is_file():
            raise UserError(
                f"{self.path}: an adapter, and an encoder starts from a whole model; give that one's folder"
            )
        if self.adapter is not None and self.dtype != torch.float32:
            raise UserError(
                f"--model.policy.adapter on an encoder in {str(self.dtype).removeprefix('torch.')}, in which the head "
                "beside it would lose small updates; leave out --model.policy.dtype, and give --trainer.precision "
                "bf16-mixed"
            )

    def blocks(self) -> list[nn.Module]:
        names = set(self.model._no_split_modules or ())
        return [module for module in self.model.modules() if type(module).__name__ in names]

    def forward(self, batch: Batch, want: Collection[str] = ("score",), temperature: float = 1.0) -> Outputs:
        """Scores of responses; see `Policy.forward`. [N] fp32, or [N, K] where there are K labels."""
        if set(want) != {"score"}:
            raise _only_scores(self.path)
        rows = batch.rows()
        config = self.model.config.get_text_config()
        # some heads look for the last token that is no pad token
        given = {"input_ids": torch.where(rows.mask > 0, rows.tokens, config.pad_token_id or 0)}
        if takes_types(self.model, self.tokenizer):
            given["token_type_ids"] = self._types(batch, rows.source, rows.mask)
        scores = self.model(**given, attention_mask=rows.mask).logits.float()[: len(batch.group)]
        logp = torch.zeros(len(batch), device=scores.device)
        return Outputs(logp, score=scores[:, 0] if scores.shape[1] == 1 else scores)

    def _types(self, batch: Batch, source: Tensor, mask: Tensor) -> Tensor:
        """[R, L] 1 on the tokens of responses, the second text."""
        types = torch.zeros_like(mask).flatten()
        types[source[batch.branch >= 0]] = 1
        return types.view_as(mask)

    def generate(self, prompts: Sequence[list[int]], *args: Any, **kwargs: Any) -> list[list[Response]]:
        raise _only_scores(self.path)

    def fingerprint(self) -> str:
        return self._fingerprint

    def save(self, folder: str | Path | None) -> None:
        """Write an `AutoModelForSequenceClassification` folder with the tokenizer; see `Policy.save`."""
        state = self.model.state_dict()
        if is_sharded(self):
            state = {name: full_tensor(x) for name, x in state.items()}
        if folder is None:
            return
        if self.adapter is None:
            self.model.save_pretrained(folder, state_dict=state)
        else:
            merged(self.model, self.adapter, self._new, state).save_pretrained(folder)
        self.tokenizer.padding_side = "right"
        self.tokenizer.save_pretrained(folder)


def pair_template(path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template that writes a conversation as the tokenizer joins two texts.

    Raises:
        UserError: the tokenizer puts nothing between two texts, or nothing after them.
    """
    text, whole = tokenizer(PROBE, add_special_tokens=False).input_ids, tokenizer(PROBE, PROBE).input_ids
    starts = [at for at in range(len(whole) - len(text) + 1) if whole[at : at + len(text)] == text]
    if len(starts) != 2 or starts[0] + len(text) == starts[1] or starts[1] + len(text) == len(whole):
        raise UserError(
            f"{path}: its tokenizer has no tokens that part two texts and end them, so it is no encoder of pairs; give "
            "--model.policy CausalLM"
        )
    pieces = whole[: starts[0]], whole[starts[0] + len(text) : starts[1]], whole[starts[1] + len(text) :]
    template = PAIR
    for name, ids in zip(("BEFORE", "BETWEEN", "AFTER"), pieces, strict=True):
        template = template.replace(name, repr("".join(tokenizer.convert_ids_to_tokens(ids))))
    return template


def _only_scores(path: str) -> UserError:
    return UserError(
        f"{path}: an encoder, whose tokens see later ones, so it has no log-probabilities and no answers, only scores; "
        "give --model.policy CausalLM, or train it by --config reward_model or attribute_model"
    )
