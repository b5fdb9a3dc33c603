"""Tokenizers, the sources of their chat templates, and the tokens that end a turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leyden.errors import UserError, first_line, nearest
from leyden.paths import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "leyden-probe"
_BOS = "{{ bos_token }}"
PLAIN = (
    f"{_BOS}"
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

The line end after `Assistant:` keeps the cut between prompt and answer on a token boundary in every tokenizer. By its
name, `plain`, it is without BOS where the tokenizer has one that it never puts before a text.
"""


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, a local folder or the embedded model (`tiny`)."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(resolve(path), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        reason, mend = loading_problem(error, "give its folder or hub name")
        raise UserError(f"{path}: no tokenizer can be loaded from it ({reason}); {mend}") from None
    tokenizer: PreTrainedTokenizerBase = loaded
    return tokenizer


def loading_problem(error: BaseException, otherwise: str) -> tuple[str, str]:
    """What a failed `from_pretrained` says in one line, and what to do: the package to install or the flag to add where
    one is missing, else `otherwise`."""
    said = first_line(error)
    if "trust_remote_code" in str(error):
        return "its code comes with it", "if you trust it, add --model.policy.trust_remote_code true"
    if not isinstance(error, ImportError):
        return said, otherwise
    command = re.search(r"pip install [\w.\[\]-]+", str(error))
    needed = re.search(r"requires (?:the )?(\w+) library", str(error))
    package = error.name or (needed[1].lower() if needed else "the package it names")
    return said.split("`pip")[0].rstrip(" ("), command[0] if command else f"pip install {package}"


def beyond_embeddings(tokenizer: PreTrainedTokenizerBase, token: int, embeddings: int) -> str:
    """What is wrong with a token that a model has no embedding for, and what to do: the end of a sentence."""
    known = token < len(tokenizer)
    name = f"the token '{tokenizer.convert_ids_to_tokens(token)}' (id {token})" if known else f"the token id {token}"
    mend = (
        "use the tokenizer that belongs to the model, or give the model more embeddings and save it: "
        f"model.resize_token_embeddings({len(tokenizer)})"
        if known
        else "mend eos_token_id in generation_config.json"
    )
    return f"{name}, beyond the model's {embeddings} embeddings; {mend}"


def chat_source(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, args: Mapping[str, Any] | None = None
) -> str | None:
    """The Jinja text of the chat template, or None where a tokenizer has none.

    Args:
        tokenizer: whose template it is.
        chat_template: as `ChatTemplate` takes it.
        args: values of variables of the template, which are set where it begins.
    """
    source = _source(tokenizer, chat_template)
    if not args:
        return source
    if source is None:
        raise UserError(
            f"chat_template_args: {tokenizer.name_or_path} has no chat template that could take them; leave them out, "
            "or add --data.chat_template"
        )
    known = template_variables(source)
    for name in args:
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none; leave this out"
            raise UserError(f"chat_template_args {name}: the chat template has no such argument; {there}")
    set_first = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}" for name, value in args.items()
    )
    return source if source.startswith(set_first) else f"{set_first}\n{source}"  # Jinja drops that line end


def template_variables(source: str) -> list[str]:
    """The variables of a chat template that its caller may set: all that it reads but does not set itself, without the
    conversation and what transformers always gives."""
    from jinja2 import meta
    from transformers.utils.chat_template_utils import _compile_jinja_template  # type: ignore[attr-defined]

    given = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "tojson"}
    environment = _compile_jinja_template(source).environment
    variables = meta.find_undeclared_variables(environment.parse(source)) - given - set(environment.globals)
    return sorted(name for name in variables if not name.endswith("_token"))


def _source(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own}
    if chat_template == "plain":
        return PLAIN if added_prefix(tokenizer)[:1] == [tokenizer.bos_token_id] else PLAIN.removeprefix(_BOS)
    if chat_template is None or chat_template in named:
        return named.get(chat_template or "default")
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = [*(file.name for file in path.parent.glob("*")), "plain", *(named if isinstance(own, dict) else ())]
        hint = nearest(path.name, names) or "; type plain, or the path of a Jinja file"
        raise UserError(f"chat_template {chat_template}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template {chat_template}: cannot be read ({error}); give a UTF-8 Jinja file") from None


def set_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Make this the chat template of a tokenizer; where it has several by name, the default one."""
    own = tokenizer.chat_template
    tokenizer.chat_template = own | {"default": source} if isinstance(own, dict) else source


def added_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer itself puts before a text: BOS, or none. To have a BOS token is not to add it."""
    text, whole = tokenizer(PROBE, add_special_tokens=False).input_ids, tokenizer(PROBE).input_ids
    starts = (at for at in range(len(whole) - len(text) + 1) if whole[at : at + len(text)] == text)
    return [int(i) for i in whole[: next(starts, 0)]]


def turn_end(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> int | None:
    """The special token that a chat template writes after an assistant's words, or None if it writes none.

    Found by rendering a conversation and looking at what follows the answer: it need not be the EOS token (Gemma
    ends turns with `<end_of_turn>`), and a model that is never trained on it never stops.
    """
    template = chat_template or _source(tokenizer, None)
    return None if template is None else _turn_end(tokenizer, template)


@lru_cache(maxsize=32)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
    after = str(text).rpartition(PROBE)[2]
    ids = tokenizer(after, add_special_tokens=False).input_ids if after.strip() else []
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((int(i) for i in ids if i in special), None)


def stop_ids(tokenizer: PreTrainedTokenizerBase, extra: int | Sequence[int] | None = None) -> frozenset[int]:
    """Token ids that end a response: EOS, the template's turn end, and those of a generation config (`extra`)."""
    ids = {tokenizer.eos_token_id, turn_end(tokenizer)}
    ids |= {extra} if isinstance(extra, int) else set(extra or ())
    return frozenset(int(i) for i in ids if i is not None)
