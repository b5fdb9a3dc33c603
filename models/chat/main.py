"""`leyden chat`: talk to a model in the terminal or line by line through a pipe, or to one or two on a web page."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable

from leyden.cli.parser import Parser
from leyden.errors import UserError
from leyden.paths import resolve, short_names

ABOUT = """Talk to a model. Every line is a turn; lines that start with / are commands (/help). Through a pipe, answers
alone go to standard output, and the exit code is 1 if a line could not be answered. With --web one or two models answer
on a web page, side by side."""
OF_THE_PAGE = {"host": "127.0.0.1", "port": 8800, "url": ""}
"""Flags that only --web reads -> their defaults."""


def main(argv: list[str]) -> int:
    """Run the command and return the exit code. Raises `UserError` for mistakes that the user can fix."""
    parser = Parser("leyden chat", ABOUT)
    text = "model or adapter folder, a run's folder, hub name, or tiny; with --web one or two"
    parser.add_argument("model", nargs="+", metavar="MODEL", help=text)
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
    parser.add_argument(
        "--web", action="store_true", help="chat on a web page, with settings; the flags are its defaults"
    )
    parser.add_argument(
        "--host", metavar="ADDRESS", help="--web: 0.0.0.0: other machines reach it (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="--web: (default: 8800; 0: a free one)")
    parser.add_argument("--url", metavar="URL", help="--web: what people open, where that is a proxy or a tunnel")
    options = parser.read(argv)
    _check(options)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if options.web:
        from leyden.web.serve import require_packages

        require_packages("leyden chat --web")
        from leyden.models.chat.web import serving

        return serving(options)
    return _talk(options)


def _check(options: Namespace) -> None:
    """Settle the flags of the page. Raises `UserError` for those that would be ignored, and for a model too many."""
    most = 2 if options.web else 1
    if len(options.model) > most:
        mend = "give one or two" if options.web else "give one, or add --web, which shows two side by side"
        raise UserError(f"leyden chat: {len(options.model)} models; {mend}")
    for name, default in OF_THE_PAGE.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif not options.web:
            raise UserError(f"--{name}: only with --web; leave it out")
    short_names(options.model)
    for model in options.model:
        resolve(model)  # a mistake is said before the libraries are there


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
    from leyden.models.chat.conversation import Conversation
    from leyden.models.chat.loading import load, template_of
    from leyden.models.chat.loop import Talk
    from leyden.policy.policy import Sampling

    policy = load(options.model[0], options.dtype, options.base)
    sampling = Sampling(options.max_new_tokens, options.temperature, 0, options.top_p, options.seed)
    template = template_of(policy, options.chat_template, options.chat_template_args)
    conversation = Conversation(template, policy.positions, sampling.max_new_tokens, options.system)
    return Talk(policy, conversation, sampling).run()
