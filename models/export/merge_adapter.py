"""Merging an adapter into its base model, and the loss of accuracy that this causes."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from leyden.batch.forest import Tree, pack
from leyden.errors import UserError, first_line
from leyden.models import quantized
from leyden.models.backbone import innermost
from leyden.models.causal_lm import CausalLM
from leyden.models.heads import saved_head
from leyden.models.load import is_encoder
from leyden.paths import resolve
from leyden.precision import QLoRAPrecision

TEXTS = (
    "The library opens at nine. If you return a book late, you pay a small fee a day, but children pay nothing.",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain it boils earlier, since the air presses less.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
    "도서관은 아홉 시에 문을 엽니다. 책을 늦게 돌려주면 하루마다 연체료를 내지만, 어린이는 내지 않아요.",
    "물은 평지에서 100도에 끓지만, 높은 산에서는 기압이 낮아서 더 낮은 온도에서 끓습니다.",
    "김치찌개는 먼저 김치와 돼지고기를 볶은 다음 물을 붓고 끓인다. 마지막에 두부와 파를 넣는다.",
)
"""Texts on which two models are compared."""


class Cost(NamedTuple):
    """Difference between the trained and the merged model on the same texts."""

    before: float
    """Mean log-probability of a token, in nats, as trained (for a reward model: mean score of a text)"""
    after: float
    """The same for the merged model"""
    apart: float
    """Mean absolute difference between the two"""
    size: int
    """Number of tokens, or of texts"""
    scores: bool

    def __str__(self) -> str:
        if self.scores:
            return f"scores of {self.size} texts moved by {self.apart:.4f} on average"
        return (
            f"on {self.size} tokens of plain text the loss was {-self.before:.4f} as trained and is {-self.after:.4f} "
            f"merged; the log-prob of a token moved by {self.apart:.4f} nats on average"
        )


def merged(
    path: str,
    dtype: Literal["float32", "bfloat16", "float16"],
    precision: QLoRAPrecision | None = None,
    into: Literal["full", "four_bit"] = "full",
    base: str | None = None,
    **source: Any,
) -> tuple[CausalLM, Cost]:
    """Merge the adapter in a folder into its base model.

    Args:
        path: the adapter's folder.
        dtype: dtype of the merged weights.
        precision: four-bit settings of the base in training, if it was in four bits.
        into: the weights that the adapter is added to: those that the base model came with, or the values of its
            four-bit weights, over which the adapter was trained.
        base: another base model than the one that the adapter names.
        source: revision and trust_remote_code of the base model.

    Returns:
        The merged policy, and the cost of merging.

    Raises:
        UserError: there is no adapter, PEFT cannot merge it, or the merged model would not be the one with the
            adapter; or `into` is `four_bit` where training had no four-bit weights.
    """
    if into == "four_bit" and precision is None:
        raise UserError(
            f"{path}: not trained over four-bit weights, so there are none to merge into; leave out --merge-into"
        )
    source["base"] = base
    policy = _built(path, dtype, source, unpack=precision is None)
    before = _outputs(policy)
    if precision is not None:
        with precision.module_init_context():
            trained = _built(path, dtype, source)
        with precision.forward_context():
            before = _outputs(trained)
        if into == "four_bit":
            _copy_unpacked(policy.model, trained.model)
        del trained
    exact = _outputs(policy)
    _merge(policy)
    after = _outputs(policy)
    if (moved := float((exact - after).abs().max())) > TOLERANCE[dtype]:
        raise UserError(
            f"{path}: merged, a log-prob or score would move by {moved:.2g}, so PEFT cannot merge this adapter truly; "
            "use it as an adapter"
        )
    values = (float(before.mean()), float(after.mean()), float((before - after).abs().mean()))
    return policy, Cost(*values, len(before), "score" in policy.heads)


TOLERANCE = {"float32": 1e-3, "bfloat16": 2.0, "float16": 0.5}
"""The most that rounding the merged weights may move one log-probability by; a merge that is wrong moves it further."""


def _merge(policy: CausalLM) -> None:
    """Work the adapter into the weights. Where embedding and head are one tensor and the adapter changes one of them,
    or both in different ways, they become two."""
    base: Any = policy.backbone.base
    parts = base.get_input_embeddings(), base.get_output_embeddings()
    embedding, head = map(innermost, parts)
    untied = parts != (embedding, head) and head is not None and head.weight is embedding.weight
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the two are apart is what is seen to here
            policy.model = policy.model.merge_and_unload()
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        kind = type(policy.model.peft_config[policy.model.active_adapters[0]]).__name__
        reason = first_line(error)
        raise UserError(f"{policy.path}: PEFT cannot merge {kind} ({reason}); use it as an adapter") from error
    if not untied:
        return
    base = policy.model
    one, other = base.get_input_embeddings(), base.get_output_embeddings()
    if same := torch.equal(one.weight, other.weight):
        other.weight = one.weight
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.tie_word_embeddings = same  # PEFT may have seen them apart


def _built(path: str, dtype: Any, source: dict[str, Any], unpack: bool = False) -> CausalLM:
    """The model with its adapter, and with a reward head if the folder has one."""
    if is_encoder(resolve(path)):
        raise UserError(f"{path}: a whole encoder, with no adapter to merge; it can be used as it is")
    policy = CausalLM(path, dtype, **source)
    policy.unpack = unpack
    policy.build(("logp",) if saved_head(path, "score") is None else ("score",), dropout=False)
    if not hasattr(policy.model, "peft_config"):
        raise UserError(f"{path}: a whole model, with no adapter to merge; it can be used as it is")
    policy.eval()
    return policy


def _copy_unpacked(model: nn.Module, packed: nn.Module) -> None:
    """Replace the weights that were quantised in `packed` by the values of their four-bit versions."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if getattr(layer, "quant_state", None) is not None:
                modules[name].get_parameter("weight").copy_(quantized.unpacked(layer.get_parameter("weight")))


@torch.no_grad()
def _outputs(policy: CausalLM) -> Tensor:
    """Log-probabilities of all tokens of the texts except the first of each; for a reward model, the texts' scores."""
    rows = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    batch = pack([Tree([], [row], row=i) for i, row in enumerate(rows) if len(row) > 1]).to(policy.device)
    if "score" in policy.heads:
        score: Tensor | None = policy(batch, {"score"}).score
        assert score is not None
        return score.float().cpu()
    logp: Tensor = policy(batch).logp
    return logp[(batch.branch >= 0) & (batch.parent >= 0)].float().cpu()
