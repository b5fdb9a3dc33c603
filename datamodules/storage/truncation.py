"""Truncation: rows with more tokens than fit are dropped, cut or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from leyden.batch.forest import Tree
from leyden.datamodules.formats.ranking import without_repeats
from leyden.datamodules.formats.row_error import LeftOut, RowError

Overlength = Literal["drop", "truncate_prompt", "truncate_response", "error"]


def longest(tree: Tree) -> int:
    """Tokens from the root to the end of the longest response: what `max_length` limits."""
    return len(tree.prompt) + max(map(len, tree.responses))


def fit(tree: Tree, max_length: int, policy: Overlength) -> Tree:
    """The tree with every path at most `max_length` tokens.

    `truncate_prompt` cuts the prompt's oldest tokens and keeps the first one (BOS or the opening of a turn); all
    responses keep the same prompt. `truncate_response` cuts the end of each response that is too long, and with it the
    token that ends the turn: the model does not learn to stop in the middle of a sentence. Responses that are equal
    after the cut are kept once.

    Raises:
        LeftOut: the policy is `drop`, or nothing is left to compare after the cut.
        RowError: the policy is `error`, or cutting the part that it names is not enough.
    """
    excess = longest(tree) - max_length
    if excess <= 0:
        return tree
    if policy == "drop":
        raise LeftOut("too long")
    if policy == "error":
        problem = f"{longest(tree)} tokens, {max_length} fit; raise --data.max_length, or set --data.overlength to drop"
        raise RowError(f"{problem}, truncate_prompt or truncate_response", "too long")
    if policy == "truncate_prompt":
        if len(tree.prompt) - excess < 2:
            problem = f"the response alone takes {max_length} tokens or more; raise --data.max_length or drop it"
            raise RowError(problem, "response too long")
        prompt = [tree.prompt[0], *tree.prompt[1 + excess :]]
        return Tree(prompt, tree.responses, tree.scores, tree.weights, tree.row)
    room = max_length - len(tree.prompt)
    weights = [w[:room] for w in tree.weights or [[1.0] * len(r) for r in tree.responses]]
    if room < 1 or not any(map(any, weights)):
        problem = (
            f"the prompt alone takes {len(tree.prompt)} tokens, {max_length} fit; raise --data.max_length, or set "
        )
        raise RowError(f"{problem}--data.overlength truncate_prompt or drop", "prompt too long")
    cut = Tree(tree.prompt, [r[:room] for r in tree.responses], tree.scores, weights, tree.row)
    if len(tree.responses) == 1:
        return cut
    try:
        return distinct_responses(cut)
    except RowError:
        raise LeftOut("equal when cut") from None


def distinct_responses(tree: Tree) -> Tree:
    """The tree with each of its responses, best first, once.

    Raises:
        RowError: only one is left, or one stands both above and below another.
    """
    numbers = without_repeats([tuple(response) for response in tree.responses])
    if len(numbers) < 2:
        problem = "the chat template writes all responses alike; drop the row, or give another template"
        raise RowError(problem, "chosen equals rejected")
    return at(tree, numbers)


def at(tree: Tree, numbers: Sequence[int]) -> Tree:
    """The tree with only these of its responses."""
    scores = None if tree.scores is None else [tree.scores[n] for n in numbers]
    weights = None if tree.weights is None else [tree.weights[n] for n in numbers]
    return Tree(tree.prompt, [tree.responses[n] for n in numbers], scores, weights, tree.row)


def cut_text(tree: Tree, max_length: int) -> list[Tree]:
    """A long text in pieces of at most `max_length` tokens, each token predicted once.

    A piece starts with the last token of the one before, as its prompt.
    """
    text, weights = tree.responses[0], (tree.weights or [[1.0] * len(tree.responses[0])])[0]
    if longest(tree) <= max_length:
        return [tree]
    out, prompt, at = [], tree.prompt, 0
    while at < len(text):
        stop = at + max_length - len(prompt)
        out.append(Tree(prompt, [text[at:stop]], None, [weights[at:stop]], tree.row))
        prompt, at = [text[min(stop, len(text)) - 1]], stop
    return out
