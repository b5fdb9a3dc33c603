"""`leyden chat`: talk to a model in the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from leyden.cli.parser import Parser
from leyden.errors import UserError
from leyden.paths import resolve

if TYPE_CHECKING:
    from leyden.data.chat_template import ChatTemplate
    from leyden.models.causal_lm import CausalLM

ABOUT = """Talk to a model. Every line is a turn; lines that start with / are commands (/help). Through a pipe, answers
alone go to standard output, and the exit code is 1 if a line could not be answered."""


def main(argv: list[str]) -> int:
    """Run the command and return the exit code. Raises `UserError` for mistakes that the user can fix."""
    parser = Parser("leyden chat", ABOUT)
    parser.add_argument("model", metavar="MODEL", help="model or adapter folder, a run's folder, hub name, or tiny")
    parser.add_argument("--base", metavar="MODEL", help="an adapter's base, if it is not where the adapter says")
    parser.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    parser.add_argument("--temperature", type=_number("--temperature", float, 0), default=0.7, help="default 0.7")
    parser.add_argument("--top-p", "--top_p", type=_number("--top-p", float, 0, 1), default=1.0, help="default 1")
    length = ("--max-new-tokens", "--max_new_tokens")
    parser.add_argument(*length, type=_number(length[0], int, 1), default=256, help="of an answer; default 256")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and lines give the same answers; default 0")
    parser.choice("--dtype", ("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--chat-template", "--chat_template", metavar="plain|FILE", help="instead of the model's own")
    names = ("--chat-template-args", "--chat_template_args")
    parser.mapping(*names, metavar="'{NAME: VALUE}'", help="arguments of the chat template")
    options = parser.read(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return _talk(options)


def _number(
    flag: str, kind: Callable[[str], float], least: float, most: float = float("inf")
) -> Callable[[str], float]:
    """A function that reads the value of a flag, from `least` to `most`. A fraction (`most` 1) must be above 0."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if least <= value <= most and (value > 0 or most > 1):
            return value
        bounds = f"a number of {least} or more" if most > 1 else "a number above 0, at most 1"
        raise UserError(f"{flag} {text}: give {bounds}")

    return read


def _talk(options: Namespace) -> int:
    """Load the model and run the chat until the input ends; the exit code."""
    resolve(options.model)  # a mistake is said before the libraries are there
    from leyden.models.chat.conversation import Conversation
    from leyden.models.chat.loop import Talk
    from leyden.policy.policy import Sampling

    policy = load(options.model, options.dtype, options.base)
    sampling = Sampling(options.max_new_tokens, options.temperature, 0, options.top_p, options.seed)
    template = template_of(policy, options.chat_template, options.chat_template_args)
    conversation = Conversation(template, policy.positions, sampling.max_new_tokens, options.system)
    return Talk(policy, conversation, sampling).run()


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
