"""An adapter worked into the weights below it, and what that costs in accuracy."""

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
"""Text to compare two models on."""


class Cost(NamedTuple):
    """What merging changed, on the same texts."""

    before: float
    """Mean log-prob of a token (of a reward model: mean score of a text) as it was trained"""
    after: float
    """The same of the merged model"""
    apart: float
    """Mean distance between the two"""
    size: int
    """How many tokens, or texts"""
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
    """The adapter in a folder, worked into its base model.

    Args:
        path: the adapter's folder.
        dtype: of the merged weights.
        precision: how the base was stored in training, if it was in four bits.
        base: what the adapter is added to: the weights that the base model came with, or the numbers that its four-bit
            weights stand for, over which the adapter was trained.
        source: revision and trust_remote_code of the base model.

    Returns:
        The merged policy, and what merging changed.

    Raises:
        UserError: there is no adapter, or four-bit weights are asked for where there were none.
    """
    if base == "four_bit" and precision is None:
        raise UserError(f"{path}: not trained over four-bit weights, so there are none to merge into; leave out --base")
    whole = _built(path, dtype, source)
    before = _looked(whole)
    if precision is not None:
        with precision.module_init_context():
            trained = _built(path, dtype, source)
        with precision.forward_context():
            before = _looked(trained)
        if base == "four_bit":
            _take(whole.model, trained.model)
        del trained
    whole.model = whole.model.merge_and_unload()
    after = _looked(whole)
    values = (float(before.mean()), float(after.mean()), float((before - after).abs().mean()))
    return whole, Cost(*values, len(before), "score" in whole.heads)


def _built(path: str, dtype: Any, source: dict[str, Any]) -> CausalLM:
    """The model with its adapter, and with a reward model's head where the folder has one."""
    policy = CausalLM(path, dtype, **source)
    policy.build(("logp",) if saved_head(path, "score") is None else ("score",), dropout=False)
    if not hasattr(policy.model, "peft_config"):
        raise UserError(f"{path}: a whole model, with no adapter to merge; it can be used as it is")
    policy.eval()
    return policy


def _take(model: nn.Module, packed: nn.Module) -> None:
    """Put the numbers that four-bit weights stand for in the place of the weights that they were made from."""
    own = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if getattr(layer, "quant_state", None) is not None:
                own[name].get_parameter("weight").copy_(quantized.unpacked(layer.get_parameter("weight")))


@torch.no_grad()
def _looked(policy: CausalLM) -> Tensor:
    """Log-probs of every token of the texts but their first ones; the texts' scores from a reward model."""
    rows = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    batch = pack([Tree([], [row], row=i) for i, row in enumerate(rows) if len(row) > 1]).to(policy.device)
    if "score" in policy.heads:
        score: Tensor | None = policy(batch, {"score"}).score
        assert score is not None
        return score.float().cpu()
    logp: Tensor = policy(batch).logp
    return logp[(batch.branch >= 0) & (batch.parent >= 0)].float().cpu()
