"""What plain transformers must know to read a score at the token where it was trained: the pad token and the template.

The `…ForSequenceClassification` classes score the rightmost token that is not the pad token. So a pad token that can
also end a text would be skipped with it, and what a chat template writes after the last answer's end (a line break in
ChatML, another token in Phi 3) would be scored in its place.
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
"""Characters that no vocabulary holds: a tokenizer that knows no bytes writes its unknown token for them."""


def scoring_tokenizer(
    tokenizer: PreTrainedTokenizerBase, stop: Collection[int], configured: int | None
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that pads on the right with a token that ends no text, and whose chat template ends a
    conversation where its last answer ends.

    Args:
        tokenizer: of the policy.
        stop: token ids that may end a response.
        configured: the pad token of the model's configuration, which is kept where it can be.
    """
    changed = copy.deepcopy(tokenizer)
    template = changed.chat_template
    if isinstance(template, dict):
        changed.chat_template = {name: scoring_template(changed, text) for name, text in template.items()}
    elif template is not None:
        changed.chat_template = scoring_template(changed, template)
    pad = pad_token(changed, stop, configured)
    if pad is None:
        changed.add_special_tokens({"pad_token": NEW_PAD})
    else:
        changed.pad_token = changed.convert_ids_to_tokens(pad)
    changed.padding_side = "right"
    return changed


def pad_token(tokenizer: PreTrainedTokenizerBase, stop: Collection[int], configured: int | None = None) -> int | None:
    """A token that pads without being mistaken for text: special, ends no response, and unused by the chat template.

    The configured one and the tokenizer's own come first, then the likeliest other; None where there is no such token.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    free = special.union(tokenizer.all_special_ids) - set(stop) - {tokenizer.eos_token_id}
    for own in (configured, tokenizer.pad_token_id):
        if own is not None and own in free:
            return int(own)
    free -= {tokenizer.bos_token_id, *tokenizer(ODD, add_special_tokens=False).input_ids}
    if tokenizer.chat_template is not None:
        free -= set(tokenizer(_conversation(tokenizer, answer=True), add_special_tokens=False).input_ids)
    likely = ("pad", "unk", "endoftext", "reserved", "unused")

    def rank(i: int) -> tuple[int, int]:
        name = str(tokenizer.convert_ids_to_tokens(i)).lower()
        return next((n for n, part in enumerate(likely) if part in name), len(likely)), i

    return min(free, key=rank, default=None)


def scoring_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A chat template that writes nothing after the token that ends the last answer, and EOS where it writes no such
    token: exactly the tokens that a response was trained with. All else it writes as before."""
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
