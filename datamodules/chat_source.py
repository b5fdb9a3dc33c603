"""Where a chat template comes from: the tokenizer, a Jinja file, or the plain template for base models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leyden.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}:\n{{ message.content }}"
    "{{ eos_token + '\n' if message.role == 'assistant' else '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""The plain template for base models. A turn is its speaker on one line and its words below; answers end with EOS::

    User:
    How are you?

    Assistant:
    Fine.</s>

The line end after `Assistant:` keeps the cut between prompt and answer on a token boundary in every tokenizer.
"""


def chat_source(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    """The Jinja text of the chat template, or None where a tokenizer has none."""
    if chat_template == "plain":
        return PLAIN
    if chat_template is None:
        own = tokenizer.chat_template
        return own.get("default") if isinstance(own, dict) else own
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = [*(file.name for file in path.parent.glob("*")), "plain"]
        hint = nearest(path.name, names) or "; type plain, or the path of a Jinja file"
        raise UserError(f"chat_template {chat_template}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template {chat_template}: cannot be read ({error}); give a UTF-8 Jinja file") from None
