"""The policy on top of any causal language model of transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.data.tokenizer import load_tokenizer, stop_ids
from leyden.errors import UserError
from leyden.models import quantized
from leyden.models.attention.dispatch import backend_named, implementation
from leyden.models.attention.flex import recording
from leyden.models.backbone import Backbone, innermost
from leyden.models.build_checks import cautions, check_head, check_rows, check_vocabulary, takes_forest
from leyden.models.compile_ahead import compile_calls, uses_flex
from leyden.models.compiled import compile_blocks
from leyden.models.critic import Critic
from leyden.models.divergence import HeadPredictions
from leyden.models.generation.generate import generate
from leyden.models.heads import ONE, check_language, check_reward, placed, predicted, saved_labels, start_head
from leyden.models.load import check_continued, enable_checkpointing, load_model
from leyden.models.logprobs import logprobs
from leyden.models.reference import base_fingerprint, frozen_reference, remove_dropout
from leyden.models.saving.save import save
from leyden.models.saving.whole_weights import whole_weights
from leyden.models.shared_base import check_frozen, with_new_adapter
from leyden.paths import resolve
from leyden.policy.policy import Outputs, Policy, Reference, ReferenceKind, Response, Sampling
from leyden.precision import advise

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
EXTRA = frozenset({"entropy", "mean_logp", "agreement"})
"""Outputs of the language-model head other than log-probabilities."""


class CausalLM(Policy):
    """A causal LM from a hub name, a local folder, or the embedded default.

    Args:
        path: hub name, folder of a model or of a PEFT adapter (whose training then continues), or `tiny`.
        dtype: dtype of the weights; nothing else sets it. Adapters are always fp32. Full training in bfloat16 loses
            small updates: use float32 with `--trainer.precision bf16-mixed` where memory allows.
        adapter: any PEFT configuration by class path, usually `LoraConfig`; without it all weights are trained. Where
            `path` is an adapter of that kind, that one is trained on.
        attention: attention over packed batches: segments, varlen, flex, dense, or the path of a `Backend` class of
            yours. `auto` takes the fastest for the device and the model; `rows` runs one padded row per response,
            which works for every model.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: compile the layers of the body with torch's compiler, for GPUs: one set of kernels for all layers and
            lengths, compiled before the first step.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Only for sources you trust.
        base: the base model of the adapter in `path`, instead of the one that the adapter names.
    """

    def __init__(
        self,
        path: str = "tiny",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        adapter: PeftConfig | None = None,
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.base, self.unpack = base, False
        self.path, self.dtype, self.adapter = path, getattr(torch, dtype), adapter
        self.attention = attention
        if attention not in ("auto", "rows"):
            backend_named(attention)  # an unknown name fails now
        if compile and gradient_checkpointing:
            raise UserError(
                "--model.policy.compile does nothing under --model.policy.gradient_checkpointing, since torch runs "
                "checkpointed layers uncompiled; leave one of them out"
            )
        self.gradient_checkpointing, self.compiled = gradient_checkpointing, compile
        self.source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.model: Any = None
        self.heads = nn.ModuleDict()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._native = "sdpa"
        self._base_fingerprint = ""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path, **self.source)
        return self._tokenizer

    @property
    def stop(self) -> frozenset[int]:
        generation = getattr(self.backbone.base, "generation_config", None) if self.model is not None else None
        return stop_ids(self.tokenizer, generation.eos_token_id if generation is not None else None)

    @property
    def backbone(self) -> Backbone:
        """The model's parts, as the rest of `leyden.models` uses them."""
        return Backbone(self.model, self.path, self.dtype, self.attention, self._native)

    def check_trainable(self) -> None:
        if self.adapter is None and not (Path(resolve(self.path)) / "adapter_config.json").is_file():
            quantized.check_float(self.path, resolve(self.path), self.source["revision"])

    def build(self, wants: Collection[str] = ("logp",), dropout: bool = True) -> None:
        if self.model is None:
            self._load()
        self._make_heads(wants)
        if not dropout:
            remove_dropout(self.model)
        self._base_fingerprint = self._base_fingerprint or base_fingerprint(
            self, self.backbone, self.adapter is not None
        )
        self.train()  # from_pretrained leaves modules in eval mode, where checkpointing would silently stay off

    def _load(self) -> None:
        advise(self.dtype, f"{self.path} in bfloat16", "--model.policy.dtype float32")
        if self.adapter is not None and (Path(resolve(self.path)) / "adapter_config.json").is_file():
            log.warning("%s", check_continued(self.path, self.adapter))
            self.adapter = None  # it is no new one, so the reference is not the model without it
        self.model = load_model(
            self.path, self.dtype, self.adapter, **self.source, origin=self.base, unpack=self.unpack
        )
        self.positions, self.cautions = self.backbone.positions, cautions(self.backbone)
        self.embeddings = innermost(self.backbone.base.get_input_embeddings()).num_embeddings
        check_vocabulary(self.path, self.tokenizer, self.embeddings, self.stop)
        self.model.eval()  # the checks compare outputs, so dropout must be off
        self._choose_attention()
        if self.gradient_checkpointing:
            enable_checkpointing(self.path, self.backbone.base)
        if self.compiled:
            compile_blocks(self.backbone.blocks())

    def _make_heads(self, wants: Collection[str]) -> None:
        """Make the scalar heads in `wants`, with weights from the folder if it has them; freeze an unused LM head."""
        backbone = self.backbone
        for name in sorted({"score", "value"} & set(wants) - set(self.heads)):
            if name == "score":
                check_reward(backbone)
            where = resolve(self.path), self.source["revision"]
            if name == "score":
                self.labels = self.labels or saved_labels(*where)
            labels = (self.labels or ONE) if name == "score" else ONE
            self.heads[name], fresh = start_head(backbone.config.hidden_size, name, *where, labels)
            self.fresh |= {name} if fresh else set()
        if EXTRA.union({"logp"}) & set(wants):
            check_language(backbone)
        else:
            tied = {id(parameter) for parameter in backbone.body.parameters()}
            for parameter in backbone.head.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in tied)

    def _choose_attention(self) -> None:
        """Choose the attention for packed batches, and check it on a few tokens."""
        exact = self.dtype == torch.float32 and not any(quantized.layers(self.model))
        tolerance = 1e-4 if exact else 5e-2
        check_head(self.backbone, tolerance)
        base = self.backbone.base
        if getattr(base.config, "attn_logit_softcapping", None) and base.config._attn_implementation == "sdpa":
            base.set_attn_implementation("eager")  # the first 5.x of transformers let SDPA leave the cap out
        self._native = base.config._attn_implementation
        if self.attention == "rows":
            return check_rows(self.backbone, tolerance)
        configured = self.attention
        if configured != "auto":
            self._check_attention()
        base.set_attn_implementation(implementation(base.config))
        anywhere = replace(self.backbone, attention="auto")  # weights may be on their way to the GPU
        if takes_forest(anywhere, tolerance):
            return
        base.set_attn_implementation(self._native)
        self.attention = "rows"
        name = type(base).__name__
        if configured != "auto":
            raise UserError(
                f"{self.path}: {name} cannot take attention {configured}; use --model.policy.attention rows"
            )
        check_rows(self.backbone, tolerance)
        log.warning("%s cannot attend to a packed batch: it runs one padded row per response, which is slower", name)

    def _check_attention(self) -> None:
        """Refuse an attention that cannot run, where training will, in the dtype of the weights or autocast's."""
        device = torch.device("cuda") if torch.cuda.is_available() else self.device
        try:
            self.backbone.backend(device)
        except UserError:
            half = replace(self.backbone, dtype=torch.bfloat16)
            if self.dtype != torch.float32 or device.type == "cpu":
                raise
            half.backend(device)  # mixed precision may still come, which the first forward pass knows

    def forward(self, batch: Batch, want: Collection[str] = ("logp",), temperature: float = 1.0) -> Outputs:
        hidden, others = self.backbone.hidden(batch), dict[str, Any]()
        if "predictions" in want:
            head, squash = self.backbone.head, self.backbone.squash
            others["predictions"] = HeadPredictions(batch, hidden, head, squash, temperature)
        if "score" in want:
            others["score"] = self._scalar("score", hidden[batch.last])
        if "value" in want:
            at, real = predicted(batch)
            others["value"] = placed(batch, at, self._scalar("value", hidden[batch.parent[at].clamp_min(0)]) * real)
        if not EXTRA.union({"logp"}) & set(want):
            return Outputs(logp=torch.zeros(len(batch), device=hidden.device), **others)
        return Outputs(**self._columns(batch, hidden, want, temperature), **others)

    def _scalar(self, name: str, states: Tensor) -> Tensor:
        """Outputs of a head on hidden states [S, H], in fp32: [S], or [S, K] where it has K."""
        with torch.autocast(states.device.type, enabled=False):
            value: Tensor = self.heads[name](states.float())
        return value[:, 0] if value.shape[1] == 1 else value

    def _columns(self, batch: Batch, hidden: Tensor, want: Collection[str], temperature: float) -> dict[str, Any]:
        """Outputs of the language-model head at predicted tokens: log-probabilities and `EXTRA` in `want`, [T] each."""
        head, squash = self.backbone.head, self.backbone.squash
        at, real = predicted(batch)
        parents = batch.parent[at].clamp_min(0)
        asked = bool({"entropy", "mean_logp"} & set(want)), "agreement" in want
        columns = logprobs(head, hidden[parents], batch.tokens[at], squash, temperature, *asked)
        names = ("logp", "entropy", "mean_logp", "agreement")
        found = {n: placed(batch, at, x * real) for n, x in zip(names, columns, strict=True) if n in {"logp", *want}}
        return found

    def is_compiled(self, batch: Batch) -> bool:
        return self.compiled or uses_flex(self, batch, self.attention)

    @contextmanager
    def compile_ahead(self, least: int, most: int) -> Iterator[None]:
        with recording() as calls:
            yield
        compile_calls(calls, (least, most), self.device)

    def fingerprint(self) -> str:
        return self._base_fingerprint

    def blocks(self) -> list[nn.Module]:
        return [*self.backbone.blocks(), *self.heads.values()]

    def twin(self) -> CausalLM:
        twin = CausalLM(self.path, attention=self.attention, base=self.base)  # type: ignore[arg-type]
        twin.dtype, twin.source, twin._tokenizer = self.dtype, self.source, self._tokenizer
        twin.compiled = self.compiled  # other kernels round otherwise
        return twin

    def reference(self, kind: ReferenceKind = "auto") -> Reference:
        return frozen_reference(self, self.backbone, self.adapter is not None, kind)

    def critic(self) -> Critic:
        check_frozen(self.backbone, "value adapter", "set --model.value head, or give a model in --model.value_policy")
        policy = self.on_same_base(with_new_adapter(self.backbone), self.path)
        policy.adapter, policy._tokenizer = self.adapter, self._tokenizer
        return Critic(policy)

    def on_same_base(self, model: nn.Module, path: str) -> CausalLM:
        """A policy over another model on the same base, with the settings of this one.

        Args:
            model: a model on this policy's base; see `leyden.models.shared_base`.
            path: source of its heads and its tokenizer.
        """
        policy = CausalLM(path, attention=self.attention)
        policy.dtype, policy.source, policy.positions = self.dtype, self.source, self.positions
        policy.gradient_checkpointing, policy._native = self.gradient_checkpointing, self._native
        policy.compiled = self.compiled
        policy.model = model
        return policy

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        keys: Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_token: Callable[[int, int, int], None] | None = None,
    ) -> list[list[Response]]:
        return generate(self, self.backbone, prompts, n, sampling or Sampling(), keys, on_progress, on_token)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return whole_weights(self.backbone)

    def save(self, folder: str | Path | None) -> None:
        save(self, self.backbone, folder)
