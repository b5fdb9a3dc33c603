"""Merging an adapter into its base model, and the loss of accuracy that this causes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from leyden.batch.forest import Tree, pack
from leyden.errors import UserError
from leyden.models import quantized
from leyden.models.causal_lm import CausalLM
from leyden.models.heads import saved_head
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
    base: Literal["full", "four_bit"] = "full",
    **source: Any,
) -> tuple[CausalLM, Cost]:
    """Merge the adapter in a folder into its base model.

    Args:
        path: the adapter's folder.
        dtype: dtype of the merged weights.
        precision: four-bit settings of the base in training, if it was in four bits.
        base: the weights that the adapter is added to: those that the base model came with, or the values of its
            four-bit weights, over which the adapter was trained.
        source: revision and trust_remote_code of the base model.

    Returns:
        The merged policy, and the cost of merging.

    Raises:
        UserError: there is no adapter, or `base` is `four_bit` where training had no four-bit weights.
    """
    if base == "four_bit" and precision is None:
        raise UserError(f"{path}: not trained over four-bit weights, so there are none to merge into; leave out --base")
    policy = _built(path, dtype, source)
    before = _outputs(policy)
    if precision is not None:
        with precision.module_init_context():
            trained = _built(path, dtype, source)
        with precision.forward_context():
            before = _outputs(trained)
        if base == "four_bit":
            _copy_unpacked(policy.model, trained.model)
        del trained
    policy.model = policy.model.merge_and_unload()
    after = _outputs(policy)
    values = (float(before.mean()), float(after.mean()), float((before - after).abs().mean()))
    return policy, Cost(*values, len(before), "score" in policy.heads)


def _built(path: str, dtype: Any, source: dict[str, Any]) -> CausalLM:
    """The model with its adapter, and with a reward head if the folder has one."""
    policy = CausalLM(path, dtype, **source)
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
