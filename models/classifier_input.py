"""What a classifier reads of a prompt and an answer: a pair of texts, a text of the user's, or a conversation."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import nn

from leyden.errors import UserError, first_line, nearest
from leyden.example import Message, Sample
from leyden.rewards.reward import at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("leyden")
FIELDS = ("response", "prompt", "conversation")
_FIELD = re.compile(r"\{(\w+)\}")
_ENDLESS = 10**6
"""The length that tokenizers without a limit state is far above this one."""


@dataclass(frozen=True)
class Encoded:
    """One text: its token ids, and for each whether it is of the first text or the second."""

    ids: list[int]
    types: list[int]

    def __len__(self) -> int:
        return len(self.ids)


PAIRED = "{%- set asked = messages[:-1] if answered else messages -%}"
"""What stands in the chat template of an exported `Encoder`, which writes a pair of texts."""


def positions_of(model: PreTrainedModel) -> int | None:
    """The longest row that a model has positions for; None without a limit. Models that count positions from their pad
    token on (RoBERTa) have fewer than their table has rows."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            limit = part.num_embeddings - part.padding_idx - 1
    return limit if limit is not None and limit > 0 else None


def takes_types(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model is told which of two texts a token is of."""
    told = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in signature(model.forward).parameters
    return told and getattr(model.config, "type_vocab_size", 2) != 1


def length_limit(
    path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None
) -> int | None:
    """Most tokens of a text: what is asked for, else the limit of the model or of its tokenizer.

    Raises:
        UserError: more is asked for than the model has positions for.
    """
    positions, stated = positions_of(model), tokenizer.model_max_length
    if asked is not None:
        if asked < 2 or (positions is not None and asked > positions):
            most = f"2 to {positions}" if positions is not None else "2 or more"
            raise UserError(f"{path}: max_length {asked}; give {most} tokens")
        return asked
    return min((limit for limit in (positions, stated) if limit is not None and limit < _ENDLESS), default=None)


def turns_as_text(messages: Sequence[Message]) -> str:
    """A prompt of one turn as it is; several as lines of `User: …`."""
    return messages[0]["content"] if len(messages) == 1 else lines_of(messages)


def lines_of(messages: Sequence[Message]) -> str:
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)


class Reader:
    """Samples to token ids.

    Args:
        path: of the model, for messages.
        tokenizer: its own.
        template: `auto`, `pair`, `chat`, or a text with fields; see `Classifier`.
        limit: most tokens of a text.

    Raises:
        UserError: the template is none, or the tokenizer cannot do what it asks.
    """

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, template: str, limit: int | None) -> None:
        self.path, self.tokenizer, self.limit = path, tokenizer, limit
        self.template = _settled(path, tokenizer, template)
        self.types = "token_type_ids" in tokenizer.model_input_names
        self.shortened = 0
        """Prompts that were cut so far."""

    def __call__(self, sample: Sample) -> Encoded:
        if self.template == "chat":
            return self._chat(sample)
        prompt = turns_as_text(sample.messages)
        encoded = self._encode(sample, prompt)
        if self.limit is None or len(encoded) <= self.limit:
            return encoded
        if len(self._encode(sample, "")) > self.limit:
            raise UserError(
                f"{at(sample)}: {len(self._encode(sample, ''))} tokens without the prompt, but {self.path} reads "
                f"{self.limit}, and answers are not cut; lower --model.sampling.max_new_tokens"
            )
        self._note_cut(sample, len(encoded))
        return self._cut(sample, prompt)

    def _cut(self, sample: Sample, prompt: str) -> Encoded:
        """With as little of the prompt's start left out as makes it fit."""
        if self.template == "pair":
            self.tokenizer.truncation_side = "left"
            return self._pair(prompt, sample.response, truncation="only_first", max_length=self.limit)
        low, high = 0, len(prompt)  # characters left out: too few, and enough
        while high - low > 1:
            middle = (low + high) // 2
            if len(self._encode(sample, prompt[middle:])) <= (self.limit or 0):
                high = middle
            else:
                low = middle
        return self._encode(sample, prompt[high:])

    def _encode(self, sample: Sample, prompt: str) -> Encoded:
        """The ids with this much of the prompt, however many."""
        if self.template == "pair":
            return self._pair(prompt, sample.response)
        answer = Message(role="assistant", content=sample.response)
        whole = lines_of([*sample.messages, answer])
        if prompt != turns_as_text(sample.messages):  # cut
            whole = f"{prompt}\n{lines_of([answer])}"
        values = {"prompt": prompt, "response": sample.response, "conversation": whole}
        return self._pair(_FIELD.sub(lambda field: values[field[1]], self.template))

    def _pair(self, first: str, second: str | None = None, **options: Any) -> Encoded:
        found = self.tokenizer(first, second, verbose=False, **options)
        ids = list(found["input_ids"])
        return Encoded(ids, list(found.get("token_type_ids", [0] * len(ids))))

    def _chat(self, sample: Sample) -> Encoded:
        """The conversation by the chat template, as plain transformers tokenises it. Of tokenizers that tell two texts
        apart by types, the answer is the second."""
        turns = [*sample.messages, Message(role="assistant", content=sample.response)]
        ids = self._rendered(sample, turns)
        if self.limit is not None and len(ids) > self.limit:
            raise UserError(
                f"{at(sample)}: {len(ids)} tokens of conversation, but {self.path} reads {self.limit}; leave out long "
                "prompts, or lower --model.sampling.max_new_tokens"
            )
        first = len(self._rendered(sample, sample.messages, add_generation_prompt=True)) if self.types else len(ids)
        return Encoded(ids, [int(place >= first) for place in range(len(ids))])

    def _rendered(self, sample: Sample, turns: Sequence[Message], **options: Any) -> list[int]:
        from jinja2 import TemplateError

        try:
            found: Any = self.tokenizer.apply_chat_template(
                list(turns), tools=sample.tools or None, tokenize=True, return_dict=True, **options
            )
        except TemplateError as error:
            raise UserError(
                f"{at(sample)}: the chat template of {self.path} refuses the conversation ({first_line(error)}); give "
                "--model.reward.template pair, or mend the row"
            ) from None
        return list(found["input_ids"])

    def _note_cut(self, sample: Sample, tokens: int) -> None:
        self.shortened += 1
        if self.shortened == 1:
            log.warning(
                "%s: it reads %s tokens, and prompts are cut on the left where there are more (first: %s, %s tokens)",
                self.path,
                self.limit,
                sample.source or "a row",
                tokens,
            )


def _settled(path: str, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template that is meant, after checks of it."""
    if template == "auto":
        chat = tokenizer.chat_template
        template = "pair" if chat is None or (isinstance(chat, str) and PAIRED in chat) else "chat"
    if template == "chat":
        if tokenizer.chat_template is None:
            raise UserError(f"{path}: template chat, but its tokenizer has no chat template; give template pair")
        return template
    if template == "pair":
        if tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=False):
            raise UserError(
                f"{path}: its tokenizer puts nothing between two texts; give template a text such as "
                "'{prompt} {response}', as the model was trained"
            )
        return template
    fields = _FIELD.findall(template)
    for name in fields:
        if name not in FIELDS:
            raise UserError(f"{path}: template has {{{name}}}{nearest(name, FIELDS)}; it may have {_named(FIELDS)}")
    if not fields:
        hint = nearest(template, ("auto", "pair", "chat"))
        raise UserError(f"{path}: template {template!r}{hint}; give pair, chat, or a text with {_named(FIELDS)}")
    if set(fields) == {"prompt"}:
        raise UserError(f"{path}: template {template!r} has no answer in it; add {{response}}")
    return template


def _named(fields: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in fields)
