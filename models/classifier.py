"""Any sequence classifier as a reward: one of its labels, or a weighted sum of some."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from leyden.data.tokenizer import load_tokenizer
from leyden.errors import UserError
from leyden.example import Message, Sample
from leyden.models.classifier_input import Encoded, Reader, length_limit, takes_types
from leyden.models.labels import chosen
from leyden.models.load import load_classifier
from leyden.paths import resolve
from leyden.rewards.reward import Reward, at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("leyden")
Output = Literal["logit", "probability", "log_probability"]


class Classifier(nn.Module, Reward):
    """Scores of answers from any sequence classifier of transformers: an encoder (BERT, RoBERTa, DeBERTa) or a decoder
    with a classification head, from a folder or the hub.

    What it reads is a pair of texts, a text of your own, or a conversation by its tokenizer's chat template. Prompts
    are cut on the left where a text is too long, answers never are. Scores do not depend on what else is scored.

    Args:
        path: folder or hub name, with weights in safetensors.
        label: what is scored, by its name in the model's `id2label` or by its number; needed where there are several.
        weights: label -> weight, instead of `label`: the score is their weighted sum, and each is logged by itself. A
            negative weight makes a label a penalty: `{toxic: -1}`.
        output: the model's `logit` as it is; its `probability`, by softmax over the labels, or by the logistic function
            where each label is a question of its own (multi-label models, and those with one output); or its log.
        template: `pair` encodes the prompt as the first text and the answer as the second, with the tokenizer's own
            separators and token types; `chat` the conversation by the tokenizer's chat template; anything else is a
            text with {response}, {prompt} or {conversation} in it. `auto` is `chat` where there is a chat template,
            else `pair`. A prompt of several turns is written as lines of `User: …`, as a conversation is.
        max_length: most tokens of a text; default: what the model has positions for.
        batch_tokens: largest number of tokens in one forward pass, padding included.
        dtype: dtype of the weights and of the arithmetic, whatever the precision of the run.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Only for sources you trust.

    Raises:
        UserError: no trained classifier at `path`, no such label, or an argument that does not fit the model.
    """

    def __init__(
        self,
        path: str,
        label: int | str | None = None,
        weights: dict[str, float] | None = None,
        output: Output = "logit",
        template: str = "auto",
        max_length: int | None = None,
        batch_tokens: int = 16384,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if batch_tokens < 1:
            raise UserError(f"Classifier: batch_tokens {batch_tokens}; give the most tokens that one forward may have")
        if (Path(resolve(path)) / "adapter_config.json").is_file():
            raise UserError(
                f"{path}: an adapter; give --model.reward ModelReward, or the classifier that it makes merged"
            )
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.path, self.output, self.batch_tokens = path, output, batch_tokens
        tokenizer = load_tokenizer(path, **source)
        self.model: PreTrainedModel = load_classifier(path, getattr(torch, dtype), **source)
        self.model.requires_grad_(False)
        self.eval()
        config = self.model.config
        names = [str(config.id2label.get(place, place)) for place in range(config.num_labels)]
        self.chosen = chosen(path, names, label, weights)
        _check_output(path, self.model.config, output)
        self.reader = Reader(path, tokenizer, template, length_limit(path, self.model, tokenizer, max_length))
        self.types = takes_types(self.model, tokenizer)
        self.together = self._is_independent()
        """Whether texts of different lengths may be scored in one batch."""

    def train(self, mode: bool = True) -> Classifier:
        return super().train(False)

    @torch.no_grad()
    def forward(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], float32, on the CPU.

        Raises:
            UserError: an answer that is too long by itself, or one that the model gives no finite number.
        """
        encoded = [self.reader(sample) for sample in samples]
        order = sorted(range(len(samples)), key=lambda i: -len(encoded[i]))  # so that too little memory shows at once
        outputs = torch.zeros(len(samples), self.model.config.num_labels)
        while order:  # as many rows as have `batch_tokens` when padded to the first, which is the longest
            count = max(1, self.batch_tokens // len(encoded[order[0]])) if self.together else 1
            part, order = order[:count], order[count:]
            outputs[part] = self._outputs([encoded[i] for i in part]).cpu()
        for place in (~outputs.isfinite().all(1)).nonzero()[:1, 0].tolist():
            raise UserError(
                f"{at(samples[place])}: {self.path} gave no finite number; give --model.reward.dtype float32"
            )
        total, self.terms = self.chosen(outputs)
        return total

    def _outputs(self, encoded: Sequence[Encoded]) -> Tensor:
        """What the labels of texts are worth, in the unit of `output`: [R, K] fp32."""
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            logits: Tensor = self.model(**self._inputs(encoded, device)).logits.float()
        if self.output == "logit":
            return logits
        single = self.model.config.num_labels > 1 and self.model.config.problem_type != "multi_label_classification"
        log_probability = logits.log_softmax(-1) if single else logsigmoid(logits)
        return log_probability.exp() if self.output == "probability" else log_probability

    def _inputs(self, encoded: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
        """Right-padded rows [R, L]. The pad token is the model's: some count positions by it (RoBERTa), some look for
        the last token that is none."""
        pad = self.model.config.get_text_config().pad_token_id
        columns = {"input_ids": (pad or 0, [one.ids for one in encoded])}
        columns["attention_mask"] = (0, [[1] * len(one) for one in encoded])
        if self.types:
            columns["token_type_ids"] = (self.reader.tokenizer.pad_token_type_id, [one.types for one in encoded])
        longest = max(map(len, encoded))
        return {
            name: torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)
            for name, (fill, rows) in columns.items()
        }

    @torch.no_grad()
    def _is_independent(self) -> bool:
        """Whether a short text scores the same beside a longer one, which it is padded for."""
        short, long = (self.reader(Sample([Message(role="user", content=text)], "!")) for text in ("?", "? " * 9))
        alone = self._outputs([short])[0]
        try:
            beside = self._outputs([short, long])[0]
            same = bool((alone - beside).abs().max() <= (1e-3 if self.model.dtype == torch.float32 else 5e-2))
        except (RuntimeError, ValueError):  # no pad token, for one
            same = False
        if not same:
            log.warning("%s: its scores depend on padding, so texts are scored one by one, which is slower", self.path)
        return same


def _check_output(path: str, config: Any, output: str) -> None:
    """Refuse probabilities of a head that was trained for numbers. Raises `UserError`."""
    if output != "logit" and config.problem_type == "regression":
        raise UserError(f"{path}: a regression head, whose numbers are no logits; leave out output {output}")
