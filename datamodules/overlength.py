"""What happens to a row with more tokens than fit."""

from __future__ import annotations

from typing import Literal

from leyden.batch import Tree
from leyden.datamodules.turns import RowError

Overlength = Literal["drop", "truncate_prompt", "truncate_response", "error"]


def longest(tree: Tree) -> int:
    """Tokens from the root to the end of the longest response: what `max_length` limits."""
    return len(tree.prompt) + max(map(len, tree.responses))


def fit(tree: Tree, max_length: int, policy: Overlength) -> Tree | None:
    """The tree with every path at most `max_length` tokens, or None where the policy is to drop it.

    `truncate_prompt` cuts the prompt's oldest tokens and keeps the first one (BOS or the opening of a turn).
    `truncate_response` cuts the response's end, and with it the token that ends the turn: the model does not learn to
    stop in the middle of a sentence.

    Raises:
        RowError: the policy is `error`, or what would be cut is not what is too long.
    """
    excess = longest(tree) - max_length
    if excess <= 0:
        return tree
    if policy == "drop":
        return None
    if policy == "error":
        raise RowError(
            f"{longest(tree)} tokens, {max_length} fit; raise --data.max_length, or set --data.overlength to drop, "
            "truncate_prompt or truncate_response"
        )
    if policy == "truncate_prompt":
        if len(tree.prompt) - excess < 2:
            raise RowError(f"the response alone takes {max_length} tokens or more; raise --data.max_length or drop it")
        prompt = [tree.prompt[0], *tree.prompt[1 + excess :]]
        return Tree(prompt, tree.responses, tree.scores, tree.weights, tree.row)
    room = max_length - len(tree.prompt)
    weights = [w[:room] for w in tree.weights or [[1.0] * len(r) for r in tree.responses]]
    if room < 1 or not any(map(any, weights)):
        raise RowError(f"the prompt alone takes {len(tree.prompt)} tokens, {max_length} fit; raise --data.max_length")
    return Tree(tree.prompt, [r[:room] for r in tree.responses], tree.scores, weights, tree.row)


def pieces(tree: Tree, max_length: int) -> list[Tree]:
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
