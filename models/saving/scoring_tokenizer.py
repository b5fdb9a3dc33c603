"""The tokenizer of a saved reward model: its pad token and chat template make plain transformers score the right token.

The `…ForSequenceClassification` classes score the rightmost token that is not the pad token. So if the pad token could
also end a text, that end would be skipped; and text that a chat template writes after the end of the last answer (a
line break in ChatML, another token in Phi 3) would be scored in its place.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from leyden.data.tokenizer import PROBE, turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
NEW_PAD = "<|pad|>"
ODD = "\U0010ffff\ue000\u0378"
"""Characters in no vocabulary: a tokenizer without byte tokens encodes them as its unknown token."""


def scoring_tokenizer(
    tokenizer: PreTrainedTokenizerBase, stop: Collection[int], configured: int | None
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that pads on the right with a token that ends no text, and whose chat template ends a
    conversation where its last answer ends.

    Args:
        tokenizer: the policy's tokenizer.
        stop: token ids that may end a response.
        configured: the pad token of the model's configuration, which is kept if it is suitable.
    """
    copied = copy.deepcopy(tokenizer)
    template = copied.chat_template
    if isinstance(template, dict):
        copied.chat_template = {name: scoring_template(copied, text) for name, text in template.items()}
    elif template is not None:
        copied.chat_template = scoring_template(copied, template)
    pad = pad_token(copied, stop, configured)
    if pad is None:
        copied.add_special_tokens({"pad_token": NEW_PAD})
    else:
        copied.pad_token = copied.convert_ids_to_tokens(pad)
    copied.padding_side = "right"
    return copied


def pad_token(tokenizer: PreTrainedTokenizerBase, stop: Collection[int], configured: int | None = None) -> int | None:
    """A pad token that cannot be mistaken for text: special, ends no response, and unused by the chat template.

    The configured one is preferred, then the tokenizer's own, then the likeliest other; None if there is no such token.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    free = special.union(tokenizer.all_special_ids) - set(stop) - {tokenizer.eos_token_id}
    for candidate in (configured, tokenizer.pad_token_id):
        if candidate is not None and candidate in free:
            return int(candidate)
    free -= {tokenizer.bos_token_id, *tokenizer(ODD, add_special_tokens=False).input_ids}
    if tokenizer.chat_template is not None:
        free -= set(tokenizer(_conversation(tokenizer, answer=True), add_special_tokens=False).input_ids)
    hints = ("pad", "unk", "endoftext", "reserved", "unused")

    def rank(i: int) -> tuple[int, int]:
        name = str(tokenizer.convert_ids_to_tokens(i)).lower()
        return next((n for n, hint in enumerate(hints) if hint in name), len(hints)), i

    return min(free, key=rank, default=None)


def scoring_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A chat template that writes nothing after the token that ends the last answer, or EOS if it writes no such token:
    exactly the tokens that a response was trained with. Everything else stays the same."""
    written = _conversation(tokenizer, template).rpartition(PROBE)[2]
    end = turn_end(tokenizer, template)
    if end is None:
        tail, added = written, tokenizer.eos_token or ""
    else:
        tail, added = written.partition(str(tokenizer.convert_ids_to_tokens(end)))[2], ""
    if not tail and not added:
        return template
    # Jinja drops one line break at a template's end, and one after each block
    whole = "{% set whole %}{{ '' }}" + re.sub(r"\r?\n\Z", "", template) + "{{ '' }}{% endset %}"
    cut = f"whole[:-{len(tail)}]" if tail else "whole"
    answered = "not add_generation_prompt and messages and messages[-1]['role'] == 'assistant'"
    ends = f" and whole.endswith({json.dumps(tail)})" if tail else ""
    written = f"{{{{ {cut} + {json.dumps(added)} }}}}"
    return f"{whole}{{% if {answered}{ends} %}}{written}{{% else %}}{{{{ whole }}}}{{% endif %}}"


def _conversation(tokenizer: PreTrainedTokenizerBase, template: str | None = None, answer: bool = False) -> str:
    """A question and an answer as the chat template writes them; `answer` adds the generation prompt."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    return str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer, chat_template=template)
    )
