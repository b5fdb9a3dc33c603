"""Templates of tasks in Jinja's sandbox: they may read a question and form text of it, and run no Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils

from leyden.errors import UserError, first_line

PLAIN = {str, int, float, bool, list, tuple, dict}
"""What questions are made of."""


class _Sandbox(SandboxedEnvironment):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also no methods of other values of a data set: that of a picture, `save`, would write a file."""
        own = type(obj) in PLAIN or type(obj).__module__.partition(".")[0] in ("jinja2", "markupsafe")
        return (own or not callable(value)) and super().is_safe_attribute(obj, attr, value)


@contextmanager
def sandboxed() -> Iterator[None]:
    """Let lm-eval render all templates in the sandbox.

    lm-eval makes one environment, `lm_eval.utils.env`, and its `apply_template`, which every template goes through,
    looks it up at each call. Plain Jinja leads from any value to Python (`cycler.__init__.__globals__.os`). The sandbox
    has the same filters, tests and handling of undefined names, so that prompts are the same letter by letter.
    """
    theirs = utils.env
    box = _Sandbox(loader=theirs.loader, undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline)
    box.filters |= theirs.filters
    box.tests |= theirs.tests
    utils.env = box
    try:
        yield
    finally:
        utils.env = theirs


def stopped(task: str, error: SecurityError) -> UserError:
    """A template that wanted more than it may."""
    return UserError(
        f"{task}: a template of it would run Python ({first_line(error)}); if you trust it, add --allow_code"
    )
