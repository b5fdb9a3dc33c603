"""A model to chat with, and its chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leyden.errors import UserError
from leyden.paths import resolve

if TYPE_CHECKING:
    from leyden.data.chat_template import ChatTemplate
    from leyden.models.causal_lm import CausalLM


def load(path: str, dtype: str | None = None, base: str | None = None) -> CausalLM:
    """A built language model, on a GPU if there is one.

    Raises:
        UserError: there is no such model, or it is a reward model.
    """
    import torch

    from leyden.models import CausalLM
    from leyden.models.load import is_reward

    folder = resolve(path)
    if is_reward(folder):
        raise UserError(f"{path}: a reward model scores answers and gives none; give the model that it judges")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = dtype or ("bfloat16" if device == "cuda" else "float32")
    policy = CausalLM(folder, kind, base=base)
    _ = policy.tokenizer  # first, since its error is the clearest where there is no model
    try:
        policy.build()
    except UserError as error:  # it names the flag of `fit`
        raise UserError(str(error).replace("--model.policy.base", "--base")) from None
    return policy.to(device)


def template_of(policy: CausalLM, given: str | None, args: dict[str, Any] | None) -> ChatTemplate:
    """The chat template of a model, or the one that is given; sampling stops at the end of its turns.

    Raises:
        UserError: it has none, and none is given.
    """
    from leyden.data.chat_template import ChatTemplate
    from leyden.data.tokenizer import set_template

    template = ChatTemplate(policy.tokenizer, given, stop=policy.stop, args=args)
    if template.source is None:
        raise UserError(
            f"{policy.path}: a base model, without a chat template; add --chat-template plain, or a Jinja file's path"
        )
    set_template(policy.tokenizer, template.source)  # sampling stops at the end of its turns
    return template
